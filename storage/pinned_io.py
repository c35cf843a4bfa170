"""`FileIo` with POSIX calls and our own pinned buffers: device memory without kvikio.

Envelope: a slot of 1 MiB is one preadv, as on the way to host memory, and one copy over the bus
(40 us at 25 GB/s), which runs while the next piece is being read.

    IoRequest       PosixFileIo
    DeviceRequest   file <-preadv, pwritev-> lane's pinned pages <-copies on its stream-> device
                         <-------------------- host buffers -------------------->

    read    piece 0  | preadv | copy              |
            piece 1           | preadv | copy     | synchronise -> check
            piece 2                    | (page free?) preadv | copy ...

A lane is a stream and two pinned pages; a thread of the pool uses one at a time, so that many
threads never hold more than `2 * io_threads * PIECE_BYTES` of pinned memory. A piece is read with
one preadv, whatever buffers it is for. A call returns only when nothing of it is in flight any
more, also when a check raises: nobody writes to its buffers afterwards.

The driver is loaded and its context taken (some 500 MB of device memory) at the first
`DeviceRequest`: a daemon that moves host memory only never does. Whether the driver may be touched
at all is `ucm.storage.io_choice`'s business. What the driver refuses is EIO.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import logging
import os
import queue
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ucm.errors import TierUnavailableError
from ucm.kernels.cuda.driver import CudaDriver
from ucm.layout import ALIGNMENT_BYTES

from .device import DeviceBuffer, DeviceRequest
from .file_io import FileHandle, IoRequest, PosixFileIo, is_aligned, transfer_all
from .forwarded_files import ForwardedFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

log = logging.getLogger(__name__)

PIECE_BYTES: Final = 1 << 20
"""Most that one system call moves, and the size of a pinned page."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some bytes of a piece, and where they go to or come from."""

    at: int
    """Offset in the piece."""
    buffer: memoryview | DeviceBuffer


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of the file that one system call transfers."""

    offset: int
    nbytes: int
    parts: tuple[Part, ...]


def pieces_of(request: DeviceRequest, limit_bytes: int) -> Iterator[Piece]:
    """Cut a request into ranges of at most `limit_bytes`, each with its share of the buffers.

    | buffer 0 | buffer 1        | b 2 |        a request
    | piece 0       | piece 1       | p 2 |     limit_bytes each
    """
    offset, parts, filled = request.offset, list[Part](), 0
    for buffer in request.buffers:
        start = 0
        while start < buffer.nbytes:
            length = min(buffer.nbytes - start, limit_bytes - filled)
            parts.append(Part(filled, buffer[start : start + length]))
            start, filled = start + length, filled + length
            if filled == limit_bytes:
                yield Piece(offset, filled, tuple(parts))
                offset, parts, filled = offset + filled, [], 0
    if parts:
        yield Piece(offset, filled, tuple(parts))


class PinnedFileIo(ForwardedFiles):
    """`DeviceFileIo` over preadv, pwritev and pinned memory. Thread-safe; every call blocks."""

    def __init__(self, io_threads: int, load_driver: Callable[[], CudaDriver] = CudaDriver) -> None:
        """Prepare; neither the driver nor a thread is started yet.

        Args:
            io_threads: how many requests are transferred at once.
            load_driver: initialises the driver, at the first `DeviceRequest`.
        """
        self._io_threads = io_threads
        self._load_driver = load_driver
        self._posix = PosixFileIo(io_threads)
        super().__init__(self._posix)
        self._pool = ThreadPoolExecutor(io_threads, thread_name_prefix="ucm-pinned")
        self._lanes: list[_Lane] = []
        self._idle: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        self._driver: CudaDriver | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"PinnedFileIo({len(self._lanes)} of {self._io_threads} lanes)"

    def open(self, path: Path, *, create: bool, writable: bool) -> FileHandle:
        """See `FileIo.open`."""
        return self._posix.open(path, create=create, writable=writable)

    def adopt(self, fd: int) -> FileHandle:
        """See `DeviceFileIo.adopt`."""
        return FileHandle(os.dup(fd))

    def forget(self, buffer: DeviceBuffer) -> None:
        """See `DeviceFileIo.forget`: nothing is kept."""

    def read_batch(self, requests: Sequence[IoRequest | DeviceRequest]) -> list[int]:
        """See `DeviceFileIo.read_batch`."""
        return self._run(requests, self._read, self._posix.read_batch)

    def write_batch(self, requests: Sequence[IoRequest | DeviceRequest]) -> list[int]:
        """See `DeviceFileIo.write_batch`."""
        return self._run(requests, self._write, self._posix.write_batch)

    def close_file(self, file: FileHandle) -> None:
        """See `FileIo.close_file`."""
        self._posix.close_file(file)

    def close(self) -> None:
        """See `FileIo.close`. Waits for what is in flight, then gives the pinned memory back."""
        with self._lock:
            self._is_closed = True
        self._pool.shutdown(wait=True)
        while self._lanes:
            self._lanes.pop().close()
        self._posix.close()

    def _run(
        self,
        requests: Sequence[IoRequest | DeviceRequest],
        transfer: Callable[[DeviceRequest], int],
        run_of_host: Callable[[Sequence[IoRequest]], list[int]],
    ) -> list[int]:
        results = [errno.EBADF] * len(requests)
        futures = {}
        of_host: list[tuple[int, IoRequest]] = []
        for index, request in enumerate(requests):
            if isinstance(request, IoRequest):
                of_host.append((index, request))
                continue
            with self._lock:
                if not self._is_closed:
                    futures[index] = self._pool.submit(transfer, request)
        try:
            codes = run_of_host([request for _, request in of_host]) if of_host else []
        finally:  # whatever is under way uses the caller's memory
            wait(futures.values())
        for (index, _), code in zip(of_host, codes, strict=True):
            results[index] = code
        for index, future in futures.items():
            results[index] = future.result()
        return results

    def _read(self, request: DeviceRequest) -> int:
        code = self._transfer(request, _Lane.read)
        if code == 0 and request.check is not None and not request.check():
            return errno.EBADMSG
        return code

    def _write(self, request: DeviceRequest) -> int:
        if request.check is not None and not request.check():
            return errno.EBADMSG
        return self._transfer(request, _Lane.write)

    def _transfer(
        self, request: DeviceRequest, move: Callable[[_Lane, FileHandle, Iterator[Piece]], int]
    ) -> int:
        if request.offset % ALIGNMENT_BYTES or not all(map(_is_aligned, request.buffers)):
            return errno.EINVAL
        try:
            with self._lane() as lane:
                return move(lane, request.file, pieces_of(request, PIECE_BYTES))
        except TierUnavailableError as error:
            log.warning("a transfer of device memory failed: %s", error)
            return errno.EIO
        except OSError as error:
            return error.errno or errno.EIO

    @contextlib.contextmanager
    def _lane(self) -> Iterator[_Lane]:
        """A lane of one's own; there are never more than threads that ask for one."""
        try:
            lane = self._idle.get_nowait()
        except queue.Empty:
            lane = self._new_lane()
        try:
            yield lane
        finally:
            self._idle.put(lane)

    def _new_lane(self) -> _Lane:
        with self._lock:
            if self._driver is None:
                self._driver = self._load_driver()
            self._lanes.append(_Lane(self._driver))
            return self._lanes[-1]


