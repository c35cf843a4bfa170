"""An adversarial `KvHook` in virtual time: it loads as slowly and as badly as it is told.

Every load follows a `LoadScript`. From `start_load` on its blocks hold garbage; a slab is right
from the moment it is due, and a bad one stays garbage. A load that cannot be stopped goes on to
write garbage into the blocks that it held, until it lets go of them. So whoever reads a slab too
early, or reuses a block too soon, gets other tokens.

Virtual time passes where the engine waits (`wait_layer`, `wait_some`) and when the test says so.
The hook checks the engine's side of the contract as it goes: `faults` must stay empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from ucm.clock import SimClock
from ucm.engine.hook import (
    LoadRequest,
    LoadStart,
    LoadState,
    StepReport,
    StoreRequest,
)
from ucm.engine.sequence import POOL_NAMESPACE
from ucm.errors import TierUnavailableError
from ucm.hashing import Encodable, chain_keys
from ucm.types import BlockKey, LoadOrder

GARBAGE = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadScript:
    """How one load goes."""

    order: LoadOrder = LoadOrder.LAYERS
    slab_us: tuple[int, ...] = (0,)
    """Virtual time of each slab, in the order of loading, over and over."""
    bad_slabs: frozenset[int] = frozenset()
    """Slabs, in the order of loading, that arrive damaged."""
    hung_slab: int | None = None
    """The slab that never arrives, nor any behind it."""
    skipped_blocks: int = 0
    """Of the request's blocks, leave out so many at the front (from the back only) ..."""
    dropped_blocks: int = 0
    """... and so many at the end."""
    write_us: int = 0
    """How long writes go on after the end, into blocks that had not all arrived."""
    optimism: float = 1.0
    """Factor on the stall that it announces."""
    failing: frozenset[str] = frozenset()
    """Methods that raise for this load."""


@dataclass(slots=True, kw_only=True)
class _Load:
    request: LoadRequest
    script: LoadScript
    start: LoadStart
    keys: Sequence[BlockKey]
    """Of the load's blocks, and no others of the request."""
    slabs: list[tuple[int, int]]
    """(layer, index in the load) in the order of loading; what was given up is taken out."""
    due_us: list[int | None]
    num_written: int = 0
    bad: dict[int, int] = field(default_factory=dict)
    """Index of a failed block to the layer that failed."""
    arrived: set[tuple[int, int]] = field(default_factory=set)
    deadline_us: int | None = None
    num_given_up: int = 0
    """From the back: blocks at the front that the engine claimed."""

    def pool_block(self, index: int) -> int:
        return self.request.block_ids[index + self.start.first_block - self.request.first_block]


