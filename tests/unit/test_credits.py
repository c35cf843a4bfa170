"""Credit: limits per owner, refusals with a hint, everything given back."""

from __future__ import annotations

import pytest

from ucm.credits import Credit, Pacer, ThreadShares
from ucm.errors import CapacityError


def test_a_refusal_says_the_limit_and_when_to_come_again() -> None:
    credit = Credit(2, "{limit} are taken", retry_after_s=0.25)
    with credit.taken("a"), credit.taken("a"):
        with pytest.raises(CapacityError, match="2 are taken") as caught, credit.taken("a"):
            pytest.fail("a third was let in")
        assert caught.value.retry_after_s == 0.25
        credit.take("b")
    assert (credit.used("a"), credit.used("b"), credit.left("a")) == (0, 1, 2)


def test_what_is_charged_without_a_look_leaves_nothing_and_comes_back() -> None:
    credit = Credit(10, "", retry_after_s=0.0)
    credit.charge("a", 15)
    assert credit.left("a") == 0
    with pytest.raises(CapacityError):
        credit.take("a")
    credit.give_back("a", 15)
    credit.take("a", 10)
    assert credit.left("a") == 0


@pytest.mark.parametrize("num_threads", [1, 2, 4, 16, 64])
def test_quick_calls_keep_a_thread_from_four_on(num_threads: int) -> None:
    shares = ThreadShares.of(num_threads)
    assert min(shares.waiting, shares.copying) >= 1
    assert num_threads < 4 or shares.waiting + shares.copying < num_threads


def test_no_rest_is_longer_than_a_bound_however_large_the_work() -> None:
    pacer = Pacer(share=0.1, quiet_s=1.0, longest_rest_s=0.5)
    for _ in range(3):  # copies that ran side by side
        pacer.note_done(0.0, 1.0)
    pacer.note_urgent(1.4)
    with pytest.raises(CapacityError) as caught:
        pacer.check(1.4)
    assert caught.value.retry_after_s == pytest.approx(0.1)
    pacer.check(1.5)


def test_stores_rest_in_proportion_only_while_loads_go_on() -> None:
    pacer = Pacer(share=0.1, quiet_s=1.0, longest_rest_s=60.0)
    pacer.check(0.0)
    pacer.note_done(0.0, 0.5)
    pacer.check(0.6)  # no load: nothing to wait for
    pacer.note_urgent(0.7)
    with pytest.raises(CapacityError, match="loads go first") as caught:
        pacer.check(1.0)
    assert caught.value.retry_after_s == pytest.approx(4.0)
    pacer.check(1.8)  # the load was long ago
    pacer.note_urgent(4.9)
    pacer.check(5.0)
