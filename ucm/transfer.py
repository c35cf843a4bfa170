"""Bounded work in the background: a prioritised thread pool, and group commit in front of it.

* `TransferPool` runs jobs on a fixed number of threads, reads that somebody waits for before
  prefetches before writes; every `FAIR_EVERY`th pick takes the lowest class, so that nothing
  starves. Its queue has a limit; a full one refuses.
* `GroupCommit` collects items until `max_items` wait or the first has waited `interval_s`, and
  commits them as one batch, one batch at a time and in order.

Both end with `close`, which finishes what was accepted and joins the threads.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from .errors import CapacityError, TierUnavailableError

_log = logging.getLogger(__name__)

FAIR_EVERY = 8
"""One pick in this many takes the least urgent job that waits."""

T = TypeVar("T")


class Priority(enum.IntEnum):
    """Classes of work, most urgent first."""

    LOAD = 0
    PREFETCH = 1
    WRITE = 2


class TransferPool:
    """A fixed set of threads over one bounded, prioritised queue."""

    def __init__(self, num_threads: int, max_queued: int, name: str = "ucm-transfer") -> None:
        """Start the threads.

        Args:
            num_threads: threads, at least 1.
            max_queued: sum of the weights of jobs that wait; running ones do not count.
            name: of the threads, for people.
        """
        self._max_queued = max_queued
        self._queues: tuple[deque[tuple[Callable[[], None], int]], ...] = tuple(
            deque() for _ in Priority
        )
        self._queued = 0
        self._picks = 0
        self._closing = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, priority: Priority, job: Callable[[], None], *, weight: int = 1) -> None:
        """Queue a job. Never blocks; the job must not raise.

        Raises:
            CapacityError: the queue is full.
            TierUnavailableError: the pool is closing.
        """
        with self._changed:
            if self._closing:
                raise TierUnavailableError("transfers have ended: the store is closing")
            if self._queued + weight > self._max_queued:
                raise CapacityError(
                    f"{self._queued} transfers wait, {weight} more would pass the limit of "
                    f"{self._max_queued}; try later"
                )
            self._queues[priority].append((job, weight))
            self._queued += weight
            self._changed.notify()

    @property
    def num_queued(self) -> int:
        """Sum of the weights of jobs that wait."""
        with self._changed:
            return self._queued

    def close(self, *, timeout_s: float) -> bool:
        """Refuse new jobs, finish the queued ones, join the threads; False on time-out."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            try:
                job()
            except Exception:  # noqa: BLE001  the thread's outermost loop: one job must not end it
                _log.exception("a transfer failed in an unforeseen way")

    def _next_job(self) -> Callable[[], None] | None:
        with self._changed:
            while not any(self._queues):
                if self._closing:
                    return None
                self._changed.wait()
            self._picks += 1
            queues = self._queues if self._picks % FAIR_EVERY else reversed(self._queues)
            job, weight = next(queue for queue in queues if queue).popleft()
            self._queued -= weight
            return job


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitLimits:
    """How group commit batches, and when it refuses."""

    max_items: int
    """Items in one batch, at most."""
    max_queued_bytes: int
    """Bytes that may wait; those of the batch being committed count too."""
    interval_s: float
    """How long a batch waits for company."""


class GroupCommit(Generic[T]):
    """Collect items and commit them in batches, in order, one batch at a time."""

    def __init__(
        self, commit: Callable[[list[T]], None], limits: CommitLimits, pool: TransferPool
    ) -> None:
        """Start the collecting thread.

        Args:
            commit: writes one batch; runs on a thread of `pool` and must not raise.
            limits: sizes and times.
            pool: where batches run, at WRITE priority.
        """
        self._commit = commit
        self._limits = limits
        self._pool = pool
        self._items: deque[tuple[T, int]] = deque()
        self._queued_bytes = 0
        self._num_offered = 0
        self._num_settled = 0
        self._hurry = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._collect, name="ucm-commit", daemon=True)
        self._thread.start()

    @property
    def queued_bytes(self) -> int:
        """Bytes offered and not yet committed."""
        with self._changed:
            return self._queued_bytes

    @property
    def num_queued(self) -> int:
        """Items offered and not yet committed."""
        with self._changed:
            return self._num_offered - self._num_settled

    def offer(self, item: T, num_bytes: int) -> None:
        """Queue one item. Never blocks.

        Raises:
            CapacityError: its bytes would pass the limit.
            TierUnavailableError: closing.
        """
        with self._changed:
            if self._closing:
                raise TierUnavailableError("write-behind has ended: the store is closing")
            if self._queued_bytes + num_bytes > self._limits.max_queued_bytes:
                raise CapacityError(
                    f"{self._queued_bytes} bytes wait for the disk, the limit is "
                    f"{self._limits.max_queued_bytes}"
                )
            self._items.append((item, num_bytes))
            self._queued_bytes += num_bytes
            self._num_offered += 1
            if len(self._items) in (1, self._limits.max_items):
                self._changed.notify_all()

    def wait_settled(self, *, timeout_s: float) -> bool:
        """Wait until all that was offered before this call was committed; False on time-out."""
        with self._changed:
            target = self._num_offered
            self._hurry += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: self._num_settled >= target, timeout_s)
            finally:
                self._hurry -= 1

    def close(self, *, timeout_s: float) -> bool:
        """Commit what waits and join the thread; False on time-out. Close the pool afterwards."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _collect(self) -> None:
        while batch := self._next_batch():
            done = threading.Event()
            try:
                self._pool.submit(Priority.WRITE, lambda: self._run(batch, done), weight=0)  # noqa: B023
            except TierUnavailableError:
                self._settle(batch)
                continue
            done.wait()

    def _run(self, batch: list[tuple[T, int]], done: threading.Event) -> None:
        try:
            self._commit([item for item, _ in batch])
        finally:
            self._settle(batch)
            done.set()

    def _next_batch(self) -> list[tuple[T, int]]:
        limits = self._limits
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closing)
            self._changed.wait_for(
                lambda: len(self._items) >= limits.max_items or self._hurry or self._closing,
                limits.interval_s,
            )
            count = min(len(self._items), limits.max_items)
            return [self._items.popleft() for _ in range(count)]

    def _settle(self, batch: list[tuple[T, int]]) -> None:
        with self._changed:
            self._queued_bytes -= sum(num_bytes for _, num_bytes in batch)
            self._num_settled += len(batch)
            self._changed.notify_all()
