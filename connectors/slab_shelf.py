"""One sequence's blocks in a cache: their names, and the plans by which their slabs are read.

    block     name                                                       found by others
    exact     the chain of its tokens, as any block of the namespace     yes
    not exact the chain, and a number that only this shelf knows         no

What a sparse step computed is no function of the tokens alone, so it must never be found under
their name. A cache drops the end of a chain first, so a chain longer than its memory that is still
extended finds no room; then the shelf begins another chain, of blocks that only it knows.

    run       `run_blocks` consecutive blocks, pinned by one lease, which is renewed at half time
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import torch

from ucm.hashing import block_key
from ucm.load_steps import Step
from ucm.slab_mover import Scratch, SlabMover
from ucm.sparse.slab_queue import QueuedRead, SlabLostError
from ucm.types import ROOT_KEY, BlockKey, NamespaceId, SourceKind

if TYPE_CHECKING:
    from ucm.api import SlabChecksums
    from ucm.layout import KvLayout
    from ucm.load_plan import LoadPlan


class Errands(Protocol):
    """What shelves ask of their source; it does it on its own thread."""

    deadline_s: float

    def submit_read(self, read: CacheRead, *, is_ahead: bool) -> None:
        """Queue a read."""

    def submit_put(self, put: Put) -> None:
        """Queue a store."""

    def submit_close(self, shelf: CacheShelf) -> None:
        """Queue the end of a shelf's leases."""


class CacheSlabs(NamedTuple):
    """What is read, and where to."""

    shelf: CacheShelf
    layer: int
    views: Sequence[memoryview]


CacheRead: TypeAlias = QueuedRead[CacheSlabs]


@dataclass(slots=True, eq=False)
class Put:
    """Blocks to store. Of the source's thread, once it was submitted."""

    shelf: CacheShelf
    epoch: int
    """Of the shelf; what was put before a truncation does not count after it."""
    first_block: int
    parent: BlockKey
    keys: list[BlockKey]
    tokens: list[list[int]]
    """Of each block."""
    slabs: torch.Tensor
    """[L, n, 2, G, B, D] in host memory, this put's own."""
    num_done: int = 0

    def parent_of(self, number: int) -> BlockKey:
        """The block before the put's block `number`."""
        return self.keys[number - 1] if number and number != self.root_at else self.parent

    root_at: int = 0
    """The block at which `parent` comes in."""

    def begin_chain(self) -> None:
        """Name what is left anew, in a chain of its own that only the shelf knows."""
        shelf = self.shelf
        with shelf.changed:
            if self.epoch != shelf.epoch:
                return
            shelf.nonce = secrets.token_bytes(16)
            shelf.is_private = True
            self.parent, self.root_at, above = ROOT_KEY, self.num_done, ROOT_KEY
            for number in range(self.num_done, len(self.keys)):
                tokens, extra = self.tokens[number], (shelf.nonce,)
                above = block_key(shelf.namespace, above, tokens, extra)
                self.keys[number] = shelf.keys[self.first_block + number] = above


@dataclass(slots=True, eq=False)
class CacheShelf:
    """See `SlabShelf` and the module. Of the engine's thread; the source's counts `num_kept`."""

    name: str
    namespace: NamespaceId
    block_tokens: int
    errands: Errands
    changed: threading.Condition
    keys: list[BlockKey] = field(default_factory=list)
    num_kept: int = 0
    epoch: int = 0
    error: str = ""
    """Why the last put failed."""
    runs: dict[int, Run] = field(default_factory=dict)
    """Of the source's thread."""
    is_private: bool = False
    """Whether the end of its chain is known to it alone."""
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    def put(self, token_ids: Sequence[int], slabs: torch.Tensor, *, num_exact: int) -> None:
        """See `SlabShelf.put`."""
        first, size = len(self.keys), self.block_tokens
        above = parent = self.keys[-1] if self.keys else ROOT_KEY
        blocks = range(first, first + slabs.shape[1])
        tokens = [list(token_ids[block * size : (block + 1) * size]) for block in blocks]
        for block in blocks:
            is_named = block < num_exact and not self.is_private
            extra = () if is_named else (self.nonce,)
            above = block_key(self.namespace, above, tokens[block - first], extra)
            self.keys.append(above)
        self.error = ""
        keys = self.keys[first:]
        self.errands.submit_put(Put(self, self.epoch, first, parent, keys, tokens, slabs))

    def wait_kept(self, num_blocks: int) -> None:
        """See `SlabShelf.wait_kept`."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.num_kept >= num_blocks or bool(self.error), self.errands.deadline_s
            )
            if self.num_kept < num_blocks:
                why = self.error or f"not stored in {self.errands.deadline_s} s"
                raise SlabLostError(self.num_kept, why)

    def read(
        self,
        layer: int,
        blocks: Sequence[int],
        into: Sequence[torch.Tensor],
        *,
        is_ahead: bool = False,
    ) -> CacheRead:
        """See `SlabShelf.read`."""
        lost = next((block for block in blocks if block >= self.num_kept), None)
        if lost is not None:
            raise SlabLostError(lost, f"not on the shelf of {self.name}")
        views = [bytes_of(slab) for slab in into]
        slabs, timeout_s = CacheSlabs(self, layer, views), self.errands.deadline_s
        read = QueuedRead(slabs, tuple(blocks), self.changed, timeout_s)
        self.errands.submit_read(read, is_ahead=is_ahead)
        return read

    def truncate(self, num_blocks: int) -> None:
        """See `SlabShelf.truncate`. The cache's own copies go when it wants their room."""
        with self.changed:
            self.num_kept = min(self.num_kept, num_blocks)
            del self.keys[self.num_kept :]
            self.is_private = self.is_private and self.num_kept > 0
            self.epoch += 1

    def close(self) -> None:
        """See `SlabShelf.close`."""
        self.truncate(0)
        self.errands.submit_close(self)


