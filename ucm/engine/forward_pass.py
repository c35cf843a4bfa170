"""`ForwardPass`: one pass over the model, behind the loads that it waits for.

    layer     |  0          |  1          |  2          | ...
    wait      ^ slabs of 0  ^ slabs of 1  ^ slabs of 2      the joined loads', verified
    final                   ^ layer 0     ^ layer 1         of what the pass computes (`LayerClock`)

A layer that comes short (a wrong checksum, a read that hangs, a cache that died) ends the pass at
that layer: the load counts only what is good, its sequence computes the rest, and the pass is run
again at once. A load is trimmed once; the second time its other layers are waited for, it is ended,
and what is good in all of them counts. So a pass is repeated at most twice a load, and always ends.

Blocks that the pass fills are offered to the hook before it, and copied out behind it.

Invariant: attention of a layer reads no slab that `wait_layer` has not said to be good.

Envelope: without loads and stores the model is called as if this module were not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ucm import tracing
from ucm.clock import Clock
from ucm.sparse.protocols import ItemAttention
from ucm.sparse.slab_queue import SlabLostError
from ucm.tracing import Track

from .guarded_hook import GuardedHook
from .hook import StepReport
from .interfaces import DecoderModel
from .layer_clock import LayerClock
from .load_queue import Load, LoadQueue
from .offload_desk import OffloadDesk
from .pool import KvPool
from .scheduler import SchedulerOptions, Work
from .sequence import TokenSequence
from .store_offers import StoreOffers


@dataclass(frozen=True, slots=True)
class PassParts:
    """What passes work with."""

    model: DecoderModel
    pool: KvPool
    hook: GuardedHook
    loads: LoadQueue
    offers: StoreOffers
    offloads: OffloadDesk
    clock: Clock


_LOOK_EVERY = 4
"""Layers between two looks at whether a pass has anything left to wait for. A wait for a layer that
is there costs 25 us, most of it caches that the layer before has emptied; a look a little more."""


class LayerShortError(Exception):
    """A layer lacks slabs that the pass counted on; it never leaves this module."""


@dataclass(slots=True)
class PassResult:
    """What a step's pass came to."""

    batch: Sequence[Work]
    """What was computed: less or more than planned for sequences whose load came short."""
    logits: torch.Tensor | None
    """[len(batch), vocab_size] fp32; None when nothing was left to compute."""


@dataclass(slots=True)
class _Gate:
    """What the model calls between its layers."""

    hook: GuardedHook
    clock: Clock
    loads: Sequence[Load]
    num_layers: int
    progress: LayerClock | None
    is_through: bool = False
    """All layers of all loads are there: nothing is waited for any more."""
    stall_us: int = 0
    mark_us: int = field(default_factory=tracing.now_us)
    """Since when the current layer is computed, by the trace's clock."""
    short: list[tuple[Load, int]] = field(default_factory=list)
    """Loads that lost blocks, with what is left of them."""

    def enter(self, layer: int) -> None:
        """Say that the layers before are final, and wait for this one's slabs.

        Raises:
            LayerShortError: some will not come.
        """
        self.trace_layer(layer - 1)
        if self.progress is not None:
            self.progress.advance(layer)
        if self.loads and not self.is_through:
            self._wait(layer)
        self.mark_us = tracing.now_us()

    def trace_layer(self, layer: int) -> None:
        """Tell who looks that a layer is computed: from its attention up to that of the next."""
        trace = tracing.active()
        if trace is not None and layer >= 0:
            trace.add(Track.COMPUTE, self.mark_us, tracing.now_us(), layers=(layer, 1))

    def _wait(self, layer: int) -> None:
        started_us, begun_us = self.clock.now_us(), tracing.now_us()
        names = [load.sequence.id for load in self.loads]
        counts = self.hook.wait_layer(layer, names)
        self.stall_us += self.clock.now_us() - started_us
        trace = tracing.active()
        if trace is not None:
            trace.add(Track.STALL, begun_us, tracing.now_us(), layers=(layer, 1))
        self.short = [
            (load, count)
            for load, count in zip(self.loads, counts, strict=True)
            if count < load.num_blocks
        ]
        if self.short:
            raise LayerShortError
        if layer % _LOOK_EVERY == 1:
            self.is_through = all(map(self._is_there, self.loads))

    def _is_there(self, load: Load) -> bool:
        state = self.hook.load_state(load.sequence.id)
        is_complete = state.num_layers_ready >= self.num_layers
        return is_complete and state.num_good_blocks >= load.num_blocks


