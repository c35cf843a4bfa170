"""`OffloadDesk`: sequences that are longer than their share of the pool.

    admitted     owns `resident_blocks` pool blocks, all of them, from the start to the end
    a pass       begin_pass, its own attention, end_pass: what is full goes to the slab source
    preempted    its pool blocks go; what the source keeps stays, and need not be computed again
    slab lost    as preempted, computed anew from the lost block on; after `max_attempts`, without
                 offload where the pool can hold it, else the request ends as failed

Such a sequence shares no blocks and has one sample. Others in the batch are not concerned.

Envelope: a sequence that fits its share costs one comparison, when it is added.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ucm.errors import CapacityError
from ucm.sparse.offload import Chooser, OffloadedAttention, OffloadOptions
from ucm.sparse.protocols import ItemAttention
from ucm.sparse.slab_queue import SlabLostError
from ucm.sparse.slab_source import SlabShelf, SlabSource

from .model import ForwardItem

if TYPE_CHECKING:
    from torch import Tensor

    from .pool import KvPool
    from .scheduler import Work
    from .sequence import TokenSequence

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class DeskStats:
    """Counters over the engine's life."""

    sequences: int = 0
    """That were longer than their share."""
    recomputed: int = 0
    """Times that one was computed anew because a slab was lost."""
    failed: int = 0
    """That could not be served: neither the source nor the pool could hold them."""


@dataclass(slots=True)
class _Place:
    """One sequence's shelf, and its pool blocks while it runs."""

    shelf: SlabShelf
    chooser: Chooser | None
    attention: OffloadedAttention | None = None
    num_attempts: int = 0

    def truncate(self, num_blocks: int) -> None:
        """Keep the first blocks only."""
        self.shelf.truncate(num_blocks)
        if self.chooser is not None:
            self.chooser.truncate(self.shelf.num_kept)


@dataclass(slots=True)
class _Watched:
    """The attention of one sequence, which says whose a lost slab is."""

    sequence: TokenSequence
    attention: OffloadedAttention
    lost: list[tuple[TokenSequence, SlabLostError]]

    def __call__(self, layer: int, q_THD: Tensor, kv_layer: Tensor, /) -> Tensor:
        """See `ItemAttention`."""
        try:
            return self.attention(layer, q_THD, kv_layer)
        except SlabLostError as error:
            self.lost.append((self.sequence, error))
            raise

    def look_ahead(self, layer: int, q_THD: Tensor, /) -> None:
        """See `QueriesAhead`."""
        try:
            self.attention.look_ahead(layer, q_THD)
        except SlabLostError as error:
            self.lost.append((self.sequence, error))
            raise


