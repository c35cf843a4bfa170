"""The `FileIo` seam: every system call on block data and superblocks, and nothing else.

Envelope: O_DIRECT, 8 to 16 threads, requests of one slot (about 1 MiB): the device's ceiling. A
request costs two hops between threads (some 20 us) on top; a single one runs on the caller.

    request | file  offset  buffers (iovec, each a multiple of 4 KiB)  check
    read    | preadv  -> check() on the I/O thread, on what now is in the buffers
    write   | check() on the I/O thread -> pwritev

Buffers that are page-aligned (arenas, `aligned_buffer`) go to the device as they are; others pass
through a bounded pool of bounce buffers, one for each thread. Short transfers are continued and
EINTR retried (Python does the latter, PEP 475). A failed `fdatasync` is never retried: after one,
the kernel may report dirty pages as clean ("Can Applications Recover from fsync Failures?",
USENIX ATC 2020).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import queue
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType, Protocol

import numpy as np

from ucm.layout import ALIGNMENT_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

FileHandle = NewType("FileHandle", int)
"""An open file of one `FileIo`."""

BOUNCE_BYTES = 1 << 20
"""Size of one bounce buffer."""

_OPEN_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW
_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02


@dataclass(frozen=True, slots=True)
class IoRequest:
    """One contiguous range of one file, from or into several buffers."""

    file: FileHandle
    offset: int
    buffers: tuple[memoryview, ...]
    """Bytes ("B"), each a multiple of 4 KiB long; writable for a read."""
    check: Callable[[], bool] | None = None
    """After a read or before a write, on the I/O thread; False fails the request: EBADMSG."""


class FileIo(Protocol):
    """System calls on block data. Thread-safe; all calls block.

    A batch's results are `errno` values, 0 for a request that was transferred whole: EBADMSG when
    its check said no, ENODATA when the file ended before it. Single calls raise `OSError`.
    """

    def open(self, path: Path, *, create: bool, writable: bool) -> FileHandle:
        """Open a regular file, mode 0600; never follows a link. `create` refuses an old one."""

    def size(self, file: FileHandle) -> int:
        """The file's length in bytes."""

    def preallocate(self, file: FileHandle, size_bytes: int) -> None:
        """Reserve disk space for the first `size_bytes`; what is there stays."""

    def read_batch(self, requests: Sequence[IoRequest]) -> list[int]:
        """Transfer every request; an `errno` for each, in order."""

    def write_batch(self, requests: Sequence[IoRequest]) -> list[int]:
        """Transfer every request; an `errno` for each, in order. Not durable by itself."""

    def fdatasync(self, file: FileHandle) -> None:
        """Make what was written durable. After a failure the file's state is unknown."""

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""

    def replace_file(self, path: Path, data: bytes) -> None:
        """Write a small file whole and durably, or leave the old one: a crash shows no mixture."""

    def punch_hole(self, file: FileHandle, offset: int, length: int) -> None:
        """Give the range's disk space back; it then reads as zeros."""

    def close_file(self, file: FileHandle) -> None:
        """Close one file."""

    def close(self) -> None:
        """End the threads. Files must be closed before. Idempotent."""


def aligned_buffer(size_bytes: int) -> memoryview:
    """Fresh zeroed memory on a page boundary."""
    return memoryview(mmap.mmap(-1, size_bytes))


def is_aligned(buffer: memoryview) -> bool:
    """Whether O_DIRECT can transfer to and from `buffer` as it is."""
    if buffer.nbytes % ALIGNMENT_BYTES:
        return False
    if buffer.readonly or not buffer.nbytes:
        address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    else:  # a tenth of the time
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    return address % ALIGNMENT_BYTES == 0


