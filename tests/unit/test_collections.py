"""Deleting blocks in every state that a block can be in; see also the conformance suite."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ucm.api import NamespaceHandle
from ucm.config import MIB, CollectionsConfig, Config, MemoryConfig, NvmeConfig, ServiceConfig
from ucm.embedded import EmbeddedCache, open_embedded
from ucm.errors import CorruptionError
from ucm.manager import Manager
from ucm.storage.file_io import IoRequest
from ucm.storage.fsck import FindingKind, check_store
from ucm.storage.tier import SlotId
from ucm.testing.blocks import TINY_LAYOUT, chain, content, get, put, tiny_spec
from ucm.testing.documents import bytes_on_disk, document, names_on_disk
from ucm.testing.nvme import quick_folder
from ucm.testing.stores import FakeStore, wait_until
from ucm.types import BlockKey, LoadStatus, StoreStatus, SummaryKind, TierKind


def config(path: Path | None, num_segments: int = 8) -> Config:
    return Config(
        service=ServiceConfig(staging_bytes=1 * MIB),
        memory=MemoryConfig(capacity_bytes=8 * TINY_LAYOUT.block_bytes),
        nvme=NvmeConfig(
            path=path,
            capacity_bytes=num_segments * MIB // 16,
            segment_bytes=MIB // 16,
            io_threads=1,
            index_map_bytes=4 * MIB,
            commit_interval_s=0.0,
        ),
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path / "data"


@pytest.fixture
def cache(folder: Path) -> Iterator[EmbeddedCache]:
    with EmbeddedCache(Manager(config(folder))) as found:
        yield found


@pytest.fixture
def handle(cache: EmbeddedCache) -> NamespaceHandle:
    return cache.open_namespace(tiny_spec())


@pytest.fixture
def fake() -> Iterator[FakeStore]:
    store = FakeStore()
    yield store
    store.close()


def out_of_memory(cache: EmbeddedCache, handle: NamespaceHandle, keys: Sequence[BlockKey]) -> None:
    """Store others until `keys` are on NVMe only."""
    seeds = iter(range(60, 99))
    while TierKind.MEMORY in cache.lookup(handle.id, keys).tiers:
        put(cache, handle, chain(handle.id, 4, next(seeds)))
        assert cache.flush(timeout_s=10)


# ------------------------------------------------------------- in other states


def test_bytes_that_eviction_left_go_too(folder: Path) -> None:
    with EmbeddedCache(Manager(config(folder, num_segments=2))) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 2, 1)
        cache.collections.put_document("docs", document(handle.id, "one", keys))
        put(cache, handle, keys)
        assert cache.flush(timeout_s=10)
        for seed in range(2, 5):  # some of its slots are free now, or others'
            put(cache, handle, chain(handle.id, 2, seed))
            assert cache.flush(timeout_s=10)
        assert cache.collections.remove("docs").deletion.num_waiting == 0
        assert not any(bytes_on_disk(folder, keys))
        assert cache.manager.check_integrity() == []


def test_a_quarantined_block_is_erased(
    cache: EmbeddedCache, handle: NamespaceHandle, folder: Path
) -> None:
    keys = chain(handle.id, 3, 1)
    cache.collections.put_document("docs", document(handle.id, "one", keys))
    put(cache, handle, keys)
    assert cache.flush(timeout_s=10)
    out_of_memory(cache, handle, keys)
    damage(folder, content(keys[1])[:64])
    assert len(get(cache, handle, keys)) == 1
    assert cache.manager.status().tiers[1].quarantined_slots == 1
    assert cache.collections.remove("docs").deletion.num_waiting == 0
    assert not any(names_on_disk(folder, keys))
    assert content(keys[1])[64:192] not in segments(folder)
    assert not any(bytes_on_disk(folder, keys))


def segments(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*.seg")))


def damage(folder: Path, wanted: bytes) -> None:
    """Flip a bit of the slab that begins with `wanted`."""
    for path in sorted(folder.rglob("*.seg")):
        data = path.read_bytes()
        at = data.find(wanted)
        if at >= 0:
            with path.open("r+b") as file:
                file.seek(at)
                file.write(bytes([wanted[0] ^ 1]))
            return
    raise AssertionError("it is not there")


def test_a_store_without_a_folder_has_collections_too() -> None:
    with open_embedded(None, config(None)) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 3, 1)
        cache.collections.put_document("docs", document(handle.id, "one", keys))
        put(cache, handle, keys)
        lease = cache.prepare_load(handle.id, keys, timeout_s=1)
        assert cache.collections.remove("docs").deletion.num_waiting == 3
        data = lease.blocks[0].data
        assert data is not None
        assert bytes(data) == content(keys[0])
        cache.complete_load(lease.id)
        cache.manager.tick()
        assert cache.collections.deletions().num_waiting == 0
        assert not any(bytes(data)), "memory is zeroed when the last lease has ended"
        assert put(cache, handle, keys) == (StoreStatus.REFUSED,) * 3
        assert cache.manager.check_integrity() == []


def test_a_namespace_that_is_not_open(folder: Path) -> None:
    with EmbeddedCache(Manager(config(folder))) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 3, 1)
        cache.collections.put_document("docs", document(handle.id, "one", keys))
        put(cache, handle, keys)
        assert cache.flush(timeout_s=10)
    aside = folder / "quarantine" / handle.id.hex()
    aside.mkdir(parents=True)
    with EmbeddedCache(Manager(config(folder))) as cache:
        assert cache.collections.remove("docs").deletion.num_waiting == 0
        assert not any(bytes_on_disk(folder, keys))
        assert not aside.exists(), "what fsck kept of the namespace may hold the block"
        unknown = cache.collections.remove_blocks(tiny_spec("nowhere").fingerprint(), keys)
        assert unknown.deletion.num_waiting == 0
    assert check_store(folder, repair=False).findings == []


def test_a_block_that_is_being_promoted(fake: FakeStore) -> None:
    keys = chain(fake.handle.id, 2, 1)
    fake.cache.collections.put_document("docs", document(fake.handle.id, "one", keys))
    put(fake.cache, fake.handle, keys)
    assert fake.cache.flush(timeout_s=5)
    fake.drop_from_memory()
    fake.cache.collections.put_document("docs", document(fake.handle.id, "one", keys))
    fake.disk.faults.reads_may_go.clear()
    assert fake.cache.prefetch(fake.handle.id, keys) == 2
    rounds = fake.manager.collections.rounds
    with fake.manager._state.lock:
        rounds.doom_locked({fake.handle.id: keys})
    fake.manager.tick()
    assert fake.cache.collections.deletions().num_waiting == 2
    fake.disk.faults.reads_may_go.set()

    def is_gone() -> bool:
        fake.manager.tick()
        return fake.cache.collections.deletions().num_waiting == 0

    wait_until(is_gone)
    assert not fake.tier.keys() & set(keys)
    assert fake.cache.lookup(fake.handle.id, keys).num_blocks == 0
    assert fake.manager.check_integrity() == []


def test_a_write_that_is_under_way_and_one_that_is_queued(fake: FakeStore) -> None:
    first, second = chain(fake.handle.id, 2, 1), chain(fake.handle.id, 2, 2)
    both = document(fake.handle.id, "one", first, second)
    fake.cache.collections.put_document("docs", both)
    fake.disk.faults.writes_may_go.clear()
    put(fake.cache, fake.handle, first)
    put(fake.cache, fake.handle, second)
    with fake.manager._state.lock:
        fake.manager.collections.rounds.doom_locked({fake.handle.id: [*first, *second]})
    fake.disk.faults.writes_may_go.set()

    def is_gone() -> bool:
        fake.manager.tick()
        return fake.cache.collections.deletions().num_waiting == 0

    wait_until(is_gone)
    assert fake.tier.keys() == set()
    assert fake.cache.flush(timeout_s=5), "what was deleted is not waited for"
    assert fake.manager.check_integrity() == []


def test_a_disk_that_refuses_is_asked_again(
    fake: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ucm.deletion_rounds.RETRY_S", 0.0)
    keys = chain(fake.handle.id, 2, 1)
    fake.cache.collections.put_document("docs", document(fake.handle.id, "one", keys))
    put(fake.cache, fake.handle, keys)
    assert fake.cache.flush(timeout_s=5)
    fake.disk.faults.deletes_fail = True
    answer = fake.cache.collections.remove("docs")
    assert answer.deletion.num_waiting == 2
    status = fake.cache.collections.deletions()
    assert status.problems == fake.manager.status().problems[:1]
    assert "refuses" in status.problems[0]
    assert fake.cache.lookup(fake.handle.id, keys).num_blocks == 0
    fake.disk.faults.deletes_fail = False

    def is_gone() -> bool:
        fake.manager.tick()
        return fake.cache.collections.deletions().num_waiting == 0

    wait_until(is_gone)
    assert fake.tier.keys() == set()
    assert fake.metric("ucm_erased_blocks_total") == 2
    assert fake.metric("ucm_deleted_documents_total") == 1
    assert fake.metric("ucm_deletions_waiting") == 0
    assert fake.metric("ucm_barred_blocks") == 2


def test_a_block_behind_a_deleted_one_keeps_its_reader(
    cache: EmbeddedCache, handle: NamespaceHandle, folder: Path
) -> None:
    keys = chain(handle.id, 4, 1)
    cache.collections.put_document("docs", document(handle.id, "one", keys[:2]))
    put(cache, handle, keys)
    assert cache.flush(timeout_s=10)
    lease = cache.prepare_load(handle.id, keys[3:], timeout_s=1)
    assert cache.collections.remove("docs").deletion.num_waiting == 2, "they wait for it"
    data = lease.blocks[0].data
    assert data is not None
    assert bytes(data) == content(keys[3])
    cache.complete_load(lease.id)
    cache.manager.tick()
    assert cache.flush(timeout_s=10)
    assert cache.collections.deletions().num_waiting == 0
    assert not any(bytes_on_disk(folder, keys))


def test_a_load_that_waits_is_a_miss_for_what_was_deleted(fake: FakeStore) -> None:
    keys = chain(fake.handle.id, 2, 1)
    put(fake.cache, fake.handle, keys)
    fake.cache.collections.remove_blocks(fake.handle.id, keys[1:])
    lease = fake.cache.prepare_load(fake.handle.id, keys, timeout_s=1)
    assert [block.status for block in lease.blocks] == [LoadStatus.READY, LoadStatus.MISS]
    fake.cache.complete_load(lease.id)


def test_summaries_of_deleted_blocks_go(folder: Path) -> None:
    with EmbeddedCache(Manager(config(folder))) as cache:
        handle = cache.open_namespace(tiny_spec(), summary=SummaryKind.MEAN)
        keys = chain(handle.id, 2, 1)
        cache.collections.put_document("docs", document(handle.id, "one", keys))
        put(cache, handle, keys)
        lease = cache.map_summaries(handle.id, keys, timeout_s=5.0)
        found = cache.manager._state.namespaces.get_locked(handle.id)
        assert found is not None
        assert found.summaries is not None
        (book,) = found.summaries.books.values()
        assert len(book) == 2
        memory = book.view(lease_slot(cache, handle))
        assert cache.collections.remove("docs").deletion.num_waiting == 0
        assert len(book) == 0
        assert any(memory), "somebody still scores it"
        cache.release(lease.id)
        assert not any(memory)
        assert found.summaries.check_integrity() == []


def lease_slot(cache: EmbeddedCache, handle: NamespaceHandle) -> SlotId:
    found = cache.manager._state.namespaces.get_locked(handle.id)
    assert found is not None
    assert found.summaries is not None
    (book,) = found.summaries.books.values()
    return next(iter(book._entries.values())).slot


# ------------------------------------------------------------------- the bar


def test_a_bar_outlives_a_restart_and_ends_in_time(folder: Path) -> None:
    settings = config(folder)
    with EmbeddedCache(Manager(settings)) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 2, 1)
        cache.collections.put_document("docs", document(handle.id, "one", keys))
        cache.collections.remove("docs")
    with EmbeddedCache(Manager(settings)) as cache:
        handle = cache.open_namespace(tiny_spec())
        assert put(cache, handle, keys) == (StoreStatus.REFUSED,) * 2
    brief = dataclasses.replace(settings, collections=CollectionsConfig(bar_s=1e-6))
    with EmbeddedCache(Manager(brief)) as cache:
        handle = cache.open_namespace(tiny_spec())
        cache.manager.tick()
        assert cache.collections.deletions().num_barred == 0
        assert put(cache, handle, keys) == (StoreStatus.ACCEPTED,) * 2


def test_a_deleted_block_that_comes_back_with_a_file_is_hidden(folder: Path) -> None:
    """A backup of a segment, put back under the store: the registry knows better."""
    settings = config(folder)
    with EmbeddedCache(Manager(settings)) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 3, 1)
        cache.collections.put_document("docs", document(handle.id, "one", keys))
        put(cache, handle, keys)
        assert cache.flush(timeout_s=10)
    names = folder / "ns" / handle.id.hex()
    backup = {path: path.read_bytes() for path in names.rglob("*") if path.is_file()}
    with EmbeddedCache(Manager(settings)) as cache:
        cache.open_namespace(tiny_spec())
        assert cache.collections.remove("docs").deletion.num_waiting == 0
    for path, data in backup.items():
        path.write_bytes(data)
    report = check_store(folder, repair=False)
    assert {finding.kind for finding in report.findings} == {FindingKind.DELETED}
    assert (len(report.findings), report.ok, report.num_deleted_blocks) == (3, False, 0)
    with EmbeddedCache(Manager(settings)) as cache:
        handle = cache.open_namespace(tiny_spec())
        assert cache.lookup(handle.id, keys).num_blocks == 0
        assert cache.flush(timeout_s=10)
    assert not any(bytes_on_disk(folder, keys))
    assert check_store(folder, repair=False).findings == []


# ---------------------------------------------------------------------- fsck


def filled(folder: Path) -> None:
    with EmbeddedCache(Manager(config(folder))) as cache:
        handle = cache.open_namespace(tiny_spec())
        for seed in (1, 2):
            keys = chain(handle.id, 2, seed)
            cache.collections.put_document("docs", document(handle.id, f"{seed}", keys))
            put(cache, handle, keys)
        assert cache.flush(timeout_s=10)


def test_fsck_finishes_a_deletion(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(folder)
    keys = chain(tiny_spec().fingerprint(), 2, 1)
    manager = Manager(config(folder))
    monkeypatch.setattr(manager.collections.rounds, "erase_closed", lambda _: None)
    monkeypatch.setattr(manager.collections.rounds, "wait", lambda *_: 0)
    manager.collections.remove("docs", ["1"])
    manager.close()
    report = check_store(folder, repair=False)
    assert {finding.kind for finding in report.findings} == {FindingKind.DELETED}
    assert not report.ok
    assert len(report.findings) == 3, "two records, and what the registry says"
    assert check_store(folder, repair=True).ok
    report = check_store(folder, repair=False)
    assert (report.findings, report.num_deleted_blocks) == ([], 2)
    assert (report.num_documents, report.num_named_blocks, report.num_evicted_blocks) == (1, 2, 0)
    assert not any(bytes_on_disk(folder, keys))


def test_fsck_counts_what_was_evicted(folder: Path) -> None:
    with EmbeddedCache(Manager(config(folder))) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 3, 1)
        cache.collections.put_document("docs", document(handle.id, "one", keys))
        other = tiny_spec("other").fingerprint()
        cache.collections.put_document("docs", document(other, "two", chain(other, 1)))
        put(cache, handle, keys[:2])
        assert cache.flush(timeout_s=10)
    report = check_store(folder, repair=False)
    assert (report.num_documents, report.num_named_blocks, report.num_evicted_blocks) == (2, 4, 2)
    assert report.ok


@pytest.mark.parametrize("garbage", [b"\xff" * 20_000, b""])
def test_a_damaged_registry_stops_the_store_until_fsck_mends_it(
    folder: Path, garbage: bytes
) -> None:
    filled(folder)
    data = folder / "collections" / "data.mdb"
    (folder / "collections" / "clean").unlink()
    data.write_bytes(garbage or data.read_bytes()[:5000])
    with pytest.raises(CorruptionError, match="fsck --repair"):
        Manager(config(folder))
    report = check_store(folder, repair=False)
    assert [finding.kind for finding in report.findings] == [FindingKind.REGISTRY]
    assert check_store(folder, repair=True).ok
    assert check_store(folder, repair=False).findings == []
    with EmbeddedCache(Manager(config(folder))) as cache:
        assert cache.collections.list_collections() == ()
        handle = cache.open_namespace(tiny_spec())
        assert cache.lookup(handle.id, chain(handle.id, 2, 1)).tiers == (TierKind.NVME,) * 2


# ------------------------------------------------------------------- erasing


def test_where_no_hole_can_be_punched_zeros_are_written(
    cache: EmbeddedCache,
    handle: NamespaceHandle,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[IoRequest] = []
    found = cache.manager._state.namespaces.get_locked(handle.id)
    assert found is not None
    assert found.nvme is not None
    eraser = found.nvme.eraser
    assert eraser is not None
    io = eraser._files.io
    real = io.write_batch

    def no_holes(*_: object) -> None:
        raise OSError(95, "not supported")

    def noted(requests: list[IoRequest]) -> list[int]:
        written.extend(requests)
        return real(requests)

    monkeypatch.setattr(io, "punch_hole", no_holes)
    keys = chain(handle.id, 3, 1)
    cache.collections.put_document("docs", document(handle.id, "one", keys))
    put(cache, handle, keys)
    assert cache.flush(timeout_s=10)
    monkeypatch.setattr(io, "write_batch", noted)
    assert cache.collections.remove("docs").deletion.num_waiting == 0
    assert written
    assert not any(bytes_on_disk(folder, keys))


def test_a_segment_out_of_use_is_named_as_the_problem(
    cache: EmbeddedCache, handle: NamespaceHandle, folder: Path
) -> None:
    keys = chain(handle.id, 3, 1)
    cache.collections.put_document("docs", document(handle.id, "one", keys))
    put(cache, handle, keys)
    assert cache.flush(timeout_s=10)
    found = cache.manager._state.namespaces.get_locked(handle.id)
    assert found is not None
    assert found.nvme is not None
    found.nvme._segments.retire(0)  # type: ignore[attr-defined]
    found.nvme._retire(0)  # type: ignore[attr-defined]
    assert cache.collections.remove("docs").deletion.num_waiting == 3
    (problem,) = cache.collections.deletions().problems
    assert "segment 0000" in problem
    assert "fsck --repair" in problem
    cache.close()
    assert not check_store(folder, repair=False).ok
    assert check_store(folder, repair=True).ok
    assert check_store(folder, repair=False).num_deleted_blocks == 3
    assert not any(bytes_on_disk(folder, keys))


def test_free_slots_are_free_again(cache: EmbeddedCache, handle: NamespaceHandle) -> None:
    keys = chain(handle.id, 3, 1)
    put(cache, handle, keys)
    assert cache.flush(timeout_s=10)
    found = cache.manager._state.namespaces.get_locked(handle.id)
    assert found is not None
    assert found.nvme is not None
    before = found.nvme.usage()
    cache.collections.remove_blocks(handle.id, keys)
    after = found.nvme.usage()
    assert (after.used_slots, after.total_slots) == (before.used_slots - 3, before.total_slots)
    others = chain(handle.id, 3, 2)
    put(cache, handle, others)
    assert cache.flush(timeout_s=10)
    out_of_memory(cache, handle, others)
    assert get(cache, handle, others) == [content(key) for key in others]
