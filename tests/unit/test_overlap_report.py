"""The table that people read, at the width that a terminal has when nobody widens it."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

from rich.console import Console

from ucm.bench.overlap_report import COLUMNS, overlap_bench_table, overlap_page
from ucm.testing.overlap_events import (
    hybrid_timeline,
    layerwise_timeline,
    overlap_cell,
    overlap_result,
)

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


def test_the_page_says_why_it_shows_this_cell_and_what_was_predicted() -> None:
    alone = replace(hybrid_timeline(), name="compute_only", end_us=9_000_000)
    ways = [alone, layerwise_timeline()]
    saved_ms = 1e-3 * ways[1].end_us
    cell = overlap_cell(name="good", ttft_ms={"predicted": 2500.0, "chosen": 2600.0})
    result = overlap_result(overlap_cell(name="bad"), cell)
    text = overlap_page(result, {"bad": [alone], "good": ways})
    assert "Of 2 cells measured, the one in which doing both saves most" in text
    assert f"{saved_ms:,.0f} ms to the first token instead of 9,000 ms" in text
    assert "chose hybrid and predicted 2,500 ms; that took 2,600 ms" in text
    assert "The only cell measured" in overlap_page(overlap_result(cell), {"good": ways})
    nothing = overlap_page(result, {"bad": [alone], "good": [alone]})
    assert "In none of the 2 cells measured does doing both save time" in nothing


def test_a_page_without_a_decision_says_so() -> None:
    cell = overlap_cell(name="c", chosen_kind=None, ttft_ms={"predicted": None, "chosen": 1.0})
    text = overlap_page(overlap_result(cell), {"c": [hybrid_timeline()]})
    assert "The cost model had nothing to choose." in text
