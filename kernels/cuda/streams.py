"""`ucm.kernels.streams` on a GPU: CUDA streams and events through the driver.

The handles are the driver's, so a stream of torch takes part as it is (`adopt`, with
`torch.cuda.current_stream().cuda_stream`), and torch can use one of these
(`torch.cuda.ExternalStream(stream.handle)`). Nothing here imports torch.

An error of the driver fails a stream as work that raises fails one of a CPU; what a GPU finds out
later comes out of whoever waits, and the driver repeats it from then on.
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import TYPE_CHECKING, Final

from ucm.errors import InvalidArgumentError, UcmError

if TYPE_CHECKING:
    from ucm.kernels.streams import Event, Work

    from .driver import CudaDriver

_FIRST_PAUSE_S: Final = 20e-6
_LAST_PAUSE_S: Final = 1e-3
"""A wait with a time-out asks, at first often: the driver has none."""


class CudaEvent:
    """`Event` of the driver; given back when nobody knows it any more."""

    def __init__(self, driver: CudaDriver, stream: int, error: BaseException | None) -> None:
        """Record on a stream, or stand for the error that the stream failed with."""
        self._driver = driver
        self._error = error
        if error is None:
            self._handle = driver.create_event()
            weakref.finalize(self, driver.destroy_event, self._handle).atexit = False
            driver.record_event(self._handle, stream)

    @property
    def is_reached(self) -> bool:
        """See `Event.is_reached`."""
        if self._error is not None:
            return True
        try:
            return self._driver.is_reached(self._handle)
        except UcmError:
            return True

    def wait(self, timeout_s: float | None = None) -> bool:
        """See `Event.wait`."""
        if self._error is not None:
            raise self._error
        if timeout_s is None:
            self._driver.synchronize_event(self._handle)
            return True
        stop_s, pause_s = time.monotonic() + timeout_s, _FIRST_PAUSE_S
        while not self._driver.is_reached(self._handle):
            if time.monotonic() >= stop_s:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)
        return True

    def order(self, stream: int) -> None:
        """Let a stream wait; for `CudaStream` only."""
        if self._error is not None:
            raise self._error
        self._driver.order_after(self._handle, stream)


class CudaStream:
    """`Stream` of the driver, its own or adopted."""

    def __init__(self, driver: CudaDriver, name: str, handle: int) -> None:
        self._driver = driver
        self._name = name
        self.handle = handle
        """The CUstream."""
        self._error: BaseException | None = None
        self._lock = threading.RLock()  # work may submit

    @property
    def name(self) -> str:
        """See `Stream.name`."""
        return self._name

    def submit(self, work: Work) -> None:
        """See `Stream.submit`. `work` enqueues now, on this thread; its error stays here."""
        with self._lock:
            if self._error is None:
                try:
                    work(self.handle)
                except BaseException as error:  # noqa: BLE001  belongs to who waits
                    self._error = error

    def record(self) -> CudaEvent:
        """See `Stream.record`."""
        with self._lock:
            return CudaEvent(self._driver, self.handle, self._error)

    def wait_for(self, event: Event) -> None:
        """See `Stream.wait_for`; of this back-end only: a GPU does not wait for a CPU's.

        Raises:
            InvalidArgumentError: an event of another back-end.
        """
        if not isinstance(event, CudaEvent):
            raise InvalidArgumentError("a CUDA stream waits for events of CUDA streams only")
        self.submit(event.order)

    def synchronize(self) -> None:
        """See `Stream.synchronize`."""
        self._driver.synchronize(self.handle)
        if self._error is not None:
            raise self._error


class CudaStreams:
    """`Streams` on one device."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._streams: dict[str, CudaStream] = {}
        self._own: list[int] = []
        self._lock = threading.Lock()

    def stream(self, name: str) -> CudaStream:
        """See `Streams.stream`.

        Raises:
            TierUnavailableError: the driver makes no more.
        """
        with self._lock:
            if name not in self._streams:
                handle = self._driver.create_stream()
                self._own.append(handle)
                self._streams[name] = CudaStream(self._driver, name, handle)
            return self._streams[name]

    def adopt(self, name: str, handle: int) -> CudaStream:
        """A stream that somebody else made and keeps, such as the one that torch computes on."""
        return CudaStream(self._driver, name, handle)

    def close(self) -> None:
        """See `Streams.close`."""
        with self._lock:
            self._streams.clear()
            while self._own:
                self._driver.destroy_stream(self._own.pop())
