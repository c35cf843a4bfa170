"""What waits to be stored: jobs that continue each other become one call.

    offered       | k0 | k1 | k2 | k3 |          one block every 32 steps of a decode
    run           | k0 . k1 . k2 . k3 |          due when it has enough blocks, or after `delay_s`,
                                                 or as soon as its request ends

A store costs the machine some 11 ms of CPU time however small it is (two calls, a commit, a sync of
the disk) and 3 ms a block of 1.4 MB; the cores are the engine's. So a block that a decode fills
waits a little for the next ones; a prompt's blocks, which are many, do not, nor do a chunk's.

Invariants: at most `max_blocks` blocks are kept. Parents are never taken after their children. No
job waits longer than `delay_s`. Pure: guarded by its owner's lock, the time is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ucm.api import SlabChecksums
from ucm.errors import UcmError
from ucm.types import BlockKey

COPY_ERRORS = (
    *(UcmError, OSError, ValueError, RuntimeError, TypeError, LookupError),
    *(AttributeError, ArithmeticError, BufferError, MemoryError),
)
"""What an engine's copy routine may fail with, defects included."""

BlockFill = Callable[[Sequence[int], Sequence[memoryview]], list[SlabChecksums]]
"""`fill(indexes, slots)` copies the blocks with those indexes of the store into the slots and
returns the checksums of the blocks that it copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreJob:
    """New blocks of one request, in the engine's pool."""

    request_id: str
    parent: BlockKey
    keys: tuple[BlockKey, ...]
    fill: BlockFill
    release: Callable[[], None]
    """Called once the blocks were copied or dropped."""
    is_chunk: bool = False
    """Whether they are a chunk's: offered at once, so nothing will continue them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """How much may wait, and how long."""

    max_blocks: int
    run_blocks: int
    """A run with so many blocks is due at once, and does not grow by waiting."""
    delay_s: float
    """Longest time that a job waits for those that continue it."""


@dataclass(slots=True, eq=False)
class StoreRun:
    """Jobs of which each continues the one before it; stored as if they were one."""

    jobs: list[StoreJob]
    due_s: float
    keys: list[BlockKey] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = [key for job in self.jobs for key in job.keys]

    @property
    def parent(self) -> BlockKey:
        """Of the first block."""
        return self.jobs[0].parent

    @property
    def is_chunk(self) -> bool:
        """Whether its blocks are a chunk's; all are of one chain."""
        return self.jobs[0].is_chunk

    def append(self, job: StoreJob) -> None:
        """Add the job that continues the last one."""
        self.jobs.append(job)
        self.keys += job.keys

    def fill(
        self, indexes: Sequence[int], slots: Sequence[memoryview]
    ) -> tuple[list[SlabChecksums], Exception | None]:
        """Copy blocks of the run, ascending; see `BlockFill`.

        Returns:
            The checksums of leading ones, and what kept the rest from being copied.
        """
        checksums: list[SlabChecksums] = []
        start = done = 0
        for job in self.jobs:
            end = start + len(job.keys)
            count = sum(start <= index < end for index in indexes)
            of_job = slice(done, done + count)
            try:
                if count:
                    checksums += _filled(job, [i - start for i in indexes[of_job]], slots[of_job])
            except COPY_ERRORS as error:
                return checksums, error
            start, done = end, done + count
        return checksums, None

    def release(self) -> None:
        """Give every job's blocks back."""
        for job in self.jobs:
            job.release()


def _filled(
    job: StoreJob, indexes: Sequence[int], slots: Sequence[memoryview]
) -> list[SlabChecksums]:
    checksums = job.fill(indexes, slots)
    if len(checksums) != len(indexes):
        raise ValueError(f"{len(checksums)} blocks were copied, {len(indexes)} asked for")
    return checksums


class StoreQueue:
    """Runs in the order of their first jobs; see the module."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._runs: list[StoreRun] = []
        self._num_blocks = 0
        self._run_of: dict[BlockKey, StoreRun] = {}

    def __bool__(self) -> bool:
        return bool(self._runs)

    def add(self, job: StoreJob, now_s: float) -> bool:
        """Keep a job of at least one block; False, and nothing kept, when it does not fit."""
        if self._num_blocks + len(job.keys) > self._limits.max_blocks:
            return False
        run = self._run_of.get(job.parent)
        continues = run is not None and run.keys[-1] == job.parent
        if run is not None and continues and len(run.keys) < self._limits.run_blocks:
            run.append(job)
        else:
            if run is not None:
                run.due_s = min(run.due_s, now_s)  # parents first
            run = StoreRun([job], now_s + self._limits.delay_s)
            self._runs.append(run)
        if job.is_chunk or len(run.keys) >= self._limits.run_blocks:
            run.due_s = now_s
        self._num_blocks += len(job.keys)
        self._run_of.update(dict.fromkeys(job.keys, run))
        return True

    def hurry(self, request_id: str, now_s: float) -> bool:
        """A request has ended: nothing will continue its jobs. Returns whether some waited."""
        found = [run for run in self._runs if any(j.request_id == request_id for j in run.jobs)]
        for run in found:
            run.due_s = min(run.due_s, now_s)
        return bool(found)

    def take(self, now_s: float, *, awaits_none: bool = False) -> StoreRun | None:
        """Remove the first run that is due, or the first of all; None when there is none."""
        ready = (run for run in self._runs if awaits_none or run.due_s <= now_s)
        run = next(ready, None)
        if run is not None:
            self._runs.remove(run)
            self._num_blocks -= len(run.keys)
            for key in run.keys:
                if self._run_of.get(key) is run:
                    del self._run_of[key]
        return run

    def seconds_to_due(self, now_s: float) -> float | None:
        """Until `take` has something to give; None: never, as it is."""
        if not self._runs:
            return None
        return max(0.0, min(run.due_s for run in self._runs) - now_s)
