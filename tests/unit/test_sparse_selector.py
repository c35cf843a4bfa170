"""Which blocks a sequence's layers read, over tables of random keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ucm.errors import ConfigError
from ucm.kernels.block_scores import Budget, SummaryTable
from ucm.kernels.summarize import summarize
from ucm.layout import KvDtype, KvLayout
from ucm.sparse.options import SparseOptions
from ucm.sparse.protocols import DecodeStep
from ucm.sparse.selector import SequenceSelector, Settings
from ucm.types import SummaryKind

B, LAYERS, HEADS, DIM = 8, 3, 2, 16
LAYOUT = KvLayout(
    num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, block_tokens=B, dtype=KvDtype.FLOAT32
)
OPTIONS = SparseOptions(min_context_tokens=0, sink_blocks=1, recent_blocks=2)
FEW = Settings(Budget(ratio=0.25), 1)


def slabs_of(num_blocks: int, seed: int = 0) -> np.ndarray:
    """[num_blocks, L, 2, G, B, D]."""
    generator = np.random.default_rng(seed)
    shape = (num_blocks, LAYERS, 2, HEADS, B, DIM)
    return generator.standard_normal(shape).astype(np.float32)


def table_of(slabs: np.ndarray) -> SummaryTable:
    table = SummaryTable(SummaryKind.GSA_K4, LAYOUT)
    records = summarize(SummaryKind.GSA_K4, slabs.reshape(-1, *slabs.shape[2:]), KvDtype.FLOAT32)
    table.extend(records.reshape(len(slabs), LAYERS, HEADS))
    return table


def step_at(position: int, num_generated: int = 100) -> DecodeStep:
    return DecodeStep(
        sequence_id="a",
        position=position,
        num_prompt=position + 1 - num_generated,
        block_ids=range(position // B + 1),
        block_tokens=B,
    )


def query(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, DIM, generator=torch.Generator().manual_seed(seed))


def test_sink_window_and_the_block_being_filled_are_always_read() -> None:
    selector = SequenceSelector(table_of(slabs_of(40)), OPTIONS)
    for seed in range(5):
        selector.begin(step_at(40 * B + 3), FEW)
        chosen = selector.choose(1, query(seed)).blocks.tolist()
        assert chosen == sorted(set(chosen))
        assert len(chosen) == 10 + 1
        assert {0, 38, 39, 40} <= set(chosen)
        selector = SequenceSelector(selector.table, OPTIONS)


def test_the_block_that_the_query_looks_for_is_read() -> None:
    slabs = slabs_of(40)
    q = query(1)
    needle = q[0].numpy().reshape(HEADS, 2, DIM).mean(1)
    slabs[17, 1, 0, :, 3] = 20 * needle / np.linalg.norm(needle, axis=-1, keepdims=True)
    selector = SequenceSelector(table_of(slabs), OPTIONS)
    selector.begin(step_at(40 * B), Settings(Budget(tokens=5 * B), 1))
    selection = selector.choose(1, q)
    assert 17 in selection.blocks
    assert len(selection.blocks) == 6
    assert 0.5 < selection.mass <= 1.0


def test_a_budget_of_all_reads_all() -> None:
    selector = SequenceSelector(table_of(slabs_of(20)), OPTIONS)
    selector.begin(step_at(20 * B), Settings(Budget(ratio=1.0), 1))
    assert selector.choose(0, query(0)).blocks.tolist() == list(range(21))


def test_dense_layers_read_all_and_are_not_scored() -> None:
    options = SparseOptions(min_context_tokens=0, dense_layers=2)
    selector = SequenceSelector(table_of(slabs_of(20)), options)
    selector.begin(step_at(20 * B), FEW)
    assert [len(selector.choose(layer, query(0)).blocks) for layer in range(3)] == [21, 21, 6]
    assert selector.num_fresh == 1


def test_a_stride_keeps_selections_and_adds_what_was_sealed() -> None:
    table = table_of(slabs_of(42))
    selector = SequenceSelector(table, OPTIONS)
    every_four = Settings(Budget(ratio=0.25), 4)
    first = 40 * B + 5
    found = {}
    for position in range(first, first + 8):
        selector.begin(step_at(position), every_four)
        found[position] = selector.choose(0, query(position))
    fresh = [position for position, selection in found.items() if selection.is_fresh]
    assert fresh == [first, 40 * B + 8, 40 * B + 12]  # the first ever, then multiples of 4
    kept = found[40 * B + 9].blocks.tolist()
    assert kept == found[40 * B + 8].blocks.tolist()
    # What was chosen before block 40 was sealed is read with the block that follows it.
    assert found[40 * B + 7].blocks.tolist() == found[first].blocks.tolist()
    assert found[first].blocks[-1] == 40
    assert found[40 * B + 8].blocks[-1] == 41


def test_a_kept_selection_grows_with_the_sequence() -> None:
    selector = SequenceSelector(table_of(slabs_of(42)), OPTIONS)
    rarely = Settings(Budget(ratio=0.25), 64)
    selector.begin(step_at(40 * B + 7), rarely)
    before = selector.choose(0, query(0)).blocks.tolist()
    selector.begin(step_at(41 * B + 1), rarely)
    after = selector.choose(0, query(1))
    assert not after.is_fresh
    assert after.blocks.tolist() == [*before, 41]


def test_an_old_selection_is_not_taken_up_again() -> None:
    selector = SequenceSelector(table_of(slabs_of(42)), OPTIONS)
    settings = Settings(Budget(ratio=0.25), 4)
    for position in (38 * B + 1, 40 * B + 2):  # dense in between: neither at a multiple of 4
        selector.begin(step_at(position), settings)
        assert selector.choose(0, query(0)).is_fresh


def test_blocks_without_summary_are_read_until_they_were_caught_up_with() -> None:
    options = SparseOptions(min_context_tokens=0, catch_up_blocks=4)
    selector = SequenceSelector(table_of(slabs_of(20)), options)
    counts = []
    for num_generated in range(1, 8):
        step = step_at(20 * B, num_generated)
        selector.begin(step, Settings(Budget(ratio=0.25), 1))
        counts.append((selector.num_scored(step), len(selector.choose(0, query(0)).blocks)))
        selector = SequenceSelector(selector.table, options)
    assert [scored for scored, _ in counts] == [4, 8, 12, 16, 20, 20, 20]
    assert [read for _, read in counts] == [18, 15, 12, 9, 6, 6, 6]


def test_a_summary_that_says_nothing_makes_its_block_read() -> None:
    slabs = slabs_of(40)
    slabs[11, 2, 0, 0, 0, 0] = np.nan
    selector = SequenceSelector(table_of(slabs), OPTIONS)
    selector.begin(step_at(40 * B), Settings(Budget(ratio=0.125), 1))
    assert 11 in selector.choose(2, query(0)).blocks
    assert all(np.isfinite(selector.choose(layer, query(0)).mass) for layer in (0, 1))


def test_a_prediction_changes_nothing() -> None:
    selector = SequenceSelector(table_of(slabs_of(40)), OPTIONS)
    selector.begin(step_at(40 * B), FEW)
    predicted = selector.predict(1, query(5)).blocks.tolist()
    assert selector.num_fresh == 0
    other = selector.choose(1, query(6))
    assert other.is_fresh
    assert predicted != other.blocks.tolist()
    again = SequenceSelector(selector.table, OPTIONS)
    again.begin(step_at(40 * B), FEW)
    assert again.choose(1, query(5)).blocks.tolist() == predicted


def test_selections_do_not_depend_on_summaries_behind_what_is_scored() -> None:
    options = SparseOptions(min_context_tokens=0, catch_up_blocks=4)
    slabs = slabs_of(20)
    found = []
    for num_blocks in (4, 20):
        selector = SequenceSelector(table_of(slabs[:num_blocks]), options)
        selector.begin(step_at(20 * B, num_generated=1), FEW)
        found.append(selector.choose(0, query(0)).blocks.tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stride": 0}, "stride is 0"),
        ({"sink_blocks": 0}, "sink_blocks is 0"),
        ({"catch_up_blocks": 0}, "catch_up_blocks is 0"),
        ({"dense_layers": -1}, "dense_layers is -1"),
        ({"recent_blocks": -1}, "recent_blocks is -1"),
        ({"resident_blocks": 4}, "need 5"),
    ],
)
def test_options_that_cannot_be(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SparseOptions(**settings)  # type: ignore[arg-type]
