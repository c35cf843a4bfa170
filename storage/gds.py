"""`FileIo` over kvikio's `CuFile`: NVMe straight to device memory where GPUDirect Storage works.

Envelope: a slab of 1 MiB is one cuFile call, of which kvikio's pool has `io_threads` at once: the
device's ceiling, without a copy through host memory. In compatibility mode each crosses a pinned
bounce buffer once more.

    IoRequest       host memory only       PosixFileIo: cuFile has nothing to add, and kvikio has no
                                           iovecs: slots of 256 KiB took 3.5 times the CPU time
    DeviceRequest   device and host        kvikio

    caller            submit parts ... -> bounded bytes in flight -> [done queue] -> check -> result
    kvikio's pool        preadv / cuFileRead of each part
    completion thread       get() of each part, in the order of submission; bytes given back

kvikio's futures have only `get` and `done`, so one thread of ours waits for them, in order (its
pool works in that order, too). Checks run on the thread that asked, while later requests are under
way: a slow check delays neither the budget nor another caller. A call returns only when nothing of
it is in flight any more, also when a check raises: nobody writes to its buffers afterwards.

Files are opened, created, synced, grown and punched by `PosixFileIo`: kvikio gets the open file
through /proc/self/fd, so that no name is looked up twice. Errors of kvikio are RuntimeErrors with
text; they become errno values here and nowhere else. What is not page-aligned in a DeviceRequest is
refused: EINVAL.

kvikio is imported here only, when a `GdsFileIo` is made. Its settings are the process's: the last
one made decides. Whether it may be made at all is `ucm.storage.io_choice`'s business: opening the
driver can hang for ever on a machine without one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ucm.layout import ALIGNMENT_BYTES

from .device import DeviceBuffer, DeviceRequest
from .file_io import FileHandle, IoRequest, PosixFileIo, is_aligned
from .forwarded_files import ForwardedFiles

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

log = logging.getLogger(__name__)

TASK_BYTES = 4 << 20
"""Larger parts are split over kvikio's threads; also the size of its bounce buffers."""

_FOREIGN_ERRORS = (
    RuntimeError, OSError, ValueError, TypeError, MemoryError, ArithmeticError, LookupError,
)  # fmt: skip
"""What Cython makes of C++ exceptions."""

_ERRNO_BY_TEXT = {os.strerror(code): code for code in sorted(errno.errorcode, reverse=True)}
_END_OF_FILE_TEXT = "EOF"
_BAD_FILE_TEXT = "POSIX error: Operation not permitted"
"""What kvikio says for EBADF."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GdsOptions:
    """Limits and mode of a `GdsFileIo`."""

    direct: bool
    """True: cuFile, and an error where it does not work. False: kvikio's compatibility mode."""
    io_threads: int = 8
    """Threads of kvikio's pool."""
    max_inflight_bytes: int = 256 << 20
    """Submitted and not transferred yet, over all callers; one larger request goes alone."""
    max_registrations: int = 64
    """Device allocations registered with cuFile; more work, through cuFile's own buffers."""


@dataclass(slots=True, eq=False)
class _Transfer:
    """One request on its way."""

    index: int
    request: DeviceRequest
    nbytes: int
    done: queue.SimpleQueue[_Transfer]
    parts: list[tuple[Any, int]] = field(default_factory=list)
    """kvikio's futures and how many bytes each must have moved."""
    code: int = 0


