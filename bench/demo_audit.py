"""A second opinion on the bytes: what a load delivered against what was computed.

`AuditHook` stands between the engine and its connector. Of every block that the engine offers it
notes a digest, taken from the pool once the block is computed; of every block that a load delivered
it takes the digest again, from the pool, when the request ends, and looks whether those bytes were
ever offered under that key. This catches what a checksum that travels with the block cannot: a
block under another's name.

It also measures how long the engine's step path waits, from outside the connector, and can switch
the connector off, so that one engine runs with and without a cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import xxhash

from ucm.connectors.reference import ByteArray, ReferenceConnector, pool_bytes
from ucm.engine.blocking_loads import BlockingLoads
from ucm.engine.hook import LoadRequest, StoreRequest
from ucm.hashing import chain_keys
from ucm.types import BlockKey


@dataclass(slots=True)
class Audit:
    """What the hook found since `AuditHook.begin`."""

    offered_blocks: int = 0
    checked_blocks: int = 0
    wrong_blocks: int = 0
    stall_s_by_request: dict[str, float] = field(default_factory=dict)
    """Time that each request's match and load took."""


class AuditHook(BlockingLoads):
    """A `KvHook` around the reference connector; see the module."""

    def __init__(self, inner: ReferenceConnector, on_load: Callable[[str], None]) -> None:
        """Wrap `inner`.

        Args:
            inner: the connector.
            on_load: called with the request's id before each load, to strike in the middle of it.
        """
        super().__init__()
        self.is_enabled = False
        self.audit = Audit()
        self._inner = inner
        self._on_load = on_load
        self._spec = inner.session.spec
        self._pool: ByteArray | None = None
        self._digests: dict[BlockKey, set[bytes]] = {}
        self._loaded: dict[str, list[tuple[BlockKey, int]]] = {}
        self._open_stores: list[StoreRequest] = []
        """Offered, and not computed yet."""
        self._match_s = 0.0

    def begin(self, *, is_enabled: bool) -> None:
        """Start a run, with or without the cache."""
        self.is_enabled = is_enabled
        self.audit = Audit()

    def attach(self, kv_pool: torch.Tensor) -> None:
        """See `KvHook.attach`."""
        self._pool = pool_bytes(kv_pool, self._spec.layout)
        self._inner.attach(kv_pool)

    def match(self, token_ids: Sequence[int], num_local_tokens: int) -> int:
        """See `KvHook.match`."""
        if not self.is_enabled:
            return num_local_tokens
        started_s = time.perf_counter()
        num_tokens = self._inner.match(token_ids, num_local_tokens)
        self._match_s = time.perf_counter() - started_s
        return num_tokens

    def load(self, request: LoadRequest) -> int:
        """See `BlockingLoads.load`."""
        self._on_load(request.request_id)
        started_s = time.perf_counter()
        num_blocks = self._inner.load(request)
        self._note_stall(request.request_id, time.perf_counter() - started_s)
        keys = self._keys(request.token_ids)[request.first_block :]
        loaded = self._loaded.setdefault(request.request_id, [])
        loaded += list(zip(keys, request.block_ids[:num_blocks], strict=False))
        return num_blocks

    def store(self, request: StoreRequest) -> None:
        """See `KvHook.store`."""
        if not self.is_enabled:
            request.release()
            return
        self._note_computed()
        self._open_stores.append(request)
        self.audit.offered_blocks += len(request.block_ids)
        self._inner.store(request)

    def finish(self, request_id: str) -> None:
        """See `KvHook.finish`; the request's blocks still hold what was loaded."""
        self._note_computed()
        for key, block_id in self._loaded.pop(request_id, ()):
            self.audit.checked_blocks += 1
            if self._digest(block_id) not in self._digests.get(key, ()):
                self.audit.wrong_blocks += 1
        self._note_stall(request_id, 0.0)
        self._inner.finish(request_id)

    def _note_computed(self) -> None:
        """Take the digests of what was offered, now that its pass is over.

        No block changes hands before the engine calls again.
        """
        open_stores, self._open_stores = self._open_stores, []
        for request in open_stores:
            if not request.layers.is_settled:
                self._open_stores.append(request)
            elif request.layers.is_complete:
                keys = self._keys(request.token_ids)[request.first_block :]
                for key, block_id in zip(keys, request.block_ids, strict=False):
                    self._digests.setdefault(key, set()).add(self._digest(block_id))

    def _note_stall(self, request_id: str, stall_s: float) -> None:
        stalls = self.audit.stall_s_by_request
        stalls[request_id] = stalls.get(request_id, 0.0) + self._match_s + stall_s
        self._match_s = 0.0

    def _keys(self, token_ids: Sequence[int]) -> list[BlockKey]:
        return chain_keys(self._spec.fingerprint(), token_ids, self._spec.layout.block_tokens)

    def _digest(self, block_id: int) -> bytes:
        assert self._pool is not None
        digest = xxhash.xxh3_128()
        for layer in range(self._spec.layout.num_layers):
            digest.update(self._pool[layer, block_id].data)
        return digest.digest()
