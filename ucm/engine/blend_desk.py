"""`BlendDesk`: reuse of chunks, beside the engine's passes.

    admitted     a sequence with chunks: their originals are found, loaded or computed
    each step    advance: loads looked after, jobs run in slices, as many as the step can afford
    nothing else to do   wait: for a layer; a job that cannot get on gives up, and is prefilled
    preempted, aborted   drop: its job ends, originals that nobody else uses go

Jobs of several requests run oldest first. A step's tokens are shared with the batch, so decodes of
others go on beside a blend as beside a prompt's chunk.

Envelope: an engine without `EngineOptions.reuse` has no desk. A job costs what
`ucm.reuse` computes, and about 0.1 ms a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from ucm.clock import Clock
from ucm.errors import ConfigError
from ucm.kernels.rope import Rope
from ucm.reuse.blending import blend
from ucm.reuse.budget import BudgetController
from ucm.reuse.chunks import check_reusable
from ucm.reuse.options import ReuseOptions
from ucm.reuse.protocols import LayerwiseModel

from .blend_job import BlendJob, JobParts
from .chunk_shelf import ChunkShelf, Original, ShelfParts
from .guarded_hook import GuardedHook
from .interfaces import DecoderModel
from .load_queue import LoadQueue
from .pool import KvPool
from .reuse_report import FallbackReason, ReuseStats
from .sequence import TokenSequence

_ENCODER_INDEX = 1 << 20
"""Behind all samples of its request, in front of the next request."""
_PATIENCE_US = 250_000
"""How long a job that nothing moves waits for blocks that stores hold."""
_POLL_S = 0.01


@dataclass(slots=True)
class BlendDesk:
    """See the module. Owned by the engine's thread."""

    parts: JobParts
    stats: ReuseStats
    _jobs: dict[str, BlendJob] = field(default_factory=dict)
    _num_steps: int = 0
    _idle_step: int = -1
    """The last in which the engine had nothing to do."""
    _stuck_since_us: int | None = None

    @property
    def owned(self) -> list[list[int]]:
        """Blocks that originals own; for checks."""
        return self._shelf.owned

    @property
    def _shelf(self) -> ChunkShelf:
        return self.parts.shelf

    @property
    def _clock(self) -> Clock:
        return self.parts.clock

    def is_blending(self, sequence: TokenSequence) -> bool:
        """Whether a running sequence waits for its chunks."""
        return sequence.id in self._jobs

    def admit(self, sequence: TokenSequence) -> None:
        """A sequence was given its blocks: get its chunks, if it has any to come."""
        span = sequence.blend
        if span is None or span.is_over:
            return
        opened: dict[tuple[int, ...], Original] = {}
        arrival = (sequence.arrival[0], _ENCODER_INDEX)
        chunks = [chunk for chunk in span.chunks if chunk.stop > sequence.num_computed]
        if not chunks:
            span.is_over = True
            return
        for chunk in chunks:
            if chunk.token_ids in opened:
                continue
            original = self._shelf.open(chunk.token_ids, sequence.id, arrival)
            if original is None:
                break
            opened[chunk.token_ids] = original
        else:
            originals = [(chunk, opened[chunk.token_ids]) for chunk in chunks]
            self._jobs[sequence.id] = BlendJob(self.parts, sequence, originals)
            return
        for original in opened.values():
            self._shelf.close(original)
        self.give_up(sequence, FallbackReason.NO_ROOM)

    def give_up(self, sequence: TokenSequence, reason: FallbackReason) -> None:
        """A sequence is to be prefilled as any other; it has no job."""
        span = sequence.blend
        assert span is not None
        span.fall_back(reason)
        assert span.report is not None
        self.stats.add(span.report)

    def drop(self, sequence: TokenSequence) -> None:
        """A sequence gives its blocks up."""
        job = self._jobs.pop(sequence.id, None)
        if job is not None:
            self._close(job)

    def take(self, encoder: TokenSequence) -> None:
        """A private sequence is computed; the caller retires it."""
        self._shelf.take(encoder)

    def advance(self, num_tokens: int) -> int:
        """Look after the chunks, and run jobs.

        Args:
            num_tokens: of all layers, that may be computed.

        Returns:
            What was computed, rounded up; above 0 whenever a job moved.
        """
        if not self._jobs:
            return 0
        self._num_steps += 1
        self._shelf.poll()
        num_layers = self.parts.pool.layout.num_layers
        allowance, used = float(num_tokens * num_layers), 0.0
        num_moved = 0
        for job in sorted(self._jobs.values(), key=lambda job: job.sequence.arrival):
            if used >= allowance:
                break
            computed = job.advance(allowance - used)
            used += computed
            num_moved += computed > 0 or job.is_over
            if job.is_over:
                self._end(job)
        return max(int(num_moved > 0), -(-int(used) // num_layers))

    def wait(self) -> bool:
        """The engine has nothing else to do: wait for what jobs need; give one up if that is idle.

        Returns:
            False when there is no job.
        """
        jobs = sorted(self._jobs.values(), key=lambda job: job.sequence.arrival)
        if not jobs:
            return False
        if any(job.wait() for job in jobs):
            return True
        if self._may_be_freed():
            return True
        jobs[0].fall_back(FallbackReason.NO_ROOM)
        self._end(jobs[0])
        return True

    def make_do(self, first: TokenSequence, stalled_us: int) -> bool:
        """Nothing runs, and there is no room for the first in the queue and its chunks.

        Returns:
            Whether it now does without them.
        """
        if not first.num_extra_blocks or stalled_us < _PATIENCE_US:
            return False
        self.give_up(first, FallbackReason.NO_ROOM)
        return True

    def _may_be_freed(self) -> bool:
        """Whether something may yet make room, though nothing could be done in this step."""
        was_idle = self._idle_step == self._num_steps - 1
        self._idle_step = self._num_steps
        now_us = self._clock.now_us()
        if not was_idle or self._stuck_since_us is None:
            self._stuck_since_us = now_us
            return True
        has_patience = now_us - self._stuck_since_us < _PATIENCE_US
        if self.parts.pool.num_pinned == 0 or not has_patience:
            return False
        self.parts.pool.wait_release(_POLL_S)
        return True

    def check_integrity(self, running: Sequence[TokenSequence]) -> list[str]:
        """Every violated invariant, in words; empty when sound."""
        known = {sequence.id for sequence in running}
        faults = [f"{gone} has a blend and no blocks" for gone in set(self._jobs) - known]
        blocks = self.parts.pool.blocks
        for sequence in running:
            span = sequence.blend
            if span is None:
                continue
            job = self._jobs.get(sequence.id)
            if job is not None and not job.is_undisturbed:
                faults.append(f"{sequence.id} computed beside the repair of its chunks")
            if sequence.approximate_from is None:
                continue
            blended = sequence.block_ids[sequence.num_exact_blocks(sequence.num_tokens) :]
            found = [block_id for block_id in blended if blocks.is_findable(block_id)]
            faults += [
                f"block {block_id} of {sequence.id} is blended and found" for block_id in found
            ]
        return faults

    def _end(self, job: BlendJob) -> None:
        """A job is over: count it, and let its originals go."""
        del self._jobs[job.sequence.id]
        span = job.sequence.blend
        if span is not None and span.report is not None:
            self.stats.add(span.report)
        self._close(job)

    def _close(self, job: BlendJob) -> None:
        for original in {id(original): original for _, original in job.originals}.values():
            self._shelf.close(original)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeskContext:
    """The engine that a desk belongs to."""

    model: DecoderModel
    options: ReuseOptions
    pool: KvPool
    hook: GuardedHook
    loads: LoadQueue
    clock: Clock
    stats: ReuseStats
    max_pinned: int
    """Blocks that stores may pin."""
    max_load_s: float
    submit: Callable[[TokenSequence], None]
    """Queues a sequence."""
    retire: Callable[[TokenSequence], None]
    """Takes a sequence out."""


def open_desk(context: DeskContext) -> BlendDesk:
    """A desk for an engine.

    Raises:
        ConfigError: the model has no RoPE, or cannot be run a layer at a time; budgets or targets
            that make no sense.
    """
    model, options = context.model, context.options
    check_reusable(model.config)
    rope = getattr(model.config, "rope", None)
    if not isinstance(rope, Rope) or not hasattr(model, "project"):
        raise ConfigError("engine: reuse needs a model that is run a layer at a time")
    shelf = ChunkShelf(
        ShelfParts(
            pool=context.pool,
            hook=context.hook,
            clock=context.clock,
            sink_tokens=tuple(options.sink_tokens),
            max_pinned=context.max_pinned,
            max_load_s=context.max_load_s,
            stats=context.stats,
            submit=context.submit,
            retire=context.retire,
        )
    )
    parts = JobParts(
        model=cast(LayerwiseModel, model),
        blend=blend,
        budgets=BudgetController(options),
        rope=rope,
        pool=context.pool,
        loads=context.loads,
        shelf=shelf,
        clock=context.clock,
        num_sink=len(options.sink_tokens),
    )
    return BlendDesk(parts, context.stats)