class GdsFileIo(ForwardedFiles):
    """`DeviceFileIo` over kvikio. Thread-safe; every call blocks its caller until it is done.

    A sync of the host's descriptor is enough: kvikio's descriptors are of the same file.
    """

    def __init__(self, options: GdsOptions) -> None:
        """Import kvikio and set its process-wide defaults.

        Raises:
            OSError: kvikio cannot be loaded.
        """
        self._options = options
        self._kvikio = _configured_kvikio(options)
        self._posix = PosixFileIo(options.io_threads)
        super().__init__(self._posix)
        self._files: dict[FileHandle, Any] = {}
        self._is_closed = False
        self._inflight_bytes = 0
        self._num_inflight = 0
        self._turn = threading.Lock()
        self._room = threading.Condition()
        self._submitted: queue.SimpleQueue[_Transfer | None] = queue.SimpleQueue()
        self._registry = BufferRegistry(self._kvikio, options)
        self._reaper = threading.Thread(target=self._reap, name="ucm-gds", daemon=True)
        self._reaper.start()

    def __repr__(self) -> str:
        mode = "cuFile" if self._options.direct else "compatibility mode"
        return f"GdsFileIo({mode}, {len(self._files)} files, {self._inflight_bytes} B in flight)"

    @property
    def registry(self) -> BufferRegistry:
        """The device allocations that cuFile knows."""
        return self._registry

    @property
    def inflight_bytes(self) -> int:
        """Bytes submitted and not transferred yet, over all callers."""
        return self._inflight_bytes

    def open(self, path: Path, *, create: bool, writable: bool) -> FileHandle:
        """See `FileIo.open`."""
        return self._known(
            self._posix.open(path, create=create, writable=writable), writable=writable
        )

    def adopt(self, fd: int) -> FileHandle:
        """See `DeviceFileIo.adopt`."""
        return self._known(FileHandle(os.dup(fd)), writable=False)

    def forget(self, buffer: DeviceBuffer) -> None:
        """See `DeviceFileIo.forget`."""
        self._registry.forget(buffer)

    def _known(self, file: FileHandle, *, writable: bool) -> FileHandle:
        """Make a file of ours known to kvikio, which opens it once more."""
        try:
            with _as_os_error():
                name = f"/proc/self/fd/{file}"
                self._files[file] = self._kvikio.CuFile(name, "r+" if writable else "r")
        except OSError:
            self._posix.close_file(file)
            raise
        return file

    def read_batch(self, requests: Sequence[IoRequest | DeviceRequest]) -> list[int]:
        """See `DeviceFileIo.read_batch`."""
        return self._run(requests, reading=True)

    def write_batch(self, requests: Sequence[IoRequest | DeviceRequest]) -> list[int]:
        """See `DeviceFileIo.write_batch`."""
        return self._run(requests, reading=False)

    def close_file(self, file: FileHandle) -> None:
        """See `FileIo.close_file`."""
        try:
            with _as_os_error():
                self._files.pop(file).close()
        finally:
            self._posix.close_file(file)

    def close(self) -> None:
        """See `FileIo.close`. Waits for what is in flight, then deregisters every buffer."""
        with self._room:
            self._is_closed = True
            self._room.wait_for(lambda: not self._num_inflight)
        if self._reaper.is_alive():
            self._submitted.put(None)
            self._reaper.join()
        self._registry.close()
        self._posix.close()

    def _run(self, requests: Sequence[IoRequest | DeviceRequest], *, reading: bool) -> list[int]:
        results = [0] * len(requests)
        of_host: list[tuple[int, IoRequest]] = []
        done: queue.SimpleQueue[_Transfer] = queue.SimpleQueue()
        num_waiting = 0
        try:
            for index, request in enumerate(requests):
                if isinstance(request, IoRequest):
                    of_host.append((index, request))
                    continue
                results[index] = self._refusal(request, reading=reading)
                transfer = _Transfer(index, request, _length(request), done)
                results[index] = results[index] or self._admit(transfer.nbytes)
                if not results[index]:
                    num_waiting += 1
                    self._submit(transfer, reading=reading)
            self._run_of_host(of_host, results, reading=reading)
            while num_waiting:
                transfer = done.get()
                num_waiting -= 1
                results[transfer.index] = _checked(transfer, reading=reading)
        finally:  # a check raised: whatever is under way still uses the caller's memory
            for _ in range(num_waiting):
                done.get()
        return results

    def _run_of_host(
        self, of_host: list[tuple[int, IoRequest]], results: list[int], *, reading: bool
    ) -> None:
        batch = [request for _, request in of_host]
        codes = self._posix.read_batch(batch) if reading else self._posix.write_batch(batch)
        for (index, _), code in zip(of_host, codes, strict=True):
            results[index] = code

    def _refusal(self, request: DeviceRequest, *, reading: bool) -> int:
        """Why a request is not even begun; 0 when it is."""
        if request.offset % ALIGNMENT_BYTES or not _all_aligned(request):
            return errno.EINVAL
        if request.file not in self._files:
            return errno.EBADF
        if not reading and request.check is not None and not request.check():
            return errno.EBADMSG
        return 0

    def _admit(self, nbytes: int) -> int:
        """Wait until so much more may be in flight, one caller after another; 0 when it may.

        EBADF once it is closed. What is admitted must be submitted.
        """
        with self._turn, self._room:  # the turn keeps small ones from overtaking a large one
            self._room.wait_for(
                lambda: (
                    not self._num_inflight
                    or self._inflight_bytes + nbytes <= self._options.max_inflight_bytes
                )
            )
            if self._is_closed:
                return errno.EBADF
            self._inflight_bytes += nbytes
            self._num_inflight += 1
            return 0

    def _submit(self, transfer: _Transfer, *, reading: bool) -> None:
        """Hand an admitted request's parts to kvikio.

        What cannot be submitted is the transfer's `code`: what was before it is still waited for.
        """
        request, offset = transfer.request, transfer.request.offset
        try:
            file = self._files[request.file]
            call = file.pread if reading else file.pwrite
            for buffer in request.buffers:
                if isinstance(buffer, DeviceBuffer):
                    self._registry.ensure(buffer)
                future = call(buffer, buffer.nbytes, offset, TASK_BYTES)
                transfer.parts.append((future, buffer.nbytes))
                offset += buffer.nbytes
        except _FOREIGN_ERRORS as error:
            transfer.code = errno_of(error)
        finally:
            self._submitted.put(transfer)

    def _reap(self) -> None:
        """The completion thread: wait for transfers in order until told to end."""
        while (transfer := self._submitted.get()) is not None:
            for future, nbytes in transfer.parts:
                code = _result(future, nbytes)
                transfer.code = transfer.code or code
            if transfer.code == errno.EIO and self._is_past_end(transfer):
                transfer.code = errno.ENODATA
            with self._room:
                self._inflight_bytes -= transfer.nbytes
                self._num_inflight -= 1
                self._room.notify_all()
            transfer.done.put(transfer)

    def _is_past_end(self, transfer: _Transfer) -> bool:
        """Whether a short transfer is the file's fault: cuFile does not say."""
        try:
            size = self._posix.size(transfer.request.file)
        except OSError:
            return False
        return transfer.request.offset + transfer.nbytes > size


