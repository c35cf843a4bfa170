"""Which blocks are chosen: by the summaries, within the budget, and never without what must be."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from ucm.errors import InvalidArgumentError
from ucm.hashing import chain_keys
from ucm.kernels.block_scores import Budget, SummaryTable
from ucm.kernels.summarize import summarize_blocks
from ucm.layer_choice import Candidates, choose_layers
from ucm.select_api import LayerSelection, SelectMode, SelectRequest
from ucm.testing.selections import (
    KIND,
    NUM_HEADS,
    SELECT_LAYOUT,
    block_bytes_of,
    queries_of,
    request_of,
    select_spec,
    slabs_of,
    true_log_mass,
    true_logits,
)
from ucm.types import SummaryKind

NUM_BLOCKS = 24
KEYS = chain_keys(select_spec().fingerprint(), list(range(4 * NUM_BLOCKS)), 4)
GROUP = NUM_HEADS // SELECT_LAYOUT.num_kv_heads


def table_of(kind: SummaryKind = KIND) -> SummaryTable:
    table = SummaryTable(kind, SELECT_LAYOUT)
    blocks = [block_bytes_of(slabs_of(key)) for key in KEYS]
    table.extend(summarize_blocks(SELECT_LAYOUT, kind, blocks))
    return table


TABLE = table_of()


def choose(
    request: SelectRequest, count: int = NUM_BLOCKS, unknown: tuple[int, ...] = ()
) -> tuple[LayerSelection, ...]:
    known = np.ones(count, np.bool_)
    known[list(unknown)] = False
    candidates = Candidates(
        table=TABLE,
        count=count,
        known=known,
        num_kv_heads=SELECT_LAYOUT.num_kv_heads,
        block_tokens=SELECT_LAYOUT.block_tokens,
    )
    request.check(SELECT_LAYOUT, count)
    return choose_layers(candidates, request, lambda _done: None)


def test_one_selection_a_layer_within_the_budget() -> None:
    found = choose(request_of((0, 2), Budget(ratio=0.25), must_blocks=(0, 23)))
    assert [(each.layer, each.kv_head) for each in found] == [(0, None), (2, None)]
    for each in found:
        assert len(each.blocks) == 6
        assert {0, 23} <= set(each.blocks.tolist())
        assert (np.diff(each.blocks) > 0).all()
        assert each.mass == pytest.approx(each.shares.sum(), abs=1e-5)


def test_the_chosen_hold_more_of_the_true_mass_than_others_do() -> None:
    request = request_of((1,), Budget(ratio=0.25))
    (found,) = choose(request)
    mass = np.exp(true_log_mass(true_logits(KEYS, 1, request.queries[0])).astype(np.float64))
    shares = (mass / mass.sum(axis=-1, keepdims=True)).mean(axis=(0, 1))
    best = np.sort(shares)[-len(found.blocks) :].sum()
    assert shares[found.blocks].sum() > 0.9 * best
    assert found.mass == pytest.approx(shares[found.blocks].sum(), abs=0.1)


def test_bounds_hold_for_every_key() -> None:
    request = request_of((0, 1, 2), Budget(tokens=20))
    for position, found in enumerate(choose(request)):
        logits = true_logits(KEYS, found.layer, request.queries[position])
        chosen = logits[..., found.blocks, :]
        assert found.lower is not None
        assert found.upper is not None
        assert found.skipped_upper is not None
        assert (chosen.min(axis=-1) >= found.lower - 1e-4).all()
        assert (chosen.max(axis=-1) <= found.upper + 1e-4).all()
        left_out = np.setdiff1d(np.arange(NUM_BLOCKS), found.blocks)
        rest = np.log(np.exp(logits[..., left_out, :].astype(np.float64)).sum(axis=(-2, -1)))
        assert (rest <= found.skipped_upper).all()


def test_nothing_left_out_is_all_of_the_mass() -> None:
    (found,) = choose(request_of((0,), Budget(ratio=1.0)))
    assert found.mass == 1.0
    assert found.skipped_upper is not None
    assert np.isneginf(found.skipped_upper).all()


def test_each_kv_head_may_choose_for_itself() -> None:
    request = request_of((0,), Budget(ratio=0.25), mode=SelectMode.PER_HEAD)
    found = choose(request)
    assert [each.kv_head for each in found] == [0, 1]
    shared = choose(request_of((0,), Budget(ratio=0.25)))[0]
    for group, each in enumerate(found):
        heads = slice(group * GROUP, (group + 1) * GROUP)
        alone = TABLE.log_mass(0, request.queries[0])[:, heads]
        assert each.log_mass is not None
        np.testing.assert_array_equal(each.log_mass, alone[..., each.blocks])
    assert any(set(each.blocks.tolist()) != set(shared.blocks.tolist()) for each in found)


def test_what_has_no_summary_is_in_every_selection() -> None:
    for found in choose(request_of((0, 2), Budget(ratio=0.25)), unknown=(3, 17)):
        assert {3, 17} <= set(found.blocks.tolist())
        assert len(found.blocks) == 6


def test_more_must_be_than_the_budget_allows() -> None:
    (found,) = choose(request_of((0,), Budget(tokens=4), must_blocks=tuple(range(10))))
    assert found.blocks.tolist() == list(range(10))


def test_a_part_of_a_table_is_scored_as_if_there_were_no_more() -> None:
    (found,) = choose(request_of((0,), Budget(ratio=0.5)), count=8)
    assert found.blocks.max() < 8
    assert len(found.blocks) == 4


def test_a_must_block_that_is_not_cached_is_left_out() -> None:
    request = request_of((0,), Budget(ratio=0.5), must_blocks=(7, 20))
    request.check(SELECT_LAYOUT, NUM_BLOCKS)
    known = np.ones(8, np.bool_)
    candidates = Candidates(
        table=TABLE, count=8, known=known, num_kv_heads=2, block_tokens=SELECT_LAYOUT.block_tokens
    )
    (found,) = choose_layers(candidates, request, lambda _done: None)
    assert 7 in found.blocks
    assert found.blocks.max() < 8


def test_without_bounds_none_are_made() -> None:
    (found,) = choose(request_of((0,), bounds=False))
    assert (found.log_mass, found.lower, found.upper, found.skipped_upper) == (None,) * 4


def test_a_query_too_large_to_be_scored_has_no_bounds_and_a_selection() -> None:
    request = request_of((0,), Budget(ratio=0.25))
    request.queries[0, 0] = 3e38
    (found,) = choose(request)
    assert len(found.blocks) == NUM_BLOCKS // 4
    assert 0 <= found.mass <= 1
    assert found.upper is not None
    assert found.skipped_upper is not None
    assert np.isposinf(found.upper[0]).all()
    assert np.isposinf(found.skipped_upper[0]).all()
    assert np.isfinite(found.upper[1]).all()
    assert np.isfinite(found.skipped_upper[1]).all()


@pytest.mark.parametrize("kind", [KIND, SummaryKind.SHADOW4])
def test_many_queries_are_scored_in_parts_and_the_time_is_asked_between(
    kind: SummaryKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(request_of((0, 2)), queries=queries_of(2, 7))
    candidates = Candidates(
        table=table_of(kind),
        count=5,
        known=np.ones(5, np.bool_),
        num_kv_heads=2,
        block_tokens=4,
    )
    whole = choose_layers(candidates, request, lambda done: None)
    asked: list[int] = []
    monkeypatch.setattr("ucm.layer_choice.SCORES_AT_ONCE", 3 * NUM_HEADS * 5 * 4)
    parts = choose_layers(candidates, request, asked.append)
    assert asked == [0, 0, 0, 1, 1, 1]
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one.blocks, other.blocks)
        for name in ("shares", "log_mass", "lower", "upper", "skipped_upper"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-5)


def test_a_short_chain_in_a_long_table_costs_what_it_is_long() -> None:
    """The checks of a request know the keys of the call, and not what was asked about before."""
    request = replace(request_of((0,)), queries=queries_of(1, 4000))

    def peak_bytes(table: SummaryTable) -> int:
        candidates = Candidates(
            table=table, count=1, known=np.ones(1, np.bool_), num_kv_heads=2, block_tokens=4
        )
        tracemalloc.start()
        choose_layers(candidates, request, lambda done: None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    short = table_of()
    short.truncate(1)
    assert peak_bytes(TABLE) < 1.5 * peak_bytes(short)


def test_the_time_is_asked_before_each_layer() -> None:
    asked: list[int] = []
    candidates = Candidates(
        table=TABLE,
        count=NUM_BLOCKS,
        known=np.ones(NUM_BLOCKS, np.bool_),
        num_kv_heads=2,
        block_tokens=4,
    )
    choose_layers(candidates, request_of((0, 1, 2)), asked.append)
    assert asked == [0, 1, 2]


GOOD = queries_of(2, 2)


@pytest.mark.parametrize(
    ("layers", "queries", "must", "says"),
    [
        ((), GOOD, (), "at least one"),
        ((0, 3), GOOD, (), "0..2"),
        ((2, 0), GOOD, (), "ascending"),
        ((1, 1), GOOD, (), "each once"),
        ((-1, 1), GOOD, (), "0..2"),
        ((0, 1, 2), GOOD, (), "one entry a layer"),
        ((0, 1), GOOD[..., :4], (), "head size"),
        ((0, 1), GOOD[0], (), "shape"),
        ((0, 1), GOOD[:, :0], (), "at least one query"),
        ((0, 1), GOOD[:, :, :3], (), "evenly"),
        ((0, 1), GOOD.astype(np.float64), (), "float32"),
        ((0, 1), GOOD.tolist(), (), "float32"),
        ((0, 1), np.where(GOOD > 3, np.nan, GOOD).astype(np.float32), (), "not finite"),
        ((0, 1), np.where(GOOD > 3, np.inf, GOOD).astype(np.float32), (), "not finite"),
        ((0, 1), GOOD, (NUM_BLOCKS,), "no index"),
        ((0, 1), GOOD, (-1,), "no index"),
        ((0, 1), queries_of(2, 1 << 15), (), "fewer"),
    ],
)
def test_a_request_that_does_not_fit_says_what_to_do(
    layers: tuple[int, ...], queries: object, must: tuple[int, ...], says: str
) -> None:
    request = SelectRequest(layers, queries, Budget(ratio=0.5), must)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=says):
        request.check(SELECT_LAYOUT, NUM_BLOCKS)