class ForwardPass:
    """Runs a step's batch until it is through; see the module."""

    def __init__(self, parts: PassParts) -> None:
        self._model = parts.model
        self._pool = parts.pool
        self._hook = parts.hook
        self._loads = parts.loads
        self._offers = parts.offers
        self._offloads = parts.offloads
        self._clock = parts.clock
        self._evicted: list[TokenSequence] = []

    def take_evicted(self) -> list[TokenSequence]:
        """Sequences that must give their blocks up, whether or not the pass then came through."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def run(
        self,
        batch: Sequence[Work],
        options: SchedulerOptions,
        attentions: Mapping[str, ItemAttention] | None = None,
    ) -> PassResult:
        """Compute `batch`, which includes the sequences whose loads have joined.

        `attentions` has those who attend for sequences that are not dense, by their ids; never for
        one whose load has joined.

        Blocks for the pass and for the loads. When it raises (the model failed) the joined loads
        and the stores are as they were before it. When it returns logits, its stores wait for
        `StoreOffers.complete_pass`. The caller calls `take_evicted` in either case.
        """
        others = attentions or {}
        while batch:
            progress = self._offers.begin_pass(batch)
            num_layers = self._pool.layout.num_layers
            gate = _Gate(self._hook, self._clock, self._loads.joined, num_layers, progress)
            started_us = self._clock.now_us()
            logits = self._attempt(batch, gate, others)
            seconds = (self._clock.now_us() - started_us) / 1e6
            cut, lost = self._trim_short(gate) if logits is None else self._end_joined(gate)
            if logits is not None and not cut:
                self._report(_computed(batch), gate, seconds)
                return PassResult(batch, logits)
            self._offers.fail_pass()
            lost += self._offloads.take_lost()
            self._evicted += lost
            batch = _refit([work for work in batch if work.sequence not in lost], cut, options)
        return PassResult(batch, None)

    def _attempt(
        self, batch: Sequence[Work], gate: _Gate, others: Mapping[str, ItemAttention]
    ) -> torch.Tensor | None:
        """Run the model once; None when a layer came short, or a long sequence lost a slab."""
        computed = _computed(batch)
        items = [self._offloads.item(work, others.get(work.sequence.id)) for work in computed]
        begun_us, is_watched = tracing.now_us(), tracing.active() is not None
        is_gated = gate.loads or gate.progress is not None or is_watched
        wait_layer = gate.enter if is_gated else None
        is_over = False
        try:
            found = None
            if items:
                found = self._model.forward(items, self._pool.tensor, wait_layer=wait_layer)
            is_over = True
            if items:
                gate.trace_layer(self._pool.layout.num_layers - 1)
                _trace_pass(computed, begun_us)
        except (LayerShortError, SlabLostError):
            is_over = True
            return None
        finally:
            if not is_over:
                self._offers.fail_pass()
                self._loads.unjoin()
        return _in_order(batch, found)

    def _trim_short(self, gate: _Gate) -> tuple[list[TokenSequence], list[TokenSequence]]:
        """Count on less; returns the sequences concerned, and those that must give up."""
        cut = [load.sequence for load, _ in gate.short]
        lost = [load.sequence for load, left in gate.short if not self._loads.trim(load, left)]
        return cut, lost

    def _end_joined(self, gate: _Gate) -> tuple[list[TokenSequence], list[TokenSequence]]:
        """All layers are in: end the loads. Returns like `_trim_short`, normally nothing."""
        cut, lost = [], []
        for load in gate.loads:
            sequence, counted_on = load.sequence, load.sequence.num_computed
            if not self._loads.end(load):
                lost.append(sequence)
                cut.append(sequence)
            elif sequence.num_computed < counted_on:
                cut.append(sequence)
        return cut, lost

    def _report(self, batch: Sequence[Work], gate: _Gate, seconds: float) -> None:
        if not self._hook.is_attached or not batch:
            return
        is_prompt = [work.sequence.num_uncomputed > 1 for work in batch]
        parts = [
            (work.sequence.num_computed, work.num_tokens)
            for work, chosen in zip(batch, is_prompt, strict=True)
            if chosen
        ]
        self._hook.observe_step(
            StepReport(
                seconds=seconds,
                stall_s=gate.stall_us / 1e6,
                parts=tuple(parts),
                num_decodes=len(batch) - len(parts),
            )
        )


def _computed(batch: Sequence[Work]) -> list[Work]:
    """All but those whose logits are known: these are in the batch to draw a token."""
    return [work for work in batch if work.sequence.known_logits is None]


def _in_order(batch: Sequence[Work], found: torch.Tensor | None) -> torch.Tensor:
    """[len(batch), vocab_size]: those known before the pass, and those that it found."""
    known = [work.sequence.known_logits for work in batch]
    if found is not None and all(logits is None for logits in known):
        return found
    rows = iter(found if found is not None else ())
    return torch.stack([next(rows) if logits is None else logits[0] for logits in known])


def _trace_pass(batch: Sequence[Work], begun_us: int) -> None:
    """Tell who looks which blocks of each sequence the pass computed."""
    trace = tracing.active()
    if trace is None:
        return
    for work in batch:
        sequence, size = work.sequence, work.sequence.block_tokens
        first, last = sequence.num_computed // size, sequence.num_computed + work.num_tokens
        blocks = (first, -(-last // size) - first)
        trace.add(Track.STEP, begun_us, tracing.now_us(), blocks=blocks, request_id=sequence.id)


def _refit(
    batch: Sequence[Work], cut: Sequence[TokenSequence], options: SchedulerOptions
) -> list[Work]:
    """Let sequences that lost a part of their load compute it at once, as the budget allows."""
    num_left = options.max_step_tokens - sum(work.num_tokens for work in batch)
    fitted = []
    for work in batch:
        num_tokens = work.num_tokens
        if work.sequence in cut:
            wanted = min(work.sequence.num_computable, options.prefill_chunk_tokens)
            num_more = min(max(0, wanted - num_tokens), num_left)
            num_left -= num_more
            num_tokens += num_more
        fitted.append(Work(work.sequence, num_tokens))
    return fitted
