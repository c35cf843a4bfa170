"""What every `CacheApi` promises of `begin_load`, in both modes.

Mix it into a subclass of `CacheApiTests`; its harness's store has an NVMe tier without a codec.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from ucm.api import CacheApi, NamespaceHandle
from ucm.checksum import verify
from ucm.errors import BlockNotFoundError, CapacityError
from ucm.layer_reader import LayerReader, ReaderOptions
from ucm.load_plan import LoadPlan, PlannedBlock
from ucm.reader_io import open_reader_io
from ucm.storage.format import HEADER_BYTES, SlotHeader, Superblock, decode_header
from ucm.storage.tier import SlotId
from ucm.types import BlockKey, LoadMode, LoadOrder, LoadStatus, SourceKind, TierKind

from .blocks import chain, content, get, meaning, put, tiny_spec
from .cache_conformance import MEMORY_BLOCKS, CacheHarness
from .slab_pool import SlabPool, slabs_of

WAIT_S = 10.0


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


def read_plan(
    cache: CacheApi,
    handle: NamespaceHandle,
    keys: Sequence[BlockKey],
    mode: LoadMode,
    options: ReaderOptions | None = None,
) -> tuple[SlabPool, LayerReader]:
    """Begin a load and have a reader work at it."""
    plan = cache.begin_load(handle.id, keys, mode=mode, timeout_s=5)
    pool = SlabPool(handle.layout, len(keys))
    options = options or ReaderOptions(request_bytes=1)
    reader = LayerReader(plan, handle.layout, pool, open_reader_io(), options)
    reader.start()
    return pool, reader


def damage(path: Path, offset: int) -> None:
    """Flip a bit of a file."""
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
        os.fsync(file.fileno())


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

    @pytest.mark.parametrize("order", LoadOrder)
    @pytest.mark.parametrize("mode", LoadMode)
    def test_a_reader_gets_what_was_put(
        self, cache: CacheApi, handle: NamespaceHandle, mode: LoadMode, order: LoadOrder
    ) -> None:
        """From wherever it is, byte for byte."""
        keys = on_nvme_only(cache, handle)
        assert len(get(cache, handle, keys[:2])) == 2
        pool, reader = read_plan(cache, handle, keys, mode, ReaderOptions(order=order))
        assert reader.wait_layer(handle.layout.num_layers - 1, WAIT_S) == len(keys)
        for index, key in enumerate(keys):
            assert pool.block(index) == slabs_of(content(key), handle.layout)
        assert reader.cancel(WAIT_S)
        cache.complete_load(reader.plan.id, reader.corrupt_keys())
        assert cache.lookup(handle.id, keys).num_blocks == len(keys)

    def test_mapped_blocks_are_promoted(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """The answer does not wait for them; they are in memory, held, when progress says so."""
        keys = on_nvme_only(cache, handle)
        plan = cache.begin_load(handle.id, keys, mode=LoadMode.MAPPED, timeout_s=1)
        assert sources(plan) == [SourceKind.PROMOTING] * len(keys)
        assert [block.tier for block in plan.blocks] == [TierKind.NVME] * len(keys)
        assert harness.leased_bytes() == len(keys) * handle.layout.block_bytes
        progress, total = plan.progress, len(keys) * handle.layout.num_layers
        assert progress is not None
        assert progress.wait(total, WAIT_S)
        assert (progress.num_blocks, progress.num_done()) == (len(keys), total)
        assert progress.num_usable() == len(keys)
        for rank, block in enumerate(plan.blocks):
            assert block.data is not None
            assert verify(handle.layout, block.data, progress.checksums(rank))
            assert meaning(block.data) == content(block.key)
        assert set(cache.lookup(handle.id, keys).tiers) == {TierKind.MEMORY}
        cache.complete_load(plan.id)
        assert harness.leased_bytes() == 0

    def test_progress_ends_with_the_load(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """A reader that outlives its lease finds nothing usable, not another load's numbers."""
        keys = on_nvme_only(cache, handle)
        plan = cache.begin_load(handle.id, keys, mode=LoadMode.MAPPED, timeout_s=1)
        assert plan.progress is not None
        harness.pass_time(plan.timeout_s + 0.01)
        again = cache.begin_load(handle.id, keys, mode=LoadMode.MAPPED, timeout_s=1)
        total = len(keys) * handle.layout.num_layers
        assert plan.progress.wait(total, WAIT_S)
        assert plan.progress.num_usable() == 0
        cache.release(again.id)

    def test_sessions_share_promotions(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """Each follows them for itself; the one that ends takes nothing from the others."""
        keys = on_nvme_only(cache, handle)
        sessions = [harness.open_session() for _ in range(3)]
        for session in sessions:
            session.open_namespace(tiny_spec())
        begun = [
            session.begin_load(handle.id, keys, mode=LoadMode.MAPPED, timeout_s=1)
            for session in sessions
        ]
        sessions[0].release(begun[0].id)
        sessions[1].close()
        read = get(cache, handle, keys)
        assert read == [content(key) for key in keys]
        pool = SlabPool(handle.layout, len(keys))
        reader = LayerReader(begun[2], handle.layout, pool, open_reader_io())
        reader.start()
        assert reader.wait_layer(handle.layout.num_layers - 1, WAIT_S) == len(keys)
        sessions[2].complete_load(begun[2].id)
        assert harness.leased_bytes() == 0

    def test_a_damaged_file_is_found_by_the_cache(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """What is promoted is verified before progress counts it."""
        keys = on_nvme_only(cache, handle)
        direct = cache.begin_load(handle.id, keys, mode=LoadMode.DIRECT, timeout_s=1)
        extent = direct.blocks[3].extent
        assert extent is not None
        for path in harness.store_folder().rglob("*.seg"):
            damage(path, extent.offset + HEADER_BYTES + handle.layout.slab_stride_bytes)
        cache.release(direct.id)
        _, reader = read_plan(cache, handle, keys, LoadMode.MAPPED)
        assert reader.wait_layer(handle.layout.num_layers - 1, WAIT_S) == 3
        assert reader.corrupt_keys() == ()
        assert reader.cancel(WAIT_S)
        cache.complete_load(reader.plan.id, reader.corrupt_keys())
        assert cache.lookup(handle.id, keys).num_blocks == 3

    def test_a_wrong_report_does_no_harm(self, cache: CacheApi, handle: NamespaceHandle) -> None:
        """The cache looks for itself."""
        keys = on_nvme_only(cache, handle)
        plan = cache.begin_load(handle.id, keys, mode=LoadMode.DIRECT, timeout_s=1)
        cache.complete_load(plan.id, keys[1:3])
        assert get(cache, handle, keys) == [content(key) for key in keys]

    def test_a_damaged_file_is_found_and_reported(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """The reader counts only what is in front of it; then the block is a miss for all."""
        keys = on_nvme_only(cache, handle)
        plan = cache.begin_load(handle.id, keys, mode=LoadMode.DIRECT, timeout_s=1)
        extent = plan.blocks[2].extent
        assert extent is not None
        for path in harness.store_folder().rglob("*.seg"):
            damage(path, extent.offset + HEADER_BYTES + handle.layout.slab_stride_bytes)
        cache.release(plan.id)
        _, reader = read_plan(cache, handle, keys, LoadMode.DIRECT)
        last = handle.layout.num_layers - 1
        assert (reader.wait_layer(0, WAIT_S), reader.wait_layer(last, WAIT_S)) in [(6, 2), (2, 2)]
        assert reader.corrupt_keys() == (keys[2],)
        assert reader.cancel(WAIT_S)
        cache.complete_load(reader.plan.id, reader.corrupt_keys())
        assert cache.lookup(handle.id, keys).num_blocks == 2

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
