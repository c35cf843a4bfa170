"""Cut the power, or fail a call, at every point of a deletion; start again; nothing may be left.

Either the document is still registered, and whole, or no index, no header and no slot has anything
of it: also when the index is lost and rebuilt from the headers. The registry's own commits are cut
as the index's are. The namespace is open in one half of the runs and closed in the other.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.collection_api import CollectionApi
from ucm.config import MIB, Config, MemoryConfig, NvmeConfig, ServiceConfig
from ucm.embedded import EmbeddedCache
from ucm.errors import UcmError
from ucm.manager import Manager
from ucm.namespaces import TierFactory
from ucm.storage.fsck import check_store
from ucm.storage.nvme import NvmeStore
from ucm.testing.blocks import TINY_LAYOUT, chain, content, get, put, tiny_spec
from ucm.testing.documents import bytes_on_disk, document, names_on_disk
from ucm.testing.faulty_index import faulty_index
from ucm.testing.faulty_io import FaultyFileIo, PowerCut
from ucm.testing.nvme import quick_folder
from ucm.types import BlockKey

NAMESPACE = tiny_spec().fingerprint()
DELETED, KEPT, SHARED = (chain(NAMESPACE, 3, seed) for seed in range(3))


def config(path: Path) -> Config:
    return Config(
        service=ServiceConfig(staging_bytes=1 * MIB),
        memory=MemoryConfig(capacity_bytes=32 * TINY_LAYOUT.block_bytes),
        nvme=NvmeConfig(
            path=path,
            capacity_bytes=MIB // 2,
            segment_bytes=MIB // 8,
            io_threads=1,
            index_map_bytes=4 * MIB,
            commit_interval_s=0.0,
        ),
    )


@pytest.fixture(scope="module")
def filled() -> Iterator[Path]:
    """Two documents that share a chunk."""
    with quick_folder() as folder:
        with EmbeddedCache(Manager(config(folder / "data"))) as cache:
            handle = cache.open_namespace(tiny_spec())
            cache.collections.put_document("docs", document(NAMESPACE, "old", DELETED, SHARED))
            cache.collections.put_document("docs", document(NAMESPACE, "new", KEPT, SHARED))
            for keys in (DELETED, KEPT, SHARED):
                put(cache, handle, keys)
            assert cache.flush(timeout_s=10)
        yield folder / "data"


class Attempt:
    """Delete a document, on a disk with planned faults, all of it on this thread."""

    def __init__(self, filled: Path, folder: Path, io: FaultyFileIo, *, is_open: bool) -> None:
        self.path = folder / "data"
        shutil.copytree(filled, self.path)
        self.io = io
        self.is_open = is_open
        self.is_acknowledged = False

    def run(self, seed: int = 0) -> None:
        with faulty_index(self.io, seed):
            store = NvmeStore(config(self.path).nvme, self.io)
            try:
                manager = Manager(config(self.path), tiers=TierFactory(nvme=store))
            except (PowerCut, UcmError):
                store.abort()
                self.io.close()
                return
            try:
                self.delete(manager)
            except (PowerCut, UcmError, OSError):
                pass
            finally:
                self.die(manager, store)

    def delete(self, manager: Manager) -> None:
        desk = manager.collections
        if self.is_open:
            manager.open_namespace(manager.open_session("crash"), tiny_spec())
        found = manager._state.namespaces.get_locked(NAMESPACE)

        def run_here(*_: object) -> int:
            if found is not None:
                assert manager._write_behind is not None
                desk.rounds._run(found, manager._write_behind._delete)
            return 0

        desk.rounds.wait = run_here  # type: ignore[method-assign,assignment]
        answer = desk.remove("docs", ["old"])
        self.is_acknowledged = answer.num_documents == 1

    def die(self, manager: Manager, store: NvmeStore) -> None:
        registry = manager.collections._registry
        if registry is not None:
            registry.abort()
        store.abort()
        self.io.close()
        manager.collections.rounds.finish = lambda: None  # type: ignore[method-assign]
        manager.close(timeout_s=1)


def check(attempt: Attempt, *, lose_index: bool = False) -> bool:
    """Start again on a disk that behaves; whether the deletion had been registered."""
    if lose_index:
        shutil.rmtree(attempt.path / "ns" / NAMESPACE.hex() / "index")
    with EmbeddedCache(Manager(config(attempt.path))) as cache:
        was_deleted = names_of(cache.collections) == {"new"}
        assert was_deleted or names_of(cache.collections) == {"new", "old"}
        assert was_deleted or not attempt.is_acknowledged
        handle = cache.open_namespace(tiny_spec())
        if not was_deleted:
            assert get(cache, handle, DELETED) == [content(key) for key in DELETED]
            assert cache.collections.remove("docs", ["old"]).deletion.num_waiting == 0
        assert cache.lookup(handle.id, DELETED).num_blocks == 0
        for keys in (KEPT, SHARED):
            assert get(cache, handle, keys) == [content(key) for key in keys]
        assert cache.flush(timeout_s=10)
        assert cache.collections.deletions().num_waiting == 0
        assert cache.manager.check_integrity() == []
    check_gone(attempt.path, DELETED)
    return was_deleted


def names_of(collections: CollectionApi) -> set[str]:
    return {each.id for each in collections.list_documents("docs")}


def check_gone(path: Path, keys: list[BlockKey]) -> None:
    """By eye, by fsck, and by a rebuild of the index."""
    assert not any(names_on_disk(path, keys))
    assert not any(bytes_on_disk(path, keys))
    report = check_store(path, repair=False)
    assert report.findings == []
    assert (report.num_deleted_blocks, report.num_documents) == (len(keys), 1)
    assert (report.num_named_blocks, report.num_evicted_blocks) == (6, 0)
    shutil.rmtree(path / "ns" / NAMESPACE.hex() / "index")
    with EmbeddedCache(Manager(config(path))) as cache:
        handle = cache.open_namespace(tiny_spec())
        assert cache.lookup(handle.id, keys).num_blocks == 0
        assert cache.lookup(handle.id, KEPT).num_blocks == len(KEPT)


def count_calls(filled: Path, folder: Path, *, is_open: bool) -> int:
    io = FaultyFileIo()
    attempt = Attempt(filled, folder / "counted", io, is_open=is_open)
    attempt.run()
    assert attempt.is_acknowledged
    assert check(attempt)
    return io.num_calls


@pytest.mark.timeout(120)
@pytest.mark.parametrize("is_open", [True, False], ids=["open", "closed"])
def test_power_cut_at_every_call(filled: Path, is_open: bool) -> None:
    outcomes = set()
    with quick_folder() as folder:
        num_calls = count_calls(filled, folder, is_open=is_open)
        assert num_calls > 12, num_calls
        for cut_at in range(1, num_calls + 1):
            io = FaultyFileIo(seed=cut_at, cut_at=cut_at)
            attempt = Attempt(filled, folder / str(cut_at), io, is_open=is_open)
            attempt.run(cut_at)
            assert io.has_failed
            outcomes.add(check(attempt, lose_index=cut_at % 2 == 0))
            shutil.rmtree(folder / str(cut_at))
    assert outcomes == {True, False}, "cuts on both sides of the registry's commit"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("is_open", [True, False], ids=["open", "closed"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_each_call_fails_once(filled: Path, code: int, is_open: bool) -> None:
    """A failed sync retires a segment: what lies in it is proven gone after a repair only."""
    with quick_folder() as folder:
        for call in range(1, count_calls(filled, folder, is_open=is_open) + 1):
            io = FaultyFileIo(seed=call, faults={call: code})
            attempt = Attempt(filled, folder / str(call), io, is_open=is_open)
            attempt.run(call)
            assert io.has_failed
            with EmbeddedCache(Manager(config(attempt.path))) as cache:
                cache.collections.remove("docs", ["old"])
                waiting = cache.collections.deletions()
                assert bool(waiting.num_waiting) == bool(waiting.problems)
                handle = cache.open_namespace(tiny_spec())
                assert cache.lookup(handle.id, DELETED).num_blocks == 0
            if waiting.num_waiting:
                assert not check_store(attempt.path, repair=False).ok
            assert check_store(attempt.path, repair=True).ok
            report = check_store(attempt.path, repair=False)
            assert (report.findings, report.num_deleted_blocks) == ([], len(DELETED))
            assert not any(bytes_on_disk(attempt.path, DELETED))
            shutil.rmtree(folder / str(call))
