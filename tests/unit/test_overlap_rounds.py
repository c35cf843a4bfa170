"""Which ways of a cell are measured again, and how long that may take in all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import pytest

from ucm.bench import overlap
from ucm.bench.overlap_cells import Cell, OverlapBenchOptions
from ucm.bench.overlap_hook import Watch
from ucm.bench.overlap_rig import (
    CHOSEN,
    COMPUTE_ONLY,
    HYBRID,
    LOAD_ONLY,
    LOAD_THEN_COMPUTE,
    OVERLAPPED,
    VARIANTS,
    OverlapRig,
    RigModel,
    Run,
    Variant,
)
from ucm.bench.overlap_rounds import CellRuns, compute_times_s
from ucm.bench.overlap_trace import Timeline
from ucm.types import TierKind

OPTIONS = OverlapBenchOptions(context_tokens=(1024,))
BLOCK_TOKENS, BLOCK_BYTES, NUM_HITS = 32, 1 << 20, 16


def run_of(variant: Variant, ttft_s: float) -> Run:
    return Run(
        variant=variant,
        ttft_s=ttft_s,
        token_ids=(1, 2),
        wrong_bytes=0,
        watch=Watch(),
        timeline=Timeline(name=variant.name, events=(), begin_us=0, end_us=1),
        decision=None,
    )


def cell_runs(context_tokens: int = 1024, **took_s: Sequence[float]) -> CellRuns:
    """A cell in which the ways with these names took so long."""
    cell = Cell(
        bandwidth_mb_s=10.0, hit_ratio=0.5, context_tokens=context_tokens, tier=TierKind.NVME
    )
    found = CellRuns(cell, list(range(context_tokens)), NUM_HITS, VARIANTS)
    for variant in VARIANTS:
        found.runs += [run_of(variant, seconds) for seconds in took_s.get(variant.name, ())]
    return found


class FakeRig:
    """Takes `seconds` of a clock of its own for each run of each way."""

    block_tokens, block_bytes = BLOCK_TOKENS, BLOCK_BYTES

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.now_s = 0.0
        self.ran: list[tuple[str, int]] = []
        """(way, tokens of the prompt), in order."""

    def monotonic(self) -> float:
        return self.now_s

    @contextmanager
    def daemon(self, _bytes_per_s: int | None) -> Iterator[None]:
        yield

    def prompt(self, context_tokens: int, hit_ratio: float) -> tuple[list[int], int]:
        return list(range(context_tokens)), int(context_tokens * hit_ratio) // BLOCK_TOKENS

    def run(self, variant: Variant, tokens: Sequence[int], _answer_tokens: int) -> Run:
        self.now_s += self.seconds
        self.ran.append((variant.name, len(tokens)))
        return run_of(variant, self.seconds)


def measure(
    rig: FakeRig, cells: Sequence[CellRuns], options: OverlapBenchOptions = OPTIONS
) -> None:
    real = cast("OverlapRig", rig)
    overlap._measure_rounds(real, cells, options, lambda _line: None, time.monotonic())


def test_every_way_is_due_in_the_first_round() -> None:
    assert cell_runs().due(OPTIONS) == list(VARIANTS)


def test_what_takes_longer_than_computing_says_nothing_by_another_run() -> None:
    found = cell_runs(
        compute_only=[19.0],
        load_then_compute=[25.0],
        overlapped=[18.0],
        hybrid=[20.0],
        chosen=[21.0],
        load_only=[24.0],
    )
    assert found.due(OPTIONS) == [OVERLAPPED, HYBRID, CHOSEN]
    assert found.expected_s(found.due(OPTIONS)) == pytest.approx(59.0)


def test_cells_of_one_context_share_what_computing_takes_where_they_have_few_runs() -> None:
    few, other = cell_runs(compute_only=[19.0]), cell_runs(compute_only=[18.0, 17.0])
    enough = cell_runs(compute_only=[1.0, 2.0, 3.0])
    longer = cell_runs(3072, compute_only=[60.0])
    cells = [few, other, enough, longer]
    assert sorted(compute_times_s(few, cells)) == [1.0, 2.0, 3.0, 17.0, 18.0, 19.0]
    assert compute_times_s(enough, cells) == [1.0, 2.0, 3.0]
    assert compute_times_s(longer, cells) == [60.0]


def test_a_round_goes_over_all_cells_before_the_next_begins() -> None:
    rig, cells = FakeRig(seconds=1.0), [cell_runs(), cell_runs(3072)]
    measure(rig, cells)
    names = [each.name for each in VARIANTS]
    rounds = [[(name, 1024) for name in names], [(name, 3072) for name in names]] * 3
    assert rig.ran == [run for part in rounds for run in part]
    row = overlap._row(cells[0], compute_times_s(cells[0], cells))
    assert row["runs"] == dict.fromkeys(names, 3)
    assert row["compute_runs"] == 3


def test_runs_that_would_end_too_late_are_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, cells = FakeRig(seconds=60.0), [cell_runs(), cell_runs()]
    monkeypatch.setattr(time, "monotonic", rig.monotonic)
    all_once_s = 2 * len(VARIANTS) * 60.0
    options = OverlapBenchOptions(context_tokens=(1024,), limit_s=all_once_s + 400.0)
    measure(rig, cells, options)
    assert [len(found.of(CHOSEN)) for found in cells] == [2, 1]
    assert rig.now_s <= options.limit_s
    assert all(found.of(variant) for found in cells for variant in VARIANTS), "all, at least once"


def test_what_is_loaded_to_teach_is_in_the_cache() -> None:
    """Three seconds of a disk without a limit are more than the longest context."""
    rig = FakeRig()
    overlap._teach(cast("OverlapRig", rig), overlap.UNLIMITED, 1024)
    assert rig.ran == [(OVERLAPPED.name, 1024)] * 2
    overlap._teach(cast("OverlapRig", rig), 1, 1024)
    assert rig.ran[-1] == (OVERLAPPED.name, 3 * BLOCK_TOKENS)


def test_ratios_are_of_medians() -> None:
    """Those of computing over all cells as long."""
    found = cell_runs(
        compute_only=[4.0], load_only=[5.0, 3.0, 2.0], hybrid=[3.3, 3.0, 2.7], chosen=[1.0]
    )
    row = overlap._row(found, [4.0, 6.0, 5.0])
    assert row["ttft_ms"][COMPUTE_ONLY.name] == 5000.0
    assert row["ttft_ms"][LOAD_ONLY.name] == 3000.0
    assert row["hybrid_to_best_alone"] == 1.0
    assert row["runs"][LOAD_THEN_COMPUTE.name] == 0


def test_what_the_benchmark_holds_up_corrects_no_prediction() -> None:
    """Ways that await all layers are loads of every hit too, and slower than one was planned."""
    model = RigModel()
    for is_held_up, took_s in ((True, 2.0), (False, 1.0), (True, 2.0), (True, 2.0)):
        model.is_held_up = is_held_up
        model.observe_ttft("load_all", 1.0, took_s)
    assert model.bias("load_all") == 1.0, "one run is none"
    model.is_held_up = False
    for took_s in (1.2, 1.2):
        model.observe_ttft("load_all", 1.0, took_s)
    assert model.bias("load_all") == 1.2
