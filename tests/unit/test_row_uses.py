"""Many rows at once are as few: both ways of `ucm.row_uses` agree."""

from __future__ import annotations

import random
from array import array

import pytest

from ucm import row_uses
from ucm.block_columns import NO_SLOT


@pytest.fixture(params=[0, 256], ids=["numpy", "loop"])
def few_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Up to how many rows are looped over."""
    monkeypatch.setattr(row_uses, "FEW_ROWS", request.param)
    return int(request.param)


ROWS = [5, 1, 2, 7]


@pytest.mark.usefixtures("few_rows")
def test_uses_decay_by_half_in_a_half_life() -> None:
    half = row_uses.HIT_HALF_LIFE_US
    last_use_us, hits = array("q", [0, half, half, 0, 0, 0, 0, 2 * half]), array("f", [4.0] * 8)
    row_uses.note_uses(last_use_us, hits, ROWS, 2 * half)
    assert list(hits) == [4, 3, 3, 4, 4, 2, 4, 5]
    assert list(last_use_us) == [0, 2 * half, 2 * half, 0, 0, 2 * half, 0, 2 * half]


@pytest.mark.usefixtures("few_rows")
def test_unpinned_leaves_and_ghosts_are_free() -> None:
    pins = array("i", [0] * 8)
    row_uses.add_pins(pins, ROWS)
    row_uses.add_pins(pins, [7])
    assert list(pins) == [0, 1, 1, 0, 0, 1, 0, 2]
    #                     row      1                2      5      7
    slots = array("i", [-1, 3, -1, -1, -1, 8, -1, 9]), array("i", [-1, 4, 1, -1, -1, -1, -1, 9])
    children = array("i", [0, 1, 0, 0, 0, 1, 0, 0]), array("i", [0, 0, 1, 0, 0, 0, 0, 0])
    assert row_uses.remove_pins(pins, ROWS, slots, children) == [1]
    slots[0][5] = NO_SLOT
    row_uses.add_pins(pins, [5])
    assert row_uses.remove_pins(pins, [5, 7], slots, children) == [5, 7]
    assert not any(pins)


@pytest.mark.usefixtures("few_rows")
def test_a_pin_too_few_is_a_bug() -> None:
    columns = array("i", [0]), array("i", [0])
    with pytest.raises(AssertionError):
        row_uses.remove_pins(array("i", [0]), [0], columns, columns)


def test_absence_is_found_whatever_the_slots_numbers() -> None:
    dice = random.Random(1)
    numbers = [0, 0xFF, 0xFFFF, 0xFFFFFF, 0x7FFFFFFF, 0x7F00FFFF, 0x00FFFF00]
    for _ in range(2000):
        slots = array("i", dice.choices([*numbers, NO_SLOT], [4] * len(numbers) + [1], k=12))
        first, last = sorted(dice.sample(range(13), 2))
        rows = range(first, last)
        assert row_uses.absent_in(slots, rows) == (NO_SLOT in slots[first:last]), slots
