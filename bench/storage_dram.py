"""Host memory through the daemon: a load of 64 blocks of 1 MiB against a plain copy.

A load is everything from asking to the last byte in the client's own memory: PrepareLoad, the copy
of every block, the check of every slab there, CompleteLoad. The plain copy moves the same bytes
into the same memory, which was touched before, in one call; the faster of a copy from private
memory and one from the arena is what we are compared with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from ucm import checksum
from ucm.api import CacheApi, LoadedBlock, NamespaceHandle
from ucm.config import MIB
from ucm.types import ROOT_KEY, BlockKey, LoadStatus, StoreStatus, TierKind

from .storage_measure import MIB_LAYOUT, Plan, Result, gb_s, interleave, medians, rounded
from .storage_payload import (
    Audit,
    BlockBuffer,
    Payload,
    bench_chain,
    bench_spec,
    copy_verified,
    require,
)

LEASE_TIMEOUT_S = 20.0
BYTES_PER_STORE = 64 * MIB
MAX_BLOCKS_PER_STORE = 4096


def put_chain(
    cache: CacheApi, handle: NamespaceHandle, payload: Payload, keys: list[BlockKey]
) -> None:
    """Store a whole chain and check that every block was accepted."""
    step = min(MAX_BLOCKS_PER_STORE, BYTES_PER_STORE // payload.layout.block_bytes)
    for first in range(0, len(keys), step):
        part = keys[first : first + step]
        lease = cache.prepare_store(handle.id, keys[first - 1] if first else ROOT_KEY, part)
        sums = {}
        for slot in lease.slots:
            require(slot.data is not None, f"a block was not wanted: {slot.status}")
            assert slot.data is not None
            payload.fill(slot.key, slot.data)
            sums[slot.key] = payload.checksums(slot.data)
        statuses = set(cache.complete_store(lease.id, sums))
        require(statuses == {StoreStatus.ACCEPTED}, f"stores ended with {statuses}")


def ready_data(block: LoadedBlock) -> memoryview:
    """The bytes of a block that must be there."""
    require(block.status is LoadStatus.READY, f"a load ended with {block.status}")
    assert block.data is not None
    return block.data


class DramBench:
    """One session, one chain in host memory."""

    def __init__(self, cache: CacheApi, num_blocks: int, audit: Audit) -> None:
        self._cache = cache
        self._audit = audit
        self._layout = MIB_LAYOUT
        self._payload = Payload(self._layout)
        self._handle = cache.open_namespace(bench_spec(self._layout))
        self._keys = bench_chain(self._handle.id, self._layout, num_blocks, seed=1 << 20)
        put_chain(cache, self._handle, self._payload, self._keys)
        require(cache.flush(timeout_s=60), "the store did not flush")
        self._private = BlockBuffer(self._layout, num_blocks)
        self._target = BlockBuffer(self._layout, num_blocks)
        for key, block in zip(self._keys, self._private.blocks, strict=True):
            self._payload.fill(key, block)

    def run(self, plan: Plan) -> Result:
        """Measure."""
        tasks = [self._plain_copies, self._load, self._load_unverified, self._zero_copy]
        samples = interleave(tasks, plan)
        middle = medians(samples)
        ceiling = max(middle["memcpy"], middle["memcpy_arena"])
        return {
            **rounded(
                {
                    "load_ratio": middle["load"] / ceiling,
                    "load_gb_s": middle["load"],
                    "memcpy_gb_s": ceiling,
                    "memcpy_private_gb_s": middle["memcpy"],
                    "memcpy_arena_gb_s": middle["memcpy_arena"],
                    "unverified_load_gb_s": middle["unverified_load"],
                    "unverified_load_ratio": middle["unverified_load"] / ceiling,
                    "zero_copy_gb_s": middle["zero_copy"],
                    "zero_copy_lease_ms": middle["zero_copy_lease_ms"],
                }
            ),
            "blocks": len(self._keys),
            "block_bytes": self._layout.block_bytes,
            "n": len(samples["load"]),
        }

    def _plain_copies(self) -> Mapping[str, float]:
        into = np.frombuffer(self._target.memory, np.uint8)
        begin = time.perf_counter()
        np.copyto(into, np.frombuffer(self._private.memory, np.uint8))
        private = gb_s(into.nbytes, begin)
        lease = self._cache.prepare_load(self._handle.id, self._keys, timeout_s=LEASE_TIMEOUT_S)
        pairs = [
            (np.frombuffer(target, np.uint8), np.frombuffer(ready_data(block), np.uint8))
            for target, block in zip(self._target.blocks, lease.blocks, strict=True)
        ]
        begin = time.perf_counter()
        for target, source in pairs:
            np.copyto(target, source)
        arena = gb_s(into.nbytes, begin)
        del pairs
        self._cache.complete_load(lease.id)
        return {"memcpy": private, "memcpy_arena": arena}

    def _load(self) -> Mapping[str, float]:
        rate = self._timed_load(verified=True)
        return {"load": rate}

    def _load_unverified(self) -> Mapping[str, float]:
        return {"unverified_load": self._timed_load(verified=False)}

    def _timed_load(self, *, verified: bool) -> float:
        self._target.wipe()
        layout, targets = self._layout, self._target.blocks
        begin = time.perf_counter()
        lease = self._cache.prepare_load(self._handle.id, self._keys, timeout_s=LEASE_TIMEOUT_S)
        for target, block in zip(targets, lease.blocks, strict=True):
            if verified:
                copy_verified(layout, block, target)
            else:
                np.copyto(
                    np.frombuffer(target, np.uint8), np.frombuffer(ready_data(block), np.uint8)
                )
        self._cache.complete_load(lease.id)
        rate = gb_s(self._target.nbytes, begin)
        require({b.tier for b in lease.blocks} == {TierKind.MEMORY}, "a block was not in memory")
        self._audit.check(self._payload, self._keys, targets)
        return rate

    def _zero_copy(self) -> Mapping[str, float]:
        """A client that computes in place: the lease's views, checked where they are."""
        begin = time.perf_counter()
        lease = self._cache.prepare_load(self._handle.id, self._keys, timeout_s=LEASE_TIMEOUT_S)
        views = [ready_data(block) for block in lease.blocks]
        leased_s = time.perf_counter() - begin
        bad = sum(
            not checksum.verify(self._layout, view, block.checksums)
            for view, block in zip(views, lease.blocks, strict=True)
        )
        rate = gb_s(self._target.nbytes, begin)
        require(not bad, "a block failed its checksum in place")
        self._audit.check(self._payload, self._keys, views)
        self._cache.complete_load(lease.id)
        return {"zero_copy": rate, "zero_copy_lease_ms": leased_s * 1e3}