@dataclass(frozen=True, slots=True)
class _Page:
    """A pinned page and the event behind the last copy that uses it."""

    address: int
    memory: memoryview
    event: int


class _Lane:
    """A stream and two pages, used by one thread at a time.

    Whatever happens, `read` and `write` end with the stream idle.
    """

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        with contextlib.ExitStack() as undo:
            self._stream = driver.create_stream()
            undo.callback(driver.destroy_stream, self._stream)
            self._pages = [_new_page(driver, undo) for _ in range(2)]
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Give everything back. The driver may refuse, after an error of the device."""
        try:
            self._undo.close()
        except TierUnavailableError as error:
            log.warning("pinned memory was not given back: %s", error)

    def read(self, file: FileHandle, pieces: Iterator[Piece]) -> int:
        """Move pieces from a file to their buffers; an `errno` value.

        Raises:
            OSError: from preadv.
            TierUnavailableError: from the driver.
        """
        driver, stream = self._driver, self._stream
        try:
            for piece, page in zip(pieces, itertools.cycle(self._pages), strict=False):
                driver.synchronize_event(page.event)  # behind the copy of two pieces ago
                code = transfer_all(os.preadv, file, _vector(piece, page), piece.offset)
                if code:
                    return code
                for at, buffer in _of_device(piece):
                    driver.copy(buffer.address, page.address + at, buffer.nbytes, stream)
                driver.record_event(page.event, stream)
        finally:
            driver.synchronize(stream)
        return 0

    def write(self, file: FileHandle, pieces: Iterator[Piece]) -> int:
        """Move pieces from their buffers to a file; as `read`."""
        pairs = zip(pieces, itertools.cycle(self._pages), strict=False)
        try:
            current = self._load(next(pairs, None))
            while current is not None:
                following = self._load(next(pairs, None))  # copied while this one is written
                piece, page = current
                self._driver.synchronize_event(page.event)
                code = transfer_all(os.pwritev, file, _vector(piece, page), piece.offset)
                if code:
                    return code
                current = following
        finally:
            self._driver.synchronize(self._stream)
        return 0

    def _load(self, pair: tuple[Piece, _Page] | None) -> tuple[Piece, _Page] | None:
        """Begin to copy a piece's device memory into its page."""
        if pair is None:
            return None
        piece, page = pair
        for at, buffer in _of_device(piece):
            self._driver.copy(page.address + at, buffer.address, buffer.nbytes, self._stream)
        self._driver.record_event(page.event, self._stream)
        return pair


def _new_page(driver: CudaDriver, undo: contextlib.ExitStack) -> _Page:
    address = driver.allocate_pinned(PIECE_BYTES)
    undo.callback(driver.free_pinned, address)
    event = driver.create_event()
    undo.callback(driver.destroy_event, event)
    memory = memoryview((ctypes.c_ubyte * PIECE_BYTES).from_address(address)).cast("B")
    return _Page(address, memory, event)


def _of_device(piece: Piece) -> Iterator[tuple[int, DeviceBuffer]]:
    return ((p.at, p.buffer) for p in piece.parts if isinstance(p.buffer, DeviceBuffer))


def _vector(piece: Piece, page: _Page) -> list[memoryview]:
    """What one system call transfers: host memory itself, the page in device memory's stead."""
    return [
        page.memory[part.at : part.at + part.buffer.nbytes]
        if isinstance(part.buffer, DeviceBuffer)
        else part.buffer
        for part in piece.parts
    ]


def _is_aligned(buffer: memoryview | DeviceBuffer) -> bool:
    return buffer.is_aligned if isinstance(buffer, DeviceBuffer) else is_aligned(buffer)