def replace_file(path: Path, data: bytes) -> None:
    """Write `path` by a temporary file, fsync, rename and fsync of the folder.

    Raises:
        OSError: from any step; `path` is then old or new, never a mixture.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _OPEN_FLAGS, 0o600)
        try:
            remaining = memoryview(data)
            while remaining:
                remaining = remaining[os.write(fd, remaining) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable.

    Raises:
        OSError: the folder cannot be opened or synced.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _OPEN_FLAGS)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class PosixFileIo:
    """`FileIo` over preadv, pwritev and O_DIRECT."""

    def __init__(self, io_threads: int) -> None:
        self._io_threads = io_threads
        self._pool = ThreadPoolExecutor(io_threads, thread_name_prefix="ucm-io")
        self._bounce: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._bounce_made = 0
        self._lock = threading.Lock()
        self._is_direct = True

    @property
    def is_direct(self) -> bool:
        """False once a file system refused O_DIRECT: its files go through the page cache."""
        return self._is_direct

    def open(self, path: Path, *, create: bool, writable: bool) -> FileHandle:
        """See `FileIo.open`. Falls back to buffered I/O where O_DIRECT is refused."""
        flags = _OPEN_FLAGS | (os.O_RDWR if writable else os.O_RDONLY)
        flags |= (os.O_CREAT | os.O_EXCL) if create else 0
        try:
            return FileHandle(os.open(path, flags | os.O_DIRECT, 0o600))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        self._is_direct = False
        return FileHandle(os.open(path, flags & ~os.O_EXCL, 0o600))  # the refusal may create it

    def size(self, file: FileHandle) -> int:
        """See `FileIo.size`."""
        return os.fstat(file).st_size

    def preallocate(self, file: FileHandle, size_bytes: int) -> None:
        """See `FileIo.preallocate`."""
        os.posix_fallocate(file, 0, size_bytes)

    def read_batch(self, requests: Sequence[IoRequest]) -> list[int]:
        """See `FileIo.read_batch`."""
        return self._run(self._read, requests)

    def write_batch(self, requests: Sequence[IoRequest]) -> list[int]:
        """See `FileIo.write_batch`."""
        return self._run(self._write, requests)

    def fdatasync(self, file: FileHandle) -> None:
        """See `FileIo.fdatasync`."""
        os.fdatasync(file)

    def sync_folder(self, path: Path) -> None:
        """See `FileIo.sync_folder`."""
        sync_folder(path)

    def replace_file(self, path: Path, data: bytes) -> None:
        """See `FileIo.replace_file`."""
        replace_file(path, data)

    def punch_hole(self, file: FileHandle, offset: int, length: int) -> None:
        """See `FileIo.punch_hole`."""
        libc = ctypes.CDLL(None, use_errno=True)
        mode = ctypes.c_int(_FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE)
        if libc.fallocate(ctypes.c_int(file), mode, ctypes.c_long(offset), ctypes.c_long(length)):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def close_file(self, file: FileHandle) -> None:
        """See `FileIo.close_file`."""
        os.close(file)

    def close(self) -> None:
        """See `FileIo.close`."""
        self._pool.shutdown(wait=True)

    def _run(
        self, transfer: Callable[[IoRequest], int], requests: Sequence[IoRequest]
    ) -> list[int]:
        results = [0] * len(requests)
        counter = itertools.count()  # `next` is atomic under the interpreter lock

        def drain() -> None:
            while (index := next(counter)) < len(requests):
                results[index] = transfer(requests[index])

        workers = min(self._io_threads, len(requests))
        if workers <= 1:
            drain()
        else:
            futures = [self._pool.submit(drain) for _ in range(workers)]
            wait(futures)  # also where a check raises: who gets that may reuse the memory
            for future in futures:
                future.result()
        return results

    def _read(self, request: IoRequest) -> int:
        code = self._transfer(request, os.preadv, reading=True)
        if code == 0 and request.check is not None and not request.check():
            return errno.EBADMSG
        return code

    def _write(self, request: IoRequest) -> int:
        if request.check is not None and not request.check():
            return errno.EBADMSG
        return self._transfer(request, os.pwritev, reading=False)

    def _transfer(
        self,
        request: IoRequest,
        call: Callable[[int, list[memoryview], int], int],
        *,
        reading: bool,
    ) -> int:
        try:
            if all(is_aligned(buffer) for buffer in request.buffers):
                return transfer_all(call, request.file, list(request.buffers), request.offset)
            with self._bounce_buffer() as bounce:
                return _transfer_bounced(call, request, bounce, reading=reading)
        except OSError as error:
            return error.errno or errno.EIO

    @contextlib.contextmanager
    def _bounce_buffer(self) -> Iterator[memoryview]:
        with self._lock:
            is_new = self._bounce_made < self._io_threads and self._bounce.empty()
            self._bounce_made += is_new
        buffer = aligned_buffer(BOUNCE_BYTES) if is_new else self._bounce.get()
        try:
            yield buffer
        finally:
            self._bounce.put(buffer)


def transfer_all(
    call: Callable[[int, list[memoryview], int], int],
    file: FileHandle,
    buffers: list[memoryview],
    offset: int,
) -> int:
    """Repeat `call` until all of `buffers` is transferred; 0, or ENODATA at the end of the file.

    A short direct transfer ends on a block boundary, so what remains is aligned again; where it
    does not (a tail at the end of the file), the next call finds the end.
    """
    while buffers:
        done = call(file, buffers, offset)
        if done == 0:
            return errno.ENODATA
        offset += done
        while buffers and done >= buffers[0].nbytes:
            done -= buffers.pop(0).nbytes
        if done and done % ALIGNMENT_BYTES:
            return errno.ENODATA
        if done:
            buffers[0] = buffers[0][done:]
    return 0


def _transfer_bounced(
    call: Callable[[int, list[memoryview], int], int],
    request: IoRequest,
    bounce: memoryview,
    *,
    reading: bool,
) -> int:
    offset = request.offset
    for buffer in request.buffers:
        for start in range(0, buffer.nbytes, bounce.nbytes):
            part = buffer[start : start + bounce.nbytes]
            aligned = bounce[: part.nbytes]
            if not reading:
                aligned[:] = part
            code = transfer_all(call, request.file, [aligned], offset)
            if code:
                return code
            if reading:
                part[:] = aligned
            offset += part.nbytes
    return 0
