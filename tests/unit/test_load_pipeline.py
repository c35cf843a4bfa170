"""The closed forms of overlap against what they are the closed forms of."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.load_pipeline import (
    BackLoad,
    claim,
    expected_max,
    layerwise,
    meet,
    read_ahead_layers,
)

SECONDS = st.floats(0.0, 10.0)


def played(num_layers: int, load_s: float, comp_s: float, begin_s: float) -> float:
    """CompDone of the last layer, layer by layer."""
    now_s = begin_s
    for layer in range(num_layers):
        now_s = max(now_s, (layer + 1) * load_s) + comp_s
    return now_s


@given(st.integers(1, 60), SECONDS, SECONDS, SECONDS)
def test_a_layerwise_pass(num_layers: int, load_s: float, comp_s: float, begin_s: float) -> None:
    overlap = layerwise(
        num_layers=num_layers, load_layer_s=load_s, comp_layer_s=comp_s, begin_s=begin_s
    )
    assert overlap.done_s == pytest.approx(played(num_layers, load_s, comp_s, begin_s))
    assert overlap.stall_s == pytest.approx(overlap.done_s - begin_s - num_layers * comp_s)


@pytest.mark.parametrize(
    ("first", "second", "spread_s"), [(5, 5, 1), (5, 6, 1), (9, 5, 2), (1, 9, 1)]
)
def test_the_larger_of_two_uncertain_times(first: float, second: float, spread_s: float) -> None:
    rng = random.Random(4)
    drawn = [max(first + rng.gauss(0, spread_s), second) for _ in range(40_000)]
    found = expected_max(first, second, spread_s=spread_s)
    assert found == pytest.approx(sum(drawn) / len(drawn), abs=0.03)
    assert found >= max(first, second)
    assert expected_max(first, second, spread_s=0.0) == max(first, second)


def test_where_loading_is_faster_only_the_first_layer_is_waited_for() -> None:
    overlap = layerwise(num_layers=30, load_layer_s=0.1, comp_layer_s=0.2, begin_s=0.0)
    assert overlap.stall_s == pytest.approx(0.1)


@given(st.integers(1, 60), st.floats(1e-3, 10.0), SECONDS)
def test_that_many_layers_ahead_hide_the_whole_load(
    num_layers: int, load_s: float, comp_s: float
) -> None:
    depth = read_ahead_layers(num_layers, load_s, comp_s, least=1, most=num_layers)
    assert 1 <= depth <= num_layers
    begin_s = depth * load_s
    done_s = played(num_layers, load_s, comp_s, begin_s)
    assert done_s == pytest.approx(begin_s + num_layers * comp_s)


def test_the_depth_is_bounded() -> None:
    assert read_ahead_layers(30, 1.0, 0.1, most=8) == 8
    assert read_ahead_layers(30, 0.1, 1.0, most=8) == 4
    assert read_ahead_layers(30, 0.1, 1.0, most=1) == 1
    assert read_ahead_layers(1, 0.0, 0.0, most=8) == 1


@given(st.integers(0, 200), st.floats(0.01, 10.0), st.floats(0.01, 10.0), st.integers(1, 16))
def test_a_claim_ends_as_soon_as_any(left: int, comp_s: float, load_s: float, most: int) -> None:
    def end_s(count: int) -> float:
        return max(count * comp_s, (left - count) * load_s)

    count = claim(left, lambda x: x * comp_s, lambda y: y * load_s, most=most)
    best = min(range(left + 1), key=end_s)
    assert count <= min(left, most)
    assert count == most or end_s(count) == pytest.approx(end_s(best))


@given(st.lists(st.floats(0.01, 2.0), min_size=1, max_size=100), st.floats(0.01, 2.0))
def test_both_ends_meet_no_later_than_either_alone(block_s: list[float], comp_s: float) -> None:
    meeting = meet(
        BackLoad.of(block_s), lambda a, b: (b - a) * comp_s, begin_s=0.0, most=len(block_s)
    )
    assert 0 <= meeting.num_computed <= len(block_s)
    # Whatever is claimed ends soonest, so one block more than either alone bounds the loss.
    alone_s = min(sum(block_s), len(block_s) * comp_s)
    assert meeting.done_s <= alone_s + 1e-9


def test_uniform_costs_take_the_harmonic_share() -> None:
    num_blocks, comp_s, load_s = 400, 0.05, 0.08
    meeting = meet(
        BackLoad.of([load_s] * num_blocks), lambda a, b: (b - a) * comp_s, begin_s=0.0, most=16
    )
    total_c, total_l = num_blocks * comp_s, num_blocks * load_s
    ideal_s = total_c * total_l / (total_c + total_l)
    assert meeting.done_s == pytest.approx(ideal_s, rel=0.02)
    assert meeting.num_computed == pytest.approx(num_blocks * load_s / (load_s + comp_s), abs=2)


def test_a_load_that_is_there_before_the_engine_is_free_wins() -> None:
    meeting = meet(BackLoad.of([0.01] * 10), lambda a, b: float(b - a), begin_s=1.0, most=4)
    assert (meeting.num_computed, meeting.done_s) == (0, 1.0)
