"""The session's background thread: stores and reconnections, off the step path.

Invariants: at most `max_queued_blocks` blocks wait; a store that does not fit is dropped, never
waited for. Every store taken is released exactly once, however it ends. While the cache is away
stores are dropped at once, so that the engine gets its blocks back. A block that a load has found
bad is stored behind the report of it: before, the cache would say that it has it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ucm.api import SlabChecksums, StoreLease, StoreSlot
from ucm.errors import CapacityError
from ucm.types import BlockKey, StoreStatus

from .deadline import DeadlineCaller
from .link import CallKind, Connection, Link
from .session_stats import StatsCounter
from .store_queue import QueueLimits, StoreJob, StoreQueue, StoreRun

log = logging.getLogger(__name__)

MAX_REPORT_S = 10.0
"""How long a store waits for the report of a bad block that it replaces: a pass, at most."""

REPORT_POLL_S = 0.1
"""How soon it is noticed then that nothing can be stored any more."""

AwaitReports = Callable[[Sequence[BlockKey], float], bool]
"""`await_reports(keys, timeout_s)` waits until the cache knows which of them it has are bad; False
when time is up."""

Summarise = Callable[[Sequence[tuple[StoreSlot, SlabChecksums]]], int]
"""`summarise(blocks)` writes summaries of filled slots; says how many. Never raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackgroundLimits:
    """Bounds of the background thread."""

    deadline_s: float
    queue: QueueLimits
    batch_blocks: int
    block_bytes: int
    """Slab bytes of one block, for counting."""
    await_reports: AwaitReports
    summarise: Summarise | None = None
    """Puts summaries beside staged blocks; None when none are wanted."""


