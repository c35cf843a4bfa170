"""Where the KV of a sequence lies that is longer than its share of the pool.

    sealed block -> SlabShelf.put -> kept -> may leave the pool -> SlabShelf.read -> pool or scratch

A `SlabSource` is a tier below the pool; a `SlabShelf` is one sequence's part of it. A shelf is
filled block by block from the front, and read slab by slab in any order. `HostSlabSource` keeps
slabs in this process's memory, behind a limit of bytes a second if one is given.

Invariants: a destination is written by nobody once its read was cancelled, ended or failed; a slab
is reported as there only when it is what was put; what cannot be had raises `SlabLostError`, which
never leaves the engine: the sequence is computed anew.

Envelope: a read costs some 15 us of this interpreter a slab besides the copy (48 KiB, 6 us).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import NamedTuple, Protocol

from torch import Tensor

from ucm.errors import CapacityError, ConfigError

from .slab_queue import QueuedRead, ReadQueue, SlabLostError


class SlabRead(Protocol):
    """Slabs on their way. For one thread."""

    def wait(self, count: int) -> None:
        """Block until the first `count` slabs are in place.

        Raises:
            SlabLostError: one of them is lost, or did not come in time.
        """

    def num_done(self) -> int:
        """How many leading slabs are in place."""

    def cancel(self) -> None:
        """Give up what has not begun; returns when nothing is written any more. Idempotent."""


class SlabShelf(Protocol):
    """One sequence's sealed blocks below the pool. For one thread."""

    @property
    def num_kept(self) -> int:
        """Leading blocks that can be read back: they may leave the pool."""

    def put(self, token_ids: Sequence[int], slabs: Tensor, *, num_exact: int) -> None:
        """Keep the blocks that follow those put before; `wait_kept` tells when they are.

        Args:
            token_ids: all tokens up to the end of the last of the blocks.
            slabs: [num_layers, n, 2, num_kv_heads, block_tokens, head_dim], given away.
            num_exact: leading blocks of the sequence whose KV is a function of the tokens alone;
                the others are not what the tokens' name stands for.

        Raises:
            CapacityError: there is no room; nothing was kept.
        """

    def wait_kept(self, num_blocks: int) -> None:
        """Block until `num_kept >= num_blocks`.

        Raises:
            SlabLostError: that will not be.
        """

    def read(
        self, layer: int, blocks: Sequence[int], into: Sequence[Tensor], *, is_ahead: bool = False
    ) -> SlabRead:
        """Begin to read one layer's slabs of kept blocks; returns at once.

        Args:
            layer: whose.
            blocks: indexes in the sequence, kept.
            into: [2, num_kv_heads, block_tokens, head_dim] each, contiguous: where they go.
            is_ahead: nobody waits for it yet: after all reads that somebody waits for.
        """

    def truncate(self, num_blocks: int) -> None:
        """Forget all but the first blocks: they are lost, or will be put again."""

    def close(self) -> None:
        """Forget all; no read of it may be under way. Idempotent."""


class SlabSource(Protocol):
    """A tier below the pool."""

    @property
    def capacity_bytes(self) -> int | None:
        """Most bytes of all shelves; None where that is not known."""

    def open(self, name: str) -> SlabShelf:
        """An empty shelf for the sequence `name`."""

    def close(self) -> None:
        """End it; all shelves are closed. Idempotent."""


class Limiter(Protocol):
    """A limit on bytes a second; `storage.throttled_io.TokenBucket` is one."""

    def take(self, num_bytes: int) -> float:
        """Take so many bytes; how many seconds to wait before they may be moved."""


class _Copies(NamedTuple):
    """What the thread copies, and where to."""

    sources: Sequence[Tensor]
    into: Sequence[Tensor]


