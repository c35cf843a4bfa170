"""A decode step over chosen blocks equals attention in which the others are masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ucm.kernels.block_scores import Budget
from ucm.layout import KvDtype, KvLayout
from ucm.sparse.decoding import SparseDecoding
from ucm.sparse.mode_policy import LoadSignals, ModeThresholds, SparseMode
from ucm.sparse.options import SparseOptions
from ucm.sparse.protocols import DecodeStep
from ucm.sparse.query_ahead import AheadStats, BlocksAhead
from ucm.sparse.selector import SequenceSelector, Settings
from ucm.sparse.table import PoolSummaries
from ucm.types import SummaryKind

B, LAYERS, HEADS, DIM, POOL = 8, 2, 2, 16, 64
LAYOUT = KvLayout(
    num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, block_tokens=B, dtype=KvDtype.FLOAT32
)
SIGNALS = LoadSignals(context_tokens=200, batch_size=1, pool_pressure=0.0)
IDS = torch.randperm(POOL, generator=torch.Generator().manual_seed(3)).tolist()[:25]


def make_pool(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(LAYERS, POOL, 2, HEADS, B, DIM, generator=generator).to(dtype)


def query(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, 4, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step_at(position: int, ids: list[int] = IDS) -> DecodeStep:
    num_prompt = position + 1 - 100
    return DecodeStep(
        sequence_id="a",
        position=position,
        num_prompt=num_prompt,
        block_ids=ids[: position // B + 1],
        block_tokens=B,
    )


def decoding_of(**options: Any) -> SparseDecoding:
    settings = {"min_context_tokens": 0, "budget": Budget(ratio=0.3), **options}
    return SparseDecoding(SparseOptions(**settings), LAYOUT, POOL, lambda _: 1)


def masked(q: Tensor, kv_layer: Tensor, step: DecodeStep, blocks: list[int]) -> Tensor:
    """Attention over the rows of `blocks` up to the step's position, written out in fp64."""
    ids = [step.block_ids[block] for block in blocks]
    k, v = kv_layer[ids].double().permute(1, 2, 0, 3, 4).reshape(2, HEADS, -1, DIM)
    positions = torch.cat([torch.arange(block * B, block * B + B) for block in blocks])
    scores = q.double().view(HEADS, -1, DIM) @ k.transpose(1, 2) * DIM**-0.5
    scores = scores.masked_fill(positions > step.position, float("-inf"))
    out: Tensor = (scores.softmax(-1) @ v).reshape(1, -1, DIM)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", [24 * B, 24 * B + 3, 24 * B + B - 1])
def test_chosen_blocks_are_attended_to_and_no_others(dtype: torch.dtype, position: int) -> None:
    layout = LAYOUT
    if dtype is torch.bfloat16:
        layout = KvLayout(
            num_layers=LAYERS,
            num_kv_heads=HEADS,
            head_dim=DIM,
            block_tokens=B,
            dtype=KvDtype.BFLOAT16,
        )
    options = SparseOptions(min_context_tokens=0)
    decoding = SparseDecoding(options, layout, POOL, lambda _: 1)
    pool, step = make_pool(dtype), step_at(position)
    decoding.begin_pass(SIGNALS)
    attention = decoding.attention(step, pool)
    assert attention is not None
    again = SequenceSelector(decoding._selectors["a"].table, options)
    again.begin(step, Settings(options.budget, 1))
    for layer in range(LAYERS):
        q = query(layer, dtype)
        out = attention(layer, q, pool[layer])
        blocks = again.choose(layer, q).blocks.tolist()
        assert 3 <= len(blocks) < 12
        assert out.dtype == dtype
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        wanted = masked(q, pool[layer], step, blocks)
        assert torch.allclose(out.double(), wanted, atol=tolerance, rtol=tolerance)
    stats = decoding.stats
    assert stats.blocks_dense == LAYERS * 25
    assert stats.bytes_read == stats.blocks_read * layout.slab_bytes
    assert stats.bytes_read < 0.5 * stats.bytes_dense
    assert (stats.sparse_steps, stats.fresh_selections, stats.stale_selections) == (1, LAYERS, 0)


def test_rows_behind_the_position_do_not_matter() -> None:
    pool, step, q = make_pool(), step_at(24 * B + 2), query(0)
    outs = []
    for junk in (1.0, 1e4):
        pool[:, IDS[24], :, :, 3:] = junk
        decoding = decoding_of()
        decoding.begin_pass(SIGNALS)
        attention = decoding.attention(step, pool)
        assert attention is not None
        outs.append(attention(0, q, pool[0]))
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"mode": SparseMode.EXACT}, "dense_by_mode"),
        ({"mode": SparseMode.REUSE}, "dense_by_mode"),
        ({"budget": Budget(ratio=1.0)}, "dense_by_budget"),
        ({"budget": Budget(eps=0.0)}, "dense_by_budget"),
        ({"min_context_tokens": 24 * B + 2}, "dense_by_context"),
    ],
)
def test_dense_steps_are_left_to_the_model(options: dict[str, object], why: str) -> None:
    decoding = decoding_of(**options)
    decoding.begin_pass(SIGNALS)
    assert decoding.attention(step_at(24 * B), make_pool()) is None
    stats = decoding.stats
    assert (stats.dense_steps, stats.sparse_steps, getattr(stats, why)) == (1, 0, 1)
    assert stats.summarised_blocks == 0


