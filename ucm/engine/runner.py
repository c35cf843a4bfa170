"""The step loop: carries out the scheduler's plans on the pool, the hook and the model.

    submit -> waiting -> [admit: prefix cache, then hook] -> running -> (sequence, token)
                 ^---------- preempt (blocks go, tokens stay) ---'

A step preempts, grows, admits, runs one forward pass and draws one token a finished sequence; the
bookkeeping comes last, where nothing can fail: an error of the model or of the sampler leaves every
sequence as it was before the pass, and the step can be repeated. It knows tokens and blocks, no
text and no requests.

Envelope of a decode step, forward pass left out: O(running) Python, some 50 us a sequence, and
nothing that grows with the context but one hash and one block every `block_tokens` tokens.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ucm.clock import Clock
from ucm.errors import CapacityError, ConfigError
from ucm.layout import KvLayout

from .guarded_hook import GuardedHook
from .hook import KvHook, LoadRequest, StoreRequest
from .interfaces import DecoderModel
from .model import ForwardItem
from .pool import TORCH_DTYPES, KvPool
from .sampling import Draw, sample
from .scheduler import Admission, SchedulerOptions, Work, plan_step
from .sequence import TokenSequence

_STALL_POLL_S = 0.01
"""Longest wait for a pinned block before the step returns empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Sizes and limits of one engine."""

    num_blocks: int = 512
    """KV pool: 16,384 tokens. Memory is used only as blocks are written."""
    block_tokens: int = 32
    """Tokens a block; the cache's block, so that slabs move unchanged."""
    device: str = "cpu"
    """Where the pool lives: the model's device."""
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    max_pinned_share: float = 0.5
    """Share of the pool that the hook's stores may pin; the rest of the new blocks is offered in
    later steps, so a slow store never starves the decode."""
    stall_timeout_s: float = 30.0
    """How long to wait for the hook to give pinned blocks back when nothing can run without."""

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.block_tokens < 1:
            raise ConfigError(
                f"engine: num_blocks is {self.num_blocks} and block_tokens {self.block_tokens}, "
                "both must be >= 1"
            )
        if not 0.0 < self.max_pinned_share <= 1.0:
            raise ConfigError(
                f"engine: max_pinned_share is {self.max_pinned_share}, must be in (0, 1]"
            )


@dataclass(slots=True)
class EngineStats:
    """Counters over the engine's life."""

    steps: int = 0
    computed_tokens: int = 0
    """Tokens that went through the model, recomputed ones included."""
    preemptions: int = 0
    copied_blocks: int = 0
    """Shared partial blocks that had to be copied before a write."""


