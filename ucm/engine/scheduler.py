"""What the next step computes: pure decisions, returned as a plan that the engine carries out.

One step mixes everything that is ready (continuous batching, Orca, OSDI 2022) under one budget of
tokens, in this order (chunked prefill, Sarathi-Serve, arXiv:2403.02310):

    1. decodes              one token each, oldest first; they are what users wait for
    2. prefills under way   a chunk each, oldest first
    3. loads about to end   a chunk each (a whole step where there is nothing else), the one with
                            the least to come first
    4. waiting requests     first come first served, each only if *all* its blocks fit

A sequence whose KV is being loaded has its blocks and its place, and computes nothing until the
load is done or close enough (`LoadView`), so a slow load holds up nobody but itself. A request
whose next block another one is loading stays waiting, and shares it later: loading twice would take
the bandwidth from both.

A sequence gets the blocks of all its tokens when it is admitted, so only decoding asks for more:
one block every `block_tokens` tokens, or one to copy a shared partial block into. When the pool has
none, the youngest running sequence is preempted: its blocks go, its tokens stay, and it is
recomputed later, from the caches where they can. The oldest is never preempted, so it always gets
on. A sequence that is itself the youngest just misses a step.

Envelope: O(running) a step, plus one dictionary look-up a block of the first waiting request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ucm.errors import ConfigError
from ucm.types import BlockKey

from .allocator import ChainLink
from .sequence import TokenSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """Limits of one step."""

    max_sequences: int = 16
    """Samples in the batch at once."""
    max_step_tokens: int = 2048
    """Tokens that one step computes, over all sequences; not below `max_sequences`, so that every
    decode takes part in every step."""
    prefill_chunk_tokens: int = 512
    """Most tokens of one prompt in one step: larger fills the machine better, smaller lets running
    decodes wait less. The pass behind a load that nobody runs or waits beside is a whole step."""
    max_loading: int = 8
    """Sequences whose KV is being loaded at once: they hold their blocks meanwhile."""
    max_load_stall_s: float = 0.01
    """A load joins the batch when the batch would wait for it no longer than this in all: a quarter
    of a decode step of a small model on a CPU."""
    max_load_s: float = 30.0
    """A load is ended after this time, whatever its hook says: far above any hook's deadline."""

    def less(self, num_tokens: int) -> SchedulerOptions:
        """With so many tokens of the step taken already."""
        if num_tokens == 0:
            return self
        num_left = max(self.max_sequences, self.max_step_tokens - num_tokens)
        return replace(self, max_step_tokens=num_left)

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_step_tokens", "prefill_chunk_tokens", "max_loading"):
            if getattr(self, name) < 1:
                raise ConfigError(f"scheduler: {name} is {getattr(self, name)}, must be >= 1")
        for name in ("max_load_stall_s", "max_load_s"):
            if not getattr(self, name) >= 0.0:
                raise ConfigError(f"scheduler: {name} is {getattr(self, name)}, must be >= 0")
        if self.max_step_tokens < self.max_sequences:
            raise ConfigError(
                f"scheduler: max_step_tokens is {self.max_step_tokens}, must be at least "
                f"max_sequences ({self.max_sequences})"
            )


class PoolView(Protocol):
    """What a decision needs to know of the pool; `BlockAllocator` is one."""

    @property
    def num_available(self) -> int:
        """Blocks that could be allocated now."""

    def refs(self, block_id: int) -> int:
        """Number of owners of a block."""

    def find(self, chain: Sequence[ChainLink]) -> list[int]:
        """Blocks of the longest cached prefix of `chain`."""


class LoadAhead(Protocol):
    """A load that the next pass could include."""

    @property
    def sequence(self) -> TokenSequence:
        """Whose it is."""

    @property
    def num_uncomputed(self) -> int:
        """Tokens left to compute when it arrives."""


class LoadView(Protocol):
    """What a decision needs to know of the loads; `load_queue.LoadQueue` is one."""

    @property
    def num_free(self) -> int | None:
        """Loads that may start now; None when nothing will ever be loaded."""

    def is_loading(self, sequence: TokenSequence, /) -> bool:
        """Whether a running sequence cannot compute before its load joins or ends."""

    def is_awaited(self, key: BlockKey, /) -> bool:
        """Whether the block with this key is being loaded."""

    def joinable(self) -> Sequence[LoadAhead]:
        """Loads that the next pass may include, in that order."""


class NoLoads:
    """Nothing is loaded, ever."""

    num_free: int | None = None

    def is_loading(self, _sequence: TokenSequence, /) -> bool:
        """See `LoadView.is_loading`."""
        return False

    def is_awaited(self, _key: BlockKey, /) -> bool:
        """See `LoadView.is_awaited`."""
        return False

    def joinable(self) -> Sequence[LoadAhead]:
        """See `LoadView.joinable`."""
        return ()


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of one running sequence to compute."""

    sequence: TokenSequence
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Admission:
    """A waiting sequence to start."""

    sequence: TokenSequence
    max_tokens: int
    """Compute at most this many; fewer are left when the caches hold more than was known. 0: only
    to begin its load."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, to be carried out in the order of the fields."""

    preempt: tuple[TokenSequence, ...] = ()
    """Youngest first."""
    work: tuple[Work, ...] = ()
    join: tuple[Work, ...] = ()
    """Sequences whose load the pass waits for, layer by layer."""
    admit: tuple[Admission, ...] = ()
    num_new_blocks: int = 0
    """Blocks that `work` takes."""


