"""Recorded events as a timeline that Perfetto and chrome://tracing open.

The format is the Trace Event Format of Chromium's "catapult" project, JSON object form:

    {"displayTimeUnit": "ms", "traceEvents": [
      {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "overlapped"}},
      {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "compute"}},
      {"ph": "X", "name": "layer 3", "cat": "load", "pid": 1, "tid": 2, "ts": 12, "dur": 40, ...}]}

A process is one measurement (a variant of a cell), a thread one track of it, or one thread of a
track that has several; times are microseconds
from the begin of the measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ucm.tracing import TraceEvent, Track

TRACKS = tuple(Track)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One measurement's events."""

    name: str
    """Of the variant."""
    events: tuple[TraceEvent, ...]
    begin_us: int
    """When the request was made, by the events' clock."""
    end_us: int
    """When its first token was there."""
    is_copied: bool = False
    """Loads copied what the daemon had put into its memory. Its reading of the disk is in another
    process: of it there is no event but the engine's wait."""

    @property
    def ttft_s(self) -> float:
        """Seconds from the request to its first token."""
        return (self.end_us - self.begin_us) / 1e6

    def total_s(self, track: Track) -> float:
        """Seconds during which the track was busy, overlaps counted once."""
        spans = sorted((e.begin_us, e.end_us) for e in self.events if e.track is track)
        busy_us, last_us = 0, 0
        for begin_us, end_us in spans:
            busy_us += max(0, end_us - max(begin_us, last_us))
            last_us = max(last_us, end_us)
        return busy_us / 1e6

    def by_row(self) -> Timeline:
        """The same with one load a layer: from its first read's begin to its last one's end.

        A layer is read in many pieces, by several threads; a person wants to see it once. Loads
        that are of no layer stay as they are.
        """
        merged: dict[int, TraceEvent] = {}
        others = []
        for event in self.events:
            if event.layer < 0 or event.track is not Track.LOAD:
                others.append(event)
                continue
            for layer in range(event.layer, event.layer + event.num_layers):
                known = merged.get(layer, event)
                merged[layer] = known._replace(
                    layer=layer,
                    num_layers=1,
                    begin_us=min(known.begin_us, event.begin_us),
                    end_us=max(known.end_us, event.end_us),
                    first_block=-1,
                    num_blocks=0,
                )
        events = sorted([*merged.values(), *others], key=lambda event: event.begin_us)
        return replace(self, events=tuple(events))


def chrome_trace(timelines: Sequence[Timeline]) -> dict[str, Any]:
    """All timelines in one trace; see the module."""
    events: list[dict[str, Any]] = []
    for pid, timeline in enumerate(timelines, start=1):
        events.append(_meta("process_name", pid, 0, timeline.name))
        lanes = _lanes(timeline.events)
        for (track, _), lane in lanes.items():
            events.append(_meta("thread_name", pid, lane, track.value))
        events += [
            _complete(event, pid, lanes[event.track, event.thread_id], timeline.begin_us)
            for event in timeline.events
        ]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _lanes(events: Sequence[TraceEvent]) -> dict[tuple[Track, int], int]:
    """A row of its own for each thread of each track: what is in one row does not overlap."""
    used = {(event.track, event.thread_id) for event in events}
    ordered = sorted(used, key=lambda lane: (TRACKS.index(lane[0]), lane[1]))
    return {lane: number for number, lane in enumerate(ordered, start=1)}


def label(event: TraceEvent) -> str:
    """What an event was about: its layer, its blocks, or both."""
    named = (
        ("layer", event.layer, event.num_layers),
        ("block", event.first_block, event.num_blocks),
    )
    parts = [
        f"{word} {first}" if count == 1 else f"{word}s {first}-{first + count - 1}"
        for word, first, count in named
        if count
    ]
    return ", ".join(parts) or event.track.value


def _meta(name: str, pid: int, tid: int, value: str) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": {"name": value}}


def _complete(event: TraceEvent, pid: int, tid: int, begin_us: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": label(event),
        "cat": event.track.value,
        "pid": pid,
        "tid": tid,
        "ts": event.begin_us - begin_us,
        "dur": event.end_us - event.begin_us,
        "args": {
            "layer": event.layer,
            "num_layers": event.num_layers,
            "first_block": event.first_block,
            "num_blocks": event.num_blocks,
            "request": event.request_id,
        },
    }
