"""`OffloadedAttention`: attention of a sequence whose KV is longer than its share of the pool.

    prefill chunk     own chunk, causal | past in the pool | rest of the past, in waves
    dense decode      all in the pool                      | the rest, in waves
    sparse decode     chosen and there  | chosen and read into the pool | chosen and passing through

Each column is attended to by itself, and the columns are merged by their log-sum-exp, so the result
is that of attention over all of the keys within rounding; what is waited for comes last. Blocks
are put on the shelf when they are full, before they may leave the pool.

Invariant: attention reads no slab that has not arrived. What is lost raises `SlabLostError` out of
the pass; the sequence is then computed anew from what is kept.

Envelope: as long as the source, bytes that are missing / bandwidth; 0.2 ms a layer besides.

Shapes: T query tokens, H query heads, G KV heads, B block tokens, D head size, L layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ucm.errors import ConfigError
from ucm.kernels.attention import PagedSequence, merge_two, select_attention
from ucm.kernels.block_attention import attend_blocks

from .resident_set import Indexes, Mass, Placement, ResidentSet, as_indexes
from .slab_source import SlabRead, SlabShelf
from .wave_stream import WaveStream


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadOptions:
    """How a sequence lives with less of the pool than it needs."""

    resident_blocks: int
    """Pool blocks that a sequence owns; a longer one keeps the rest in a slab source."""
    sink_blocks: int = 1
    """First blocks that never leave the pool."""
    recent_blocks: int = 2
    """Last blocks that never leave it, the one being filled not counted."""
    wave_blocks: int = 16
    """Slabs that are attended to at a time when they pass through without staying."""
    num_waves: int = 4
    """Buffers of `wave_blocks` slabs that each sequence has: one in use, the others arriving."""
    prefetch_blocks: int = 4
    """Next-best blocks that a layer reads ahead for the next step, when nothing else is to read."""
    max_attempts: int = 3
    """Times that a sequence is computed anew, from what is left of it, when a slab is lost."""

    def __post_init__(self) -> None:
        for name in ("sink_blocks", "wave_blocks", "max_attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"offload: {name} is {getattr(self, name)}, must be >= 1")
        for name in ("recent_blocks", "prefetch_blocks"):
            if getattr(self, name) < 0:
                raise ConfigError(f"offload: {name} is {getattr(self, name)}, must be >= 0")
        if self.num_waves < 2:
            raise ConfigError(f"offload: num_waves is {self.num_waves}, must be >= 2")
        if self.max_new_blocks < 2:
            raise ConfigError(
                f"offload: resident_blocks is {self.resident_blocks}; sink, recent blocks and a "
                f"chunk to compute need at least {self.resident_blocks + 2 - self.max_new_blocks}"
            )

    @property
    def max_new_blocks(self) -> int:
        """Blocks that one chunk of a prompt may begin."""
        return self.resident_blocks - self.sink_blocks - max(1, self.recent_blocks)

    def max_chunk_tokens(self, block_tokens: int) -> int:
        """Most tokens of one pass: wherever it starts, its blocks fit."""
        return (self.max_new_blocks - 1) * block_tokens


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one layer of one decode step reads."""

    blocks: Indexes
    """Logical blocks, ascending; the last one is the one that is being filled."""
    mass: Mass | None = None
    """[blocks of the sequence] the share of the attention mass that each is estimated to hold."""


class Chooser(Protocol):
    """Chooses what a decode step reads. Of the engine's thread."""

    def choose(self, layer: int, q_THD: Tensor, position: int, /) -> Wanted | None:
        """Blocks for one layer of the step at `position`; None for all."""

    def predict(self, layer: int, q_THD: Tensor, position: int, /) -> Wanted | None:
        """What `choose` would say to these queries; changes nothing."""

    def seal(self, slabs: Tensor, /) -> None:
        """The next blocks are full: [L, n, 2, G, B, D]."""

    def truncate(self, num_blocks: int, /) -> None:
        """All but the first blocks will be computed again."""