def plan_step(
    running: Sequence[TokenSequence],
    waiting: Sequence[TokenSequence],
    pool: PoolView,
    options: SchedulerOptions,
    loads: LoadView | None = None,
) -> StepPlan:
    """Decide the next step; changes nothing.

    Args:
        running: admitted sequences, oldest first.
        waiting: sequences to admit, in order.
        pool: the state of the KV pool.
        options: the limits.
        loads: what is being loaded; nothing when None.
    """
    loads = loads or NoLoads()
    planner = _Planner(list(running), pool, options, loads)
    ready = [sequence for sequence in running if not loads.is_loading(sequence)]
    for sequence in ready:
        if sequence.num_uncomputed == 1:
            planner.add_decode(sequence)
    for sequence in ready:
        if sequence.num_uncomputed > 1:
            planner.add_prefill(sequence)
    for load in loads.joinable():
        planner.join(load)
    if not planner.preempted:
        planner.admit(waiting)
    return StepPlan(
        preempt=tuple(planner.preempted),
        work=tuple(planner.work),
        join=tuple(planner.joined),
        admit=tuple(planner.admitted),
        num_new_blocks=planner.num_new_blocks,
    )


@dataclass(slots=True)
class _Planner:
    """A step in the making: what the pool would look like after what is planned so far."""

    running: list[TokenSequence]
    pool: PoolView
    options: SchedulerOptions
    loads: LoadView
    joined: list[Work] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    preempted: list[TokenSequence] = field(default_factory=list)
    admitted: list[Admission] = field(default_factory=list)
    num_available: int = 0
    num_tokens_left: int = 0
    num_new_blocks: int = 0
    dropped_refs: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.num_available = self.pool.num_available
        self.num_tokens_left = self.options.max_step_tokens

    def add_decode(self, sequence: TokenSequence) -> None:
        """Plan one token of `sequence`, preempting younger sequences for its block."""
        if sequence in self.preempted:
            return
        while not self._has_room(sequence):
            if self.running[-1] is sequence:
                return
            self._preempt_youngest()
        self._take_room(sequence)
        self._compute(sequence, 1)

    def add_prefill(self, sequence: TokenSequence) -> None:
        """Plan the next chunk of a prompt that has its blocks already."""
        num_tokens = self._chunk(sequence.num_computable)
        if num_tokens and sequence not in self.preempted:
            self._compute(sequence, num_tokens)

    def join(self, load: LoadAhead) -> None:
        """Plan the first chunk behind a load that is nearly there."""
        num_tokens = self._chunk(load.num_uncomputed)
        if num_tokens and load.sequence not in self.preempted:
            self.joined.append(Work(load.sequence, num_tokens))
            self.num_tokens_left -= num_tokens

    def admit(self, waiting: Sequence[TokenSequence]) -> None:
        """Plan the start of waiting sequences, in order, as long as they fit."""
        num_places = self.options.max_sequences - sum(item.num_slots for item in self.running)
        for sequence in waiting:
            chain = sequence.reusable_chain
            shared = self.pool.find(chain)
            if any(self.loads.is_awaited(link.key) for link in chain[len(shared) :][:1]):
                continue
            num_needed = sequence.num_blocks_for(sequence.num_tokens)
            num_needed -= sum(1 for block_id in shared if self.pool.refs(block_id) > 0)
            num_needed += sequence.num_extra_blocks
            num_wanted = sequence.num_computable_from(len(shared) * sequence.block_tokens)
            num_tokens = self._chunk(num_wanted)
            num_reserved = len(self.running) + len(self.admitted)
            if (
                not self._may_start(num_tokens, num_wanted)
                or sequence.num_slots > num_places
                or num_needed + num_reserved > self.num_available
            ):
                return
            num_places -= sequence.num_slots
            self.num_available -= num_needed
            self.num_tokens_left -= num_tokens
            self.admitted.append(Admission(sequence, num_tokens))

    def _may_start(self, num_tokens: int, num_wanted: int) -> bool:
        """With no token left a request may begin to load; with no load left it must wait."""
        num_free = self.loads.num_free
        if num_free is None:
            return num_tokens > 0 or num_wanted == 0
        return len(self.admitted) < num_free

    def _chunk(self, num_tokens: int) -> int:
        return min(num_tokens, self.options.prefill_chunk_tokens, self.num_tokens_left)

    def _compute(self, sequence: TokenSequence, num_tokens: int) -> None:
        self.work.append(Work(sequence, num_tokens))
        self.num_tokens_left -= num_tokens

    def _refs(self, block_id: int) -> int:
        return self.pool.refs(block_id) - self.dropped_refs[block_id]

    def _shares_tail(self, sequence: TokenSequence) -> bool:
        return self._refs(sequence.block_ids[-1]) > 1

    def _needs_block(self, sequence: TokenSequence) -> bool:
        if sequence.num_blocks_for(sequence.num_tokens) > len(sequence.block_ids):
            return True
        return self._shares_tail(sequence)

    def _has_room(self, sequence: TokenSequence) -> bool:
        return self.num_available > 0 or not self._needs_block(sequence)

    def _take_room(self, sequence: TokenSequence) -> None:
        if not self._needs_block(sequence):
            return
        self.num_available -= 1
        self.num_new_blocks += 1
        if sequence.num_blocks_for(sequence.num_tokens) == len(sequence.block_ids):
            self.dropped_refs[sequence.block_ids[-1]] += 1

    def _preempt_youngest(self) -> None:
        victim = self.running.pop()
        self.preempted.append(victim)
        for block_id in victim.block_ids:
            self.dropped_refs[block_id] += 1
            if self._refs(block_id) == 0:
                self.num_available += 1
