"""Making memory real ahead of its use, so that nobody who stores or loads waits for the kernel.

    arena | handed out ............ | made ahead ....... | never touched, costs nothing
          0                         use                  target

The first touch of a page costs up to 5 us (0.8 GB/s): several times the copy that touches it. One
`madvise(MADV_POPULATE_WRITE)` a step does it in bulk, on a thread that ends when it has reached its
target. Who raises the target counts the memory as used: it is. Nothing depends on success: where
the kernel does not know the call (before 5.14) or refuses, pages come by touch as ever.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mmap

log = logging.getLogger(__name__)

STEP_BYTES = 4 << 20
"""One call; what `close` waits for at most: some milliseconds."""

MADV_POPULATE_WRITE = 23
"""From linux/mman.h (Linux 5.14)."""


class Prefaulter:
    """Populates one shared mapping from its start. Thread-safe.

    No method but `close` and `wait` blocks.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        """Begin with nothing; `close` it before the mapping."""
        self._size_bytes = len(mapping)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self._lock = threading.Lock()
        self._target_bytes = 0
        self._done_bytes = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def done_bytes(self) -> int:
        """How far the mapping is populated."""
        return self._done_bytes

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

    def close(self) -> None:
        """End; waits for the step that is under way. Idempotent."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while (step := self._next_step()) is not None:
            code = _populate(self._address + step[0], step[1])
            if code:
                log.info("memory comes by touch, not ahead of it: %s", os.strerror(code))
            with self._lock:
                self._done_bytes = self._size_bytes if code else sum(step)

    def _next_step(self) -> tuple[int, int] | None:
        """Offset and length of what comes next; None ends the thread."""
        with self._lock:
            length = min(STEP_BYTES, self._target_bytes - self._done_bytes)
            if self._closed or length <= 0:
                self._thread = None
                return None
            return self._done_bytes, length


def _populate(address: int, length: int) -> int:
    """0, or the `errno` that the kernel gave. Runs without the interpreter lock."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.madvise(
        ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(MADV_POPULATE_WRITE)
    )
    return ctypes.get_errno() if done else 0
