"""Where a deleted block might survive or be seen, beyond the states of `test_collections`."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator
from pathlib import Path

import lmdb
import pytest

from ucm.api import NamespaceHandle
from ucm.config import MIB, Config, MemoryConfig, NvmeConfig, ServiceConfig
from ucm.embedded import EmbeddedCache
from ucm.manager import Manager
from ucm.testing.blocks import TINY_LAYOUT, chain, content, get, meaning, put, tiny_spec
from ucm.testing.documents import bytes_on_disk, document
from ucm.testing.load_plan_conformance import read_extent
from ucm.testing.nvme import quick_folder
from ucm.testing.stores import FakeStore, wait_until
from ucm.types import BlockKey, LoadMode, LoadStatus, SourceKind, StoreStatus, TierKind


@pytest.fixture
def fake() -> Iterator[FakeStore]:
    store = FakeStore()
    yield store
    store.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path / "data"


def config(path: Path) -> Config:
    return Config(
        service=ServiceConfig(staging_bytes=1 * MIB),
        memory=MemoryConfig(capacity_bytes=8 * TINY_LAYOUT.block_bytes),
        nvme=NvmeConfig(path=path, capacity_bytes=MIB, segment_bytes=MIB // 16, io_threads=1),
    )


def arena_of(cache: EmbeddedCache, handle: NamespaceHandle) -> bytes:
    found = cache.manager._state.namespaces.get_locked(handle.id)
    assert found is not None
    arena = found.memory.arena
    num_slots = arena.size_bytes // TINY_LAYOUT.block_bytes
    return b"".join(bytes(arena.view(slot)) for slot in range(num_slots))  # type: ignore[arg-type]


def test_bytes_that_eviction_left_in_memory_go_too(folder: Path) -> None:
    with EmbeddedCache(Manager(config(folder))) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 2, 1)
        cache.collections.put_document("docs", document(handle.id, "one", keys))
        put(cache, handle, keys)
        assert cache.flush(timeout_s=10)
        others = chain(handle.id, 2, 2)
        put(cache, handle, others)
        assert cache.flush(timeout_s=10)
        found = cache.manager._state.namespaces.get_locked(handle.id)
        assert found is not None
        found.memory.delete(
            [
                (found.index.evict(found.index.find(key), TierKind.MEMORY), key)
                for key in reversed(keys)
            ]
        )
        assert content(keys[0])[:64] in arena_of(cache, handle), "in a slot that is free"
        assert cache.collections.remove("docs").deletion.num_waiting == 0
        left = arena_of(cache, handle)
        assert not any(content(key)[:64] in left for key in keys)
        assert get(cache, handle, others) == [content(key) for key in others]
        assert cache.manager.check_integrity() == []


def test_a_block_that_is_being_promoted_is_a_miss_once_its_document_is_removed(
    fake: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ucm.deletion_rounds.PATIENCE_S", 0.05)  # the disk hangs for longer
    keys = chain(fake.handle.id, 3, 1)
    put(fake.cache, fake.handle, keys)
    assert fake.cache.flush(timeout_s=5)
    fake.drop_from_memory()
    collections = fake.cache.collections
    collections.put_document("docs", document(fake.handle.id, "one", keys[:2]))
    fake.disk.faults.reads_may_go.clear()
    assert fake.cache.prefetch(fake.handle.id, keys[:2]) == 2
    assert collections.remove("docs").deletion.num_waiting == 2
    assert fake.cache.lookup(fake.handle.id, keys).num_blocks == 0
    assert fake.cache.lookup(fake.handle.id, keys[2:]).num_blocks == 0, "it follows them"
    lease = fake.cache.prepare_load(fake.handle.id, keys, timeout_s=0.0)
    assert {block.status for block in lease.blocks} == {LoadStatus.MISS}
    fake.cache.complete_load(lease.id)
    fake.disk.faults.reads_may_go.set()
    wait_until(lambda: not promotions(fake))
    assert fake.cache.lookup(fake.handle.id, keys).num_blocks == 0, "nobody has to tick"
    collections.put_document("docs", document(fake.handle.id, "one", keys[:2]))
    assert put(fake.cache, fake.handle, keys[:2])
    assert get(fake.cache, fake.handle, keys[:2]) == [content(key) for key in keys[:2]]
    assert fake.cache.flush(timeout_s=5)
    assert fake.manager.check_integrity() == []


def promotions(fake: FakeStore) -> int:
    with fake.manager._state.lock:
        found = fake.manager._state.namespaces.get_locked(fake.handle.id)
        assert found is not None
        return len(found.promotions)


def test_what_expired_while_nobody_had_the_store_is_not_served(folder: Path) -> None:
    with EmbeddedCache(Manager(config(folder))) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 2, 1)
        expires_s = time.time() + 3600
        cache.collections.put_document("docs", document(handle.id, "a", keys, expires_s=expires_s))
        put(cache, handle, keys)
        assert cache.flush(timeout_s=10)
        cache.manager.collections._next_expiry_us = 0  # it does not notice what is due
        cache.manager.collections.expire("docs", None, time.time() - 1)
        cache.manager.collections._next_expiry_us = 0
    with EmbeddedCache(Manager(config(folder))) as cache:
        handle = cache.open_namespace(tiny_spec())
        assert cache.lookup(handle.id, keys).num_blocks == 0


class SickEnvironment:
    def __init__(self, real: lmdb.Environment) -> None:
        self.close = real.close

    def sync(self, _: bool) -> None:
        raise lmdb.Error("Input/output error")


def test_a_registry_that_cannot_be_synced_does_not_keep_the_store_from_closing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EmbeddedCache(Manager(config(folder)))
    handle = cache.open_namespace(tiny_spec())
    keys = chain(handle.id, 2, 1)
    cache.collections.put_document("docs", document(handle.id, "one", keys))
    registry = cache.manager.collections._registry
    assert registry is not None
    assert registry._env is not None
    monkeypatch.setattr(registry, "_env", SickEnvironment(registry._env))
    cache.close()
    with EmbeddedCache(Manager(config(folder))) as again:  # nobody holds the folder
        assert len(again.collections.list_documents("docs")) == 1


def test_a_document_that_comes_back_leaves_its_old_readers_alone(folder: Path) -> None:
    """Its blocks are stored once more while somebody reads the deleted copies in their files."""
    with EmbeddedCache(Manager(config(folder))) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 3, 1)
        one = document(handle.id, "one", keys)
        cache.collections.put_document("docs", one)
        put(cache, handle, keys)
        assert cache.flush(timeout_s=10)
        out_of_memory(cache, handle, keys)
        plan = cache.begin_load(handle.id, keys, mode=LoadMode.DIRECT, timeout_s=1.0)
        assert {block.source for block in plan.blocks} == {SourceKind.EXTENT}
        assert cache.collections.remove("docs").deletion.num_waiting == 3
        cache.collections.put_document("docs", one)
        assert put(cache, handle, keys) == (StoreStatus.ACCEPTED,) * 3
        assert not cache.flush(timeout_s=10), "in memory only, as long as the deleted copies are"
        for seed in range(60, 64):  # to whom free slots would go
            put(cache, handle, chain(handle.id, 2, seed))
            cache.flush(timeout_s=10)
        for block in plan.blocks:
            assert meaning(read_extent(handle, block)[1]) == content(block.key)
        put(cache, handle, keys)  # what memory let go meanwhile
        cache.release(plan.id)
        cache.manager.tick()
        wait_until(lambda: cache.flush(timeout_s=10))
        assert all(bytes_on_disk(folder, keys))
        assert get(cache, handle, keys) == [content(key) for key in keys]
        assert cache.manager.check_integrity() == []


def out_of_memory(cache: EmbeddedCache, handle: NamespaceHandle, keys: list[BlockKey]) -> None:
    seeds = iter(range(20, 60))
    while TierKind.MEMORY in cache.lookup(handle.id, keys).tiers:
        put(cache, handle, chain(handle.id, 5, next(seeds)))
        assert cache.flush(timeout_s=10)


def test_waiting_for_a_reader_does_not_erase_the_disk_over_and_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader holds a block behind the deleted ones, so all of them wait for it."""
    with EmbeddedCache(Manager(config(folder))) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 4, 1)
        cache.collections.put_document("docs", document(handle.id, "one", keys[:2]))
        put(cache, handle, keys)
        assert cache.flush(timeout_s=10)
        found = cache.manager._state.namespaces.get_locked(handle.id)
        assert found is not None
        assert found.nvme is not None
        assert found.nvme.eraser is not None
        rounds: list[object] = []
        real = found.nvme.eraser.erase

        def counted(gone: Container[BlockKey]) -> None:
            rounds.append(gone)
            real(gone)

        monkeypatch.setattr(found.nvme.eraser, "erase", counted)
        lease = cache.prepare_load(handle.id, keys[3:], timeout_s=1)
        assert cache.collections.remove("docs", timeout_s=0.5).deletion.num_waiting == 2
        cache.manager.tick()
        assert cache.flush(timeout_s=10)
        assert len(rounds) <= 2
        cache.complete_load(lease.id)
        wait_until(lambda: cache.collections.deletions().num_waiting == 0)
        assert not any(bytes_on_disk(folder, keys))