class Background:
    """One thread over a bounded queue."""

    def __init__(self, link: Link, counter: StatsCounter, limits: BackgroundLimits) -> None:
        self._link = link
        self._counter = counter
        self._limits = limits
        self._caller = DeadlineCaller("ucm-session-background")
        self._queue = StoreQueue(limits.queue)
        self._num_hurrying = 0
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
            if self._is_closing or not self._link.takes_calls():
                return False
            if not self._queue.add(job, time.monotonic()):
                return False
            self._changed.notify_all()
            return True

    def hurry(self, request_id: str) -> None:
        """Store what waits of a request at once: nothing will continue it."""
        with self._changed:
            if self._queue.hurry(request_id, time.monotonic()):
                self._changed.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        """Have everything queued done at once; False when `timeout_s` passes first."""
        with self._changed:
            self._num_hurrying += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(
                    lambda: not (self._queue or self._is_busy), timeout=timeout_s
                )
            finally:
                self._num_hurrying -= 1

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
        while (run := self._queue.take(0.0, awaits_none=True)) is not None:
            self._drop(run)
        self._link.drop(self._caller)
        self._caller.close()

    def _next_work(self) -> Callable[[], None] | None:
        """What to do now; waits for it, but no longer than until a probe is due."""
        with self._changed:
            work = self._choose()
            if work is None and not self._is_closing:
                self._changed.wait(self._seconds_to_work())
            self._is_busy = work is not None
            return work

    def _seconds_to_work(self) -> float | None:
        waits = (
            self._link.breaker.seconds_to_probe(),
            self._queue.seconds_to_due(time.monotonic()),
        )
        return min((wait_s for wait_s in waits if wait_s is not None), default=None)

    def _choose(self) -> Callable[[], None] | None:
        if self._link.needs_check():
            return lambda: self._link.check(self._caller)
        # While the cache takes no calls the engine gets its blocks back at once.
        awaits_none = self._num_hurrying > 0 or not self._link.takes_calls()
        run = self._queue.take(time.monotonic(), awaits_none=awaits_none)
        if run is not None:
            return lambda: self._run_store(run)
        if self._link.breaker.begin_probe():
            return lambda: self._link.probe(self._caller)
        return None

    def _give_back(self, errand: Callable[[Connection], None]) -> None:
        deadline_s = self._limits.deadline_s
        # As the end of a load it may go by the door, and proves nothing of other calls.
        self._link.attempt(self._caller, errand, deadline_s, kind=CallKind.LOAD)

    def _drop(self, run: StoreRun) -> None:
        self._counter.add(dropped_blocks=len(run.keys))
        run.release()

    def _run_store(self, run: StoreRun) -> None:
        """Store batch by batch; what a batch could not place is tried once more, then dropped."""
        num_kept = 0
        try:
            while num_kept < len(run.keys):
                last = min(num_kept + self._limits.batch_blocks, len(run.keys))
                num_new, error = self._store_batch(run, range(num_kept, last))
                num_kept += num_new
                if error is not None:
                    log.warning("copying blocks into the cache failed: %s", error)
                    self._counter.add(failures=1)
                if num_new == 0 or error is not None:
                    break
        finally:
            self._counter.add(dropped_blocks=len(run.keys) - num_kept)
            run.release()

    def _store_batch(self, run: StoreRun, indexes: range) -> tuple[int, Exception | None]:
        """Returns how many of the blocks the cache has now, and why some were not copied."""
        keys = run.keys[indexes.start : indexes.stop]
        self._await_reports(keys)
        if not self._link.takes_calls():
            return 0, None
        parent = run.keys[indexes.start - 1] if indexes.start else run.parent
        prepared = self._link.attempt(
            self._caller,
            lambda connection: connection.cache.prepare_store(
                connection.namespace.id, parent, keys
            ),
            self._limits.deadline_s,
            on_late=lambda connection, lease: connection.cache.release(lease.id),
        )
        if prepared.value is None:
            return 0, None
        return self._fill_and_complete(run, indexes, prepared.value)

    def _await_reports(self, keys: Sequence[BlockKey]) -> None:
        """Until then the cache would say that it has blocks which a load has found bad."""
        stop_s = time.monotonic() + MAX_REPORT_S
        while not self._limits.await_reports(keys, REPORT_POLL_S):
            is_in_vain = self._is_closing or not self._link.takes_calls()
            if is_in_vain or time.monotonic() >= stop_s:
                return

    def _fill_and_complete(
        self, run: StoreRun, indexes: range, lease: StoreLease
    ) -> tuple[int, Exception | None]:
        wanted = [
            (index, slot, slot.data)
            for index, slot in zip(indexes, lease.slots, strict=True)
            if slot.status is StoreStatus.WANTED and slot.data is not None
        ]
        num_present = sum(slot.status is StoreStatus.PRESENT for slot in lease.slots)
        self._counter.add(present_blocks=num_present)
        checksums, error = run.fill([item[0] for item in wanted], [item[2] for item in wanted])
        # Without an error there is one of each; after one, what was copied before it counts.
        filled = [
            (slot, sums) for (_, slot, _), sums in zip(wanted, checksums, strict=error is None)
        ]
        by_key = {slot.key: sums for slot, sums in filled}
        if not by_key:
            self._give_back(lambda connection: connection.cache.release(lease.id))
            return num_present, error
        if self._limits.summarise is not None:
            self._counter.add(summarised_blocks=self._limits.summarise(filled))
        completed = self._link.attempt(
            self._caller,
            lambda connection: connection.cache.complete_store(lease.id, by_key),
            self._limits.deadline_s,
        )
        if isinstance(completed.error, CapacityError):  # refused: the lease is still ours
            self._give_back(lambda connection: connection.cache.release(lease.id))
        return num_present + self._count_accepted(run, completed.value or ()), error

    def _count_accepted(self, run: StoreRun, statuses: Sequence[StoreStatus]) -> int:
        num_accepted = sum(status is StoreStatus.ACCEPTED for status in statuses)
        self._counter.add(
            stored_blocks=num_accepted,
            stored_chunk_blocks=num_accepted if run.is_chunk else 0,
            stored_bytes=num_accepted * self._limits.block_bytes,
            corrupt_blocks=sum(status is StoreStatus.CORRUPT for status in statuses),
        )
        return num_accepted
