"""The overlap benchmark's result for people: a table, and the page with its timelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ucm.types import TierKind

from .overlap_page import Page, render_page
from .overlap_rig import COMPUTE_ONLY, LOAD_ONLY, VARIANTS
from .overlap_trace import Timeline, chrome_trace

Result = Mapping[str, Any]
COLUMNS = {
    "compute_only": "compute",
    "load_only": "load",
    "load_then_compute": "direct",
    "overlapped": "overlap",
    "hybrid": "hybrid",
    "chosen": "chosen",
    "predicted": "pred.",
}
"""Headings of the ways; the whole table has room in 80 columns."""
KEY = """\
compute    no cache, everything is computed
load       all hits through the daemon's memory, then the rest is computed
direct     all hits read directly, then the rest is computed
overlap    the same reads, each layer computed as soon as it is there
hybrid     computed from the front, read from the back, until the two meet, or as overlap
chosen     what the cost model chose; pred. is what it said of that beforehand
hid%       of the loading in `overlap`, the share that computing hid
max        as fast as the disk; memory: hits lie in the daemon's memory"""


def overlap_bench_table(result: Result) -> Group:
    """One row a cell: seconds to the first token of every way, and what they come to.

    At most 80 columns wide; the headings are explained below.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False)
    for heading in ("MB/s", "hits", "ctx", *COLUMNS.values(), "hid%"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in result["cells"]:
        table.add_row(
            _speed(cell),
            f"{cell['hit_ratio']:.0%}",
            str(cell["context_tokens"]),
            *(_number(cell["ttft_ms"][way]) for way in COLUMNS),
            _share(cell["overlap_efficiency"]),
        )
    head = f"{result['model']} {result['dtype']}, {result['threads']} threads"
    parts = (f"{head}: seconds to the first token", "", table, "", KEY, "", _verdict(result))
    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def _verdict(result: Result) -> str:
    """What decides the exit code, and what storing costs."""
    cells = result["cells"]
    wrong = [cell for cell in cells if not cell["identical_tokens"]]
    lines = [f"{result['wrong_bytes']} wrong bytes; same tokens in every way: "]
    lines[0] += f"{len(cells) - len(wrong)} of {len(cells)} cells"
    lines += [
        f"OTHER TOKENS at {_speed(cell)} MB/s, hits {cell['hit_ratio']:.0%}, "
        f"ctx {cell['context_tokens']}"
        for cell in wrong
    ]
    if result["store"]:
        lines.append(f"decoding with storing on: {100 * result['store']['ratio']:+.1f} % time")
    return "\n".join(lines)


def _speed(cell: Result) -> str:
    if cell["tier"] == TierKind.MEMORY:
        return "memory"
    speed = cell["bandwidth_mb_s"]
    return "max" if speed is None else f"{speed:g}"


def overlap_page(result: Result, timelines: Mapping[str, Sequence[Timeline]]) -> str:
    """The page of one cell: that in which overlap changes most.

    Args:
        result: of the benchmark.
        timelines: by cell.
    """
    name, found = most_telling(timelines)
    cell = next(cell for cell in result["cells"] if cell["name"] == name)
    facts = {"model": result["model"], "dtype": result["dtype"], "cell": name}
    return render_page(
        Page(
            title="Loading KV cache while computing",
            facts=facts,
            notes=(_why_this_cell(found, len(timelines)), _what_was_chosen(cell)),
            timelines=found,
            explanations={variant.name: variant.text for variant in VARIANTS},
        )
    )


def overlap_trace(timelines: Mapping[str, Sequence[Timeline]]) -> dict[str, Any]:
    """All cells in one trace; a process is one way in one cell."""
    return chrome_trace(
        [
            replace(timeline, name=f"{cell}: {timeline.name}")
            for cell, found in timelines.items()
            for timeline in found
        ]
    )


def most_telling(timelines: Mapping[str, Sequence[Timeline]]) -> tuple[str, Sequence[Timeline]]:
    """The cell in which doing both saves most seconds over the better of the ways alone."""

    def gain(found: Sequence[Timeline]) -> float:
        alone_s, best_s = _alone_and_best(found)
        return alone_s - best_s

    return max(timelines.items(), key=lambda item: gain(item[1]))


def _alone_and_best(found: Sequence[Timeline]) -> tuple[float, float]:
    """Seconds of the better of the ways alone, and of the best way of all."""
    alone = [line.ttft_s for line in found if line.name in (COMPUTE_ONLY.name, LOAD_ONLY.name)]
    best_s = min((line.ttft_s for line in found), default=0.0)
    return min(alone, default=best_s), best_s


def _why_this_cell(found: Sequence[Timeline], num_cells: int) -> str:
    alone_s, best_s = _alone_and_best(found)
    saved = (
        f"{1e3 * best_s:,.0f} ms to the first token instead of {1e3 * alone_s:,.0f} ms with the "
        "better of loading alone and computing alone"
    )
    if num_cells == 1:
        return f"The only cell measured: {saved}."
    if alone_s > best_s:
        return f"Of {num_cells} cells measured, the one in which doing both saves most: {saved}."
    return (
        f"In none of the {num_cells} cells measured does doing both save time; this is the first."
    )


def _what_was_chosen(cell: Result) -> str:
    kind, taken = cell["chosen_kind"], cell["ttft_ms"]
    if kind is None or taken["predicted"] is None:
        return "The cost model had nothing to choose."
    return (
        f"The cost model chose {kind} and predicted {taken['predicted']:,.0f} ms; "
        f"that took {taken['chosen']:,.0f} ms."
    )


def _number(milliseconds: float | None) -> str:
    """Seconds in at most six characters, below a day."""
    if milliseconds is None:
        return "-"
    return f"{milliseconds / 1e3:.{2 if milliseconds < 100_000 else 0}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"
