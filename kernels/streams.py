"""Named streams and events: work in order, beside other work in order, on a CPU or on a GPU.

    stream "copy"    | work | work | record(e) |
    stream "place"          | wait_for(e) ..... | work |

The seam is what CUDA has, with the same promises on both sides:

* what is submitted to one stream happens in that order, and different streams run side by side;
* an event stands for all that was submitted to its stream before it was recorded;
* a stream that waits for an event does nothing behind that point before the event is reached;
* work that raises fails its stream for good: what is behind it does not happen, and its error comes
  out of everything that waits for an event behind it, or for the stream, or on a stream that does.

An event is recorded before it can be waited for, so no two streams ever wait for each other.

    back-end      a stream is      work(handle)                            module
    CpuStreams    a thread         runs on it; the handle is 0             here
    CudaStreams   a CUstream       enqueues on the handle, at once         ucm.kernels.cuda.streams

Envelope: a hand-over to a CPU stream costs some 20 us, so it is given steps of 256 KiB and more.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from ucm.errors import CapacityError

if TYPE_CHECKING:
    from collections.abc import Callable

Work: TypeAlias = "Callable[[int], None]"
"""Gets the stream's handle: a CUstream to enqueue on, 0 on a CPU."""

MAX_QUEUED: Final = 65_536
"""Pieces of work that may wait on a CPU stream: a runaway submitter is told, not served."""


class Event(Protocol):
    """A point in a stream. Thread-safe."""

    @property
    def is_reached(self) -> bool:
        """Whether all that was before it is done, or failed; does not wait."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block the calling thread until it is reached; False when it was not in time.

        Raises:
            BaseException: what the work before it raised.
        """


class Stream(Protocol):
    """Work in order. Thread-safe; what one thread submits stays in its order."""

    @property
    def name(self) -> str:
        """For logs and traces."""

    def submit(self, work: Work) -> None:
        """Do `work` behind all that was submitted before; does not wait for it.

        Raises:
            CapacityError: too much waits already.
        """

    def record(self) -> Event:
        """An event for all that was submitted so far."""

    def wait_for(self, event: Event) -> None:
        """Let what is submitted from now on wait for an event of the same back-end, or a CPU's."""

    def synchronize(self) -> None:
        """Block until all that was submitted is done.

        Raises:
            BaseException: what it raised.
        """


class Streams(Protocol):
    """A back-end: makes streams, each name once."""

    def stream(self, name: str) -> Stream:
        """The stream of that name."""

    def close(self) -> None:
        """End all streams after what was submitted to them. Idempotent."""


class CpuEvent:
    """`Event` over a threading event."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._error: BaseException | None = None

    @property
    def is_reached(self) -> bool:
        """See `Event.is_reached`."""
        return self._reached.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """See `Event.wait`."""
        if not self._reached.wait(timeout_s):
            return False
        if self._error is not None:
            raise self._error
        return True

    def reach(self, error: BaseException | None) -> None:
        """Tell who waits; for the stream only."""
        self._error = error
        self._reached.set()


class CpuStream:
    """`Stream` with a thread of its own."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.Queue[Work | CpuEvent | None] = queue.Queue(MAX_QUEUED)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"ucm-stream-{name}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        state = f"failed: {self._error!r}" if self._error else f"{self._queue.qsize()} waiting"
        return f"CpuStream({self._name}, {state})"

    @property
    def name(self) -> str:
        """See `Stream.name`."""
        return self._name

    def submit(self, work: Work) -> None:
        """See `Stream.submit`."""
        self._put(work)

    def record(self) -> CpuEvent:
        """See `Stream.record`."""
        event = CpuEvent()
        self._put(event)
        return event

    def wait_for(self, event: Event) -> None:
        """See `Stream.wait_for`; of any back-end. Its error is this stream's from there on."""
        self._put(lambda _handle: _wait_without_end(event))

    def synchronize(self) -> None:
        """See `Stream.synchronize`."""
        self.record().wait()

    def close(self) -> None:
        """End the thread after what was submitted."""
        self._queue.put(None)
        self._thread.join()

    def _put(self, item: Work | CpuEvent) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            raise CapacityError(f"stream {self._name}: {MAX_QUEUED} pieces of work wait") from None

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, CpuEvent):
                item.reach(self._error)
            elif self._error is None:
                self._error = _error_of(item)


class CpuStreams:
    """`Streams` of threads, one a stream."""

    def __init__(self) -> None:
        self._streams: dict[str, CpuStream] = {}
        self._lock = threading.Lock()

    def stream(self, name: str) -> CpuStream:
        """See `Streams.stream`."""
        with self._lock:
            if name not in self._streams:
                self._streams[name] = CpuStream(name)
            return self._streams[name]

    def close(self) -> None:
        """See `Streams.close`."""
        with self._lock:
            while self._streams:
                self._streams.popitem()[1].close()


def _wait_without_end(event: Event) -> None:
    event.wait()


def _error_of(work: Work) -> BaseException | None:
    """Run it; whatever it raises belongs to who waits, as a future's does."""
    try:
        work(0)
    except BaseException as error:  # noqa: BLE001  the outermost loop of the stream's thread
        return error
    return None
