"""What the engine offers its hook to store: blocks, before the pass that fills them.

    chain     | offered before | full, not offered | filled by this pass | to come
    offered                    ^ final already     ^ behind a LayerClock ^

The hook copies layer l while the pass computes layer l + 1, so a store adds nothing to the step. A
pass that fails, or is repeated, drops its stores: their clock fails, their pins go, and the blocks
are offered again.

Invariants: no more than `max_pinned` blocks are pinned for stores, the rest is offered in later
passes, so a slow store never starves the decode. Blocks of a load that has not ended are never
offered. A clock is complete only when the pass and the sampling are over.

Envelope: one integer comparison a sequence and step; a pin, a clock and a call of the hook for a
step that fills a block, that is every `block_tokens` steps of a decode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .guarded_hook import GuardedHook
from .hook import StoreRequest
from .layer_clock import LayerClock
from .load_queue import LoadQueue
from .pool import KvPool
from .scheduler import Work
from .sequence import TokenSequence


@dataclass(slots=True)
class _OpenPass:
    """The offers of the pass under way."""

    clock: LayerClock
    releases: list[Callable[[], None]] = field(default_factory=list)
    offered: list[tuple[TokenSequence, int]] = field(default_factory=list)
    """Sequences, with what they had offered before."""


class StoreOffers:
    """Offers blocks to the hook; see the module. Owned by the engine's thread."""

    def __init__(self, hook: GuardedHook, pool: KvPool, loads: LoadQueue, max_pinned: int) -> None:
        """Offer at most `max_pinned` blocks at a time."""
        self._hook = hook
        self._pool = pool
        self._loads = loads
        self._max_pinned = max_pinned
        self._open: _OpenPass | None = None

    def begin_pass(self, batch: Sequence[Work]) -> LayerClock | None:
        """Offer what `batch` will fill; ended by `complete_pass` or `fail_pass`.

        Returns:
            The clock to advance; None when nothing waits for it.
        """
        if not self._hook.is_attached:
            return None
        under_way = _OpenPass(LayerClock(self._pool.layout.num_layers))
        self._open = under_way
        for work in batch:
            self._offer_work(work, under_way)
        return under_way.clock if under_way.releases else None

    def complete_pass(self) -> None:
        """The pass is over, and nothing of it can fail any more."""
        if self._open is not None:
            self._open.clock.advance(self._open.clock.num_layers)
            self._open = None

    def fail_pass(self) -> None:
        """The pass failed or will be repeated: take back what it was to fill."""
        failed, self._open = self._open, None
        if failed is None:
            return
        failed.clock.fail()
        for release in failed.releases:
            release()
        for sequence, num_offered in failed.offered:
            sequence.num_offered = num_offered
        self._pool.drain()

    def swap_out(self, sequence: TokenSequence, num_wanted: int) -> None:
        """Offer what a sequence that gives its blocks up has not offered yet, if that pays.

        Args:
            sequence: it has no load.
            num_wanted: blocks that must be available at once when it has left.
        """
        if sequence.is_offloaded:
            return
        num_new = sequence.num_exact_blocks(sequence.num_computed) - sequence.num_offered
        if num_new <= 0 or not self._hook.should_swap_out(sequence.num_computed):
            return
        blocks = self._pool.blocks
        num_freed = sum(1 for block_id in sequence.block_ids if blocks.refs(block_id) == 1)
        num_spare = blocks.num_available + num_freed - num_wanted
        last = sequence.num_offered + min(num_new, num_spare)
        self._offer(sequence, last, LayerClock.finished(self._pool.layout.num_layers))

    def _offer_work(self, work: Work, under_way: _OpenPass) -> None:
        sequence = work.sequence
        last = sequence.num_exact_blocks(sequence.num_computed + work.num_tokens)
        before = sequence.num_offered
        if last <= before or sequence.is_offloaded:
            return
        num_final = sequence.num_exact_blocks(sequence.num_computed)
        load = self._loads.get(sequence)
        if load is not None and load.is_joined:
            # Not what it loads, which comes from there, and is not verified yet.
            sequence.num_offered = num_final
        elif before < num_final:
            self._offer(sequence, num_final, LayerClock.finished(under_way.clock.num_layers))
            before = sequence.num_offered
        if sequence.num_offered >= num_final:
            release = self._offer(sequence, last, under_way.clock)
            under_way.releases += [release] if release else []
        under_way.offered.append((sequence, before))

    def _offer(
        self, sequence: TokenSequence, last: int, clock: LayerClock
    ) -> Callable[[], None] | None:
        """Offer blocks up to `last`, as many as may be pinned; returns what unpins them."""
        first = sequence.num_offered
        last = min(last, first + self._max_pinned - self._pool.num_pinned)
        if last <= first:
            return None
        block_ids = tuple(sequence.block_ids[first:last])
        release = self._pool.pin(block_ids)
        sequence.num_offered = last
        self._hook.store(
            StoreRequest(
                request_id=sequence.id,
                token_ids=sequence.tokens[: last * sequence.block_tokens],
                first_block=first,
                block_ids=block_ids,
                release=release,
                layers=clock,
            )
        )
        return release
