"""Copying the blocks of a lease, several at a time, and checking every copy.

One core copies and checksums cold blocks at half the speed at which the memory delivers, so a batch
is shared out between the caller and a few helper threads: each takes the next block when it is
done with one, and a helper that the machine does not run costs nothing. The copies and the checks
of slabs above 100 KiB run without the interpreter lock.

Invariants
    * What is judged is the copy, after it was made: no later writer can make a bad one look good.
    * When a call has returned or raised, nobody writes to its targets any more.
    * Threads are started by the first batch worth it, are at most `MAX_THREADS`, and end with
      `close`. Without them (closed, forked in the middle, no more threads) the caller copies alone.

Envelope: 64 blocks of 1 MiB with 64 KiB slabs, from memory to memory: 19 ms on one core, 11 on two
(8 without checksums; those of slabs below 100 KiB hold the interpreter lock, and two threads wait
for it). One plain copy of all of it takes 9 ms, because the C library writes round the cache above
some 40 MB. The first touch of an arena of 2 MiB pages adds 0.6 ms in a process (5 of 4 KiB pages).

What a core can do, CPU-s/GB: read 0.13, plain copy of 64 MiB 0.15, of 512 KiB 0.24 (every line of
the target is fetched to be overwritten), and 0.28 with the checksum of the copy in the cache. One
long copy and then its checksums is no better (0.15 + 0.13): so pieces stay small, and whether they
lie together does not matter. Below 0.28 only stores that go round the cache in the same loop as the
hash would lead, which nothing that Python can call has.

Tried in C in the same rounds, medians in ms for 64 MiB where one plain copy takes 8.4. Other work
went on beside, which hurts two cores most: only the order counts, 8.6 was the best there.

    7.1   stores round the cache, four pages at a time: what is written is not in it to be checked
    9.5   through the cache, four pages at a time, fetched ahead; 11.4 as one instruction
    2.0   checksums of 64 KiB that are in the cache; 8.2 of those that are not
    14.4  slab by slab, checksum of the source, then the copy round the cache
    17.7  by way of a buffer in the cache, whose checksum it is
    10.9  this module on two cores; 15.3 on one

Checksums that let go of the interpreter lock (called by ctypes) do not help: changing hands costs
more than waiting, 13.1 ms on two cores at best against 10.1.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Final, Generic, Self, TypeVar, cast

from .api import LoadedBlock, SlabChecksums
from .checksum import copy_block, verify
from .errors import InvalidArgumentError
from .layout import KvLayout
from .types import LoadStatus

T = TypeVar("T")

MAX_THREADS: Final = 4
"""A few cores saturate the memory; the others are the engine's."""

BYTES_PER_THREAD: Final = 2 << 20
"""A helper that would copy less is not woken."""


