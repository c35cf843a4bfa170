"""A recorder of what ran when: layers computed, layers loaded, waits. Off unless somebody looks.

    start_recording()                       bench, a test
    trace = active()                        engine, reader: None when nobody looks
    if trace is not None:
        trace.add(Track.LOAD, begin_us, now_us(), layers=(3, 1))
    events = stop_recording()

Invariants: nothing is recorded before `start_recording`; at most `max_events` are kept and the
others counted; any thread may add; no token ids, no text and no keys are ever in an event.

Envelope: off 0.05 us a look, on 1.5 us an event, 200 bytes each.
"""

from __future__ import annotations

import enum
import threading
import time
from typing import Final, NamedTuple

MAX_EVENTS: Final = 100_000
"""Some ten minutes of a small model; 20 MB."""


class Track(enum.StrEnum):
    """Who was busy."""

    COMPUTE = "compute"
    """The engine, with a layer's forward pass."""
    STEP = "step"
    """The engine, with a whole forward pass and the waits in it; of one request's blocks."""
    LOAD = "load"
    """A reader, with slabs on their way to the pool."""
    STALL = "stall"
    """The engine, waiting for slabs."""
    STORE = "store"
    """The copy of new blocks behind the pass."""


class TraceEvent(NamedTuple):
    """Something that took from `begin_us` to `end_us`."""

    track: Track
    begin_us: int
    """By `now_us`."""
    end_us: int
    layer: int
    """The first one; -1: not of certain layers."""
    num_layers: int
    first_block: int
    """The engine counts in the request's chain, a reader in its load; -1: not of certain blocks."""
    num_blocks: int
    request_id: str
    thread_id: int
    """Identifies the thread that did it, within the recording's process."""


class TraceRecorder:
    """Keeps events up to a limit. Thread-safe: one append an event."""

    def __init__(self, max_events: int = MAX_EVENTS) -> None:
        self.num_dropped = 0
        """Events beyond the limit; racing threads may miss one now and then."""
        self._events: list[TraceEvent] = []
        self._max_events = max_events

    def add(
        self,
        track: Track,
        begin_us: int,
        end_us: int,
        *,
        layers: tuple[int, int] = (-1, 0),
        blocks: tuple[int, int] = (-1, 0),
        request_id: str = "",
    ) -> None:
        """Record one event.

        Args:
            track: who was busy.
            begin_us: by `now_us`.
            end_us: not before `begin_us`.
            layers: (first, how many).
            blocks: (first, how many).
            request_id: the engine's name for the request.
        """
        if len(self._events) >= self._max_events:
            self.num_dropped += 1
            return
        thread_id = threading.get_ident()
        self._events.append(
            TraceEvent(track, begin_us, end_us, *layers, *blocks, request_id, thread_id)
        )

    def events(self) -> tuple[TraceEvent, ...]:
        """What was recorded so far, in the order of its begin."""
        return tuple(sorted(self._events, key=lambda event: event.begin_us))


_active: TraceRecorder | None = None


def active() -> TraceRecorder | None:
    """The recorder, or None when nobody looks; ask again for each event."""
    return _active


def start_recording(max_events: int = MAX_EVENTS) -> TraceRecorder:
    """Record from now on, in this process; a recording under way is dropped."""
    global _active  # noqa: PLW0603  one switch for the process
    _active = TraceRecorder(max_events)
    return _active


def stop_recording() -> tuple[TraceEvent, ...]:
    """Record no more; the events, or none when nothing was recording."""
    global _active
    recorder, _active = _active, None
    return recorder.events() if recorder is not None else ()


def now_us() -> int:
    """The clock of events: monotonic microseconds."""
    return time.perf_counter_ns() // 1000
