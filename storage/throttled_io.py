"""A limit on the bytes that are read each second: for disks that others use too, and for benches.

    tokens    grow by `bytes_per_s`, up to `burst_bytes`; a read takes its bytes' worth, and waits
              until the account would be above zero again (a debt makes the next one wait longer)

A batch is cut into parts of about a burst, each of which waits and is then transferred as it would
be without. Only reads are limited. Token bucket after Turner, "New directions in communications",
IEEE Communications Magazine 24 (1986).
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from .forwarded_files import ForwardedFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from ucm.clock import Clock

    from .file_io import FileHandle, FileIo, IoRequest

US_PER_S: Final = 1_000_000

BURST_S: Final = 0.01
"""What may be saved up, in time: short, so that a limit holds for a single small load too."""


class TokenBucket:
    """An account of bytes. Thread-safe; never blocks."""

    def __init__(self, bytes_per_s: float, burst_bytes: float, clock: Clock) -> None:
        """Begin with a full burst.

        Args:
            bytes_per_s: above 0.
            burst_bytes: what may be saved up, above 0.
            clock: what time it is.

        Raises:
            ValueError: a rate or a burst that lets nothing through.
        """
        if not (bytes_per_s > 0 and burst_bytes > 0):
            raise ValueError(f"a bucket of {burst_bytes} bytes at {bytes_per_s} bytes a second")
        self.bytes_per_s = bytes_per_s
        self.burst_bytes = burst_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens = burst_bytes
        self._then_us = clock.now_us()

    def take(self, num_bytes: int) -> float:
        """Take so many bytes; how many seconds to wait before they may be moved.

        Less than 0 gives back what was taken and not moved.
        """
        with self._lock:
            now_us = self._clock.now_us()
            earned = (now_us - self._then_us) * self.bytes_per_s / US_PER_S
            self._tokens = min(self.burst_bytes, self._tokens + earned) - num_bytes
            self._then_us = now_us
            return max(0.0, -self._tokens / self.bytes_per_s)


def limit_of(bytes_per_s: int, clock: Clock) -> TokenBucket | None:
    """As `bucket_of`; None for 0, which is no limit."""
    return bucket_of(bytes_per_s, clock) if bytes_per_s else None


def bucket_of(bytes_per_s: int, clock: Clock) -> TokenBucket:
    """The bucket for a limit of so many bytes a second."""
    return TokenBucket(bytes_per_s, max(1.0, bytes_per_s * BURST_S), clock)


class ThrottledIo(ForwardedFiles):
    """A `FileIo` whose reads wait for a bucket's tokens. Thread-safe."""

    def __init__(
        self, io: FileIo, bucket: TokenBucket, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        """Limit `io`, and close it with this one. `sleep` waits; tests turn a clock instead."""
        self._io = io
        super().__init__(io)
        self._bucket = bucket
        self._sleep = sleep

    def read_batch(self, requests: Sequence[IoRequest]) -> list[int]:
        """See `FileIo.read_batch`. Takes as long as the limit says, at least."""
        codes: list[int] = []
        for part, num_bytes in self._parts(requests):
            delay_s = self._bucket.take(num_bytes)
            if delay_s > 0:
                self._sleep(delay_s)
            codes += self._io.read_batch(part)
        return codes

    def _parts(self, requests: Sequence[IoRequest]) -> Iterator[tuple[Sequence[IoRequest], int]]:
        start, num_bytes = 0, 0
        for number, request in enumerate(requests, 1):
            num_bytes += sum(buffer.nbytes for buffer in request.buffers)
            if num_bytes >= self._bucket.burst_bytes or number == len(requests):
                yield requests[start:number], num_bytes
                start, num_bytes = number, 0

    def open(self, path: Path, *, create: bool, writable: bool) -> FileHandle:
        """See `FileIo.open`."""
        return self._io.open(path, create=create, writable=writable)

    def write_batch(self, requests: Sequence[IoRequest]) -> list[int]:
        """See `FileIo.write_batch`. Not limited."""
        return self._io.write_batch(requests)

    def close_file(self, file: FileHandle) -> None:
        """See `FileIo.close_file`."""
        self._io.close_file(file)

    def close(self) -> None:
        """See `FileIo.close`."""
        self._io.close()
