"""`BlendJob`: one sequence's chunks, from their originals into its own blocks.

    waits for       the prefix (ordinary passes, the cache) and for chunks that must be computed
    then, by layer  the layer's originals -> rows moved, some recomputed -> the sequence's blocks
    ends            the sequence goes on behind its chunks, as if they had been prefilled, or
                    with the last token of a short query, whose logits it has then

It is run in slices between the engine's passes. A chunk that is lost while it is loaded makes the
job begin anew, once, when the chunk has been computed; the second time, as whenever reuse is not
possible, the sequence is prefilled as any other.

Invariants: a layer is read only when every original's rows of it are there and verified. While a
repair runs the sequence computes nothing beside it; before, a pass behind a load that comes short
may compute some of the span, exactly as its tokens say. What it wrote is marked in the
sequence (`approximate_from`), so that it is neither shared nor stored under its tokens' names.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ucm.clock import Clock
from ucm.kernels.rope import Rope
from ucm.reuse.budget import BlendWork, BudgetController
from ucm.reuse.options import BlendOptions, RecomputePolicy
from ucm.reuse.protocols import (
    BlendOutcome,
    BlendPlan,
    BlendStep,
    ChunkSpan,
    KvRows,
    LayerwiseModel,
)

from .blend_span import BlendChunk, BlendSpan
from .chunk_rows import MovedRows, PoolRows
from .chunk_shelf import ChunkShelf, Original, OriginalState
from .load_queue import LoadQueue
from .pool import KvPool
from .reuse_report import FallbackReason, ReuseReport
from .sequence import TokenSequence

Steps = Generator[BlendStep, None, BlendOutcome]

MAX_QUERY_ROWS = 128
"""Tokens of a query, its last one not counted, that are computed with the repair at most; a longer
one is computed behind it. Rows added to a pass over the weights cost less than a pass of their own
(SmolLM2-135M on two cores: 1 row 23 ms, 96 rows 160 ms, 180 rows 290 ms, 276 rows 390 ms)."""


class Blend(Protocol):
    """`ucm.reuse.blending.blend` is one."""

    def __call__(
        self, model: LayerwiseModel, rows: KvRows, plan: BlendPlan, options: BlendOptions, /
    ) -> Steps:
        """Begin to repair the chunks of one request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobParts:
    """What jobs work with."""

    model: LayerwiseModel
    blend: Blend
    budgets: BudgetController
    """Chooses each blend's budget, and learns from it."""
    rope: Rope
    pool: KvPool
    loads: LoadQueue
    shelf: ChunkShelf
    clock: Clock
    num_sink: int
    """Position that originals' keys begin at."""


