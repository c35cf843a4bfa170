"""Host memory through the daemon: a load of 64 blocks of 1 MiB against a plain copy.

A load is everything from asking for the lease to the last byte, checked, in the client's own
memory: PrepareLoad and `BlockCopier.copy_verified`. CompleteLoad follows and is timed by itself.

What it is compared with, in the same rounds. All copy into the same memory, which is overwritten
before each, so each finds the cache full of bytes that have to be written to memory first:

    memcpy_gb_s           the same bytes from the arena, one call for each run of neighbouring
                          slots: one call for all, as a rule (`arena_runs`); `load_ratio` is to this
    memcpy_private_gb_s   as many bytes from private memory in one call; `load_private_ratio`
    memcpy_blocks_gb_s    the same bytes from the arena, one call a block

Each is one call on one thread, for as long as the bytes lie together. A load may use more, and
says so: `copy_threads`. Beside the times stand the processor seconds that the client used,
`load_cpu_s_per_gb` and `memcpy_cpu_s_per_gb`; the daemon's for the lease are not in them.

One call for 64 MiB is faster than 64 calls because the C library goes round the cache above a size
(43 MB where this was written); no client can have that for blocks that it wants in 64 places, nor
for bytes that it looks at next. It is the ceiling all the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ucm.api import CacheApi, LoadedBlock, NamespaceHandle
from ucm.config import MIB
from ucm.copying import BlockCopier
from ucm.types import ROOT_KEY, BlockKey, LoadStatus, StoreStatus, TierKind

from .storage_measure import GB, MIB_LAYOUT, Plan, Result, gb_s, interleave, medians, rounded
from .storage_payload import Audit, BlockBuffer, Payload, bench_chain, bench_spec, require

LEASE_TIMEOUT_S = 20.0
BYTES_PER_STORE = 64 * MIB
MAX_BLOCKS_PER_STORE = 4096
Bytes = NDArray[np.uint8]


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


def runs_in_arena(blocks: Sequence[memoryview]) -> Iterator[Bytes]:
    """The bytes of blocks of one arena in as few arrays as possible, in order.

    Args:
        blocks: views of one mapping, not empty.
    """
    arena = np.frombuffer(memoryview(blocks[0].obj), np.uint8)
    size = blocks[0].nbytes
    origin = arena.ctypes.data
    starts = [np.frombuffer(block, np.uint8).ctypes.data - origin for block in blocks]
    first = 0
    for number in range(1, len(starts) + 1):
        if number == len(starts) or starts[number] != starts[number - 1] + size:
            yield arena[starts[first] : starts[number - 1] + size]
            first = number


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
        with BlockCopier(self._layout) as copier:
            tasks = [
                self._plain_copies,
                lambda: self._load(copier),
                lambda: self._load_unverified(copier),
                lambda: self._zero_copy(copier),
            ]
            samples = interleave(tasks, plan)
            threads = copier.num_threads
        middle = medians(samples)
        return {
            **rounded(
                {
                    "load_ratio": middle["load"] / middle["memcpy_arena"],
                    "load_gb_s": middle["load"],
                    "memcpy_gb_s": middle["memcpy_arena"],
                    "load_private_ratio": middle["load"] / middle["memcpy_private"],
                    "memcpy_private_gb_s": middle["memcpy_private"],
                    "memcpy_blocks_gb_s": middle["memcpy_blocks"],
                    "unverified_load_gb_s": middle["unverified_load"],
                    "zero_copy_gb_s": middle["zero_copy"],
                    "lease_ms": middle["lease_ms"],
                    "copy_gb_s": middle["copy"],
                    "complete_ms": middle["complete_ms"],
                    "load_cpu_s_per_gb": middle["load_cpu"],
                    "memcpy_cpu_s_per_gb": middle["memcpy_cpu"],
                }
            ),
            "arena_runs": round(middle["arena_runs"]),
            "copy_threads": threads,
            "blocks": len(self._keys),
            "block_bytes": self._layout.block_bytes,
            "n": len(samples["load"]),
        }

    def _plain_copies(self) -> Mapping[str, float]:
        into = np.frombuffer(self._target.memory, np.uint8)
        self._target.wipe()
        begin = time.perf_counter()
        np.copyto(into, np.frombuffer(self._private.memory, np.uint8))
        private = gb_s(into.nbytes, begin)
        self._target.wipe()
        lease = self._cache.prepare_load(self._handle.id, self._keys, timeout_s=LEASE_TIMEOUT_S)
        blocks = [ready_data(block) for block in lease.blocks]
        runs = list(runs_in_arena(blocks))
        cpu = time.thread_time()
        arena = _copy_rate(into, runs)
        cpu = time.thread_time() - cpu
        self._target.wipe()
        by_block = _copy_rate(into, [np.frombuffer(block, np.uint8) for block in blocks])
        self._cache.complete_load(lease.id)
        return {
            "memcpy_private": private,
            "memcpy_arena": arena,
            "memcpy_blocks": by_block,
            "memcpy_cpu": cpu / (into.nbytes / GB),
            "arena_runs": len(runs),
        }

    def _load(self, copier: BlockCopier) -> Mapping[str, float]:
        self._target.wipe()
        cpu, begin = time.process_time(), time.perf_counter()
        lease = self._cache.prepare_load(self._handle.id, self._keys, timeout_s=LEASE_TIMEOUT_S)
        leased = time.perf_counter()
        right = copier.copy_verified(lease.blocks, self._target.blocks)
        copied, cpu = time.perf_counter(), time.process_time() - cpu
        self._cache.complete_load(lease.id)
        completed = time.perf_counter()
        require(all(right), "a block failed its checksum after the copy")
        self._check(lease.blocks)
        size_gb = self._target.nbytes / GB
        return {
            "load": size_gb / (copied - begin),
            "copy": size_gb / (copied - leased),
            "load_cpu": cpu / size_gb,
            "lease_ms": (leased - begin) * 1e3,
            "complete_ms": (completed - copied) * 1e3,
        }

    def _load_unverified(self, copier: BlockCopier) -> Mapping[str, float]:
        """The same without checksums: what they cost."""
        self._target.wipe()
        begin = time.perf_counter()
        lease = self._cache.prepare_load(self._handle.id, self._keys, timeout_s=LEASE_TIMEOUT_S)
        views, targets = [ready_data(block) for block in lease.blocks], self._target.blocks

        def copy(number: int) -> None:
            target, source = (np.frombuffer(m[number], np.uint8) for m in (targets, views))
            np.copyto(target, source)

        copier.each(copy, len(views))
        rate = gb_s(self._target.nbytes, begin)
        self._cache.complete_load(lease.id)
        self._check(lease.blocks)
        return {"unverified_load": rate}

    def _check(self, blocks: Sequence[LoadedBlock]) -> None:
        require({b.tier for b in blocks} == {TierKind.MEMORY}, "a block was not in memory")
        self._audit.check(self._payload, self._keys, self._target.blocks)

    def _zero_copy(self, copier: BlockCopier) -> Mapping[str, float]:
        """A client that computes in place: the lease's views, checked where they are."""
        begin = time.perf_counter()
        lease = self._cache.prepare_load(self._handle.id, self._keys, timeout_s=LEASE_TIMEOUT_S)
        right = copier.verify_in_place(lease.blocks)
        rate = gb_s(self._target.nbytes, begin)
        require(all(right), "a block failed its checksum in place")
        views = [ready_data(block) for block in lease.blocks]
        self._audit.check(self._payload, self._keys, views)
        self._cache.complete_load(lease.id)
        return {"zero_copy": rate}


def _copy_rate(into: Bytes, sources: Sequence[Bytes]) -> float:
    """GB/s of copying `sources` one behind the other, a call each."""
    starts = np.cumsum([0, *(len(source) for source in sources)]).tolist()
    begin = time.perf_counter()
    for start, source in zip(starts, sources, strict=False):
        np.copyto(into[start : start + len(source)], source)
    return gb_s(into.nbytes, begin)
