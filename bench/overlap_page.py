"""The timeline as one page that draws itself: HTML and inline SVG, no script, nothing from outside.

One panel a measurement, all on one time scale, so that their lengths compare. A panel has one row
a layer (of a load layer by layer) or one a block (of a load from the back); blue is the row's load,
orange its computation:

    layers   staircase: the orange of row l begins where its blue ends, or right behind row l-1
    blocks   two fronts: orange from the top, blue from the bottom, until they meet

Below the rows, red marks when the engine waited; a dashed line is the first token. The colours are
told apart by people who do not see red and green alike, and follow the light or dark mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ucm.tracing import TraceEvent, Track

from .overlap_trace import Timeline, label

WIDTH = 1000
"""Of a drawing, in its own units; it scales to the window."""
LEFT, RIGHT, TOP = 64, 44, 8
"""Margins; the right one has room for half of the last label."""
PANEL_HEIGHT = 220
WAIT_HEIGHT = 10
AXIS_HEIGHT = 26
NUM_TICKS = 8

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""The browser itself refuses whatever is not in the page."""
COPYING = "copying out of memory"
COPY_NOTE = (
    "Blue is only the copying out of the daemon's memory: the daemon's own reading of the disk, if "
    "any, shows as the engine's wait."
)

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --dim: #646b78; --line: #d9dce2; --back: #fcfcfd;
  --load: #2f6fde; --compute: #e08a1e; --stall: #c8324b; --store: #7b8494; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --dim: #9aa1ae; --line: #3a404b;
  --back: #15181d; --load: #6ea3ff; --compute: #f2a950; --stall: #ff6b81; --store: #8d96a6; } }
body { background: var(--back); color: var(--ink); max-width: 1120px; margin: 2rem auto;
  padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin-bottom: .2rem; }
h2 { font-size: 1.05rem; margin: 1.8rem 0 .1rem; }
p { margin: .2rem 0 .6rem; color: var(--dim); }
svg { width: 100%; min-width: 700px; height: auto; display: block; }
.wide { overflow-x: auto; }
svg text { fill: var(--dim); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--line); stroke-width: 1; }
.end { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 4 3; }
.load { fill: var(--load); } .compute, .step { fill: var(--compute); }
.stall { fill: var(--stall); } .store { fill: var(--store); }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; }
.key { margin: 0 .35em 0 1em; } .key:first-child { margin-left: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem 1.2rem .15rem 0; text-align: right; font-weight: normal;
  white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
th { color: var(--dim); border-bottom: 1px solid var(--line); }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What to draw."""

    title: str
    facts: Mapping[str, str]
    """Shown under the title: bandwidth, hit ratio and the like."""
    notes: Sequence[str] = ()
    """Sentences under the facts."""
    timelines: Sequence[Timeline]
    explanations: Mapping[str, str]
    """For each timeline's name one sentence."""


def render_page(page: Page) -> str:
    """The whole page as text; every value is escaped."""
    longest_s = max((timeline.ttft_s for timeline in page.timelines), default=0.0) or 1.0
    facts = " &middot; ".join(f"{escape(k)}: {escape(v)}" for k, v in page.facts.items())
    body = [f"<h1>{escape(page.title)}</h1>", f"<p>{facts}</p>"]
    body += [f"<p>{escape(note)}</p>" for note in page.notes]
    body += [_legend(page), _table(page)]
    for timeline in page.timelines:
        text = escape(_explanation(page, timeline))
        body += [
            f"<h2>{escape(timeline.name)}: {1e3 * timeline.ttft_s:,.0f} ms</h2>",
            f"<p>{text}</p>",
            f'<div class="wide">{_drawing(timeline, longest_s)}</div>',
        ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(page.title)}</title><style>{STYLE}</style></head><body>",
            *body,
            "</body></html>",
        ]
    )


def _explanation(page: Page, timeline: Timeline) -> str:
    text = page.explanations.get(timeline.name, "")
    return f"{text} {COPY_NOTE}".strip() if _is_copying(timeline) else text


def _is_copying(timeline: Timeline) -> bool:
    return timeline.is_copied and any(event.track is Track.LOAD for event in timeline.events)


def _legend(page: Page) -> str:
    used = {event.track for timeline in page.timelines for event in timeline.events}
    words = {
        Track.LOAD: "load from the cache",
        Track.COMPUTE: "compute",
        Track.STALL: "the engine waits",
        Track.STORE: "store",
    }
    keys = [
        f'<span class="key" style="background:var(--{track.value})"></span>{text}'
        for track, text in words.items()
        if track in used
    ]
    return f"<p>{''.join(keys)}</p>"


