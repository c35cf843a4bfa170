"""A second opinion on the bytes: what a load delivered against what was computed.

`AuditHook` stands between the engine and its connector. Of every block that the engine offers it
notes a digest, taken from the pool once it is final; of every block that a load delivered it takes
the digest again, from the pool, when the request ends, and looks whether those bytes were ever
offered under that key. This catches what a checksum that travels with the block cannot: a block
under another's name.

It also measures how long the engine's step path waits, from outside the connector, and can switch
the connector off, so that one engine runs with and without a cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import xxhash

from ucm.connectors.reference import ByteArray, ReferenceConnector, pool_bytes
from ucm.engine.hook import LoadRequest, LoadStart, StoreRequest
from ucm.engine.hook_proxy import HookProxy
from ucm.hashing import Encodable, chain_keys
from ucm.types import BlockKey, LoadOrder


@dataclass(slots=True)
class Audit:
    """What the hook found since `AuditHook.begin`."""

    offered_blocks: int = 0
    checked_blocks: int = 0
    wrong_blocks: int = 0
    stall_s_by_request: dict[str, float] = field(default_factory=dict)
    """Time that each request's match and waiting for layers took."""


class AuditHook(HookProxy):
    """A `KvHook` around the reference connector; see the module."""

    def __init__(self, inner: ReferenceConnector, on_load: Callable[[str], None]) -> None:
        """Wrap `inner`.

        Args:
            inner: the connector.
            on_load: called with the request's id before each load, to strike in the middle of it.
        """
        super().__init__(inner)
        self.connector = inner
        self.is_enabled = False
        self.audit = Audit()
        self._on_load = on_load
        self._spec = inner.session.spec
        self._pool: ByteArray | None = None
        self._digests: dict[BlockKey, set[bytes]] = {}
        self._loading: dict[str, tuple[LoadStart, list[tuple[BlockKey, int]]]] = {}
        self._loaded: dict[str, list[tuple[BlockKey, int]]] = {}
        self._match_s = 0.0

    def begin(self, *, is_enabled: bool) -> None:
        """Start a run, with or without the cache."""
        self.is_enabled = is_enabled
        self.audit = Audit()

    def attach(self, kv_pool: torch.Tensor) -> None:
        """See `KvHook.attach`."""
        self._pool = pool_bytes(kv_pool, self._spec.layout)
        self.inner.attach(kv_pool)

    def match(
        self, token_ids: Sequence[int], num_local_tokens: int, extra_keys: Sequence[Encodable] = ()
    ) -> int:
        """See `KvHook.match`."""
        if not self.is_enabled:
            return num_local_tokens
        started_s = time.perf_counter()
        num_tokens = self.inner.match(token_ids, num_local_tokens, extra_keys)
        self._match_s = time.perf_counter() - started_s
        return num_tokens

    def start_load(self, request: LoadRequest) -> LoadStart:
        """See `KvHook.start_load`."""
        self._on_load(request.request_id)
        started_s = time.perf_counter()
        start = self.inner.start_load(request)
        self._note_stall(request.request_id, time.perf_counter() - started_s)
        keys = self._keys(request.token_ids, request.extra_keys)[start.first_block :]
        first = start.first_block - request.first_block
        places = zip(keys, request.block_ids[first : first + start.num_blocks], strict=False)
        self._loading[request.request_id] = (start, list(places))
        return start

    def wait_layer(self, layer: int, request_ids: Sequence[str], /) -> Sequence[int]:
        """See `KvHook.wait_layer`."""
        started_s = time.perf_counter()
        counts = self.inner.wait_layer(layer, request_ids)
        for request_id in request_ids:
            self._note_stall(request_id, time.perf_counter() - started_s)
        return counts

    def end_load(self, request_id: str) -> int:
        """See `KvHook.end_load`."""
        num_good = self.inner.end_load(request_id)
        start, places = self._loading.pop(request_id)
        is_from_back = start.order is LoadOrder.BLOCKS_FROM_BACK
        good = places[len(places) - num_good :] if is_from_back else places[:num_good]
        self._loaded.setdefault(request_id, []).extend(good)
        return num_good

    def store(self, request: StoreRequest) -> None:
        """See `KvHook.store`."""
        if not self.is_enabled:
            request.release()
            return
        self.audit.offered_blocks += len(request.block_ids)
        self.inner.store(replace(request, release=lambda: self._note_offer(request)))

    def _note_offer(self, request: StoreRequest) -> None:
        """The blocks were copied or dropped: if their pass was computed they are final now."""
        if request.layers.is_complete:
            keys = self._keys(request.token_ids, request.extra_keys)[request.first_block :]
            for key, block_id in zip(keys, request.block_ids, strict=False):
                self._digests.setdefault(key, set()).add(self._digest(block_id))
        request.release()

    def finish(self, request_id: str) -> None:
        """See `KvHook.finish`; the request's blocks still hold what was loaded."""
        for key, block_id in self._loaded.pop(request_id, ()):
            self.audit.checked_blocks += 1
            if self._digest(block_id) not in self._digests.get(key, ()):
                self.audit.wrong_blocks += 1
        self._note_stall(request_id, 0.0)
        self.inner.finish(request_id)

    def _note_stall(self, request_id: str, stall_s: float) -> None:
        stalls = self.audit.stall_s_by_request
        stalls[request_id] = stalls.get(request_id, 0.0) + self._match_s + stall_s
        self._match_s = 0.0

    def _keys(self, token_ids: Sequence[int], extra_keys: Sequence[Encodable]) -> list[BlockKey]:
        namespace, size = self._spec.fingerprint(), self._spec.layout.block_tokens
        return chain_keys(namespace, token_ids, size, extra_keys=extra_keys)

    def _digest(self, block_id: int) -> bytes:
        assert self._pool is not None
        digest = xxhash.xxh3_128()
        for layer in range(self._spec.layout.num_layers):
            digest.update(self._pool[layer, block_id].data)
        return digest.digest()