class BlockCopier:
    """Copies blocks of one layout. Thread-safe: batches at the same time share the helpers."""

    def __init__(self, layout: KvLayout, num_threads: int | None = None) -> None:
        """Start nothing yet.

        Args:
            layout: shape of the blocks.
            num_threads: the caller's included; None takes the cores this process may use, at most
                `MAX_THREADS`.

        Raises:
            InvalidArgumentError: `num_threads` is not positive.
        """
        if num_threads is not None and num_threads < 1:
            raise InvalidArgumentError(f"copying needs a thread, not {num_threads}")
        self.layout = layout
        self.num_threads = num_threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))
        self._helpers = _Helpers(self.num_threads - 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def copy_verified(
        self, blocks: Sequence[LoadedBlock], targets: Sequence[memoryview]
    ) -> list[bool]:
        """Copy the blocks of a load lease to where the client wants them. Blocks until done.

        Report the keys of READY blocks that come back False to `CacheApi.complete_load`.

        Args:
            blocks: of one lease; it must stay open for the time of the call.
            targets: for each block a writable, contiguous buffer of `layout.block_bytes`.

        Returns:
            For each block whether it is READY and every slab of the copy has its checksum. What
            a target holds where it is False is of no value.

        Raises:
            LayoutMismatchError: a buffer is not one block long.
            ValueError: not as many targets as blocks.
        """
        pairs = list(zip(blocks, targets, strict=True))
        return self.each(lambda index: self._copy_one(*pairs[index]), len(pairs))

    def verify_in_place(self, blocks: Sequence[LoadedBlock]) -> list[bool]:
        """Check the blocks of a load lease where they are, for a client that computes there.

        What is true now stays true until the lease's time is up: whoever computes longer checks
        again at the end. Blocks until done.

        Returns:
            For each block whether it is READY and every slab has its checksum.
        """
        return self.each(lambda index: self._check_one(blocks[index]), len(blocks))

    def copy_blocks(
        self, sources: Sequence[memoryview], targets: Sequence[memoryview]
    ) -> list[SlabChecksums]:
        """Copy blocks; the slab checksums of every copy, padding excluded. Blocks until done.

        Args:
            sources: contiguous, `layout.block_bytes` each.
            targets: as many, as long, writable.

        Raises:
            LayoutMismatchError: a buffer is not one block long.
            ValueError: not as many targets as sources.
        """
        pairs = list(zip(sources, targets, strict=True))
        return self.each(lambda index: copy_block(self.layout, *pairs[index]), len(pairs))

    def each(self, work: Callable[[int], T], num_blocks: int) -> list[T]:
        """`work(0)`, ..., `work(num_blocks - 1)`, each about one block of copying, on all threads.

        For those whose blocks do not lie in one piece. `work` may run on several threads at once,
        in any order. After an exception no further call begins; those that run are waited for,
        unless an interrupt from the keyboard cuts the waiting short.

        Returns:
            What the calls returned, by index.

        Raises:
            Exception: what a call raised; the caller's own thread's, if several did.
        """
        batch = _Batch(work, num_blocks)
        worth = num_blocks * self.layout.block_bytes // BYTES_PER_THREAD
        self._helpers.run(batch.work_off, batch.stop, min(worth, num_blocks) - 1)
        return batch.results()

    def close(self) -> None:
        """End the helper threads, without waiting for them. Idempotent; copying still works."""
        self._helpers.close()

    def _copy_one(self, block: LoadedBlock, target: memoryview) -> bool:
        if block.status is not LoadStatus.READY or block.data is None:
            return False
        return copy_block(self.layout, block.data, target) == tuple(block.checksums)

    def _check_one(self, block: LoadedBlock) -> bool:
        if block.status is not LoadStatus.READY or block.data is None:
            return False
        return verify(self.layout, block.data, block.checksums)


class _Batch(Generic[T]):
    """Work that any number of threads take one by one."""

    def __init__(self, work: Callable[[int], T], count: int) -> None:
        self._work = work
        self._todo = deque(range(count))
        self._found: list[T | None] = [None] * count

    def work_off(self) -> None:
        """Do what nobody else has begun."""
        try:
            while self._todo:
                self._do_next()
        finally:
            self.stop()

    def _do_next(self) -> None:
        try:
            index = self._todo.popleft()
        except IndexError:  # another thread took the last one
            return
        self._found[index] = self._work(index)

    def stop(self) -> None:
        """Have nobody begin anything more."""
        self._todo.clear()

    def results(self) -> list[T]:
        """What the work returned; everything must be done."""
        return cast("list[T]", self._found)


class _Helpers:
    """At most `size` threads, none before they are needed."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._pid = os.getpid()
        self._pool = self._make_pool()

    def _make_pool(self) -> ThreadPoolExecutor | None:
        # The pool starts a thread only when there is work and none is idle.
        return ThreadPoolExecutor(self._size, "ucm-copy") if self._size > 0 else None

    def run(self, work: Callable[[], None], stop: Callable[[], None], num_helpers: int) -> None:
        """Run `work` here and, as far as they are free, on helpers; all have returned then."""
        futures = self._submit(work, min(num_helpers, self._size))
        try:
            work()
        finally:
            stop()
            # One that has not begun, because its thread is busy or gone, is not waited for.
            begun = [future for future in futures if not future.cancel()]
            wait(begun)
        for future in begun:
            future.result()

    def _submit(self, work: Callable[[], None], count: int) -> list[Future[None]]:
        if self._pid != os.getpid():  # the threads stayed behind in the parent process
            self._pid, self._pool = os.getpid(), self._make_pool()
        futures: list[Future[None]] = []
        pool = self._pool
        try:
            while pool is not None and len(futures) < count:
                futures.append(pool.submit(work))
        except RuntimeError:  # closed meanwhile, or no more threads: fewer do it
            return futures
        return futures

    def close(self) -> None:
        pool, self._pool, self._size = self._pool, None, 0
        if pool is not None and self._pid == os.getpid():
            pool.shutdown(wait=False, cancel_futures=True)
