"""LRU and watermarks, case by case."""

from __future__ import annotations

import pytest

from ucm.eviction import LruPolicy, Watermarks


class View:
    """Rows that may leave, with their last use."""

    def __init__(self, **used_us: int) -> None:
        self.used_us = {int(name[1:]): value for name, value in used_us.items()}

    def may_leave(self, row: int) -> bool:
        return row in self.used_us

    def last_use_us(self, row: int) -> int:
        return self.used_us[row]


def test_the_oldest_goes_first() -> None:
    policy, view = LruPolicy(), View(r1=30, r2=10, r3=20)
    for row in view.used_us:
        policy.offer(row, view)
    assert [policy.next_victim(view) for _ in range(4)] == [2, 3, 1, None]


def test_a_use_after_the_offer_counts() -> None:
    policy, view = LruPolicy(), View(r1=1, r2=2)
    policy.offer(1, view)
    policy.offer(2, view)
    view.used_us[1] = 9
    assert policy.next_victim(view) == 2
    assert policy.next_victim(view) == 1


def test_what_may_not_leave_is_dropped_until_it_is_offered_again() -> None:
    policy, view = LruPolicy(), View(r1=1)
    policy.offer(1, view)
    del view.used_us[1]
    assert policy.next_victim(view) is None
    assert len(policy) == 0
    view.used_us[1] = 1
    assert policy.next_victim(view) is None
    policy.offer(1, view)
    assert policy.next_victim(view) == 1


def test_an_offer_twice_is_one() -> None:
    policy, view = LruPolicy(), View(r5=1)
    for _ in range(3):
        policy.offer(5, view)
    assert len(policy) == 1


@pytest.mark.parametrize(
    ("used", "needed", "excess"),
    [
        (0, 10, 0),
        (85, 10, 0),  # just at the high watermark
        (86, 10, 6),  # above it: down to 90 with the ten
        (100, 0, 10),
        (100, 95, 100),  # more than the low watermark leaves: everything
        (0, 200, 0),
    ],
)
def test_watermarks(used: int, needed: int, excess: int) -> None:
    assert Watermarks(0.95, 0.90).excess_slots(used=used, total=100, needed=needed) == excess