class HostSlabSource:
    """Slabs in this process's memory; one thread copies them back. See the module."""

    def __init__(
        self,
        capacity_bytes: int,
        limiter: Limiter | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Start the thread.

        Args:
            capacity_bytes: most bytes of all shelves.
            limiter: every read takes its bytes here first; no limit when None. It may be replaced
                between reads.
            sleep: waits; tests turn a clock instead.

        Raises:
            ConfigError: the capacity is no whole number of bytes above 0.
        """
        is_number = isinstance(capacity_bytes, Integral) and not isinstance(capacity_bytes, bool)
        if not is_number or capacity_bytes < 1:
            raise ConfigError(
                f"slab source: capacity_bytes is {capacity_bytes!r}, must be a whole number of "
                "bytes >= 1, for example 1 << 30"
            )
        self.limiter = limiter
        self.read_bytes = 0
        """Bytes that were read back, over its life."""
        self.kept_bytes = 0
        """Bytes on all shelves."""
        self.capacity_bytes = capacity_bytes
        """Most bytes of all shelves."""
        self._sleep = sleep
        self._changed = threading.Condition()
        self._reads: ReadQueue[_Copies] = ReadQueue()
        self._thread = threading.Thread(target=self._run, name="ucm-slab-source", daemon=True)
        self._thread.start()

    def open(self, name: str) -> HostShelf:
        """See `SlabSource.open`."""
        return HostShelf(self, name)

    def close(self) -> None:
        """See `SlabSource.close`."""
        with self._changed:
            self._reads.close()
            self._changed.notify_all()
        self._thread.join()

    def reserve(self, num_bytes: int) -> None:
        """Count bytes that a shelf keeps, or, below 0, gives up.

        Raises:
            CapacityError: more than the capacity.
        """
        if self.kept_bytes + num_bytes > self.capacity_bytes:
            raise CapacityError(
                f"slab source: {num_bytes} bytes more than the {self.kept_bytes} kept pass the "
                f"capacity of {self.capacity_bytes}"
            )
        self.kept_bytes += num_bytes

    def submit(
        self,
        blocks: Sequence[int],
        sources: Sequence[Tensor],
        into: Sequence[Tensor],
        is_ahead: bool,
    ) -> SlabRead:
        """Queue copies; for the shelves."""
        read = QueuedRead(_Copies(sources, into), blocks, self._changed)
        self._reads.submit(read, is_ahead=is_ahead)
        return read

    def _run(self) -> None:
        while (read := self._next()) is not None:
            source = read.job.sources[read.done]
            self._pay(source.nbytes)
            if not read.begin():
                continue
            read.job.into[read.done].copy_(source)
            with self._changed:
                read.done += 1
                self.read_bytes += source.nbytes
                read.end()

    def _next(self) -> QueuedRead[_Copies] | None:
        """The read to go on with; None at the end."""
        with self._changed:
            while not self._reads.is_closed:
                if (read := self._reads.next_read()) is not None:
                    return read
                self._changed.wait()
            return None

    def _pay(self, num_bytes: int) -> None:
        delay_s = self.limiter.take(num_bytes) if self.limiter is not None else 0.0
        if delay_s > 0.0:
            self._sleep(delay_s)


@dataclass(slots=True)
class HostShelf:
    """One sequence's blocks in a `HostSlabSource`."""

    source: HostSlabSource
    name: str
    blocks: list[Tensor] = field(default_factory=list)
    """[num_layers, 2, num_kv_heads, block_tokens, head_dim] each."""

    @property
    def num_kept(self) -> int:
        """See `SlabShelf.num_kept`."""
        return len(self.blocks)

    def put(self, token_ids: Sequence[int], slabs: Tensor, *, num_exact: int) -> None:
        """See `SlabShelf.put`."""
        del token_ids, num_exact  # nobody else looks here
        self.source.reserve(slabs.nbytes)
        self.blocks += [slabs[:, index].clone() for index in range(slabs.shape[1])]

    def wait_kept(self, num_blocks: int) -> None:
        """See `SlabShelf.wait_kept`."""
        if num_blocks > len(self.blocks):
            raise SlabLostError(len(self.blocks), f"never put on the shelf of {self.name}")

    def read(
        self, layer: int, blocks: Sequence[int], into: Sequence[Tensor], *, is_ahead: bool = False
    ) -> SlabRead:
        """See `SlabShelf.read`."""
        lost = next((block for block in blocks if block >= len(self.blocks)), None)
        if lost is not None:
            raise SlabLostError(lost, f"not on the shelf of {self.name}")
        sources = [self.blocks[block][layer] for block in blocks]
        return self.source.submit(tuple(blocks), sources, into, is_ahead)

    def truncate(self, num_blocks: int) -> None:
        """See `SlabShelf.truncate`."""
        dropped = self.blocks[num_blocks:]
        del self.blocks[num_blocks:]
        self.source.reserve(-sum(block.nbytes for block in dropped))

    def close(self) -> None:
        """See `SlabShelf.close`."""
        self.truncate(0)
