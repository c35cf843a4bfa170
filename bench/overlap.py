"""`ucm bench overlap`: what overlap and load-or-compute gain, by bandwidth, hit ratio and context.

A cell is one bandwidth, hit ratio, context and tier. In it the same prompt is served in each of
these ways, one after the other, in rounds over all cells (see `overlap_rounds`); medians are
reported, seconds to the first token, and how many runs they are of:

    compute_only        no cache
    load_only           every hit through the daemon's memory (MAPPED), awaited whole before the
                        first layer; then the rest is computed
    load_then_compute   the direct reads of `overlapped`, awaited whole before the first layer
    overlapped          direct reads layer by layer, computed behind them
    hybrid              computed from the front, read directly from the back, until they meet; as
                        `overlapped` where the cost model sees no gain in that (`hybrid_ways`)
    chosen              what the cost model chose by itself, in a run of its own
    predicted           what it said of that choice before that run (so compare with `chosen`); it
                        has learnt from the cell's other runs, as a server learns from requests, but
                        is not corrected by those that the benchmark itself holds up (awaited whole)

Blocks of the tier `memory` lie in the daemon's memory in every run; there is nothing to read
directly, all loads copy from it. `identical_tokens`: every way gave the greedy answer of
`compute_only`. `wrong_bytes`: bytes of blocks that a load put into the pool and that differ from
what was computed for the same tokens (compared by digest, whatever the checksums said). Ways that
would read for longer than `longest_load_s` are left out; short loads teach the model instead.

`overlap_efficiency`, of the overlapped run: 1 - stall / load. The stall is what the engine waited
(in passes, and with nothing else to do), the load is the time during which at least one read was
under way. Where loading takes no longer than the pass behind it (`is_load_the_shorter`), all but
the first layer can be hidden. `store_overhead_ratio`: seconds of decoding with storing on over off,
minus 1; `stored_share`: blocks stored by the end of a decode over those that it filled.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ucm.engine.loading import default_model_folder, load_model
from ucm.tracing import Track
from ucm.types import TierKind

from .overlap_cells import (
    MB,
    TEACHING_BLOCKS,
    Cell,
    OverlapBenchOptions,
    cells_of,
    check_cells,
    check_contexts,
    check_speeds,
    left_out,
)
from .overlap_rig import (
    CHOSEN,
    COMPUTE_ONLY,
    HYBRID,
    LOAD_ONLY,
    LOAD_THEN_COMPUTE,
    OVERLAPPED,
    VARIANTS,
    OverlapRig,
    Run,
    Variant,
)
from .overlap_rounds import CellRuns, compute_times_s
from .overlap_trace import Timeline

TEACHING_S = 3.0
"""Of a load that is measured for nothing else; `TEACHING_BLOCKS` may take longer, but no longer
than `longest_load_s`."""
UNLIMITED = 100 * MB
"""Bytes a second, by which a teaching load of a disk without a limit is sized."""
Progress = Callable[[str], None]
Result = dict[str, Any]


@dataclass(slots=True)
class OverlapOutcome:
    """What a benchmark found."""

    result: Result
    timelines: dict[str, list[Timeline]] = field(default_factory=dict)
    """By cell: one timeline a way."""


def run_overlap_bench(
    options: OverlapBenchOptions, progress: Progress | None = None
) -> OverlapOutcome:
    """Measure; see the module. Blocks for minutes to hours and uses every core.

    Args:
        options: what to measure.
        progress: called with a line of text before each longer piece of work.

    Raises:
        ConfigError: there is no model, nothing to measure, nowhere to store it, a bandwidth is too
            low to read anything at, or a context is longer than the model or the machine's memory
            takes.
        UcmError: the daemon does not start or answer.
    """
    say = progress or (lambda _line: None)
    check_cells(options)
    for line in left_out(options):
        say(line)
    say("loading the model")
    loaded = load_model(options.model_path or default_model_folder(), options.dtype)
    check_contexts(options, loaded.config.max_context_tokens)
    longest = max(options.context_tokens)
    with tempfile.TemporaryDirectory(prefix="ucm-overlap-", dir=options.store) as folder:
        rig = OverlapRig(
            loaded,
            options.dtype,
            Path(folder) / "store",
            longest + options.answer_tokens,
            stores_wait=options.stores_wait,
        )
        try:
            check_speeds(options, rig.block_bytes)
            outcome = _measure(rig, options, say)
        finally:
            rig.close()
    outcome.result = {
        "model": loaded.config.name,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "block_bytes": rig.block_bytes,
        **outcome.result,
    }
    return outcome


def _measure(rig: OverlapRig, options: OverlapBenchOptions, say: Progress) -> OverlapOutcome:
    outcome, begun_s = OverlapOutcome({}), time.monotonic()
    longest = max(options.context_tokens)
    with rig.daemon(None):
        # This also warms torch up: no measured run is the first one.
        say(f"computing and storing {longest} tokens")
        rig.fill(longest)
        store = None
        if options.decode_rounds:
            say("decoding with and without storing")
            store = _store_overhead(rig, options)
    cells = [_cell_runs(rig, cell, options) for cell in cells_of(options)]
    _measure_rounds(rig, cells, options, say, begun_s)
    rows = [_row(found, compute_times_s(found, cells)) for found in cells]
    outcome.timelines = {str(found.cell): _first_timelines(found) for found in cells}
    outcome.result = {
        "cells": rows,
        "store_overhead_ratio": store["ratio"] if store is not None else None,
        "store": store,
        "wrong_bytes": sum(row["wrong_bytes"] for row in rows),
    }
    return outcome


def _measure_rounds(
    rig: OverlapRig,
    cells: Sequence[CellRuns],
    options: OverlapBenchOptions,
    say: Progress,
    begun_s: float,
) -> None:
    """Round after round over all cells, until nothing is due or the time is up."""
    for number in itertools.count(1):
        is_over = True
        for found in cells:
            due = found.due(options)
            end_s = time.monotonic() - begun_s + found.expected_s(due)
            if due and (number <= options.repeats or end_s <= options.limit_s):
                is_over = False
                say(f"{found.cell}: round {number}")
                _measure_cell(rig, found, due, options, say)
        if is_over:
            return


def _cell_runs(rig: OverlapRig, cell: Cell, options: OverlapBenchOptions) -> CellRuns:
    tokens, num_hits = rig.prompt(cell.context_tokens, cell.hit_ratio)
    return CellRuns(cell, tokens, num_hits, _variants_of(rig, cell, num_hits, options))


def _measure_cell(
    rig: OverlapRig,
    found: CellRuns,
    due: Sequence[Variant],
    options: OverlapBenchOptions,
    say: Progress,
) -> None:
    """One round of a cell, on a daemon with nothing in its memory."""
    cell = found.cell
    speed = None if cell.bandwidth_mb_s is None else int(cell.bandwidth_mb_s * MB)
    with rig.daemon(speed):
        if cell.tier is TierKind.MEMORY:
            rig.run(LOAD_ONLY, found.tokens, 1)
        if OVERLAPPED not in due:
            _teach(rig, speed or UNLIMITED, max(options.context_tokens))
        for variant in due:
            say(f"{cell}: {variant.name}")
            found.runs.append(rig.run(variant, found.tokens, options.answer_tokens))
            say(f"{cell}: {variant.name} {1e3 * found.runs[-1].ttft_s:.0f} ms")


def _first_timelines(found: CellRuns) -> list[Timeline]:
    return [found.of(variant)[0].timeline for variant in found.variants]


def _teach(rig: OverlapRig, bytes_per_s: int, most_tokens: int) -> None:
    """Short loads where the long ones are left out: the model learns the bandwidth from either."""
    num_blocks = max(TEACHING_BLOCKS, int(TEACHING_S * bytes_per_s) // rig.block_bytes)
    tokens, _ = rig.prompt(min((num_blocks + 1) * rig.block_tokens, most_tokens), 1.0)
    for _ in range(2):
        rig.run(OVERLAPPED, tokens, 1)


def _variants_of(
    rig: OverlapRig, cell: Cell, num_hits: int, options: OverlapBenchOptions
) -> list[Variant]:
    """All ways but those that would read for too long."""
    if cell.bandwidth_mb_s is None:
        return list(VARIANTS)
    load_s = num_hits * rig.block_bytes / (cell.bandwidth_mb_s * MB)
    slow = (LOAD_ONLY, LOAD_THEN_COMPUTE, OVERLAPPED) if load_s > options.longest_load_s else ()
    return [variant for variant in VARIANTS if variant not in slow]


def _row(found: CellRuns, compute_s: Sequence[float]) -> Result:
    cell, runs = found.cell, found.runs
    of = {variant.name: found.of(variant) for variant in VARIANTS}
    expected = of[COMPUTE_ONLY.name][0].token_ids
    chosen = of[CHOSEN.name]
    decision = chosen[0].decision
    predicted = [run.decision.predicted_ttft_s for run in chosen if run.decision is not None]
    errors = [
        run.decision.predicted_ttft_s / run.ttft_s - 1 for run in chosen if run.decision is not None
    ]
    ttft = {each.name: _median_ms(found.times_s(each)) for each in VARIANTS}
    ttft[COMPUTE_ONLY.name] = _median_ms(compute_s)
    return {
        "name": str(cell),
        "bandwidth_mb_s": cell.bandwidth_mb_s,
        "hit_ratio": cell.hit_ratio,
        "context_tokens": cell.context_tokens,
        "tier": cell.tier.value,
        "hit_blocks": found.num_hits,
        "ttft_ms": {**ttft, "predicted": _median_ms(predicted)},
        "chosen_kind": decision.kind.value if decision is not None else None,
        "alternatives_ms": {
            name: round(1e3 * seconds, 2)
            for name, seconds in (decision.alternatives if decision is not None else {}).items()
        },
        "predicted_error": round(statistics.median(errors), 4) if errors else None,
        "overlap_efficiency": _efficiency(of[OVERLAPPED.name]),
        **_shares(of[OVERLAPPED.name]),
        **_ratios(ttft),
        "loaded_blocks": {
            name: taken[0].watch.num_loaded_blocks for name, taken in of.items() if taken
        },
        "identical_tokens": all(run.token_ids == expected for run in runs),
        "wrong_bytes": sum(run.wrong_bytes for run in runs),
        "runs": {name: len(taken) for name, taken in of.items()},
        "compute_runs": len(compute_s),
        "hybrid_ways": [run.decision.way.value for run in of[HYBRID.name] if run.decision],
    }


def _ratios(ttft: dict[str, float | None]) -> Result:
    """The comparisons that the cell is about."""

    def ratio(name: str, *others: str) -> float | None:
        own, rest = ttft[name], [ttft[other] for other in others]
        known = [value for value in rest if value]
        return round(own / min(known), 4) if own and known else None

    return {
        "overlapped_to_load_then_compute": ratio(OVERLAPPED.name, LOAD_THEN_COMPUTE.name),
        "hybrid_to_best_alone": ratio(HYBRID.name, LOAD_ONLY.name, COMPUTE_ONLY.name),
        "chosen_to_best_alone": ratio(CHOSEN.name, LOAD_ONLY.name, COMPUTE_ONLY.name),
    }


def _efficiency(runs: Sequence[Run]) -> float | None:
    """1 - stall / load time; see the module. None where nothing was loaded."""
    found = [
        1 - run.watch.stall_s / load_s
        for run in runs
        if (load_s := run.timeline.total_s(Track.LOAD)) > 0
    ]
    return round(statistics.median(found), 4) if found else None


def _shares(runs: Sequence[Run]) -> Result:
    """Loading and computing one layer in the overlapped run: what is hidden, and behind what."""
    found = [
        (run.timeline.total_s(Track.LOAD), run.watch.steps[0].seconds - run.watch.steps[0].stall_s)
        for run in runs
        if run.watch.steps and run.timeline.total_s(Track.LOAD) > 0
    ]
    load_s, compute_s = (
        [statistics.median(column) for column in zip(*found, strict=True)] if found else (0.0, 0.0)
    )
    return {
        "load_ms": round(1e3 * load_s, 2),
        "first_pass_ms": round(1e3 * compute_s, 2),
        "is_load_the_shorter": bool(found) and load_s <= compute_s,
    }


def _median_ms(seconds: Sequence[float]) -> float | None:
    return round(1e3 * statistics.median(seconds), 2) if seconds else None


def _store_overhead(rig: OverlapRig, options: OverlapBenchOptions) -> Result:
    """Decodes with storing on and off, alternating; each step's median over the rounds.

    Every step counts: the one that fills a block, and those that follow while it is copied out.
    """
    steps: dict[bool, list[list[float]]] = {True: [], False: []}
    num_filled, num_stored = 0, 0
    rig.decode_s(8, stores=False)
    for round_index in range(options.decode_rounds):
        for stores in (True, False) if round_index % 2 else (False, True):
            num_before = rig.num_stored_blocks
            steps[stores].append(rig.decode_s(options.decode_tokens, stores=stores))
            num_stored += rig.num_stored_blocks - num_before
            rig.settle()
            num_filled += rig.num_stored_blocks - num_before
    on, off = (
        sum(map(statistics.median, zip(*steps[stores], strict=True))) for stores in (True, False)
    )
    count = options.decode_tokens
    return {
        "ratio": round(on / off - 1, 4),
        "tpot_on_ms": round(1e3 * on / count, 3),
        "tpot_off_ms": round(1e3 * off / count, 3),
        "rounds": options.decode_rounds,
        "decode_tokens": count,
        "stored_share": round(num_stored / num_filled, 3) if num_filled else None,
    }