class FakeLoadingHook:
    """See the module."""

    def __init__(
        self,
        clock: SimClock,
        scripts: Callable[[], LoadScript] = LoadScript,
        *,
        deadline_us: int = 1_000_000,
    ) -> None:
        """Start empty.

        Args:
            clock: virtual time.
            scripts: asked for the script of each load.
            deadline_us: longest wait for one request.
        """
        self.blocks: dict[BlockKey, torch.Tensor] = {}
        self.loads: dict[str, _Load] = {}
        self.reports: list[StepReport] = []
        self.finished: list[str] = []
        self.stores: list[StoreRequest] = []
        self.faults: list[str] = []
        self.num_started = 0
        self.wants_swap = True
        self._clock = clock
        self._scripts = scripts
        self._deadline_us = deadline_us
        self._writes: list[tuple[int, tuple[int, ...], Callable[[], None]]] = []
        """(end, blocks, release) of writes that could not be stopped."""
        self.lost: set[int] = set()
        """Pool blocks of loads whose end raised: written to for ever."""
        self.num_given_away = 0
        """Blocks that the engine must never use again."""
        self.stored_chains: list[tuple[list[int], torch.Tensor]] = []
        """What was stored: all tokens up to a block's end, and the block."""
        self._pool: torch.Tensor | None = None

    # The hook

    def attach(self, kv_pool: torch.Tensor) -> None:
        """See `KvHook.attach`."""
        self._pool = kv_pool

    def match(
        self, token_ids: Sequence[int], num_local_tokens: int, extra_keys: Sequence[Encodable] = ()
    ) -> int:
        """See `KvHook.match`."""
        self.tick()
        num_blocks = 0
        for key in self._keys(token_ids, extra_keys):
            if key not in self.blocks:
                break
            num_blocks += 1
        return max(num_blocks * self._block_tokens, num_local_tokens)

    def start_load(self, request: LoadRequest) -> LoadStart:
        """See `KvHook.start_load`."""
        script = self._scripts()
        if request.whole:
            script = replace(script, order=LoadOrder.LAYERS, dropped_blocks=0)
        if "start_load" in script.failing:
            raise TierUnavailableError("start_load fails, as the test wants")
        if request.request_id in self.loads:
            self.faults.append(f"{request.request_id}: a second load")
        skipped = script.skipped_blocks if script.order is LoadOrder.BLOCKS_FROM_BACK else 0
        num_blocks = len(request.block_ids) - skipped - script.dropped_blocks
        if num_blocks < 1:
            return LoadStart(first_block=request.first_block, num_blocks=0)
        start = LoadStart(
            first_block=request.first_block + skipped, num_blocks=num_blocks, order=script.order
        )
        self._begin(request, script, start)
        return start

    def _begin(self, request: LoadRequest, script: LoadScript, start: LoadStart) -> None:
        layers, count = range(self.pool.shape[0]), start.num_blocks
        if script.order is LoadOrder.LAYERS:
            slabs = [(layer, index) for layer in layers for index in range(count)]
        else:
            slabs = [(layer, index) for index in reversed(range(count)) for layer in layers]
        due_us: list[int | None] = []
        now_us = self._clock.now_us()
        for number in range(len(slabs)):
            now_us += script.slab_us[number % len(script.slab_us)]
            is_hung = script.hung_slab is not None and number >= script.hung_slab
            due_us.append(None if is_hung else now_us)
        keys = self._keys(request.token_ids, request.extra_keys)[start.first_block :][:count]
        load = _Load(
            request=request, script=script, start=start, keys=keys, slabs=slabs, due_us=due_us
        )
        for index in range(count):
            self.pool[:, load.pool_block(index)] = GARBAGE
        self.loads[request.request_id] = load
        self.num_started += 1
        self._deliver(load)

    def load_state(self, request_id: str) -> LoadState:
        """See `KvHook.load_state`."""
        load = self._get(request_id, "load_state")
        left_us = [due for due in load.due_us[load.num_written :] if due is not None]
        is_hung = len(left_us) < len(load.due_us) - load.num_written
        stall_us = max(left_us, default=self._clock.now_us()) - self._clock.now_us()
        stall_us += self._deadline_us if is_hung else 0
        return LoadState(
            is_done=load.num_written == len(load.slabs) or self._is_hopeless(load),
            num_good_blocks=min(load.bad, default=load.start.num_blocks),
            num_layers_ready=self._num_layers_ready(load),
            bytes_left=len(load.slabs) - load.num_written,
            stall_s=stall_us / 1e6 * load.script.optimism,
            first_ready_block=load.start.first_block + self._first_ready(load),
        )

    def wait_layer(self, layer: int, request_ids: Sequence[str]) -> Sequence[int]:
        """See `KvHook.wait_layer`."""
        counts = []
        for request_id in request_ids:
            load = self._get(request_id, "wait_layer")
            if load.deadline_us is None:
                load.deadline_us = self._clock.now_us() + self._deadline_us
            self._wait_until(self._due_of(load, layer), load.deadline_us)
            counts.append(self._num_good(load, layer))
        return counts

    def claim(self, request_id: str, first_block: int, last_block: int) -> int:
        """See `KvHook.claim`."""
        load = self._get(request_id, "claim")
        first = load.start.first_block
        if first_block < first + load.num_given_up:
            self.faults.append(f"{request_id}: block {first_block} was claimed before")
        end = min(last_block, first + self._first_ready(load))
        next_index = self._next_index(load)
        if next_index is not None and self._is_nearly_there(load, next_index):
            end = min(end, first + next_index)
        load.num_given_up = max(load.num_given_up, end - first)
        kept = [n for n, slab in enumerate(load.slabs) if slab[1] >= load.num_given_up]
        written = [n for n in kept if n < load.num_written]
        load.slabs = [load.slabs[n] for n in kept]
        load.due_us = [load.due_us[n] for n in kept]
        load.num_written = len(written)
        return end

    def wait_some(self, timeout_s: float) -> None:
        """See `KvHook.wait_some`."""
        coming = [
            due
            for load in self.loads.values()
            for due in load.due_us[load.num_written :][:1]
            if due is not None
        ]
        until_us = self._clock.now_us() + int(timeout_s * 1e6)
        self._wait_until(min(coming, default=until_us), until_us)

    def end_load(self, request_id: str) -> int:
        """See `KvHook.end_load`."""
        self.tick()
        if request_id not in self.loads:
            self.faults.append(f"{request_id}: an end without a load")
            return 0
        load = self.loads.pop(request_id)
        count = load.start.num_blocks
        unfinished = tuple(
            load.pool_block(index)
            for index in range(load.num_given_up, count)
            if any((layer, index) not in load.arrived for layer in range(self.pool.shape[0]))
        )
        if "end_load" in load.script.failing:
            self.lost.update(unfinished)
            self.num_given_away += count - load.num_given_up
            raise TierUnavailableError("end_load fails, as the test wants")
        if load.script.write_us and unfinished:
            end_us = self._clock.now_us() + load.script.write_us
            self._writes.append((end_us, unfinished, load.request.hold(unfinished)))
        if load.start.order is LoadOrder.BLOCKS_FROM_BACK:
            return count - self._first_ready(load)
        return self._num_good(load, self.pool.shape[0] - 1)

    def store(self, request: StoreRequest) -> None:
        """See `KvHook.store`."""
        self.stores.append(request)
        self.tick()

    def should_swap_out(self, _num_tokens: int, /) -> bool:
        """See `KvHook.should_swap_out`."""
        return self.wants_swap

    def observe_step(self, report: StepReport) -> None:
        """See `KvHook.observe_step`."""
        self.reports.append(report)

    def finish(self, request_id: str) -> None:
        """See `KvHook.finish`."""
        self.finished.append(request_id)
        if request_id in self.loads:
            self.faults.append(f"{request_id}: finished with a load under way")

    # Time

    def tick(self) -> None:
        """Do what is due by now."""
        for load in self.loads.values():
            self._deliver(load)
        now_us = self._clock.now_us()
        for write in list(self._writes):
            end_us, block_ids, release = write
            self.pool[:, list(block_ids)] = GARBAGE
            if end_us <= now_us:
                self._writes.remove(write)
                release()
        if self.lost:
            self.pool[:, list(self.lost)] = GARBAGE
        open_stores, self.stores = self.stores, []
        self.stores = [request for request in open_stores if not self._take(request)]

    def _take(self, request: StoreRequest) -> bool:
        """Copy a store whose pass is over; False when it is not."""
        if not request.layers.is_settled:
            return False
        if request.layers.is_complete:
            keys = self._keys(request.token_ids, request.extra_keys)[request.first_block :]
            size = self._block_tokens
            for index, (key, block_id) in enumerate(zip(keys, request.block_ids, strict=True)):
                self.blocks[key] = self.pool[:, block_id].clone()
                stop = (request.first_block + index + 1) * size
                self.stored_chains.append((list(request.token_ids[:stop]), self.blocks[key]))
        request.release()
        return True

    def _wait_until(self, due_us: int | None, limit_us: int) -> None:
        until_us = limit_us if due_us is None else min(due_us, limit_us)
        self._clock.advance_us(max(0, until_us - self._clock.now_us()))
        self.tick()

    def _deliver(self, load: _Load) -> None:
        now_us = self._clock.now_us()
        for number in range(load.num_written, len(load.slabs)):
            due_us = load.due_us[number]
            if due_us is None or due_us > now_us:
                return
            layer, index = load.slabs[number]
            load.num_written = number + 1
            if number in load.script.bad_slabs:
                load.bad.setdefault(index, layer)
                continue
            load.arrived.add((layer, index))
            self.pool[layer, load.pool_block(index)] = self.blocks[load.keys[index]][layer]

    # What is there

    @property
    def pool(self) -> torch.Tensor:
        """The engine's."""
        assert self._pool is not None, "used before attach"
        return self._pool

    @property
    def _block_tokens(self) -> int:
        return int(self.pool.shape[4])

    def _keys(
        self, token_ids: Sequence[int], extra_keys: Sequence[Encodable] = ()
    ) -> list[BlockKey]:
        size = self._block_tokens
        return chain_keys(POOL_NAMESPACE, token_ids, size, extra_keys=extra_keys)

    def _get(self, request_id: str, method: str) -> _Load:
        self.tick()
        load = self.loads[request_id]
        if method in load.script.failing:
            raise TierUnavailableError(f"{method} fails, as the test wants")
        return load

    def _due_of(self, load: _Load, layer: int) -> int | None:
        """When the slabs up to `layer` of the blocks that are still good are there."""
        first_bad = min(load.bad, default=load.start.num_blocks)
        dues = [
            due
            for (of_layer, index), due in zip(load.slabs, load.due_us, strict=True)
            if of_layer <= layer and index < first_bad
        ]
        known = [due for due in dues if due is not None]
        return None if len(known) < len(dues) else max(known, default=0)

    def _num_good(self, load: _Load, layer: int) -> int:
        for index in range(load.start.num_blocks):
            if any((of_layer, index) not in load.arrived for of_layer in range(layer + 1)):
                return index
        return load.start.num_blocks

    def _num_layers_ready(self, load: _Load) -> int:
        """LAYERS: leading layers of which every block that is still good is there."""
        if load.start.order is not LoadOrder.LAYERS:
            return 0
        first_bad = min(load.bad, default=load.start.num_blocks)
        for layer in range(self.pool.shape[0]):
            if any((layer, index) not in load.arrived for index in range(first_bad)):
                return layer
        return int(self.pool.shape[0])

    def _first_ready(self, load: _Load) -> int:
        first = load.start.num_blocks
        for index in reversed(range(load.num_given_up, load.start.num_blocks)):
            if any((layer, index) not in load.arrived for layer in range(self.pool.shape[0])):
                return first
            first = index
        return first

    def _next_index(self, load: _Load) -> int | None:
        """From the back: the block that is being loaded."""
        if load.bad or load.num_written == len(load.slabs):
            return None
        return load.slabs[load.num_written][1]

    def _is_nearly_there(self, load: _Load, index: int) -> bool:
        """Whether a block is worth waiting for; not beyond the deadline."""
        num_there = sum((layer, index) in load.arrived for layer in range(self.pool.shape[0]))
        if load.deadline_us is None:
            load.deadline_us = self._clock.now_us() + self._deadline_us
        in_time = self._clock.now_us() < load.deadline_us
        return 2 * num_there >= self.pool.shape[0] and in_time

    def _is_hopeless(self, load: _Load) -> bool:
        """Whether what is still to come would not count."""
        if load.start.order is LoadOrder.BLOCKS_FROM_BACK:
            return bool(load.bad)
        return 0 in load.bad


def script_source(scripts: Sequence[LoadScript]) -> Callable[[], LoadScript]:
    """One script after the other, then the default for ever."""
    left: Iterator[LoadScript] = iter(scripts)
    return lambda: next(left, LoadScript())