class BlendJob:
    """See the module. Owned by the engine's thread."""

    def __init__(
        self,
        parts: JobParts,
        sequence: TokenSequence,
        originals: Sequence[tuple[BlendChunk, Original]],
    ) -> None:
        """Wait for `originals`, which the caller opened and will close."""
        assert sequence.blend is not None
        self.sequence = sequence
        self.originals = tuple(originals)
        self._parts = parts
        self._span: BlendSpan = sequence.blend
        self._steps: Steps | None = None
        self._rows: PoolRows | None = None
        self._plan: BlendPlan | None = None
        self._next_layer = 0
        self._num_losses = 0
        self._num_restarts = 0
        self._num_guarded = 0
        self._guard_cost = 0.0
        """What computing drifted chunks in full adds to the cost."""
        self._outcome: BlendOutcome | None = None
        """Of the last repair, which left rows to be put in their place."""
        self._first: BlendOutcome | None = None
        """Of the repair under the budget; a second one may follow (`_guard`)."""
        self._options: BlendOptions | None = None
        self._work: BlendWork | None = None
        self._used_us = self._begun_us = 0
        self._begun_at = 0
        """Position that the repair began at."""

    @property
    def is_over(self) -> bool:
        """Whether the sequence goes on without it."""
        return self._span.is_over

    @property
    def is_undisturbed(self) -> bool:
        """Whether nothing was computed beside the repair since it began; for checks."""
        is_running = self._steps is not None and self._plan is not None
        return not is_running or self._begun_at == self.sequence.num_computed

    @property
    def is_due(self) -> bool:
        """Whether all that comes before the chunks is there, but for less than a block."""
        sequence = self.sequence
        is_loading = self._parts.loads.get(sequence) is not None
        num_missing = self._span.start - sequence.num_computed
        return not is_loading and num_missing < sequence.block_tokens

    @property
    def num_chunk_tokens(self) -> int:
        """Rows that chunks will fill, from here on."""
        start = self.sequence.num_computed
        return sum(chunk.stop - max(chunk.start, start) for chunk in self._live_chunks())

    @property
    def num_fresh_tokens(self) -> int:
        """Rows of no chunk up to the span's end, the last few in front of it included."""
        return self._span.stop - self.sequence.num_computed - self.num_chunk_tokens

    def advance(self, allowance: float) -> float:
        """Go on, as far as the chunks are there; never waits for them.

        Args:
            allowance: token-layers to compute; it may go over by a slice.

        Returns:
            Token-layers computed.
        """
        if self.is_over or not self.is_due:
            return 0.0
        if not self._live_chunks():  # an exact prefix covers them; ordinary passes do the rest
            self._span.report = self._report(ReuseReport())
            self._span.is_over = True
            return 0.0
        if not self._has_originals():
            return 0.0
        return self._run(allowance)

    def wait(self) -> bool:
        """Block until the layer that it needs next is there, or lost.

        Returns:
            False when it waits for something else.
        """
        originals = self._live_originals()
        loading = [item for item in originals if item.state is OriginalState.LOADING]
        if self.is_over or not self.is_due or not loading:
            return False
        for original in loading:
            self._parts.shelf.wait_layer(original, self._wanted_layer)
        return True

    def fall_back(self, reason: FallbackReason) -> None:
        """Have the sequence prefilled as any other."""
        done = ReuseReport() if self._first is None else self._spent(self._first)
        self._abandon()
        self._span.report = self._report(done)
        self._span.fall_back(reason)

    # The originals

    @property
    def _stop(self) -> int:
        """Position behind the last that is computed here."""
        sequence = self.sequence
        end = sequence.num_prompt - 1
        if end - self._span.stop > MAX_QUERY_ROWS:
            return self._span.stop
        # The last token's logits are wanted unless tokens that were drawn already follow it.
        return sequence.num_prompt if sequence.num_tokens == sequence.num_prompt else end

    @property
    def _wanted_layer(self) -> int:
        return min(self._next_layer, self._parts.pool.layout.num_layers - 1)

    def _live_chunks(self) -> list[BlendChunk]:
        """Chunks that stand, in part at least, behind what is computed."""
        start = self.sequence.num_computed
        return [chunk for chunk, _ in self.originals if chunk.stop > start]

    def _live_originals(self) -> list[Original]:
        start = self.sequence.num_computed
        return [original for chunk, original in self.originals if chunk.stop > start]

    def _has_originals(self) -> bool:
        """Whether every chunk is there or coming; begins anew, or gives up, where one is not."""
        originals = self._live_originals()
        if any(original.state is OriginalState.FAILED for original in originals):
            self.fall_back(FallbackReason.NO_ROOM)
            return False
        if self._steps is not None and self._count_losses() != self._num_losses:
            self._restart()
            return False
        return all(original.is_readable for original in originals)

    def _count_losses(self) -> int:
        return sum(original.num_losses for original in self._live_originals())

    def _restart(self) -> None:
        """Rows were read that did not come."""
        if self._num_restarts:
            self.fall_back(FallbackReason.LOST)
            return
        self._num_restarts += 1
        self._abandon()

    def _abandon(self) -> None:
        if self._steps is not None:
            self._steps.close()
        self._steps = self._rows = self._plan = self._outcome = self._first = None
        self._next_layer = self._num_guarded = 0
        self._guard_cost = 0.0

    # The steps

    def _run(self, allowance: float) -> float:
        if self._steps is None and not self._begin():
            return 0.0
        used = 0.0
        while used < allowance and self._may_read():
            if self._outcome is not None:
                self._complete()
                break
            used += self._step()
        return used

    def _may_read(self) -> bool:
        """Whether the next layer of every original may be read."""
        if self.is_over or self._steps is None:
            return False
        shelf, layer = self._parts.shelf, self._wanted_layer
        has_all = all(shelf.has_layer(original, layer) for original in self._live_originals())
        return has_all and self._has_originals()

    def _begin(self) -> bool:
        """Begin the repair, or give up where the pool has no block to write to."""
        sequence, parts = self.sequence, self._parts
        start = sequence.num_computed
        sequence.loaded_ahead = None  # of a load that left a gap: blended over, or computed anew
        stop = self._stop
        if not self._make_writable(start, stop):
            self.fall_back(FallbackReason.NO_ROOM)
            return False
        own = sequence.block_ids[: sequence.num_blocks_for(stop)]
        self._rows = PoolRows(parts.pool.tensor, own, list(self._moved(start)), parts.rope, stop)
        self._plan = BlendPlan(
            token_ids=tuple(sequence.tokens[: sequence.num_prompt]),
            spans=tuple(
                ChunkSpan(
                    start=max(chunk.start, start),
                    stop=chunk.stop,
                    is_exact=chunk.is_exact,
                    num_cut=max(0, start - chunk.start),
                )
                for chunk in self._live_chunks()
            ),
            start=start,
            stop=stop,
            query_start=self._span.stop,
        )
        self._work = BlendWork.of(self._plan, parts.pool.layout.num_layers)
        self._options = parts.budgets.choose(self._work)
        self._begun_at = start
        self._begun_us, self._num_losses = self._used_us, self._count_losses()
        self._steps = parts.blend(parts.model, self._rows, self._plan, self._options)
        return True

    def _make_writable(self, start: int, stop: int) -> bool:
        """See to it that nobody else has the blocks of these positions; False without room."""
        pool, own = self._parts.pool, self.sequence.block_ids
        size = self.sequence.block_tokens
        for index in range(start // size, self.sequence.num_blocks_for(stop)):
            if not pool.may_make_writable(own[index]):
                return False
            own[index] = pool.make_writable(own[index], max(0, start - index * size))
        return True

    def _moved(self, start: int) -> list[MovedRows]:
        return [
            MovedRows(
                start=max(chunk.start, start),
                stop=chunk.stop,
                first_row=max(0, start - chunk.start),
                block_ids=tuple(original.block_ids),
                shift=chunk.start - self._parts.num_sink,
            )
            for chunk, original in self.originals
            if chunk.stop > start
        ]

    def _step(self) -> float:
        """One step of the repair; the job begins anew should it fail."""
        assert self._steps is not None
        started_us = self._parts.clock.now_us()
        is_good = False
        try:
            with torch.inference_mode():
                step = next(self._steps)
            is_good = True
        except StopIteration as stop:
            is_good = True
            self._take(stop.value)
            return 0.0
        finally:
            self._used_us += self._parts.clock.now_us() - started_us
            if not is_good:
                self._abandon()
        self._next_layer = max(self._next_layer, step.next_layer)
        return step.token_layers

    def _take(self, outcome: BlendOutcome) -> None:
        """The repair is over; compute in full what the guard found too far off."""
        if self._first is None:
            self._first = outcome
            self._learn(outcome)
            if outcome.drifted:
                self._guard(outcome)
                return
        self._next_layer = self._parts.pool.layout.num_layers
        self._outcome = outcome

    def _learn(self, outcome: BlendOutcome) -> None:
        assert self._work is not None
        assert self._options is not None
        seconds = (self._used_us - self._begun_us) / 1e6
        self._parts.budgets.observe(self._work, self._options, outcome, seconds)

    def _guard(self, outcome: BlendOutcome) -> None:
        """Begin a second repair, of drifted chunks as if they were text."""
        assert self._plan is not None
        assert self._rows is not None
        assert self._options is not None
        parts, spans = self._parts, self._plan.spans
        kept = [span for i, span in enumerate(spans) if i not in outcome.drifted]
        if all(span.is_exact for span in kept):
            self.fall_back(FallbackReason.DRIFTED)
            return
        self._num_guarded = len(outcome.drifted)
        self._guard_cost = self._cost_of([spans[i] for i in outcome.drifted])
        start = spans[min(outcome.drifted)].start
        plan = BlendPlan(
            token_ids=self._plan.token_ids,
            spans=tuple(span for span in kept if span.start >= start),
            start=start,
            stop=self._plan.stop,
            query_start=self._plan.query_start,
        )
        options = replace(self._options, policy=RecomputePolicy.NONE, guard_tokens=0)
        self._steps = parts.blend(parts.model, self._rows, plan, options)

    def _cost_of(self, spans: Sequence[ChunkSpan]) -> float:
        """Of all rows of these, in every layer, as `BlendOutcome.cost` counts."""
        assert self._work is not None
        num_layers, share = self._work.num_layers, self._parts.model.projection_share
        num_rows = sum(span.stop - span.start for span in spans)
        return num_rows * (num_layers - 1 + share) / (num_layers * self._work.num_rows)

    def _complete(self) -> None:
        """All rows are in place: the sequence goes on behind them."""
        assert self._rows is not None
        assert self._first is not None
        assert self._outcome is not None
        with torch.inference_mode():
            self._rows.finish()
            if self._outcome.last is not None:
                logits = self._parts.model.logits(self._outcome.last)
                # What is not finite is for a pass to find out, which can be repeated.
                self.sequence.known_logits = logits if bool(logits.isfinite().all()) else None
        for _, original in self.originals:
            self._parts.shelf.settle(original)
        self._span.report = self._report(self._repaired(self._first))
        self.sequence.approximate_from = max(self.sequence.num_computed, self._span.start)
        # A pass that computes nothing draws from logits that are known.
        self.sequence.num_computed = min(self._stop, self.sequence.num_prompt - 1)
        self._span.is_over = True
        self._steps = self._rows = None

    def _spent(self, outcome: BlendOutcome) -> ReuseReport:
        assert self._options is not None
        return ReuseReport(
            budget=self._options.budget,
            cost=outcome.cost + self._guard_cost,
            drift=max(outcome.drift, default=None),
        )

    def _repaired(self, outcome: BlendOutcome) -> ReuseReport:
        exact = [chunk for chunk in self._live_chunks() if chunk.is_exact]
        start = self.sequence.num_computed
        return replace(
            self._spent(outcome),
            num_chunk_tokens=self.num_chunk_tokens,
            num_exact_tokens=sum(chunk.stop - max(chunk.start, start) for chunk in exact),
            num_fresh_tokens=self.num_fresh_tokens,
            num_guarded=self._num_guarded,
        )

    def _report(self, repaired: ReuseReport) -> ReuseReport:
        originals = {id(original): original for _, original in self.originals}.values()
        layout, shelf = self._parts.pool.layout, self._parts.shelf
        num_loaded = sum(original.num_loaded for original in originals)
        num_encoded = sum(original.num_encoded for original in originals)
        num_known = sum(original.num_found for original in originals)
        size = layout.block_tokens
        return replace(
            repaired,
            num_chunks=len(self.originals),
            num_found_tokens=num_known * size,
            num_loaded_tokens=num_loaded * size,
            num_encoded_tokens=num_encoded * size,
            loaded_bytes=num_loaded * layout.num_layers * layout.slab_bytes,
            num_restarts=self._num_restarts,
            seconds=self._used_us / 1e6,
            chunks=tuple(shelf.outcome(original) for original in originals),
        )
