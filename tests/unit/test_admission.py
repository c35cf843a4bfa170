"""Second touch, and the bounded memory of keys under it."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from ucm.admission import AlwaysAdmit, SecondTouch
from ucm.ghost import GhostSet
from ucm.types import BlockKey

S = 1_000_000


def key_of(number: int) -> BlockKey:
    return BlockKey(random.Random(number).randbytes(32))


def test_always_is_always() -> None:
    assert AlwaysAdmit().admits(key_of(1), 0)


def test_the_second_touch_is_admitted() -> None:
    admission = SecondTouch(capacity=64)
    assert not admission.admits(key_of(1), 0)
    assert not admission.admits(key_of(2), 1 * S)
    assert admission.admits(key_of(1), 2 * S)


def test_after_it_was_admitted_it_starts_again() -> None:
    admission = SecondTouch(capacity=64)
    answers = [admission.admits(key_of(1), time * S) for time in range(4)]
    assert answers == [False, True, False, True]


def test_a_touch_is_forgotten_after_the_window() -> None:
    admission = SecondTouch(capacity=64, window_s=10)
    assert not admission.admits(key_of(1), 0)
    assert not admission.admits(key_of(1), 11 * S)  # a first touch again
    assert admission.admits(key_of(1), 21 * S)


def test_a_scan_of_many_keys_neither_grows_it_nor_is_admitted() -> None:
    admission = SecondTouch(capacity=1000)
    assert not any(admission.admits(key_of(number), number * S) for number in range(5000))


def test_a_full_bucket_forgets_its_oldest() -> None:
    ghosts = GhostSet(capacity=8)
    assert ghosts.capacity == 8
    for number in range(9):
        ghosts.add(key_of(number), 100 + number)
    assert ghosts.take(key_of(0)) is None
    assert [ghosts.take(key_of(number)) for number in range(1, 9)] == list(range(101, 109))
    assert ghosts.take(key_of(8)) is None


@given(
    uses=st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=200),
    capacity=st.sampled_from([1, 8, 64, 512]),
)
def test_ghosts_are_a_dictionary_that_forgets(uses: list[tuple[bool, int]], capacity: int) -> None:
    ghosts, model = GhostSet(capacity), dict[int, int]()
    for stamp, (adds, number) in enumerate(uses):
        if adds:
            ghosts.add(key_of(number), stamp)
            model[number] = stamp
        else:
            taken = ghosts.take(key_of(number))
            expected = model.pop(number, None)
            assert taken == expected or (taken is None and capacity < 512)
