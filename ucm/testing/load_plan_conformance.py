"""What every `CacheApi` promises of `begin_load`, in both modes.

Mix it into a subclass of `CacheApiTests`; its harness's store has an NVMe tier without a codec.
"""

from __future__ import annotations

import os

import pytest

from ucm.api import CacheApi, NamespaceHandle
from ucm.checksum import verify
from ucm.errors import BlockNotFoundError, CapacityError
from ucm.load_plan import LoadPlan, PlannedBlock
from ucm.storage.format import HEADER_BYTES, SlotHeader, Superblock, decode_header
from ucm.storage.tier import SlotId
from ucm.types import BlockKey, LoadMode, LoadStatus, SourceKind, TierKind

from .blocks import chain, content, get, meaning, put, tiny_spec
from .cache_conformance import MEMORY_BLOCKS, CacheHarness


def on_nvme_only(cache: CacheApi, handle: NamespaceHandle, num_blocks: int = 6) -> list[BlockKey]:
    """Keys of a chain that only NVMe has: others took its place in memory."""
    keys = chain(handle.id, num_blocks, seed=90)
    put(cache, handle, keys)
    assert cache.flush(timeout_s=10)
    for seed in range(91, 95):
        put(cache, handle, chain(handle.id, MEMORY_BLOCKS // 2, seed=seed))
        assert cache.flush(timeout_s=10)
    assert set(cache.lookup(handle.id, keys).tiers) == {TierKind.NVME}
    return keys


def read_extent(handle: NamespaceHandle, block: PlannedBlock) -> tuple[SlotHeader, bytes]:
    """Header and block, read where the plan says and checked against it."""
    extent = block.extent
    assert extent is not None
    slot = os.open(f"/proc/self/fd/{extent.fd}", os.O_RDONLY)
    try:
        data = os.pread(slot, HEADER_BYTES + handle.layout.block_bytes, extent.offset)
    finally:
        os.close(slot)
    superblock = Superblock(namespace=handle.id, layout=handle.layout, segment_bytes=1 << 30)
    header = decode_header(superblock, SlotId(extent.slot), data[:HEADER_BYTES])
    assert header is not None
    assert (header.key, header.generation) == (block.key, extent.generation)
    assert verify(handle.layout, memoryview(data[HEADER_BYTES:]), header.checksums)
    return header, data[HEADER_BYTES:]


def sources(plan: LoadPlan) -> list[SourceKind | None]:
    """The source of every block."""
    return [block.source for block in plan.blocks]


class LoadPlanTests:
    """The plan itself; what is made of it is `ucm.layer_reader`'s."""

    @pytest.mark.parametrize("mode", LoadMode)
    def test_what_is_in_memory_is_read_there(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle, mode: LoadMode
    ) -> None:
        """In both modes, with checksums, read-only, held by the lease."""
        keys = chain(handle.id, 3)
        put(cache, handle, keys)
        plan = cache.begin_load(handle.id, keys, mode=mode, timeout_s=1)
        assert (plan.namespace, plan.mode, plan.num_ready) == (handle.id, mode, 3)
        assert sources(plan) == [SourceKind.MEMORY] * 3
        for block in plan.blocks:
            assert block.data is not None
            assert block.data.readonly
            assert verify(handle.layout, block.data, block.checksums)
            assert meaning(block.data) == content(block.key)
        assert harness.leased_bytes() == 3 * handle.layout.block_bytes
        cache.complete_load(plan.id)
        assert harness.leased_bytes() == 0

    @pytest.mark.parametrize("mode", LoadMode)
    def test_a_plan_says_what_is_missing(
        self, cache: CacheApi, handle: NamespaceHandle, mode: LoadMode
    ) -> None:
        """One entry for every key, in order; nothing but a status for what is not there."""
        keys = chain(handle.id, 4)
        put(cache, handle, keys[:2])
        plan = cache.begin_load(handle.id, keys, mode=mode, timeout_s=1)
        assert [block.key for block in plan.blocks] == keys
        assert [block.status for block in plan.blocks[2:]] == [LoadStatus.MISS] * 2
        assert (plan.num_ready, plan.blocks[2].source, plan.blocks[3].data) == (2, None, None)
        cache.release(plan.id)
        cache.release(plan.id)
        assert cache.begin_load(handle.id, [], mode=mode, timeout_s=1).blocks == ()

    def test_direct_blocks_are_read_where_they_lie(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """Read-only descriptors, and no memory of the cache for any of it."""
        keys = on_nvme_only(cache, handle)
        plan = cache.begin_load(handle.id, keys, mode=LoadMode.DIRECT, timeout_s=1)
        assert sources(plan) == [SourceKind.EXTENT] * len(keys)
        assert harness.leased_bytes() == 0
        for block in plan.blocks:
            assert meaning(read_extent(handle, block)[1]) == content(block.key)
            assert block.extent is not None
            assert os.get_inheritable(block.extent.fd) is False
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(block.extent.fd, bytes(4096), block.extent.offset)
        assert set(cache.lookup(handle.id, keys).tiers) == {TierKind.NVME}
        cache.complete_load(plan.id)

    def test_a_mixed_direct_plan(self, cache: CacheApi, handle: NamespaceHandle) -> None:
        """What memory has of the chain comes from there."""
        keys = on_nvme_only(cache, handle)
        assert len(get(cache, handle, keys[:2])) == 2
        plan = cache.begin_load(handle.id, keys, mode=LoadMode.DIRECT, timeout_s=1)
        assert sources(plan) == [SourceKind.MEMORY] * 2 + [SourceKind.EXTENT] * 4
        assert [block.tier for block in plan.blocks] == [TierKind.MEMORY] * 2 + [TierKind.NVME] * 4
        cache.complete_load(plan.id)

    def test_a_plan_is_a_lease(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """It has a deadline, a limit on their number, and means nothing in another session."""
        keys = on_nvme_only(cache, handle)
        other = harness.open_session()
        with pytest.raises(BlockNotFoundError):
            other.begin_load(handle.id, keys, mode=LoadMode.DIRECT, timeout_s=1)
        plans = [
            cache.begin_load(handle.id, keys, mode=LoadMode.DIRECT, timeout_s=1)
            for _ in range(harness.max_leases_per_session)
        ]
        with pytest.raises(CapacityError):
            cache.begin_load(handle.id, keys, mode=LoadMode.DIRECT, timeout_s=1)
        other.open_namespace(tiny_spec())
        other.release(plans[0].id)
        assert plans[0].timeout_s == pytest.approx(1 + harness.lease_timeout_s)
        harness.pass_time(plans[0].timeout_s + 0.01)
        again = cache.begin_load(handle.id, keys, mode=LoadMode.DIRECT, timeout_s=1)
        cache.release(again.id)

    def test_files_outlive_the_session_as_long_as_a_plan_is_held(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """A late read never meets another file's descriptor."""
        keys = on_nvme_only(cache, handle)
        other = harness.open_session()
        opened = other.open_namespace(tiny_spec())
        plan = other.begin_load(opened.id, keys, mode=LoadMode.DIRECT, timeout_s=1)
        other.close()
        assert meaning(read_extent(handle, plan.blocks[0])[1]) == content(keys[0])