def _table(page: Page) -> str:
    rows = ["<tr><th></th><th>first token</th><th>loading</th><th>computing</th><th>waiting</th>"]
    rows.append("</tr>")
    for timeline in page.timelines:
        first, load, *others = (
            f"{1e3 * seconds:,.0f} ms"
            for seconds in (
                timeline.ttft_s,
                *map(timeline.total_s, (Track.LOAD, Track.COMPUTE, Track.STALL)),
            )
        )
        if _is_copying(timeline):
            load = f"{COPYING}: {load}"
        numbers = "".join(f"<td>{text}</td>" for text in (first, load, *others))
        rows.append(f"<tr><td>{escape(timeline.name)}</td>{numbers}</tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _drawing(timeline: Timeline, longest_s: float) -> str:
    """One panel; rows are layers, or blocks where loads have no layer."""
    timeline = timeline.by_row()
    is_layered = not any(e.track is Track.LOAD and e.layer < 0 for e in timeline.events)
    drawn = {Track.LOAD, Track.STORE, Track.COMPUTE if is_layered else Track.STEP}
    bars = [e for e in timeline.events if e.track in drawn and _num_rows(e, is_layered)]
    num_rows = 1 + max((_rows_of(e, is_layered)[1] - 1 for e in bars), default=0)
    scale = _Scale(timeline.begin_us, longest_s, num_rows)
    parts = [_grid(scale, longest_s), _axis_of_rows(scale, is_layered)]
    parts += [scale.bar(event, *_rows_of(event, is_layered)) for event in bars]
    parts += [scale.wait(e) for e in timeline.events if e.track is Track.STALL]
    end = scale.x(timeline.end_us)
    parts.append(f'<line class="end" x1="{end}" x2="{end}" y1="{TOP}" y2="{scale.bottom}"/>')
    height = scale.bottom + AXIS_HEIGHT
    name = escape(f"{timeline.name}: load and compute by {'layer' if is_layered else 'block'}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
    )


def _num_rows(event: TraceEvent, is_layered: bool) -> int:
    return event.num_layers if is_layered else event.num_blocks


def _rows_of(event: TraceEvent, is_layered: bool) -> tuple[int, int]:
    """First row and the one behind the last."""
    first = event.layer if is_layered else event.first_block
    return first, first + _num_rows(event, is_layered)


class _Scale:
    """From microseconds and rows to the drawing's units."""

    def __init__(self, begin_us: int, longest_s: float, num_rows: int) -> None:
        self.num_rows = num_rows
        self.bottom = TOP + PANEL_HEIGHT + WAIT_HEIGHT + 4
        self.begin_us = begin_us
        self._per_us = (WIDTH - LEFT - RIGHT) / (longest_s * 1e6)
        self._row = PANEL_HEIGHT / num_rows

    def x(self, at_us: float) -> float:
        """Where a moment is."""
        return round(LEFT + (at_us - self.begin_us) * self._per_us, 2)

    def y(self, row: int) -> float:
        """Where a row begins."""
        return round(TOP + row * self._row, 2)

    def bar(self, event: TraceEvent, first: int, last: int) -> str:
        """An event in its rows."""
        gap = 0.2 * self._row if last - first == 1 else 0.0
        height = round(max(1.6, (last - first) * self._row - gap), 2)
        return self._rect(event, self.y(first), height)

    def wait(self, event: TraceEvent) -> str:
        """A wait, below the rows."""
        return self._rect(event, TOP + PANEL_HEIGHT + 4, WAIT_HEIGHT)

    def _rect(self, event: TraceEvent, y: float, height: float) -> str:
        x = self.x(event.begin_us)
        width = max(0.4, round(self.x(event.end_us) - x, 2))
        begin_ms = (event.begin_us - self.begin_us) / 1e3
        taken_ms = (event.end_us - event.begin_us) / 1e3
        text = f"{event.track.value} {label(event)}: {taken_ms:.1f} ms from {begin_ms:.1f} ms"
        return (
            f'<rect class="{event.track.value}" x="{x}" y="{y}" width="{width}" '
            f'height="{height}"><title>{escape(text)}</title></rect>'
        )


def _grid(scale: _Scale, longest_s: float) -> str:
    step_s = _round_step(longest_s / NUM_TICKS)
    parts = []
    count = int(longest_s / step_s + 1e-9)
    for tick in range(count + 1):
        x = scale.x(scale.begin_us + tick * step_s * 1e6)
        text = f"{1e3 * tick * step_s:g} ms"
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{scale.bottom}"/>')
        parts.append(f'<text x="{x}" y="{scale.bottom + 16}" text-anchor="middle">{text}</text>')
    return "".join(parts)


def _round_step(seconds: float) -> float:
    """The next number of the form 1, 2 or 5 times a power of ten."""
    power = 1.0
    while power > seconds:
        power /= 10
    while power * 10 <= seconds:
        power *= 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= seconds)


def _axis_of_rows(scale: _Scale, is_layered: bool) -> str:
    word = "layer" if is_layered else "block"
    last = scale.num_rows - 1
    bottom = TOP + PANEL_HEIGHT
    return (
        f'<text x="{LEFT - 8}" y="{TOP + 12}" text-anchor="end">{word} 0</text>'
        f'<text x="{LEFT - 8}" y="{bottom - 2}" text-anchor="end">{last}</text>'
        f'<text x="{LEFT - 8}" y="{bottom + WAIT_HEIGHT + 4}" text-anchor="end">waits</text>'
    )