class BufferRegistry:
    """Device allocations registered with cuFile: each once, at its first use. Thread-safe.

    Holds on to what it registered, so that an address is never another allocation's meanwhile.
    """

    def __init__(self, kvikio: Any, options: GdsOptions) -> None:
        self._kvikio = kvikio
        self._limit = options.max_registrations if options.direct else 0
        self._registered: dict[tuple[int, int], DeviceBuffer] = {}
        self._refused: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._registered)

    def ensure(self, buffer: DeviceBuffer) -> None:
        """Register the buffer's allocation unless it is, the registry is full, or cuFile says no.

        A transfer works without, through cuFile's own buffers.
        """
        with self._lock:
            is_known = buffer.base in self._registered or buffer.base in self._refused
            if is_known or len(self._registered) >= self._limit:
                return
            try:
                self._kvikio.memory_register(buffer)
            except _FOREIGN_ERRORS as error:
                log.warning("cuFile does not register %d bytes: %s", buffer.base[1], error)
                if len(self._refused) < self._limit:
                    self._refused.add(buffer.base)
                return
            self._registered[buffer.base] = buffer

    def forget(self, buffer: DeviceBuffer) -> None:
        """Deregister the buffer's allocation, before its owner frees it. Nothing may be in flight.

        Unknown buffers are ignored.
        """
        with self._lock:
            self._refused.discard(buffer.base)
            known = self._registered.pop(buffer.base, None)
            if known is not None:
                self._deregister(known)

    def close(self) -> None:
        """Deregister everything. Idempotent."""
        with self._lock:
            while self._registered:
                self._deregister(self._registered.popitem()[1])

    def _deregister(self, buffer: DeviceBuffer) -> None:
        try:
            self._kvikio.memory_deregister(buffer)
        except _FOREIGN_ERRORS as error:
            log.warning("cuFile does not deregister %d bytes: %s", buffer.base[1], error)


def errno_of(error: BaseException) -> int:
    """The errno value that an exception of kvikio stands for; EIO when it does not say."""
    text = str(error)
    if text.endswith(_END_OF_FILE_TEXT):
        return errno.ENODATA
    if text.endswith(_BAD_FILE_TEXT):
        return errno.EBADF
    code = _ERRNO_BY_TEXT.get(text.rpartition(": ")[2], errno.EIO)
    # cuFile's plain -1 ("see errno") is shown as the text of errno 1.
    return errno.EIO if code == errno.EPERM else code


def _configured_kvikio(options: GdsOptions) -> Any:  # untyped library
    try:
        import kvikio
        import kvikio.defaults
    except (ImportError, *_FOREIGN_ERRORS) as error:  # its loaders raise what they like
        raise OSError(errno.ELIBACC, f"kvikio cannot be loaded: {error}") from error
    mode = kvikio.CompatMode.OFF if options.direct else kvikio.CompatMode.ON
    kvikio.defaults.set(
        {
            "compat_mode": mode,
            "num_threads": options.io_threads,
            "task_size": TASK_BYTES,
            "bounce_buffer_size": TASK_BYTES,
            "auto_direct_io_read": True,  # what is cached twice is memory lost
            "auto_direct_io_write": True,
        }
    )
    return kvikio


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except _FOREIGN_ERRORS as error:
        raise OSError(errno_of(error), str(error)) from error


def _all_aligned(request: DeviceRequest) -> bool:
    return all(
        buffer.is_aligned if isinstance(buffer, DeviceBuffer) else is_aligned(buffer)
        for buffer in request.buffers
    )


def _length(request: DeviceRequest) -> int:
    return sum(buffer.nbytes for buffer in request.buffers)


def _result(future: Any, nbytes: int) -> int:
    """Wait for one part; EIO when it moved less than it should have."""
    try:
        return 0 if future.get() == nbytes else errno.EIO
    except _FOREIGN_ERRORS as error:
        return errno_of(error)


def _checked(transfer: _Transfer, *, reading: bool) -> int:
    check = transfer.request.check
    if reading and not transfer.code and check is not None and not check():
        return errno.EBADMSG
    return transfer.code