@dataclass(slots=True)
class OffloadStats:
    """Counters of one sequence's life."""

    read_slabs: int = 0
    """Slabs read into the pool because attention waited for them."""
    ahead_slabs: int = 0
    """Slabs read into the pool before anybody asked."""
    lost_slabs: int = 0


@dataclass(slots=True)
class _Into:
    """A read into slots of the pool."""

    read: SlabRead
    placement: Placement


@dataclass(slots=True)
class _Parts:
    """Attention over disjoint parts of the keys, merged as it comes."""

    out: Tensor | None = None
    lse: Tensor | None = None
    dtype: torch.dtype = field(default=torch.float32)

    def add(self, part: tuple[Tensor, Tensor]) -> None:
        """Merge one more part."""
        out, lse = part
        if self.out is None or self.lse is None:
            self.out, self.lse, self.dtype = out, lse, out.dtype
            return
        self.out, self.lse = merge_two(self.out.float(), self.lse, out.float(), lse)

    def result(self) -> Tensor:
        """[T, H, D] of all parts."""
        assert self.out is not None
        return self.out.to(self.dtype)


class OffloadedAttention:
    """One sequence beyond the pool; an `ItemAttention`. Owned by the engine's thread."""

    def __init__(
        self,
        options: OffloadOptions,
        kv_pool: Tensor,
        block_ids: Sequence[int],
        shelf: SlabShelf,
        chooser: Chooser | None = None,
    ) -> None:
        """Own `block_ids`; what the shelf keeps already counts as computed.

        Args:
            options: sizes.
            kv_pool: [L, num_blocks, 2, G, B, D].
            block_ids: `options.resident_blocks` pool blocks, of this sequence alone.
            shelf: where its full blocks go.
            chooser: what decode steps read; everything when None.
        """
        num_layers, block_tokens = kv_pool.shape[0], kv_pool.shape[4]
        self.stats = OffloadStats()
        self.shelf = shelf
        self.resident = ResidentSet(
            num_layers,
            len(block_ids),
            sink_blocks=options.sink_blocks,
            recent_blocks=options.recent_blocks,
        )
        self.resident.restore(shelf.num_kept)
        self._options = options
        self._kv_pool = kv_pool
        self._block_tokens = block_tokens
        self._ids = as_indexes(block_ids)
        self._chooser = chooser
        scratch = kv_pool.new_empty((options.num_waves, options.wave_blocks, *kv_pool.shape[2:]))
        self.stream = WaveStream(shelf, scratch)
        self._ahead: defaultdict[int, list[_Into]] = defaultdict(list)
        self._awaited: tuple[int, _Into] | None = None
        self._start = self._num_tokens = 0
        self._is_decode = False

    def begin_pass(self, start: int, num_tokens: int, *, is_decode: bool) -> list[int]:
        """Get ready for a pass over these positions; may be repeated when a pass failed.

        Args:
            start: the first position.
            num_tokens: positions.
            is_decode: whether the pass may leave blocks out: a single token behind the prompt.

        Returns:
            A block table for the pass: right at the new positions, -1 before.
        """
        self._abandon()
        self._start, self._num_tokens, self._is_decode = start, num_tokens, is_decode
        first, stop = start // self._block_tokens, -(-(start + num_tokens) // self._block_tokens)
        if stop > self.resident.num_blocks:
            self._settle()
            self.resident.begin_blocks(stop - self.resident.num_blocks)
        table = [-1] * first
        return table + [int(self._ids[self.resident.slot_of_new(b)]) for b in range(first, stop)]

    def end_pass(self, token_ids: Sequence[int], num_computed: int, num_exact: int) -> range:
        """The pass was good: keep the blocks that it filled.

        Args:
            token_ids: the sequence's.
            num_computed: tokens whose KV is there now.
            num_exact: leading blocks that are no product of a sparse step.

        Returns:
            The blocks that are full since this pass.

        Raises:
            SlabLostError: the shelf cannot keep them.
            CapacityError: likewise.
        """
        full, put = num_computed // self._block_tokens, self.resident.num_kept
        if full > put:
            slots = [self.resident.slot_of_new(block) for block in range(put, full)]
            slabs = self._kv_pool[:, self._ids[slots]]
            self.shelf.put(token_ids[: full * self._block_tokens], slabs, num_exact=num_exact)
            self.shelf.wait_kept(full)
            self.resident.keep(full)
            if self._chooser is not None:
                self._chooser.seal(slabs)
        return range(put, full)

    def __call__(self, layer: int, q_THD: Tensor, kv_layer: Tensor, /) -> Tensor:
        """See `ItemAttention`."""
        if not self._is_decode or self._chooser is None:
            if layer == 0:
                self._expect_all()
            return self._attend_all(layer, q_THD, kv_layer)
        wanted = self._chooser.choose(layer, q_THD, self._start)
        if wanted is not None:
            return self._attend_chosen(layer, q_THD, kv_layer, wanted)
        self._collect(layer)
        self.stream.expect(layer, self._missing_past(layer))
        return self._attend_all(layer, q_THD, kv_layer)

    def stop(self) -> None:
        """End all reads; nothing is written to the pool any more. Idempotent."""
        self._abandon()
        self._settle()

    def check_integrity(self) -> list[str]:
        """Every violated invariant, in words; empty when sound."""
        faults = self.resident.check_integrity()
        if self.resident.num_kept > self.shelf.num_kept:
            faults.append(f"{self.resident.num_kept} blocks may leave, {self.shelf.num_kept} kept")
        return faults

    # Everything: the past in waves

    def _attend_all(self, layer: int, q_THD: Tensor, kv_layer: Tensor) -> Tensor:
        """Dense: what is in the pool first, then what is expected."""
        past = np.arange(self._start // self._block_tokens)
        parts = _Parts()
        parts.add(self._attend_pool(layer, q_THD, kv_layer, past))
        for wave in self.stream.waves(layer):
            parts.add(attend_blocks(q_THD, wave))
        return parts.result()

    def _expect_all(self) -> None:
        """Nothing moves in or out during a dense pass, so all of it is known beforehand."""
        self._settle()
        for layer in range(len(self._kv_pool)):
            self.stream.expect(layer, self._missing_past(layer))

    def _missing_past(self, layer: int) -> Indexes:
        missing = self.resident.missing(layer)
        return missing[missing < self._start // self._block_tokens]

    def _attend_pool(
        self, layer: int, q_THD: Tensor, kv_layer: Tensor, past: Indexes
    ) -> tuple[Tensor, Tensor]:
        """Attend to those of `past` that are in the pool, and to the blocks of the new positions.

        They are attended to as if they were a sequence of their own: rotated keys know their place.
        """
        first, size = self._start // self._block_tokens, self._block_tokens
        stop = -(-(self._start + self._num_tokens) // size)
        slots = self.resident.slots_of(layer, past)
        slots = np.append(slots[slots >= 0], self.resident.slots_of(layer, np.arange(first, stop)))
        start = (len(slots) - (stop - first)) * size + self._start % size
        table = PagedSequence.build(start, self._num_tokens, self._ids[slots].tolist(), kv_layer)
        attend = select_attention(table, (q_THD.shape[1], q_THD.shape[2]), kv_layer, None)
        return attend(q_THD, kv_layer, table)

    # Chosen blocks: misses into the pool

    def _attend_chosen(self, layer: int, q_THD: Tensor, kv_layer: Tensor, wanted: Wanted) -> Tensor:
        """Sparse: read what is missing, attend to what is there meanwhile."""
        resident, blocks = self.resident, wanted.blocks
        resident.want(layer, blocks, wanted.mass)
        self._collect(layer)
        past = blocks[blocks < self._start // self._block_tokens]
        there = resident.slots_of(layer, past) >= 0
        placement = resident.place(layer, past[~there], protected=blocks)
        arriving = self._read(layer, placement, kv_layer)
        self._awaited = None if arriving is None else (layer, arriving)
        self.stream.expect(layer, placement.rest)
        parts = _Parts()
        parts.add(self._attend_pool(layer, q_THD, kv_layer, past[there]))
        if arriving is not None:
            self._wait()
            ids = torch.from_numpy(self._ids[placement.slots])
            parts.add(attend_blocks(q_THD, kv_layer[ids.to(kv_layer.device)]))
        for wave in self.stream.waves(layer):
            parts.add(attend_blocks(q_THD, wave))
        if wanted.mass is not None and self._options.prefetch_blocks:
            self._prefetch(layer, wanted.mass, protected=blocks)
        return parts.result()

    def look_ahead(self, layer: int, q_THD: Tensor, /) -> None:
        """See `QueriesAhead`: read what the next layer will probably want, while this one attends.

        Raises:
            SlabLostError: the shelf has lost a block.
        """
        if not self._is_decode or self._chooser is None:
            return
        wanted = self._chooser.predict(layer, q_THD, self._start)
        if wanted is None or wanted.mass is None:
            return
        resident, past = self.resident, wanted.blocks[:-1]
        missing = past[~(resident.is_loading(layer, past) | (resident.slots_of(layer, past) >= 0))]
        self._read_ahead(layer, missing, wanted.mass, wanted.blocks)

    def _prefetch(self, layer: int, mass: Mass, protected: Indexes) -> None:
        """Read the next best blocks of a layer for the next step."""
        best = self.resident.best_missing(layer, mass, self._options.prefetch_blocks)
        best = best[best < self._start // self._block_tokens]
        self._read_ahead(layer, best, mass, protected)

    def _read_ahead(self, layer: int, blocks: Indexes, mass: Mass, protected: Indexes) -> None:
        """Begin to read blocks into the pool, behind all reads that somebody waits for.

        Args:
            layer: the layer.
            blocks: kept, neither there nor on their way.
            mass: [at most the blocks of the sequence] what they are estimated to hold.
            protected: blocks that may not leave the layer for them.
        """
        blocks = blocks[blocks < len(mass)]
        self.resident.note_mass(layer, blocks, mass[blocks])
        placement = self.resident.place(layer, blocks, protected=protected, is_ahead=True)
        read = self._read(layer, placement, self._kv_pool[layer], is_ahead=True)
        if read is not None:
            self._ahead[layer].append(read)

    def _read(
        self, layer: int, placement: Placement, kv_layer: Tensor, *, is_ahead: bool = False
    ) -> _Into | None:
        if len(placement.blocks) == 0:
            return None
        into = [kv_layer[block_id] for block_id in self._ids[placement.slots]]
        blocks = placement.blocks.tolist()
        read: SlabRead | None = None
        try:
            read = self.shelf.read(layer, blocks, into, is_ahead=is_ahead)
        finally:
            if read is None:
                self.resident.end_load(layer, placement.slots, 0)
        return _Into(read, placement)

    def _wait(self) -> None:
        """Wait for the read into the pool."""
        assert self._awaited is not None
        layer, arriving = self._awaited
        count = len(arriving.placement.blocks)
        arriving.read.wait(count)
        self._awaited = None
        self.resident.end_load(layer, arriving.placement.slots, count)
        self.stats.read_slabs += count

    def _abandon(self) -> None:
        """End what a pass that failed has left under way: slots whose slab is lost hold nothing."""
        self.stream.reset()
        if self._awaited is not None:
            layer, arriving = self._awaited
            self._awaited = None
            self.stats.lost_slabs += len(arriving.placement.blocks) - self._end(layer, arriving)

    def _collect(self, layer: int) -> None:
        """End what was read ahead for a layer: what has not come yet is asked for anew."""
        for ahead in self._ahead.pop(layer, ()):
            self.stats.ahead_slabs += self._end(layer, ahead)

    def _end(self, layer: int, arriving: _Into) -> int:
        arriving.read.cancel()
        num_good = arriving.read.num_done()
        self.resident.end_load(layer, arriving.placement.slots, num_good)
        return num_good

    def _settle(self) -> None:
        """End all reads ahead."""
        for layer in list(self._ahead):
            self._collect(layer)