@dataclass(slots=True)
class OffloadDesk:
    """Long sequences and where their KV is; see the module. Owned by the engine's thread."""

    pool: KvPool
    source: SlabSource | None
    options: OffloadOptions | None
    """None: no sequence is offloaded."""
    make_chooser: Callable[[], Chooser] | None
    """What decode steps of a sequence read; everything when None."""
    stats: DeskStats = field(default_factory=DeskStats)
    failed: list[tuple[TokenSequence, str]] = field(default_factory=list)
    """Sequences that must end, and why; the runner takes them."""
    _places: dict[str, _Place] = field(default_factory=dict)
    _lost: list[tuple[TokenSequence, SlabLostError]] = field(default_factory=list)

    def admit(self, sequence: TokenSequence) -> None:
        """A long sequence was given its pool blocks; it goes on behind what the source keeps."""
        if not sequence.is_offloaded:
            return
        assert self.source is not None
        assert self.options is not None
        place = self._places.get(sequence.id)
        if place is None:
            chooser = self.make_chooser() if self.make_chooser is not None else None
            place = _Place(self.source.open(sequence.id), chooser)
            self._places[sequence.id] = place
            self.stats.sequences += 1
        # The last token has to be computed in any case: the next one comes from its logits.
        place.truncate((sequence.num_tokens - 1) // sequence.block_tokens)
        place.attention = OffloadedAttention(
            self.options, self.pool.tensor, sequence.block_ids, place.shelf, place.chooser
        )
        sequence.num_computed = place.attention.resident.num_kept * sequence.block_tokens

    def item(self, work: Work, other: ItemAttention | None) -> ForwardItem:
        """The sequence's share of a pass; `other` attends if it is not a long one."""
        sequence = work.sequence
        start = sequence.num_computed
        tokens = sequence.tokens[start : start + work.num_tokens]
        if not sequence.is_offloaded:
            return ForwardItem(tokens, start, sequence.block_ids, other)
        attention = self._attention(sequence)
        is_decode = work.num_tokens == 1 and start >= sequence.num_prompt
        table = attention.begin_pass(start, work.num_tokens, is_decode=is_decode)
        watched = _Watched(sequence, attention, self._lost)
        look_ahead = watched.look_ahead if is_decode and self.make_chooser is not None else None
        return ForwardItem(tokens, start, table, watched, look_ahead)

    def take_lost(self) -> list[TokenSequence]:
        """Sequences whose slabs the pass that just ended could not have."""
        lost = [sequence for sequence, _ in self._lost]
        for sequence, error in self._lost:
            self._give_up(sequence, error, error.block)
        self._lost.clear()
        return lost

    def end_pass(self, batch: Sequence[Work]) -> list[TokenSequence]:
        """Keep what a good pass filled.

        Returns:
            Sequences that the source cannot keep: they must be computed anew, and their tokens of
            this pass do not count.
        """
        lost = []
        for work in batch:
            sequence = work.sequence
            if not sequence.is_offloaded:
                continue
            attention = self._attention(sequence)
            try:
                num_computed = sequence.num_computed + work.num_tokens
                num_exact = sequence.num_exact_blocks(num_computed)
                attention.end_pass(sequence.tokens, num_computed, num_exact)
            except (SlabLostError, CapacityError) as error:
                self._give_up(sequence, error, attention.resident.num_kept)
                lost.append(sequence)
        return lost

    def leave(self, sequence: TokenSequence) -> None:
        """The sequence loses its pool blocks; nothing is written to them any more."""
        place = self._places.get(sequence.id)
        if place is not None and place.attention is not None:
            place.attention.stop()
            place.attention = None

    def forget(self, sequence: TokenSequence) -> None:
        """The sequence has left the engine, or the desk."""
        self.leave(sequence)
        self.failed = [each for each in self.failed if each[0] is not sequence]
        place = self._places.pop(sequence.id, None)
        if place is not None:
            place.shelf.close()

    def check_integrity(self) -> list[str]:
        """Every violated invariant, in words; empty when sound."""
        return [
            f"{name}: {fault}"
            for name, place in self._places.items()
            if place.attention is not None
            for fault in place.attention.check_integrity()
        ]

    def attention_of(self, sequence_id: str) -> OffloadedAttention | None:
        """The attention of a running sequence, for its counters."""
        place = self._places.get(sequence_id)
        return None if place is None else place.attention

    def _attention(self, sequence: TokenSequence) -> OffloadedAttention:
        attention = self._places[sequence.id].attention
        assert attention is not None
        return attention

    def _give_up(self, sequence: TokenSequence, error: Exception, num_good: int) -> None:
        """Decide how the sequence goes on; the caller preempts it."""
        assert self.options is not None
        place = self._places[sequence.id]
        self.leave(sequence)
        place.truncate(max(0, num_good))
        place.num_attempts += 1
        self.stats.recomputed += 1
        logger.warning("long sequence computed anew: %s", error)
        if place.num_attempts <= self.options.max_attempts:
            return
        self.forget(sequence)
        sequence.resident_blocks = 0
        if sequence.num_blocks_for(sequence.max_length - 1) > self.pool.blocks.num_blocks:
            self.stats.failed += 1
            why = (
                f"its KV was lost {place.num_attempts} times ({error}), and "
                f"{self.pool.blocks.num_blocks} pool blocks cannot hold it"
            )
            self.failed.append((sequence, why))
