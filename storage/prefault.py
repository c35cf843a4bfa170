"""Making memory real ahead of its use, so that nobody who stores or loads waits for the kernel.

    arena | handed out ............ | made ahead ....... | never touched, costs nothing
          0                         use                  target

    chunk | first page by MADV_POPULATE_WRITE | the rest by MADV_COLLAPSE: one page of 2 MiB
    rest  | MADV_POPULATE_WRITE: pages of 4 KiB, where a chunk would reach behind the target

The first touch of a page costs up to 5 us (0.8 GB/s): several times the copy that touches it. A
`madvise` a step does it in bulk, on a thread that ends when it has reached its target. Who raises
the target counts the memory as used: it is. Nothing depends on success: where the kernel does not
make large pages (before 6.1, or shmem_enabled is deny) they are small, where it does not populate
(before 5.14) they come by touch as ever.

Envelope: 0.35 CPU-s/GB as large pages, 0.7 as small ones. A large page keeps what it held, needs
nobody's permission (`MADV_COLLAPSE` does not ask shmem_enabled, unless it says deny), and serves
every process that maps the file on a 2 MiB boundary (`ucm/mapping.py`).
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import threading

from ucm.mapping import HUGE_PAGE_BYTES, address_of, map_shared

log = logging.getLogger(__name__)

STEP_BYTES = 4 << 20
"""One call; what `close` waits for at most: some milliseconds. Two large pages."""

MADV_POPULATE_WRITE = 23
"""From linux/mman.h (Linux 5.14)."""

MADV_COLLAPSE = 25
"""From linux/mman.h (Linux 6.1)."""

_PASSING_ERRNOS = frozenset({errno.EAGAIN, errno.EBUSY, errno.ENOMEM})
"""Pages in use by a device just now, no whole 2 MiB free: the next chunk may fare better."""


class Prefaulter:
    """Populates one shared mapping from its start. Thread-safe.

    No method but `close`, `wait` and `wait_for` blocks.
    """

    def __init__(self, mapping: memoryview) -> None:
        """Begin with nothing; `close` it before the mapping."""
        self._size_bytes = len(mapping)
        self._address = address_of(mapping)
        self._lock = threading.Condition(threading.Lock())
        self._target_bytes = 0
        self._done_bytes = 0
        self._huge_bytes = 0
        self._makes_huge = self._address % HUGE_PAGE_BYTES == 0
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def done_bytes(self) -> int:
        """How far the mapping is populated."""
        return self._done_bytes

    @property
    def huge_bytes(self) -> int:
        """How much of it the kernel was asked to make 2 MiB pages of, and did."""
        return self._huge_bytes

    def request(self, end_bytes: int) -> None:
        """Populate up to `end_bytes` in the background; never takes anything back."""
        with self._lock:
            self._target_bytes = max(self._target_bytes, min(end_bytes, self._size_bytes))
            if self._closed or self._thread or self._done_bytes >= self._target_bytes:
                return
            self._thread = threading.Thread(target=self._work, name="ucm-prefault", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:  # no more threads: the memory comes by touch
                self._thread = None
                log.debug("no prefaulting: %s", error)

    def wait(self, timeout_s: float) -> None:
        """Wait until what was requested is populated or given up."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def wait_for(self, end_bytes: int, timeout_s: float) -> None:
        """Wait until the mapping is populated up to `end_bytes`, as far as that was requested.

        For whoever is about to write there: touching it first would cost more than the wait, and
        leave small pages.
        """
        if end_bytes <= self._done_bytes:
            return  # the usual case, without the lock
        with self._lock:
            end_bytes = min(end_bytes, self._target_bytes)
            self._lock.wait_for(
                lambda: self._done_bytes >= end_bytes or self._thread is None, timeout_s
            )

    def close(self) -> None:
        """End; waits for the step that is under way. Idempotent."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while (step := self._next_step()) is not None:
            start, end = step
            self._make_huge(start, end)
            code = _populate(self._address + start, end - start)
            if code:
                log.info("memory comes by touch, not ahead of it: %s", os.strerror(code))
            with self._lock:
                self._done_bytes = self._size_bytes if code else end
                self._lock.notify_all()

    def _next_step(self) -> tuple[int, int] | None:
        """Start and end of what comes next; None ends the thread."""
        with self._lock:
            start = self._done_bytes
            end = min(start // STEP_BYTES * STEP_BYTES + STEP_BYTES, self._target_bytes)
            if self._closed or end <= start:
                self._thread = None
                self._lock.notify_all()
                return None
            return start, end

    def _make_huge(self, start: int, end: int) -> None:
        """Give every chunk that ends in this step, none of it behind `end`, one large page."""
        first = start // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        for chunk in range(first, end - HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES):
            if not self._makes_huge:
                return
            code = collapse(self._address + chunk)
            if code == 0:
                self._huge_bytes += HUGE_PAGE_BYTES
            elif code in _PASSING_ERRNOS:
                log.debug("no large page this time: %s", os.strerror(code))
            else:
                self._makes_huge = False
                log.info("the arena has pages of 4 KiB, not 2 MiB: %s", os.strerror(code))


def collapse(address: int) -> int:
    """Make the 2 MiB at `address` one page that holds what they held; 0 or an `errno`.

    Somebody who reads or writes there meanwhile waits, and finds everything. Runs without the
    interpreter lock.
    """
    # An empty chunk would be refused; one page is enough to take the others' place.
    return _populate(address, mmap.PAGESIZE) or _advise(address, HUGE_PAGE_BYTES, MADV_COLLAPSE)


def huge_page_errno() -> int:
    """Try it on a memfd of one chunk: 0 if it becomes one large page, else why not."""
    try:
        fd = os.memfd_create("ucm-probe", os.MFD_CLOEXEC)
    except OSError as error:
        return error.errno or errno.EIO
    try:
        os.ftruncate(fd, HUGE_PAGE_BYTES)
        chunk = map_shared(fd, HUGE_PAGE_BYTES, writable=True)
        address = address_of(chunk)
        return errno.EINVAL if address % HUGE_PAGE_BYTES else collapse(address)
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        os.close(fd)


def _populate(address: int, length: int) -> int:
    """0, or the `errno` that the kernel gave. Runs without the interpreter lock."""
    return _advise(address, length, MADV_POPULATE_WRITE)


def _advise(address: int, length: int, advice: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(advice))
    return ctypes.get_errno() if done else 0
