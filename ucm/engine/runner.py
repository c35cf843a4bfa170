"""The step loop: carries out the scheduler's plans on the pool, the hook and the model.

    submit -> waiting -> [admit: prefix cache] -> loading -> running -> (sequence, token)
                 ^---------- preempt (blocks go, tokens stay) ---'

A step looks after the loads, preempts, grows, admits, runs one forward pass and draws one token a
finished sequence; the bookkeeping comes last, where nothing can fail: an error of the model or of
the sampler leaves every sequence as it was before the pass, and the step can be repeated. It knows
tokens and blocks, no text and no requests.

Loads start at admission and run behind the passes of others. When nothing else can run, the pass
starts with the load that has the least to come, and follows it layer by layer; with as many tokens
as a step may have where nobody runs or waits beside it, for what it computes hides the load.

Envelope of a decode step, forward pass left out: O(running) Python, some 50 us a sequence, and
nothing that grows with the context but one hash and one block every `block_tokens` tokens.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch

from ucm.clock import Clock
from ucm.errors import CapacityError, ConfigError
from ucm.layout import KvLayout
from ucm.sparse.certified_attention import Promises
from ucm.sparse.decoding import SparseStats
from ucm.sparse.slab_source import SlabSource
from ucm.types import LoadOrder

from .blend_desk import BlendDesk, DeskContext, open_desk
from .engine_options import EngineOptions, EngineStats
from .forward_pass import ForwardPass, PassParts
from .guarded_hook import GuardedHook
from .hook import KvHook
from .interfaces import DecoderModel
from .load_queue import Load, LoadQueue
from .offload_desk import OffloadDesk
from .pool import TORCH_DTYPES, KvPool
from .sampling import Draw, sample
from .scheduler import Admission, Work, plan_step
from .sequence import TokenSequence
from .sparse_decode import SparseDecode
from .store_offers import StoreOffers

_STALL_POLL_S = 0.01
"""Longest wait for a pinned block or a load before the step returns empty."""


class BatchRunner:
    """Running and waiting sequences over one pool; see the module. Owned by one thread."""

    def __init__(
        self,
        model: DecoderModel,
        options: EngineOptions,
        hook: KvHook | None,
        clock: Clock,
        source: SlabSource | None = None,
    ) -> None:
        """Build the pool and attach the hook."""
        self.stats = EngineStats()
        self.running: list[TokenSequence] = []
        """Those that have blocks, loading ones included; oldest first."""
        self.waiting: list[TokenSequence] = []
        """Oldest first."""
        self._options = options
        self._clock = clock
        layout = layout_of(model, options.block_tokens)
        self.pool = KvPool(layout, options.num_blocks, options.device)
        self.hook = GuardedHook(hook, self.pool.tensor, layout.block_tokens)
        self.loads = LoadQueue(self.hook, self.pool, options.scheduler, clock)
        self._offers = StoreOffers(self.hook, self.pool, self.loads, options.max_pinned)
        self.blends: BlendDesk | None = None
        if options.reuse is not None:
            self.blends = open_desk(
                DeskContext(
                    model=model,
                    options=options.reuse,
                    pool=self.pool,
                    hook=self.hook,
                    loads=self.loads,
                    clock=clock,
                    stats=self.stats.reuse,
                    max_pinned=options.max_pinned,
                    max_load_s=options.scheduler.max_load_s,
                    submit=self.submit,
                    retire=self.retire,
                )
            )
        self._sparse: SparseDecode | None = None
        if options.sparse is not None:
            self._sparse = SparseDecode(options.sparse, self.pool, self.loads)
        make_chooser = self._sparse.chooser if self._sparse else None
        self.offloads = OffloadDesk(self.pool, source, options.share, make_chooser)
        self._pass = ForwardPass(
            PassParts(model, self.pool, self.hook, self.loads, self._offers, self.offloads, clock)
        )
        self._stalled_since_us: int | None = None

    @property
    def sparse_stats(self) -> SparseStats | None:
        """What sparse attention read and left out; None without it."""
        return None if self._sparse is None else self._sparse.stats

    @property
    def promises(self) -> Promises | None:
        """What certificates came to; None without one."""
        return None if self._sparse is None else self._sparse.promises

    def check_integrity(self) -> list[str]:
        """Every violated invariant of pool and sequences, in words; empty when sound."""
        owners = [*(item.block_ids for item in self.running), *self.loads.owned]
        owners += self.blends.owned if self.blends else []
        faults = self.pool.check_integrity(owners)
        faults += self.blends.check_integrity(self.running) if self.blends else []
        faults += [f"waiting {item.id} holds blocks" for item in self.waiting if item.block_ids]
        faults += self.offloads.check_integrity()
        return faults + (self._sparse.check_integrity(self.running) if self._sparse else [])

    def submit(self, sequence: TokenSequence) -> None:
        """Queue a sequence; it starts with the next step that has room."""
        bisect.insort(self.waiting, sequence, key=_by_arrival)

    def retire(self, sequence: TokenSequence) -> None:
        """Take a sequence out, whatever its state; its blocks go back."""
        (self.running if sequence.block_ids else self.waiting).remove(sequence)
        self._give_up(sequence)
        self.offloads.forget(sequence)

    def step(self) -> list[tuple[TokenSequence, int]]:
        """Compute one batch; blocks for one forward pass (and the hook's loads).

        Returns:
            Sequences with their new token, which the caller appends, or retires the sequence. A
            sequence that was forked comes with its forks.

        Raises:
            CapacityError: the hook did not give its blocks back for `stall_timeout_s`.
            CorruptionError: the model produced no finite logits.
        """
        self.pool.drain()
        for sequence in self.loads.poll():
            self._preempt(sequence)
        num_blended = self._blend()
        options = self._options.scheduler.less(num_blended)
        plan = plan_step(self.running, self.waiting, self.pool.blocks, options, self.loads)
        for sequence in plan.preempt:
            if sequence.block_ids:  # a private one may have gone with its request
                self._preempt(sequence, plan.num_new_blocks)
        ready = [self._prepare(work) for work in plan.work]
        ready += [self._join(work.sequence, work.num_tokens) for work in plan.join]
        ready += [self._admit(admission) for admission in plan.admit]
        batch = [work for work in ready if work is not None and work.sequence.block_ids]
        batch = batch or self._join_smallest()
        if not batch:
            if not num_blended:
                self._stall()
            return []
        self._stalled_since_us = None
        attentions = self._sparse.begin_pass(batch) if self._sparse is not None else None
        try:
            result = self._pass.run(batch, options, attentions)
        finally:  # what lost its KV has lost it, even if the pass then failed
            for sequence in self._pass.take_evicted():
                self._preempt(sequence)
        return [] if result.logits is None else self._finish_step(result.batch, result.logits)

    def _finish_step(
        self, batch: Sequence[Work], logits: torch.Tensor
    ) -> list[tuple[TokenSequence, int]]:
        ready = [
            (row, work.sequence)
            for row, work in enumerate(batch)
            if work.num_tokens == work.sequence.num_uncomputed and not work.sequence.is_private
        ]
        token_ids = self._sample(logits, ready)
        lost = self.offloads.end_pass(batch)
        for work in batch:
            if work.sequence not in lost and work.sequence.block_ids:
                self._advance(work)
        sinks = [sink for _, item in ready for sink in (item, *self._fork(item))]
        self.stats.steps += 1
        for sequence in lost:
            self._preempt(sequence)
        self._take_private(batch)
        drawn = zip(sinks, token_ids, strict=True)
        return [(sequence, token_id) for sequence, token_id in drawn if sequence not in lost]

    def _blend(self) -> int:
        """Run what chunks need; returns the tokens that it counts as.

        Beside others it takes no more of a step than a prompt's chunk does.
        """
        if self.blends is None:
            return 0
        options = self._options.scheduler
        is_alone = all(self.blends.is_blending(sequence) for sequence in self.running)
        is_alone = is_alone and not self.waiting
        return self.blends.advance(
            options.max_step_tokens if is_alone else options.prefill_chunk_tokens
        )

    def _take_private(self, batch: Sequence[Work]) -> None:
        """Keep the chunks that were computed for those who wait for them."""
        for work in batch:
            sequence = work.sequence
            if sequence.is_private and sequence.block_ids and sequence.num_uncomputed == 0:
                assert self.blends is not None
                self.blends.take(sequence)
                self.retire(sequence)

    def _sample(
        self, logits: torch.Tensor, ready: Sequence[tuple[int, TokenSequence]]
    ) -> list[int]:
        """Draw the tokens; what the pass stored is good only if that succeeds."""
        is_over = False
        try:
            token_ids = sample(logits, [draw for row, item in ready for draw in _draws(row, item)])
            is_over = True
        finally:
            if is_over:
                self._offers.complete_pass()
            else:
                self._offers.fail_pass()
        return token_ids

    def _preempt(self, sequence: TokenSequence, num_wanted: int = 0) -> None:
        """Send a sequence back to wait; its KV stays in the caches, where it is worth it.

        Args:
            sequence: a running one.
            num_wanted: blocks that the step needs from it, so they cannot be stored first.
        """
        self.running.remove(sequence)
        self.loads.drop(sequence)
        self._offers.swap_out(sequence, num_wanted)
        self._give_up(sequence)
        bisect.insort(self.waiting, sequence, key=_by_arrival)
        sequence.num_preemptions += 1
        self.stats.preemptions += 1

    def _give_up(self, sequence: TokenSequence) -> None:
        """End what is under way for a sequence, and give its blocks back."""
        self.loads.drop(sequence)
        self.offloads.leave(sequence)
        if self._sparse is not None:
            self._sparse.drop(sequence)
        if self.blends is not None:
            self.blends.drop(sequence)
        self.pool.blocks.release(sequence.rewind())
        self.hook.finish(sequence.id)

    def _prepare(self, work: Work) -> Work | None:
        """Make sure that the rows to write belong to this sequence alone; None when they cannot.

        A preempted sequence may have left fewer blocks than planned: some may still be written to.
        """
        sequence, blocks = work.sequence, work.sequence.block_ids
        num_tokens = self.loads.claim(sequence, work.num_tokens) if blocks else 0
        if num_tokens == 0:
            return None
        if sequence.is_offloaded:
            return Work(sequence, num_tokens)
        if sequence.num_blocks_for(sequence.num_computed + num_tokens) > len(blocks):
            if self.pool.blocks.num_available == 0:
                return None
            blocks += self.pool.blocks.allocate(1, after=blocks[-1])
            return Work(sequence, num_tokens)
        index, num_rows = divmod(sequence.num_computed, sequence.block_tokens)
        if not self.pool.may_make_writable(blocks[index]):
            return None
        writable = self.pool.make_writable(blocks[index], num_rows)
        self.stats.copied_blocks += writable != blocks[index]
        blocks[index] = writable
        return Work(sequence, num_tokens)

    def _admit(self, admission: Admission) -> Work | None:
        """Give a sequence its blocks: shared ones first, then its own, some of them to be loaded.

        Returns:
            What it computes in this step; None when it only loads, or must wait after all.
        """
        sequence, blocks = admission.sequence, self.pool.blocks
        if sequence not in self.waiting:
            return None
        usable = sequence.reusable_chain
        shared = blocks.find(usable)
        num_own = sequence.num_blocks_for(sequence.num_tokens) - len(shared)
        if any(self.loads.is_awaited(link.key) for link in usable[len(shared) :][:1]):
            return None
        blocks.acquire(shared)
        if num_own > blocks.num_available:
            blocks.release(shared)
            return None
        own = blocks.allocate(
            num_own,
            after=shared[-1] if shared else None,
            growth=sequence.num_blocks_for(sequence.max_length - sequence.num_tokens),
        )
        sequence.block_ids = shared + own
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_by_arrival)
        sequence.num_computed = len(shared) * sequence.block_tokens
        sequence.num_registered = len(shared)
        self.offloads.admit(sequence)
        if sequence.num_preemptions == 0:
            sequence.num_local_tokens = sequence.num_computed
        num_loadable = len(shared) if sequence.is_private else len(usable)
        load = self.loads.begin(sequence, len(shared), num_loadable, is_alone=self._is_alone())
        if self.blends is not None:
            self.blends.admit(sequence)
        return self._start(sequence, admission.max_tokens, load)

    def _start(self, sequence: TokenSequence, max_tokens: int, load: Load | None) -> Work | None:
        """What an admitted sequence computes at once, given the load that was begun for it."""
        if load is not None and self.loads.is_over(load):
            if not self.loads.end(load):
                self._preempt(sequence)
                return None
        elif load is not None and load.order is LoadOrder.LAYERS:
            return self._join(sequence, max_tokens) if self.loads.is_near(load) else None
        num_tokens = self.loads.claim(sequence, min(max_tokens, sequence.num_computable))
        return Work(sequence, num_tokens) if num_tokens else None

    def _join(self, sequence: TokenSequence, max_tokens: int) -> Work | None:
        """Make a sequence's load part of the pass.

        Where it is alone, with as many tokens as a step may have: what is computed hides the load,
        and nobody waits for the step's end but who comes while it runs.
        """
        load = self.loads.get(sequence)
        if load is None or max_tokens == 0 or load.num_uncomputed == 0:
            return None
        if self._is_alone():
            max_tokens = self._options.scheduler.max_step_tokens
        if not self.loads.join(load):
            self._preempt(sequence)
            return None
        return Work(sequence, min(max_tokens, sequence.num_computable))

    def _is_alone(self) -> bool:
        """Whether nobody runs or waits beside the one sequence."""
        return len(self.running) == 1 and not self.waiting

    def _join_smallest(self) -> list[Work]:
        """Nothing else can run: follow the load that has the least to come."""
        options = self._options.scheduler
        max_tokens = min(options.prefill_chunk_tokens, options.max_step_tokens)
        for load in self.loads.by_size():
            work = self._join(load.sequence, max_tokens)
            if work is not None:
                return [work]
        return []

    def _advance(self, work: Work) -> None:
        work.sequence.advance(work.num_tokens)
        self.stats.computed_tokens += work.num_tokens
        work.sequence.register_full(self.pool.blocks)
        if self._sparse is not None and not work.sequence.is_private:
            self._sparse.end_pass(work)

    def _fork(self, sequence: TokenSequence) -> list[TokenSequence]:
        """Split off a request's other samples, once its prompt is computed."""
        forks = [sequence.fork(index) for index in range(1, 1 + sequence.num_forks)]
        sequence.num_forks = 0
        for fork in forks:
            self.pool.blocks.acquire(fork.block_ids)
            bisect.insort(self.running, fork, key=_by_arrival)
        return forks

    def _stall(self) -> None:
        """Nothing can run before the hook loads or gives blocks back: wait, but not for ever."""
        if not self.running and not self.waiting:
            return
        if self.loads:  # none lasts longer than `max_load_s`
            self.hook.wait_some(_STALL_POLL_S)
            return
        if self.blends is not None and self.blends.wait():
            return
        now_us = self._clock.now_us()
        if self._stalled_since_us is None:
            self._stalled_since_us = now_us
        stalled_us = now_us - self._stalled_since_us
        if (
            self.blends is not None
            and not self.running
            and self.blends.make_do(self.waiting[0], stalled_us)
        ):
            return
        if stalled_us > self._options.stall_timeout_s * 1e6:
            raise CapacityError(
                f"engine: nothing can run, the KV hook holds {self.pool.num_pinned} of "
                f"{self._options.num_blocks} blocks since {self._options.stall_timeout_s} s"
            )
        self.pool.wait_release(_STALL_POLL_S)


def _by_arrival(sequence: TokenSequence) -> tuple[int, int]:
    return sequence.arrival


def layout_of(model: DecoderModel, block_tokens: int) -> KvLayout:
    """The layout of a pool of blocks of this model.

    Raises:
        ConfigError: its dtype cannot be stored.
    """
    config = model.config
    kinds = {dtype: kind for kind, dtype in TORCH_DTYPES.items()}
    if model.dtype not in kinds:
        raise ConfigError(f"engine: KV of {model.dtype} is not supported")
    return KvLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_tokens=block_tokens,
        dtype=kinds[model.dtype],
    )


def _draws(row: int, sequence: TokenSequence) -> list[Draw]:
    """The draws from one row of logits: more than one where a prompt ends in several samples."""
    return [
        Draw(
            row=row,
            params=sequence.params,
            sample_index=sequence.index + offset,
            position=sequence.num_tokens,
            seen=sequence.seen,
        )
        for offset in range(sequence.num_slots)
    ]
