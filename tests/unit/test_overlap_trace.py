"""The trace that Perfetto opens and the page that a person reads, from known timelines."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from ucm.bench.overlap_page import COPY_NOTE, COPYING, WIDTH, Page, render_page
from ucm.bench.overlap_trace import Timeline, chrome_trace
from ucm.testing.overlap_events import (
    COMPUTE_US,
    LOAD_US,
    NUM_LAYERS,
    event,
    hybrid_timeline,
    layerwise_timeline,
)
from ucm.tracing import TraceEvent, Track


def page(*timelines: Timeline, title: str = "Overlap") -> str:
    return render_page(
        Page(
            title=title,
            facts={"bandwidth": "10 MB/s"},
            timelines=timelines,
            explanations={"hybrid": "From both ends."},
        )
    )


def drawings(text: str) -> list[ET.Element]:
    """The page's SVG elements, parsed: they are well-formed XML."""
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def bars(svg: ET.Element, kind: str) -> list[dict[str, float]]:
    return [
        {name: float(rect.attrib[name]) for name in ("x", "y", "width", "height")}
        for rect in svg.iter("rect")
        if rect.attrib["class"] == kind
    ]


def test_a_timeline_counts_what_overlaps_once() -> None:
    timeline = Timeline(
        name="t",
        events=(
            event(Track.LOAD, 0, 100),
            event(Track.LOAD, 50, 150),
            event(Track.LOAD, 60, 70),
            event(Track.LOAD, 200, 300),
            event(Track.COMPUTE, 0, 5),
        ),
        begin_us=0,
        end_us=400,
    )
    assert timeline.total_s(Track.LOAD) == pytest.approx(250e-6)
    assert timeline.total_s(Track.STALL) == 0.0
    assert timeline.ttft_s == pytest.approx(400e-6)


def test_the_trace_is_what_the_format_asks_for() -> None:
    begin_us = 5_000_000
    trace = json.loads(json.dumps(chrome_trace([layerwise_timeline(begin_us), hybrid_timeline()])))
    events = trace["traceEvents"]
    assert {entry["ph"] for entry in events} == {"M", "X"}
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {1: "overlapped", 2: "hybrid"}
    threads = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"
    }
    complete = [entry for entry in events if entry["ph"] == "X"]
    assert all(threads[e["pid"], e["tid"]] == e["cat"] for e in complete)
    loads = [e for e in complete if (e["pid"], e["cat"]) == (1, "load")]
    assert [e["ts"] for e in loads] == [layer * LOAD_US for layer in range(NUM_LAYERS)]
    assert {e["dur"] for e in loads} == {LOAD_US}
    assert [e["name"] for e in loads[:2]] == ["layer 0", "layer 1"]
    assert any(e["name"] == "blocks 32-44" for e in complete)


def test_every_layer_has_its_load_and_behind_it_its_computation() -> None:
    (svg,) = drawings(page(layerwise_timeline()))
    loads, computes = bars(svg, "load"), bars(svg, "compute")
    assert len(loads) == len(computes) == NUM_LAYERS
    for load, compute in zip(loads, computes, strict=True):
        assert load["y"] == compute["y"]
        assert compute["x"] >= load["x"] + load["width"] - 0.1
        assert compute["width"] == pytest.approx(load["width"] * COMPUTE_US / LOAD_US, abs=0.2)
    assert len(bars(svg, "stall")) == NUM_LAYERS


def test_all_panels_share_one_scale() -> None:
    short, long = drawings(page(hybrid_timeline(), layerwise_timeline()))
    assert short.attrib["viewBox"].split()[2] == long.attrib["viewBox"].split()[2]
    ends = [
        float(line.attrib["x1"])
        for svg in (short, long)
        for line in svg.iter("line")
        if line.attrib["class"] == "end"
    ]
    assert ends[0] < ends[1] <= 1000


@pytest.mark.parametrize("seconds", [0.0006, 6.0, 6.01, 900.0])
def test_no_label_of_the_axis_is_clipped(seconds: float) -> None:
    end_us = round(1e6 * seconds)
    timeline = Timeline(name="t", events=(), begin_us=0, end_us=end_us)
    (svg,) = drawings(page(timeline))
    labels = [text for text in svg.iter("text") if (text.text or "").endswith(" ms")]
    assert len(labels) > 1
    for text in labels:
        # Digits of a 12 px sans-serif font are 7 px wide.
        assert float(text.attrib["x"]) + 7 * len(text.text or "") / 2 <= WIDTH


def test_a_copy_out_of_memory_is_not_called_loading() -> None:
    read = layerwise_timeline()
    copied = replace(read, is_copied=True)
    assert COPYING not in page(read)
    assert COPY_NOTE not in page(read)
    (row,) = re.findall(r"<tr><td>overlapped.*?</tr>", page(copied))
    assert f"<td>{COPYING}: {1e3 * read.total_s(Track.LOAD):,.0f} ms</td>" in row
    assert COPY_NOTE.replace("'", "&#x27;") in page(copied)
    nothing = replace(copied, events=())
    assert COPYING not in page(nothing)


def test_what_is_wide_scrolls_by_itself() -> None:
    text = page(layerwise_timeline())
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in text
    assert len(re.findall(r'<div class="wide"><(?:svg|table)', text)) == 2


def test_a_hybrid_has_two_fronts() -> None:
    (svg,) = drawings(page(hybrid_timeline()))
    loads, computes = bars(svg, "load"), bars(svg, "step")
    assert [bar["y"] for bar in loads] == sorted((bar["y"] for bar in loads), reverse=True)
    assert [bar["y"] for bar in computes] == sorted(bar["y"] for bar in computes)


def test_nothing_comes_from_outside_and_nothing_is_executed() -> None:
    text = page(layerwise_timeline(), title="<script>alert(1)</script>")
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import|https?:", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_a_layer_that_several_threads_read_is_drawn_once() -> None:
    reads = tuple(
        TraceEvent(Track.LOAD, begin, begin + 30, layer, 2, block, 1, "", thread)
        for begin, layer, block, thread in (
            (0, 0, 0, 1),
            (5, 0, 1, 2),
            (30, 2, 0, 1),
            (35, 2, 1, 2),
        )
    )
    timeline = Timeline(name="t", events=reads, begin_us=0, end_us=70)
    merged = timeline.by_row().events
    assert [(e.layer, e.begin_us, e.end_us) for e in merged] == [
        (0, 0, 35),
        (1, 0, 35),
        (2, 30, 65),
        (3, 30, 65),
    ]
    (svg,) = drawings(page(timeline))
    assert len(bars(svg, "load")) == 4
    lanes = {(e["tid"]) for e in chrome_trace([timeline])["traceEvents"] if e["ph"] == "X"}
    assert len(lanes) == 2


def test_an_empty_measurement_is_a_page_all_the_same() -> None:
    empty = Timeline(name="nothing", events=(), begin_us=0, end_us=0)
    assert len(drawings(page(empty))) == 1
    assert "<h1>" in page()
