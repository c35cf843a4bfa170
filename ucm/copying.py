"""Copying the blocks of a lease, several at a time, and checking every copy.

One core does not copy as fast as the memory delivers, so a batch is shared out between the caller
and a few helper threads: each takes the next block when it is done with one, and a helper that the
machine does not run costs nothing. How they are copied and checked is `kernels.block_copy`'s
choice: in one pass by machine code, or in pieces of a core's cache.

Invariants
    * What is judged are the bytes that were written, whoever writes to the source meanwhile.
    * When a call has returned or raised, nobody writes to its targets any more. An interrupt from
      the keyboard is the exception: a helper may still finish the block that it is at.
    * Threads are started by the first batch worth it, are at most `MAX_THREADS`, and end with
      `close`. Without them (closed, forked in the middle, no more threads) the caller copies alone.

Envelope: 64 blocks of 1 MiB with 64 KiB slabs, memory to memory, GB/s on one core and on two, where
one plain copy of all of it runs at 18 (the C library goes round the cache above some 40 MB):

    one pass, round the cache    20    26
    one pass, through it         15    19
    in pieces                    15    19    (slabs below 100 KiB hold the interpreter lock)

Below 32 MiB the copy stays in the last cache: all ways run at 20 to 25 GB/s, and who reads it next
reads it there; above, going round it is faster even with that reading (12.8 and 10.6 GB/s). The
first touch of an arena of 2 MiB pages adds 0.6 ms in a process (5 of 4 KiB pages).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from .api import LoadedBlock, SlabChecksums
from .checksum import verify
from .errors import InvalidArgumentError
from .joint_work import Helpers, JointCalls, JointWork
from .kernels.block_copy import block_copy, check_counts
from .layout import KvLayout
from .leased_blocks import LeasedBlocks
from .types import LoadStatus

T = TypeVar("T")

MAX_THREADS: Final = 4
"""A few cores saturate the memory; the others are the engine's."""

BYTES_PER_THREAD: Final = 2 << 20
"""A helper that would copy less is not woken."""

AROUND_BYTES: Final = 32 << 20
"""A batch of this size is not in a cache when it is done: it need not push out what is."""


class BlockCopier:
    """Copies blocks of one layout. Thread-safe: batches at the same time share the helpers."""

    def __init__(self, layout: KvLayout, num_threads: int | None = None) -> None:
        """Start nothing yet.

        Args:
            layout: shape of the blocks.
            num_threads: the caller's included; None takes the cores this process may use, at most
                `MAX_THREADS`.

        Raises:
            ConfigError: `UCM_KERNEL_BLOCK_COPY` asks for what is not possible.
            InvalidArgumentError: `num_threads` is not positive.
        """
        if num_threads is not None and num_threads < 1:
            raise InvalidArgumentError(f"copying needs a thread, not {num_threads}")
        self.layout = layout
        self.num_threads = num_threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))
        self._copy = block_copy(layout)
        self._helpers = Helpers(self.num_threads - 1, "ucm-copy")

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
            targets: for each block a writable, contiguous buffer of `layout.block_bytes`, none in
                another.

        Returns:
            For each block whether it is READY and every slab of the copy has its checksum. What
            a target holds where it is False is of no value.

        Raises:
            LayoutMismatchError: a buffer is not one block long.
            ValueError: not as many targets as blocks.
        """
        check_counts(blocks, targets)
        right = [False] * len(blocks)
        if isinstance(blocks, LeasedBlocks):
            count = len(blocks.ready)
            found = self._copied(blocks.ready, targets[:count])
            if found.shape == blocks.checksums.shape:
                right[:count] = (found == blocks.checksums).all(1).tolist()
            return right
        ready = [
            (number, block.data)
            for number, block in enumerate(blocks)
            if block.status is LoadStatus.READY and block.data is not None
        ]
        sources, into = [data for _, data in ready], [targets[number] for number, _ in ready]
        copied = self._copied(sources, into).tolist()
        for (number, _), sums in zip(ready, copied, strict=True):
            right[number] = tuple(sums) == tuple(blocks[number].checksums)
        return right

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
        return [tuple(sums) for sums in self._copied(sources, targets).tolist()]

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
        calls = JointCalls(work, num_blocks)
        self._do(calls, num_blocks)
        return calls.results()

    def close(self) -> None:
        """End the helper threads, without waiting for them. Idempotent; copying still works."""
        self._helpers.close()

    def _copied(
        self, sources: Sequence[memoryview], targets: Sequence[memoryview]
    ) -> NDArray[np.uint64]:
        """Copy blocks; [blocks, layers] checksums of the copies."""
        count = len(sources)
        around = count * self.layout.block_bytes >= AROUND_BYTES
        copies = self._copy(self.layout, sources, targets, around)
        self._do(copies, count)
        return copies.sums()

    def _do(self, work: JointWork, num_blocks: int) -> None:
        worth = num_blocks * self.layout.block_bytes // BYTES_PER_THREAD
        self._helpers.run(work, min(worth, num_blocks) - 1)

    def _check_one(self, block: LoadedBlock) -> bool:
        if block.status is not LoadStatus.READY or block.data is None:
            return False
        return verify(self.layout, block.data, block.checksums)
