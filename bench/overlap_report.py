"""The overlap benchmark's result for people: a table, and the page with its timelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from .overlap_page import Page, render_page
from .overlap_rig import VARIANTS
from .overlap_trace import Timeline, chrome_trace

Result = Mapping[str, Any]
COLUMNS = {
    "compute_only": "no\ncache",
    "load_only": "load",
    "load_then_compute": "di-\nrect",
    "overlapped": "over-\nlap",
    "hybrid": "hy-\nbrid",
    "chosen": "own\nway",
    "predicted": "(pre-\ndict.)",
}
"""Headings of the ways."""


def overlap_bench_table(result: Result) -> Table:
    """One row a cell: milliseconds to the first token of every way, and what they come to."""
    store, title = result["store"], f"{result['model']} {result['dtype']}"
    storing = f"; decoding with storing on {100 * store['ratio']:+.1f} %" if store else ""
    table = Table(
        box=box.SIMPLE,
        padding=(0, 0, 0, 1),
        title=f"{title}, {result['threads']} threads: seconds to the first token",
        caption=f"{result['wrong_bytes']} wrong bytes{storing}; hidden: 1 - stall / load",
    )
    table.add_column("MB/s, hits", no_wrap=True)
    for heading in (*COLUMNS.values(), "hid-\nden", "same\ntok."):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in result["cells"]:
        speed = cell["bandwidth_mb_s"]
        name = f"{speed:g}" if speed is not None else cell["tier"]
        table.add_row(
            f"{name}\n{cell['hit_ratio']:.0%} of {cell['context_tokens']}",
            *(_number(cell["ttft_ms"][way]) for way in COLUMNS),
            _share(cell["overlap_efficiency"]),
            "yes" if cell["identical_tokens"] else "NO",
        )
    return table


def overlap_page(result: Result, timelines: Mapping[str, Sequence[Timeline]]) -> str:
    """The page of one cell: that in which overlap changes most.

    Args:
        result: of the benchmark.
        timelines: by cell.
    """
    name, found = most_telling(timelines)
    facts = {"model": result["model"], "dtype": result["dtype"], "cell": name}
    return render_page(
        Page(
            title="Loading KV cache while computing",
            facts=facts,
            timelines=found,
            explanations={variant.name: variant.text for variant in VARIANTS},
        )
    )


def overlap_trace(timelines: Mapping[str, Sequence[Timeline]]) -> dict[str, Any]:
    """All cells in one trace; a process is one way in one cell."""
    return chrome_trace(
        [
            Timeline(
                name=f"{cell}: {timeline.name}",
                events=timeline.events,
                begin_us=timeline.begin_us,
                end_us=timeline.end_us,
            )
            for cell, found in timelines.items()
            for timeline in found
        ]
    )


def most_telling(timelines: Mapping[str, Sequence[Timeline]]) -> tuple[str, Sequence[Timeline]]:
    """The cell in which doing both saves most seconds over the better of the ways alone."""

    def gain(found: Sequence[Timeline]) -> float:
        seconds = sorted(timeline.ttft_s for timeline in found)
        by_name = {timeline.name: timeline.ttft_s for timeline in found}
        alone = [by_name[name] for name in ("compute_only", "load_only") if name in by_name]
        return min(alone) - seconds[0] if seconds and alone else 0.0

    return max(timelines.items(), key=lambda item: gain(item[1]))


def _number(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds / 1e3:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
