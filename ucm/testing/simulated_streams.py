"""Streams whose work happens when, and in which order, a test says: every schedule, in one thread.

A `pick` chooses which stream goes on; who waits for an event lets the others go on until it is
reached. So a property test drives code that has several threads through any interleaving of its
steps, and replays it.

    stream(name)          as a thread: what is submitted runs when it is picked
    device_stream(name)   as a GPU: it is called at once, and what it enqueues is done when picked
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ucm.kernels.streams import Event, Work


class SimulatedEvent:
    """`Event` of a simulated stream."""

    def __init__(self, world: SimulatedStreams) -> None:
        self._world = world
        self.is_reached = False

    def wait(self, timeout_s: float | None = None) -> bool:
        """Let others go on until it is reached; with a time-out of 0 only look."""
        while not self.is_reached and timeout_s != 0:
            if not self._world.step():
                raise AssertionError("waits for what nobody will do")
        return self.is_reached


class SimulatedStream:
    """`Stream` that does one piece of work each time it is picked."""

    def __init__(self, world: SimulatedStreams, name: str) -> None:
        self._world = world
        self._items: deque[Work | SimulatedEvent | tuple[Event]] = deque()
        self._is_running = False
        self.name = name

    def submit(self, work: Work) -> None:
        """See `Stream.submit`."""
        self._items.append(work)

    def record(self) -> SimulatedEvent:
        """See `Stream.record`."""
        event = SimulatedEvent(self._world)
        self._items.append(event)
        return event

    def wait_for(self, event: Event) -> None:
        """See `Stream.wait_for`."""
        self._items.append((event,))

    def synchronize(self) -> None:
        """See `Stream.synchronize`."""
        self.record().wait()

    @property
    def can_go_on(self) -> bool:
        """Whether its next item does not wait."""
        if not self._items or self._is_running:
            return False
        item = self._items[0]
        return not isinstance(item, tuple) or item[0].is_reached

    def go_on(self) -> None:
        """Do the next item."""
        item = self._items.popleft()
        if isinstance(item, SimulatedEvent):
            item.is_reached = True
        elif not isinstance(item, tuple):
            self._is_running = True
            try:
                item(0)
            finally:
                self._is_running = False


class SimulatedDeviceStream:
    """`Stream` of a GPU that does what was enqueued as late as a test says."""

    def __init__(self, inner: SimulatedStream, handle: int) -> None:
        self._inner = inner
        self._handle = handle
        self.name = inner.name

    def submit(self, work: Work) -> None:
        """See `Stream.submit`; `work` calls `SimulatedStreams.enqueue` with the handle."""
        work(self._handle)

    def record(self) -> SimulatedEvent:
        """See `Stream.record`."""
        return self._inner.record()

    def wait_for(self, event: Event) -> None:
        """See `Stream.wait_for`."""
        self._inner.wait_for(event)

    def synchronize(self) -> None:
        """See `Stream.synchronize`."""
        self._inner.synchronize()


class SimulatedStreams:
    """`Streams` of one test."""

    def __init__(self, pick: Callable[[Sequence[SimulatedStream]], SimulatedStream]) -> None:
        self._pick = pick
        self._streams: dict[str, SimulatedStream] = {}

    def stream(self, name: str) -> SimulatedStream:
        """See `Streams.stream`."""
        return self._streams.setdefault(name, SimulatedStream(self, name))

    def device_stream(self, name: str) -> SimulatedDeviceStream:
        """One that behaves as a GPU's."""
        inner = self.stream(name)
        handle = 1 + list(self._streams).index(name)
        return SimulatedDeviceStream(inner, handle)

    def enqueue(self, handle: int, effect: Callable[[], None]) -> None:
        """Do `effect` in the order of a device's stream; at once where the handle is a CPU's."""
        if handle:
            name = list(self._streams)[handle - 1]
            self._streams[name].submit(lambda _handle: effect())
        else:
            effect()

    def step(self) -> bool:
        """Let one stream do one thing; False when none can."""
        able = [stream for stream in self._streams.values() if stream.can_go_on]
        if able:
            self._pick(able).go_on()
        return bool(able)

    def close(self) -> None:
        """Do what is left."""
        while self.step():
            pass
