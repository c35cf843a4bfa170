"""The table that people read, at the width that a terminal has when nobody widens it."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from ucm.bench.overlap_report import COLUMNS, overlap_bench_table
from ucm.testing.overlap_events import overlap_cell, overlap_result

HEADINGS = ["MB/s", "hits", "ctx", *COLUMNS.values(), "hid%"]


def lines(result: dict[str, Any]) -> list[str]:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(overlap_bench_table(result))
    return console.export_text().splitlines()


def test_the_table_is_whole_at_80_columns() -> None:
    cells = [
        overlap_cell(bandwidth_mb_s=1000.0, hit_ratio=1.0, context_tokens=131_072),
        overlap_cell(bandwidth_mb_s=None, tier="memory"),
        overlap_cell(bandwidth_mb_s=None, overlap_efficiency=None),
    ]
    cells[2]["ttft_ms"]["overlapped"] = None
    cells[2]["ttft_ms"]["hybrid"] = 1234.5
    found = lines(overlap_result(*cells))
    assert all(len(line) <= 80 and "…" not in line for line in found)
    rows = [line.split() for line in found]
    assert HEADINGS in rows
    assert ["1000", "100%", "131072", *["123"] * 7, "-25"] in rows
    assert ["memory", "90%", "6144", *["123"] * 7, "-25"] in rows
    assert ["max", "90%", "6144", "123", "123", "123", "-", "1.23", "123", "123", "-"] in rows


def test_every_heading_of_a_way_is_explained() -> None:
    first_words = {line.split()[0] for line in lines(overlap_result()) if line}
    assert {*COLUMNS.values()} - {"pred."} | {"hid%", "max"} <= first_words


def test_a_cell_with_other_tokens_is_named() -> None:
    wrong = overlap_cell(identical_tokens=False, bandwidth_mb_s=3.0)
    found = "\n".join(lines(overlap_result(overlap_cell(), wrong)))
    assert "same tokens in every way: 1 of 2 cells" in found
    assert "OTHER TOKENS at 3 MB/s, hits 90%, ctx 6144" in found
    assert "decoding with storing on: +1.0 % time" in found
