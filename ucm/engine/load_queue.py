"""Loads under way: which sequences wait for KV from outside, and what becomes of their blocks.

    begin -> (poll, claim)* -> [join -> trim?] -> end | drop          one `end_load` each, always

A load in the order LAYERS keeps its sequence out of the batch until it is done, or close enough
behind the pass (`join`). One from the back lets its sequence compute from the front meanwhile, as
far as it can claim blocks, and leaves the rest in the pool for it to jump over
(`TokenSequence.skip_loaded`).

Invariants:
* A block that is being loaded is in no prefix look-up: it is registered after `end_load` only.
* Nothing is computed into a block that a loader may still write to. Lost blocks of a load that goes
  on are exchanged for fresh ones and kept aside until its end; what is held after the end is
  exchanged too, and where there is no block to exchange it for the sequence must give all up.
* A load's blocks are all owned: by the sequence, by `owned`, or by a hold.
* Blocks that a loader left unfinished are zeroed before they are computed into: attention masks
  rows that are not filled, but 0 times NaN is NaN.

Envelope: O(loads) a step, one call of the hook each; nothing when there are none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ucm.clock import Clock
from ucm.types import BlockKey, LoadOrder

from .guarded_hook import GuardedHook
from .hook import LoadRequest, LoadStart, LoadState
from .pool import KvPool
from .scheduler import SchedulerOptions
from .sequence import TokenSequence


@dataclass(slots=True, eq=False, kw_only=True)
class Load:
    """One sequence's load."""

    sequence: TokenSequence
    order: LoadOrder
    first_block: int
    num_blocks: int
    """Blocks that are still counted on."""
    block_ids: tuple[int, ...]
    """All pool blocks that the loader said it would fill, from `first_block` on."""
    started_us: int
    state: LoadState
    claimed_block: int
    """From the back: end of the chain blocks that the engine may compute; else `first_block`."""
    lost_ids: list[int] = field(default_factory=list)
    """Blocks that are no longer the sequence's, and may still be written to."""
    is_void: bool = False
    """Nothing of it counts: its hook answered what it must not."""
    is_joined: bool = False
    """Part of the pass that is being computed."""

    @property
    def end_block(self) -> int:
        """Chain index behind the last block."""
        return self.first_block + self.num_blocks

    @property
    def num_good_blocks(self) -> int:
        """LAYERS: leading blocks that may still come."""
        return max(0, min(self.state.num_good_blocks, self.num_blocks))

    @property
    def num_uncomputed(self) -> int:
        """LAYERS: tokens that a pass may compute behind the good blocks when they arrive."""
        size = self.sequence.block_tokens
        return self.sequence.num_computable_from((self.first_block + self.num_good_blocks) * size)

    @property
    def is_met(self) -> bool:
        """From the back: the computation has reached what is loaded."""
        start = min(self.state.first_ready_block, self.end_block)
        return self.sequence.num_computed >= start * self.sequence.block_tokens