class BatchRunner:
    """Running and waiting sequences over one pool; see the module. Owned by one thread."""

    def __init__(
        self, model: DecoderModel, options: EngineOptions, hook: KvHook | None, clock: Clock
    ) -> None:
        """Build the pool and attach the hook."""
        self.stats = EngineStats()
        self.running: list[TokenSequence] = []
        """Oldest first."""
        self.waiting: list[TokenSequence] = []
        """Oldest first."""
        self._model = model
        self._options = options
        self._clock = clock
        layout = _layout_of(model, options.block_tokens)
        self.pool = KvPool(layout, options.num_blocks, options.device)
        self.hook = GuardedHook(hook, self.pool.tensor, layout.block_tokens)
        self._max_pinned = max(1, int(options.num_blocks * options.max_pinned_share))
        self._stalled_since_us: int | None = None

    def submit(self, sequence: TokenSequence) -> None:
        """Queue a sequence; it starts with the next step that has room."""
        bisect.insort(self.waiting, sequence, key=_by_arrival)

    def retire(self, sequence: TokenSequence) -> None:
        """Take a sequence out, whatever its state; its blocks go back."""
        (self.running if sequence.block_ids else self.waiting).remove(sequence)
        self.pool.blocks.release(sequence.rewind())
        self.hook.finish(sequence.id)

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
        plan = plan_step(self.running, self.waiting, self.pool.blocks, self._options.scheduler)
        for sequence in plan.preempt:
            self._preempt(sequence)
        for work in plan.work:
            self._grow(work)
        batch = [*plan.work, *(self._admit(admission) for admission in plan.admit)]
        if not batch:
            self._stall()
            return []
        self._stalled_since_us = None
        logits = self._model.forward([_forward_item(work) for work in batch], self.pool.tensor)
        return self._finish_step(batch, logits)

    def _finish_step(
        self, batch: Sequence[Work], logits: torch.Tensor
    ) -> list[tuple[TokenSequence, int]]:
        ready = [
            (row, work.sequence)
            for row, work in enumerate(batch)
            if work.num_tokens == work.sequence.num_uncomputed
        ]
        token_ids = sample(logits, [draw for row, item in ready for draw in _draws(row, item)])
        for work in batch:
            self._advance(work)
        sinks = [sink for _, item in ready for sink in (item, *self._fork(item))]
        self.stats.steps += 1
        return list(zip(sinks, token_ids, strict=True))

    def _preempt(self, sequence: TokenSequence) -> None:
        self.running.remove(sequence)
        self.pool.blocks.release(sequence.rewind())
        bisect.insort(self.waiting, sequence, key=_by_arrival)
        sequence.num_preemptions += 1
        self.stats.preemptions += 1
        self.hook.finish(sequence.id)

    def _grow(self, work: Work) -> None:
        """Make sure that the rows to write belong to this sequence alone."""
        sequence, blocks = work.sequence, work.sequence.block_ids
        if sequence.num_blocks_for(sequence.num_computed + work.num_tokens) > len(blocks):
            blocks += self.pool.blocks.allocate(1, after=blocks[-1])
            return
        index, num_rows = divmod(sequence.num_computed, sequence.block_tokens)
        writable = self.pool.make_writable(blocks[index], num_rows)
        self.stats.copied_blocks += writable != blocks[index]
        blocks[index] = writable

    def _admit(self, admission: Admission) -> Work:
        """Give a sequence its blocks: shared ones first, loaded ones next, the rest to compute."""
        sequence, blocks = admission.sequence, self.pool.blocks
        usable = sequence.reusable_chain
        shared = blocks.find(usable)
        blocks.acquire(shared)
        own = blocks.allocate(
            sequence.num_blocks_for(sequence.num_tokens) - len(shared),
            after=shared[-1] if shared else None,
            growth=sequence.num_blocks_for(sequence.max_length - sequence.num_tokens),
        )
        sequence.block_ids = shared + own
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_by_arrival)
        num_loaded = self._load(sequence, len(shared), len(usable))
        num_ready = len(shared) + num_loaded
        sequence.num_computed = num_ready * sequence.block_tokens
        sequence.num_registered = len(shared)
        # A cache that had nothing to add may have lost the shared blocks too (it was restarted, or
        # was full), and would refuse their children as orphans; offering them again costs names.
        sequence.num_offered = num_ready if num_loaded else 0
        self._register(sequence)
        if sequence.num_preemptions == 0:
            sequence.num_local_tokens = len(shared) * sequence.block_tokens
            sequence.num_hook_tokens = num_loaded * sequence.block_tokens
        return Work(sequence, min(admission.max_tokens, sequence.num_uncomputed))

    def _load(self, sequence: TokenSequence, num_local: int, num_usable: int) -> int:
        tokens = list(sequence.tokens)
        num_matched = self.hook.match_blocks(tokens, num_local, num_usable)
        if num_matched == num_local:
            return 0
        block_ids = tuple(sequence.block_ids[num_local:num_matched])
        num_loaded = self.hook.load(
            LoadRequest(
                request_id=sequence.id,
                token_ids=tokens,
                first_block=num_local,
                block_ids=block_ids,
            )
        )
        self.pool.clear(block_ids[num_loaded:])
        return num_loaded

    def _advance(self, work: Work) -> None:
        work.sequence.num_computed += work.num_tokens
        self.stats.computed_tokens += work.num_tokens
        self._register(work.sequence)
        self._offer(work.sequence)

    def _register(self, sequence: TokenSequence) -> None:
        for index in range(sequence.num_registered, sequence.num_full_blocks):
            self.pool.blocks.register(sequence.block_ids[index], sequence.chain[index])
        sequence.num_registered = sequence.num_full_blocks

    def _offer(self, sequence: TokenSequence) -> None:
        """Offer new full blocks to the hook, as many as may be pinned now."""
        first = sequence.num_offered
        num_allowed = self._max_pinned - self.pool.num_pinned
        last = min(sequence.num_full_blocks, first + num_allowed)
        if last <= first or not self.hook.is_attached:
            return
        block_ids = tuple(sequence.block_ids[first:last])
        sequence.num_offered = last
        self.hook.store(
            StoreRequest(
                request_id=sequence.id,
                token_ids=sequence.tokens[: last * sequence.block_tokens],
                first_block=first,
                block_ids=block_ids,
                release=self.pool.pin(block_ids),
            )
        )

    def _fork(self, sequence: TokenSequence) -> list[TokenSequence]:
        """Split off a request's other samples, once its prompt is computed."""
        forks = [sequence.fork(index) for index in range(1, 1 + sequence.num_forks)]
        sequence.num_forks = 0
        for fork in forks:
            self.pool.blocks.acquire(fork.block_ids)
            bisect.insort(self.running, fork, key=_by_arrival)
        return forks

    def _stall(self) -> None:
        """Nothing can run before the hook gives blocks back: wait, but not for ever."""
        if not self.running and not self.waiting:
            return
        now_us = self._clock.now_us()
        if self._stalled_since_us is None:
            self._stalled_since_us = now_us
        if now_us - self._stalled_since_us > self._options.stall_timeout_s * 1e6:
            raise CapacityError(
                f"engine: nothing can run, the KV hook holds {self.pool.num_pinned} of "
                f"{self._options.num_blocks} blocks since {self._options.stall_timeout_s} s"
            )
        self.pool.wait_release(_STALL_POLL_S)


def _by_arrival(sequence: TokenSequence) -> tuple[int, int]:
    return sequence.arrival


def _layout_of(model: DecoderModel, block_tokens: int) -> KvLayout:
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


def _forward_item(work: Work) -> ForwardItem:
    sequence = work.sequence
    start = sequence.num_computed
    return ForwardItem(
        token_ids=sequence.tokens[start : start + work.num_tokens],
        start=start,
        block_ids=sequence.block_ids,
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
