"""Reads of slabs that wait for a source's thread, and how they are given up.

    engine's thread   submit -> wait, num_done, cancel
    source's thread   next_read -> begin -> write outside the lock -> end

Both sides hold the source's lock where a read changes. Invariants: a destination is written by
nobody once `cancel` returned; reads that somebody waits for go before those that are ahead of time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Job = TypeVar("Job")


class SlabLostError(Exception):
    """A slab cannot be had any more; it never leaves the engine."""

    def __init__(self, block: int, why: str) -> None:
        """Say which block of the sequence, and why."""
        super().__init__(f"block {block}: {why}")
        self.block = block


@dataclass(slots=True, eq=False)
class QueuedRead(Generic[Job]):
    """See `SlabRead`. The source's thread advances it, under the source's lock."""

    job: Job
    """What the source needs to know of it."""
    blocks: Sequence[int]
    """Of the sequence, one a slab."""
    changed: threading.Condition
    """The source's lock."""
    timeout_s: float = threading.TIMEOUT_MAX
    """Longest wait for one slab; without end where it always comes."""
    done: int = 0
    error: SlabLostError | None = None
    is_writing: bool = False
    is_cancelled: bool = False

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is left to do."""
        return self.is_cancelled or self.error is not None or self.done == len(self.blocks)

    def wait(self, count: int) -> None:
        """See `SlabRead.wait`."""
        with self.changed:
            self.changed.wait_for(lambda: self.done >= count or self.is_over, self.timeout_s)
            if self.done >= count:
                return
            if self.error is not None:
                raise self.error
            why = "the source was closed" if self.is_cancelled else f"not in {self.timeout_s} s"
            raise SlabLostError(self.blocks[self.done], why)

    def num_done(self) -> int:
        """See `SlabRead.num_done`."""
        return self.done

    def cancel(self) -> None:
        """See `SlabRead.cancel`."""
        with self.changed:
            self.is_cancelled = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.is_writing)

    def begin(self) -> bool:
        """Whether its destination may be written now; if so, until `end`."""
        with self.changed:
            self.is_writing = not self.is_cancelled
            return self.is_writing

    def end(self) -> None:
        """The destination is not written any more."""
        with self.changed:
            self.is_writing = False
            self.changed.notify_all()


@dataclass(slots=True)
class ReadQueue(Generic[Job]):
    """What a source's thread has to read. Under the source's lock."""

    wanted: deque[QueuedRead[Job]] = field(default_factory=deque)
    ahead: deque[QueuedRead[Job]] = field(default_factory=deque)
    """Nobody waits for them yet."""
    is_closed: bool = False

    def submit(self, read: QueuedRead[Job], *, is_ahead: bool) -> None:
        """Queue a read; it is cancelled at once where the queue was closed."""
        with read.changed:
            read.is_cancelled = self.is_closed
            (self.ahead if is_ahead else self.wanted).append(read)
            read.changed.notify_all()

    def next_read(self) -> QueuedRead[Job] | None:
        """The read to go on with; those that are over are forgotten."""
        for reads in (self.wanted, self.ahead):
            while reads and reads[0].is_over:
                reads.popleft()
            if reads:
                return reads[0]
        return None

    def close(self) -> None:
        """Cancel all, also those that will come."""
        self.is_closed = True
        for read in (*self.wanted, *self.ahead):
            read.is_cancelled = True
