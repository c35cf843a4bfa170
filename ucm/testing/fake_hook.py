"""A `KvHook` over a dictionary: the smallest cache that an engine can be tested with.

It copies a stored block as soon as its pass is over, at the next call, but may give it back later
(`defer_release`), from another thread if the test likes; it can be told to fail, to load less than
it promised, or to leave NaN behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ucm.engine.hook import LoadRequest, StoreRequest
from ucm.engine.sequence import POOL_NAMESPACE
from ucm.errors import TierUnavailableError
from ucm.hashing import Encodable, chain_keys
from ucm.types import BlockKey

from .blocking_loads import BlockingLoads


@dataclass(slots=True)
class DictHook(BlockingLoads):
    """Blocks by chain key; see the module."""

    defer_release: bool = False
    """Keep the stores' pins until `release_all`."""
    failing: frozenset[str] = frozenset()
    """Names of methods that raise."""
    max_loaded_blocks: int | None = None
    """Load at most this many of the blocks asked for and fill the next with NaN."""
    blocks: dict[BlockKey, torch.Tensor] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    pending: list[Callable[[], None]] = field(default_factory=list)
    stored: list[StoreRequest] = field(default_factory=list)
    open_stores: list[StoreRequest] = field(default_factory=list)
    """Stores whose pass is not over."""
    finished: list[str] = field(default_factory=list)
    pool: torch.Tensor | None = None

    def attach(self, kv_pool: torch.Tensor) -> None:
        """See `KvHook.attach`."""
        self._enter("attach")
        assert self.pool is None, "attached twice"
        self.pool = kv_pool

    def match(
        self, token_ids: Sequence[int], num_local_tokens: int, extra_keys: Sequence[Encodable] = ()
    ) -> int:
        """See `KvHook.match`."""
        self._enter("match")
        assert num_local_tokens % self._block_tokens == 0
        num_blocks = 0
        for key in self._keys(token_ids, extra_keys):
            if key not in self.blocks:
                break
            num_blocks += 1
        return num_blocks * self._block_tokens

    def load(self, request: LoadRequest) -> int:
        """See `BlockingLoads.load`."""
        self._enter("load")
        assert self.pool is not None
        keys = self._keys(request.token_ids, request.extra_keys)[request.first_block :]
        limit = len(request.block_ids) if self.max_loaded_blocks is None else self.max_loaded_blocks
        for index, block_id in enumerate(request.block_ids):
            if index >= limit:
                self.pool[:, block_id] = float("nan")
                return index
            self.pool[:, block_id] = self.blocks[keys[index]]
        return len(request.block_ids)

    def store(self, request: StoreRequest) -> None:
        """See `KvHook.store`."""
        self._enter("store")
        self.stored.append(request)
        self.open_stores.append(request)
        self.settle()

    def settle(self) -> None:
        """Copy what is final, drop what will never be."""
        waiting = [item for item in self.open_stores if not item.layers.is_settled]
        settled = [item for item in self.open_stores if item.layers.is_settled]
        self.open_stores = waiting
        for request in settled:
            if request.layers.is_complete:
                self._copy(request)
            if self.defer_release:
                self.pending.append(request.release)
            else:
                request.release()

    def _copy(self, request: StoreRequest) -> None:
        assert self.pool is not None
        keys = self._keys(request.token_ids, request.extra_keys)[request.first_block :]
        for key, block_id in zip(keys, request.block_ids, strict=True):
            self.blocks[key] = self.pool[:, block_id].clone()

    def finish(self, request_id: str) -> None:
        """See `KvHook.finish`."""
        self._enter("finish")
        self.finished.append(request_id)

    def release_all(self) -> None:
        """Give back everything that stores pinned."""
        self.settle()
        while self.pending:
            self.pending.pop()()

    @property
    def _block_tokens(self) -> int:
        assert self.pool is not None, "used before attach"
        return int(self.pool.shape[4])

    def _keys(
        self, token_ids: Sequence[int], extra_keys: Sequence[Encodable] = ()
    ) -> list[BlockKey]:
        size = self._block_tokens
        return chain_keys(POOL_NAMESPACE, token_ids, size, extra_keys=extra_keys)

    def _enter(self, method: str) -> None:
        self.calls.append(method)
        self.settle()
        if method in self.failing:
            raise TierUnavailableError(f"{method} fails, as the test wants")
