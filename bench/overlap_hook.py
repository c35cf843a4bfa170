"""`MeasuredHook`: stands between the engine and a connector, and watches one request at a time.

What it does to a run, and nothing else:

    is_enabled       False: the connector is asked for nothing (`compute_only`)
    awaits_all       True: the pass waits for every layer before its first one
    stores           False: new blocks are not stored, so that a run leaves the cache as it was

What it sees: how long the engine waited, which pool blocks a load delivered. `audit` compares those
with the bytes that were computed for the same tokens, so a block under another's name is found,
which no checksum that travels with the block can do.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import xxhash

from ucm.connectors.reference import ByteArray, pool_bytes
from ucm.engine.hook import (
    KvHook,
    LoadRequest,
    LoadStart,
    LoadState,
    StepReport,
    StoreRequest,
)
from ucm.errors import ConfigError
from ucm.hashing import Encodable
from ucm.layout import KvLayout
from ucm.types import LoadOrder


@dataclass(slots=True)
class Watch:
    """What the hook saw of the request since `MeasuredHook.begin`."""

    stall_s: float = 0.0
    """The engine waited for the load, in a pass or with nothing else to do."""
    num_loaded_blocks: int = 0
    num_bad_calls: int = 0
    """Answers that broke the hook's contract."""
    loaded: list[tuple[int, int]] = field(default_factory=list)
    """(index in the chain, pool block) of every block that a load delivered."""
    offered: list[tuple[int, int]] = field(default_factory=list)
    """The same of what the engine offered."""
    steps: list[StepReport] = field(default_factory=list)


@dataclass(slots=True)
class _Load:
    request: LoadRequest
    start: LoadStart
    claimed_block: int
    counts: list[Sequence[int]] = field(default_factory=list)
    """Answers of `wait_layer`, layer by layer, when all were awaited at once."""


class MeasuredHook:
    """A `KvHook` around another; see the module. Owned by the engine's thread."""

    def __init__(self, layout: KvLayout) -> None:
        self.is_enabled = False
        self.awaits_all = False
        self.stores = False
        self.watch = Watch()
        self._layout = layout
        self._inner: KvHook | None = None
        self._pool: torch.Tensor | None = None
        self._bytes: ByteArray | None = None
        self._load: _Load | None = None
        self._reference: dict[int, bytes] = {}

    # For the benchmark

    def use(self, inner: KvHook | None) -> None:
        """Put another connector behind the hook."""
        self._inner = inner
        if inner is not None and self._pool is not None:
            inner.attach(self._pool)

    def begin(self, *, is_enabled: bool, awaits_all: bool = False, stores: bool = False) -> None:
        """Say how the next request is to run."""
        self.is_enabled, self.awaits_all, self.stores = is_enabled, awaits_all, stores
        self.watch = Watch()
        self._load = None

    def note_reference(self) -> None:
        """Remember the bytes of what was just offered, as what a load must bring back."""
        for index, block_id in self.watch.offered:
            self._reference[index] = self._digest(block_id)

    def audit(self) -> int:
        """How many of the blocks that were just loaded hold other bytes than were computed."""
        return sum(
            self._digest(block_id) != self._reference.get(index)
            for index, block_id in self.watch.loaded
        )

    def _digest(self, block_id: int) -> bytes:
        assert self._bytes is not None
        digest = xxhash.xxh3_128()
        for layer in range(self._layout.num_layers):
            digest.update(self._bytes[layer, block_id].data)
        return digest.digest()

    @property
    def _hook(self) -> KvHook:
        if self._inner is None:
            raise ConfigError("the benchmark's hook has no connector")
        return self._inner

    # For the engine

    def attach(self, kv_pool: torch.Tensor) -> None:
        """See `KvHook.attach`."""
        self._pool = kv_pool
        self._bytes = pool_bytes(kv_pool, self._layout)
        if self._inner is not None:
            self._inner.attach(kv_pool)

    def match(
        self, token_ids: Sequence[int], num_local_tokens: int, extra_keys: Sequence[Encodable] = ()
    ) -> int:
        """See `KvHook.match`."""
        if not self.is_enabled:
            return num_local_tokens
        return self._hook.match(token_ids, num_local_tokens, extra_keys)

    def start_load(self, request: LoadRequest) -> LoadStart:
        """See `KvHook.start_load`."""
        start = self._hook.start_load(request)
        self._load = _Load(request, start, claimed_block=start.first_block)
        return start

    def load_state(self, request_id: str) -> LoadState:
        """See `KvHook.load_state`."""
        return self._hook.load_state(request_id)

    def wait_layer(self, layer: int, request_ids: Sequence[str]) -> Sequence[int]:
        """See `KvHook.wait_layer`; with `awaits_all` the first call waits for all layers."""
        load = self._load
        if not self.awaits_all or load is None:
            return self._hook.wait_layer(layer, request_ids)
        if layer == 0:
            layers = range(self._layout.num_layers)
            load.counts = [self._hook.wait_layer(each, request_ids) for each in layers]
        return load.counts[layer]

    def claim(self, request_id: str, first_block: int, last_block: int) -> int:
        """See `KvHook.claim`."""
        end = self._hook.claim(request_id, first_block, last_block)
        if self._load is not None:
            self._load.claimed_block = max(self._load.claimed_block, end)
        return end

    def wait_some(self, timeout_s: float) -> None:
        """See `KvHook.wait_some`."""
        started_s = time.perf_counter()
        self._hook.wait_some(timeout_s)
        self.watch.stall_s += time.perf_counter() - started_s

    def end_load(self, request_id: str) -> int:
        """See `KvHook.end_load`; notes which blocks the load delivered."""
        num_good = self._hook.end_load(request_id)
        load, self._load = self._load, None
        if load is None:
            self.watch.num_bad_calls += 1
            return num_good
        first, end = load.start.first_block, load.start.first_block + load.start.num_blocks
        if load.start.order is LoadOrder.LAYERS:
            good = range(first, first + num_good)
        else:
            good = range(max(end - num_good, load.claimed_block), end)
        offset = load.request.first_block
        self.watch.loaded += [(i, load.request.block_ids[i - offset]) for i in good]
        self.watch.num_loaded_blocks += len(good)
        return num_good

    def store(self, request: StoreRequest) -> None:
        """See `KvHook.store`."""
        self.watch.offered += enumerate(request.block_ids, request.first_block)
        if self.stores:
            self._hook.store(request)
        else:
            request.release()

    def should_swap_out(self, num_tokens: int) -> bool:
        """See `KvHook.should_swap_out`."""
        return self.is_enabled and self._hook.should_swap_out(num_tokens)

    def observe_step(self, report: StepReport) -> None:
        """See `KvHook.observe_step`."""
        self.watch.steps.append(report)
        self.watch.stall_s += report.stall_s
        if self._inner is not None:
            self._inner.observe_step(report)

    def finish(self, request_id: str) -> None:
        """See `KvHook.finish`."""
        if self._inner is not None:
            self._inner.finish(request_id)