class Run:
    """Some consecutive blocks of a shelf under one lease. Of the source's thread.

    It is the target and the gate of its own `SlabMover`.
    """

    def __init__(
        self,
        plan: LoadPlan,
        layout: KvLayout,
        generation: int,
        make_mover: Callable[[Run], SlabMover],
    ) -> None:
        """Read by `plan`, which was granted just now by connection number `generation`."""
        self.plan = plan
        self.generation = generation
        self.renew_s = time.monotonic() + plan.timeout_s / 2
        """From when on another lease is to be had."""
        self.corrupt: list[BlockKey] = []
        self._mover = make_mover(self)
        self._read: CacheRead | None = None
        self._view = memoryview(b"")
        self._own = memoryview(bytearray(layout.slab_bytes))
        self._ranks = {
            index: rank
            for rank, index in enumerate(
                i for i, b in enumerate(plan.blocks) if b.source is SourceKind.PROMOTING
            )
        }

    def fetch(
        self, index: int, layer: int, wanted: tuple[CacheRead, memoryview], scratch: Scratch
    ) -> str:
        """Bring one slab; returns why it cannot be had, or nothing."""
        block = self.plan.blocks[index]
        source = block.source
        if source is None:
            return f"the cache says {block.status}"
        if source is SourceKind.PROMOTING and not self._wait_promotion(index, layer, wanted[0]):
            return "it was not promoted"
        if source is SourceKind.EXTENT and index not in self._mover.checksums and layer > 0:
            self._read, self._view = None, self._own
            if not self._move(source, index, 0, scratch):  # the header comes with layer 0
                return "its header is not there"
        self._read, self._view = wanted
        return "" if self._move(source, index, layer, scratch) else "its bytes are not there"

    def _move(self, source: SourceKind, index: int, layer: int, scratch: Scratch) -> bool:
        step = Step(source, index, index + 1, layer, layer + 1)
        (outcome,) = self._mover.move(step, scratch, in_scratch=True)
        if outcome.is_suspect:
            self.corrupt.append(self.plan.blocks[index].key)
        return outcome.is_good or outcome.is_dropped

    def _wait_promotion(self, index: int, layer: int, read: CacheRead) -> bool:
        """Wait as long as the read's owner does: the lease lasts longer, and others are waiting."""
        progress, rank = self.plan.progress, self._ranks[index]
        if progress is None:
            return False
        num_slabs = layer * progress.num_blocks + rank + 1
        return progress.wait(num_slabs, read.timeout_s) and rank < progress.num_usable()

    # `SlabTarget` and `WriteGate`

    def view(self, _layer: int, _index: int) -> memoryview:
        """See `SlabTarget.view`."""
        return self._view

    def begin_write(self, _block: int) -> bool:
        """See `WriteGate.begin_write`."""
        read = self._read
        return read is None or read.begin()

    def end_write(self, _block: int) -> None:
        """See `WriteGate.end_write`."""
        read = self._read
        if read is not None:
            read.end()

    def wait_turn(self, _block: int, num_bytes: int) -> bool:
        """See `WriteGate.wait_turn`."""
        limit = self.plan.read_limit
        delay_s = limit.take(num_bytes) if limit is not None else 0.0
        if delay_s > 0.0:
            threading.Event().wait(delay_s)
        return True

    def wait_checksums(self, block: int) -> SlabChecksums | None:
        """See `WriteGate.wait_checksums`."""
        return self._mover.checksums.get(block)


def bytes_of(slab: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, shared."""
    flat: memoryview = slab.view(-1).view(torch.uint8).numpy().data
    return flat
