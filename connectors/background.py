"""The session's background thread: stores and reconnections, off the step path.

Invariants: at most `max_queued_blocks` blocks wait; a store that does not fit is dropped, never
waited for. Every store taken is released exactly once, however it ends. While the cache is away
stores are dropped at once, so that the engine gets its blocks back.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ucm.api import SlabChecksums, StoreLease, StoreSlot
from ucm.errors import CapacityError, UcmError
from ucm.types import BlockKey, StoreStatus

from .deadline import DeadlineCaller
from .link import Connection, Link
from .session_stats import StatsCounter

log = logging.getLogger(__name__)

COPY_ERRORS = (
    *(UcmError, OSError, ValueError, RuntimeError, TypeError, LookupError),
    *(AttributeError, ArithmeticError, BufferError, MemoryError),
)
"""What an engine's copy routine may fail with, defects included."""

BlockFill = Callable[[Sequence[int], Sequence[memoryview]], list[SlabChecksums]]
"""`fill(indexes, slots)` copies the blocks with those indexes of the store into the slots and
returns the checksums of the blocks that it copied."""


Summarise = Callable[[Sequence[tuple[StoreSlot, SlabChecksums]]], int]
"""`summarise(blocks)` writes summaries of filled slots; says how many. Never raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreJob:
    """New blocks of one request, in the engine's pool."""

    parent: BlockKey
    keys: tuple[BlockKey, ...]
    fill: BlockFill
    release: Callable[[], None]
    """Called once the blocks were copied or dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackgroundLimits:
    """Bounds of the background thread."""

    deadline_s: float
    max_queued_blocks: int
    batch_blocks: int
    block_bytes: int
    """Slab bytes of one block, for counting."""
    summarise: Summarise | None = None
    """Puts summaries beside staged blocks; None when none are wanted."""


class Background:
    """One thread over a bounded queue."""

    def __init__(self, link: Link, counter: StatsCounter, limits: BackgroundLimits) -> None:
        self._link = link
        self._counter = counter
        self._limits = limits
        self._caller = DeadlineCaller("ucm-session-background")
        self._jobs: deque[StoreJob] = deque()
        self._queued_blocks = 0
        self._is_busy = False
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="ucm-session", daemon=True)
        link.on_trouble = self._wake

    def start(self) -> None:
        """Begin; the first thing it does is to connect."""
        self._thread.start()

    def submit(self, job: StoreJob) -> bool:
        """Queue a store; False, and nothing kept, when it would not fit."""
        with self._changed:
            fits = self._queued_blocks + len(job.keys) <= self._limits.max_queued_blocks
            if self._is_closing or not fits or not self._link.takes_calls():
                return False
            self._jobs.append(job)
            self._queued_blocks += len(job.keys)
            self._changed.notify_all()
            return True

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until everything queued is done; False when `timeout_s` passes first."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not (self._jobs or self._is_busy), timeout=timeout_s
            )

    def close(self, timeout_s: float) -> None:
        """Drop what is queued, close the connection, end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while not self._is_closing:
            work = self._next_work()
            if work is not None:
                work()
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()
        for job in self._jobs:
            self._drop(job)
        self._link.drop(self._caller)
        self._caller.close()

    def _next_work(self) -> Callable[[], None] | None:
        """What to do now; waits for it, but no longer than until a probe is due."""
        with self._changed:
            work = self._choose()
            if work is None and not self._is_closing:
                self._changed.wait(self._link.breaker.seconds_to_probe())
            self._is_busy = work is not None
            return work

    def _choose(self) -> Callable[[], None] | None:
        if self._link.needs_check():
            return lambda: self._link.check(self._caller)
        if self._jobs:
            job = self._jobs.popleft()
            self._queued_blocks -= len(job.keys)
            return lambda: self._run_store(job)
        if self._link.breaker.begin_probe():
            return lambda: self._link.probe(self._caller)
        return None

    def _give_back(self, errand: Callable[[Connection], None]) -> None:
        self._link.attempt(self._caller, errand, self._limits.deadline_s)

    def _drop(self, job: StoreJob) -> None:
        self._counter.add(dropped_blocks=len(job.keys))
        job.release()

    def _run_store(self, job: StoreJob) -> None:
        """Store batch by batch; what a batch could not place is tried once more, then dropped."""
        num_kept = 0
        try:
            while num_kept < len(job.keys):
                last = min(num_kept + self._limits.batch_blocks, len(job.keys))
                num_new = self._store_batch(job, range(num_kept, last))
                num_kept += num_new
                if num_new == 0:
                    break
        except COPY_ERRORS as error:
            log.warning("copying blocks into the cache failed: %s", error)
            self._counter.add(failures=1)
        finally:
            self._counter.add(dropped_blocks=len(job.keys) - num_kept)
            job.release()

    def _store_batch(self, job: StoreJob, indexes: range) -> int:
        """Returns how many of the blocks the cache has now."""
        if not self._link.takes_calls():
            return 0
        keys = job.keys[indexes.start : indexes.stop]
        parent = job.keys[indexes.start - 1] if indexes.start else job.parent
        prepared = self._link.attempt(
            self._caller,
            lambda connection: connection.cache.prepare_store(
                connection.namespace.id, parent, keys
            ),
            self._limits.deadline_s,
            on_late=lambda connection, lease: connection.cache.release(lease.id),
        )
        if prepared.value is None:
            return 0
        return self._fill_and_complete(job, indexes, prepared.value)

    def _fill_and_complete(self, job: StoreJob, indexes: range, lease: StoreLease) -> int:
        wanted = [
            (index, slot, slot.data)
            for index, slot in zip(indexes, lease.slots, strict=True)
            if slot.status is StoreStatus.WANTED and slot.data is not None
        ]
        num_present = sum(slot.status is StoreStatus.PRESENT for slot in lease.slots)
        self._counter.add(present_blocks=num_present)
        if not wanted:
            self._give_back(lambda connection: connection.cache.release(lease.id))
            return num_present
        try:
            checksums = job.fill([item[0] for item in wanted], [item[2] for item in wanted])
        except COPY_ERRORS:
            self._give_back(lambda connection: connection.cache.release(lease.id))
            raise
        filled = [(slot, sums) for (_, slot, _), sums in zip(wanted, checksums, strict=True)]
        if self._limits.summarise is not None:
            self._counter.add(summarised_blocks=self._limits.summarise(filled))
        by_key = {slot.key: sums for slot, sums in filled}
        completed = self._link.attempt(
            self._caller,
            lambda connection: connection.cache.complete_store(lease.id, by_key),
            self._limits.deadline_s,
        )
        if isinstance(completed.error, CapacityError):  # refused: the lease is still ours
            self._give_back(lambda connection: connection.cache.release(lease.id))
        return num_present + self._count_accepted(completed.value or ())

    def _count_accepted(self, statuses: Sequence[StoreStatus]) -> int:
        num_accepted = sum(status is StoreStatus.ACCEPTED for status in statuses)
        self._counter.add(
            stored_blocks=num_accepted,
            stored_bytes=num_accepted * self._limits.block_bytes,
            corrupt_blocks=sum(status is StoreStatus.CORRUPT for status in statuses),
        )
        return num_accepted