def test_a_step_that_chooses_everything_is_dense_to_the_bit() -> None:
    pool, step = make_pool(), step_at(24 * B + 3)
    outs = []
    everything = Budget(eps=0.5, min_ratio=1.0, max_ratio=1.0)
    for options in ({"budget": everything}, {"dense_layers": 2}):
        decoding = decoding_of(**options)
        decoding.begin_pass(SIGNALS)
        attention = decoding.attention(step, pool)
        assert attention is not None
        outs.append(attention(1, query(0), pool[1]))
    assert torch.equal(*outs)
    wanted = masked(query(0), pool[1], step, list(range(25)))
    assert torch.allclose(outs[0].double(), wanted, atol=1e-5)


def test_modes_have_their_budget_and_stride() -> None:
    pool = make_pool()
    reads = {}
    for mode in (SparseMode.LATENCY, SparseMode.CONCURRENCY):
        decoding = decoding_of(mode=mode, stride=1, concurrency_stride=4)
        for position in range(24 * B, 24 * B + 4):
            decoding.begin_pass(SIGNALS)
            attention = decoding.attention(step_at(position), pool)
            assert attention is not None
            attention(0, query(position), pool[0])
        reads[mode] = (decoding.stats.blocks_read, decoding.stats.fresh_selections)
    assert reads[SparseMode.LATENCY] == (4 * (8 + 1), 4)
    assert reads[SparseMode.CONCURRENCY] == (4 * (3 + 1), 1)


def test_auto_follows_the_load() -> None:
    limits = ModeThresholds(
        enter_context_tokens=100, leave_context_tokens=50, patience_steps=1, dwell_steps=1
    )
    decoding = decoding_of(mode=SparseMode.AUTO, thresholds=limits)
    modes = []
    for context in (10, 10, 200, 200, 10, 10, 10):
        modes.append(decoding.begin_pass(LoadSignals(context, 1, 0.0)).value)
        is_dense = decoding.attention(step_at(24 * B), make_pool()) is None
        assert is_dense == (modes[-1] == "reuse")
    assert modes == ["reuse", "reuse", "latency", "latency", "reuse", "reuse", "reuse"]
    assert decoding.stats.mode_switches == 2


# Summaries


def test_a_block_is_summarised_once_for_all_who_share_it() -> None:
    decoding, pool = decoding_of(), make_pool()
    decoding.feed("a", IDS[:10], pool)
    decoding.feed("b", IDS[:12], pool)
    decoding.feed("a", IDS[:10], pool)
    assert decoding.stats.summarised_blocks == 12
    assert (decoding.num_fed("a"), decoding.num_fed("b"), decoding.num_fed("c")) == (10, 12, 0)
    decoding.drop("a")
    decoding.drop("a")
    assert decoding.fed == {"b"}


def test_a_block_in_its_next_life_is_summarised_anew() -> None:
    lives: dict[int, int] = {}
    pool = make_pool()
    summaries = PoolSummaries(SummaryKind.GSA_K4, LAYOUT, POOL, lambda i: lives.get(i, 1))
    first = summaries.records([5, 6], pool)
    pool[:, 5] += 1.0
    assert summaries.records([5, 6], pool).tobytes() == first.tobytes()
    lives[5] = 2
    second = summaries.records([5, 6], pool)
    assert second[0].tobytes() != first[0].tobytes()
    assert second[1].tobytes() == first[1].tobytes()
    assert summaries.num_made == 3


def test_more_blocks_than_fit_one_call() -> None:
    summaries = PoolSummaries(SummaryKind.MEAN, LAYOUT, POOL, lambda _: 1)
    pool = make_pool()
    everything = summaries.records(list(range(40)), pool)
    for block_id in (0, 15, 16, 39):
        alone = PoolSummaries(SummaryKind.MEAN, LAYOUT, POOL, lambda _: 1)
        assert alone.records([block_id], pool)[0].tobytes() == everything[block_id].tobytes()


def test_a_prediction_is_told_and_counted() -> None:
    decoding, pool, told = decoding_of(), make_pool(), []
    decoding.begin_pass(SIGNALS)
    decoding.attention(step_at(24 * B), pool)
    selector, stats = decoding._selectors["a"], AheadStats()
    ahead = BlocksAhead(selector, stats, lambda layer, blocks: told.append((layer, len(blocks))))
    ahead(1, query(4))
    ahead.check(0, selector.choose(0, query(4)))
    assert stats.recall == 0.0
    ahead.check(1, selector.choose(1, query(4)))
    ahead.check(1, selector.choose(1, query(4)))
    assert told == [(1, 9)]
    assert (stats.expected, stats.chosen, stats.hits, stats.recall) == (9, 9, 9, 1.0)