class LoadQueue:
    """The loads of one engine; see the module. Owned by the engine's thread."""

    def __init__(
        self, hook: GuardedHook, pool: KvPool, options: SchedulerOptions, clock: Clock
    ) -> None:
        self._hook = hook
        self._pool = pool
        self._options = options
        self._clock = clock
        self._loads: dict[str, Load] = {}
        self._keys: set[BlockKey] = set()

    def __len__(self) -> int:
        return len(self._loads)

    @property
    def num_free(self) -> int | None:
        """Loads that may start now; None without a hook."""
        if not self._hook.is_attached:
            return None
        return self._options.max_loading - len(self._loads)

    @property
    def owned(self) -> list[list[int]]:
        """Blocks that loads own, and no sequence; for checks."""
        return [load.lost_ids for load in self._loads.values()]

    @property
    def joined(self) -> list[Load]:
        """Loads that the pass under way waits for."""
        return [load for load in self._loads.values() if load.is_joined]

    def get(self, sequence: TokenSequence) -> Load | None:
        """The sequence's load, if one is under way."""
        return self._loads.get(sequence.id)

    def is_loading(self, sequence: TokenSequence) -> bool:
        """Whether the sequence cannot compute before its load joins or ends."""
        load = self._loads.get(sequence.id)
        return load is not None and load.order is LoadOrder.LAYERS

    def is_awaited(self, key: BlockKey) -> bool:
        """Whether the block with this key is being loaded."""
        return key in self._keys

    def joinable(self) -> list[Load]:
        """Loads that a pass would hardly wait for, the one with the least to come first."""
        return [load for load in self.by_size() if self.is_near(load)]

    def by_size(self) -> list[Load]:
        """Loads in the order LAYERS, the one with the least to come first."""
        loads = [load for load in self._loads.values() if load.order is LoadOrder.LAYERS]
        return sorted(loads, key=lambda load: (load.state.bytes_left, load.sequence.arrival))

    def is_near(self, load: Load) -> bool:
        """Whether a pass may start with this load, although it is not done."""
        return load.state.stall_s <= self._options.max_load_stall_s

    # From the beginning of a load to its end

    def begin(
        self, sequence: TokenSequence, num_local: int, num_usable: int, *, is_alone: bool = False
    ) -> Load | None:
        """Start to load what the hook has of a sequence that was given its blocks.

        Args:
            sequence: `num_computed` says what is in the pool.
            num_local: leading blocks that the pool had.
            num_usable: leading blocks that may come from outside.
            is_alone: see `LoadRequest`.

        Returns:
            None when nothing is being loaded.
        """
        tokens = list(sequence.tokens)
        num_matched = self._hook.match_blocks(tokens, num_local, num_usable)
        if num_matched == num_local:
            return None
        block_ids = tuple(sequence.block_ids[num_local:num_matched])
        request = LoadRequest(
            request_id=sequence.id,
            token_ids=tokens,
            first_block=num_local,
            block_ids=block_ids,
            hold=self._pool.holder(block_ids),
            is_alone=is_alone,
        )
        start = self._hook.start_load(request)
        if start.num_blocks < 1:
            return None
        return self._add(sequence, request, start)

    def _add(self, sequence: TokenSequence, request: LoadRequest, start: LoadStart) -> Load:
        first, last = request.first_block, request.first_block + len(request.block_ids)
        is_inside = first <= start.first_block and start.first_block + start.num_blocks <= last
        is_void = not is_inside or (start.order is LoadOrder.LAYERS and start.first_block != first)
        if is_void:  # nobody knows what it writes: it is done at once, and nothing of it counts
            start = LoadStart(first_block=first, num_blocks=last - first)
        load = Load(
            sequence=sequence,
            order=start.order,
            first_block=start.first_block,
            num_blocks=start.num_blocks,
            block_ids=tuple(request.block_ids[start.first_block - first :][: start.num_blocks]),
            started_us=self._clock.now_us(),
            state=LoadState(is_done=True),
            claimed_block=start.first_block,
            is_void=is_void,
        )
        self._loads[sequence.id] = load
        self._keys.update(self._keys_of(load))
        if load.order is LoadOrder.BLOCKS_FROM_BACK:
            sequence.loaded_ahead = (load.end_block, load.end_block)
        if not is_void:
            load.state = self._hook.load_state(sequence.id)
        return load

    def poll(self) -> list[TokenSequence]:
        """Ask how far the loads are and end those that are done, met or overdue.

        Returns:
            Sequences that must give their blocks up: see `end`.
        """
        lost = []
        for load in list(self._loads.values()):
            load.state = self._hook.load_state(load.sequence.id)
            if self.is_over(load) and not self.end(load):
                lost.append(load.sequence)
        return lost

    def is_over(self, load: Load) -> bool:
        """Whether a load has nothing more to give, or had its time."""
        age_us = self._clock.now_us() - load.started_us
        is_met = load.order is LoadOrder.BLOCKS_FROM_BACK and load.is_met
        return load.state.is_done or is_met or age_us > self._options.max_load_s * 1e6

    def claim(self, sequence: TokenSequence, num_tokens: int) -> int:
        """How many of the next `num_tokens` the sequence may compute itself now.

        With the load's last block it may go on behind it in the same pass: nothing is loaded.
        """
        load = self._loads.get(sequence.id)
        size, start = sequence.block_tokens, sequence.num_computed
        if load is None or load.order is LoadOrder.LAYERS:
            return num_tokens
        last = min(sequence.num_blocks_for(start + num_tokens), load.end_block)
        if last > load.claimed_block:
            # Only what the chunk covers: the loader goes on with the rest.
            first = max(load.claimed_block, load.first_block)
            load.claimed_block = self._hook.claim(sequence.id, first, last)
            self._clear(range(first, load.claimed_block), sequence)
        if load.claimed_block == load.end_block:
            return num_tokens
        return max(0, min(num_tokens, load.claimed_block * size - start))

    def join(self, load: Load) -> bool:
        """Make a load part of the next pass.

        Returns:
            False when its sequence must give its blocks up: see `end`.
        """
        load.is_joined = True
        if load.num_good_blocks < load.num_blocks:
            return self.trim(load, load.num_good_blocks)
        self._count_on(load)
        return True

    def unjoin(self) -> None:
        """The pass failed: its loads are as they were before it."""
        for load in self.joined:
            load.is_joined = False
            load.sequence.num_computed = load.first_block * load.sequence.block_tokens

    def trim(self, load: Load, num_good: int) -> bool:
        """A load lost blocks: count on the leading good ones only, and go on, but only once.

        The second time the rest of it is waited for, as long as it may be, and it is ended.

        Returns:
            False when its sequence must give its blocks up: see `end`.
        """
        sequence, num_lost = load.sequence, load.num_blocks - num_good
        if load.lost_ids and num_good:
            self._hook.wait_layer(self._pool.layout.num_layers - 1, (sequence.id,))
        if load.lost_ids or num_good == 0 or self._pool.blocks.num_available < num_lost:
            return self.end(load)
        lost = range(load.first_block + num_good, load.end_block)
        load.lost_ids = [sequence.block_ids[index] for index in lost]
        fresh = self._pool.blocks.allocate(num_lost, after=sequence.block_ids[lost.start - 1])
        sequence.block_ids[lost.start : lost.stop] = fresh
        load.num_blocks = num_good
        self._count_on(load)
        return True

    def end(self, load: Load) -> bool:
        """End a load; its sequence goes on from what is good.

        Returns:
            False when blocks of the sequence are still written to and there are no others: it must
            give up all it has, and wait.
        """
        sequence, claimed = load.sequence, load.claimed_block
        num_good = 0 if load.is_void else load.num_blocks
        num_good = min(self._stop(load), num_good)
        if load.order is LoadOrder.LAYERS:
            blocks = range(load.first_block, load.end_block)
            num_good = self._leading_unheld(sequence, blocks, num_good)
            bad = blocks[num_good:]
            sequence.take_loaded(blocks[:num_good])
        else:
            blocks = range(load.end_block - num_good, load.end_block)
            num_good = self._leading_unheld(sequence, blocks[::-1], num_good)
            blocks = range(max(load.end_block - num_good, claimed), load.end_block)
            bad = range(claimed, blocks.start)
            sequence.loaded_ahead = (blocks.start, blocks.stop)
            sequence.skip_loaded()
            num_good = len(blocks)
        sequence.register_full(self._pool.blocks)
        self._hook.stats.loaded_tokens += num_good * sequence.block_tokens
        return self._make_computable(sequence, bad)

    def drop(self, sequence: TokenSequence) -> None:
        """The sequence leaves: end its load, if it has one, and keep nothing of it.

        What the loader left unfinished is zeroed; the sequence's blocks are still the sequence's.
        """
        load = self._loads.get(sequence.id)
        if load is not None:
            self._stop(load)
            self._clear(range(max(load.first_block, load.claimed_block), load.end_block), sequence)

    def _stop(self, load: Load) -> int:
        """End it at the hook, and give back what was kept aside; returns the good blocks."""
        del self._loads[load.sequence.id]
        self._keys.clear()
        for other in self._loads.values():
            self._keys.update(self._keys_of(other))
        num_good = self._hook.end_load(load.sequence.id)
        if num_good is None:
            # Not what was claimed: the sequence computed it, and goes on in it.
            self._pool.hold(load.block_ids[load.claimed_block - load.first_block :])
            num_good = 0
        self._pool.clear(load.lost_ids)
        self._pool.blocks.release(load.lost_ids)
        load.lost_ids = []
        return num_good

    # Blocks

    def _count_on(self, load: Load) -> None:
        """As if its blocks were there: what the pass waits for, layer by layer."""
        load.sequence.num_computed = load.end_block * load.sequence.block_tokens

    def _leading_unheld(self, sequence: TokenSequence, blocks: range, num_good: int) -> int:
        for offset, index in enumerate(blocks[:num_good]):
            if self._pool.is_held(sequence.block_ids[index]):
                return offset
        return num_good

    def _make_computable(self, sequence: TokenSequence, bad: range) -> bool:
        """Zero blocks that a load left unfinished, exchange those that it may still write to."""
        held = [i for i in bad if self._pool.is_held(sequence.block_ids[i])]
        if len(held) > self._pool.blocks.num_available:
            return False
        self._clear(bad, sequence)
        old = [sequence.block_ids[index] for index in held]
        for index, fresh in zip(held, self._pool.blocks.allocate(len(held)), strict=True):
            sequence.block_ids[index] = fresh
        self._pool.blocks.release(old)
        return True

    def _clear(self, blocks: range, sequence: TokenSequence) -> None:
        self._pool.clear(sequence.block_ids[index] for index in blocks)

    def _keys_of(self, load: Load) -> Iterator[BlockKey]:
        chain = load.sequence.chain
        return (link.key for link in chain[load.first_block : load.end_block])
