"""Documents come and go while engines store and read: no wrong bytes, nothing left, no deadlock."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from ucm.api import NamespaceHandle
from ucm.config import MIB, Config, MemoryConfig, NvmeConfig, ServiceConfig
from ucm.embedded import EmbeddedCache
from ucm.errors import CapacityError, UcmError
from ucm.manager import Manager
from ucm.storage.fsck import check_store
from ucm.testing.blocks import TINY_LAYOUT, chain, content, get, put, tiny_spec
from ucm.testing.documents import bytes_on_disk, document, names_on_disk
from ucm.testing.nvme import quick_folder
from ucm.testing.stores import wait_until
from ucm.types import LoadMode

NUM_SEEDS = 8
CHAIN_BLOCKS = 4
NUM_STEPS = 60


def config(path: Path) -> Config:
    """Memory for 12 blocks, disk for 32: everything is evicted, promoted and moved all the time."""
    return Config(
        service=ServiceConfig(staging_bytes=1 * MIB),
        memory=MemoryConfig(capacity_bytes=12 * TINY_LAYOUT.block_bytes),
        nvme=NvmeConfig(
            path=path,
            capacity_bytes=6 * MIB // 16,
            segment_bytes=MIB // 16,
            io_threads=2,
            index_map_bytes=4 * MIB,
            commit_interval_s=0.0,
        ),
    )


class Engine:
    """Stores and reads chains at random; knows that what it reads must be right."""

    def __init__(self, manager: Manager, seed: int) -> None:
        self.cache = EmbeddedCache(manager, owns_manager=False)
        self.handle: NamespaceHandle = self.cache.open_namespace(tiny_spec())
        self.random = random.Random(seed)
        self.failures: list[BaseException] = []

    def run(self) -> None:
        try:
            for _ in range(NUM_STEPS):
                self.step()
        except (UcmError, AssertionError) as error:
            self.failures.append(error)
        finally:
            self.cache.close()

    def step(self) -> None:
        keys = chain(self.handle.id, CHAIN_BLOCKS, self.random.randrange(NUM_SEEDS))
        what = self.random.randrange(4)
        try:
            if what == 0:
                put(self.cache, self.handle, keys)
            elif what == 1:
                found = get(self.cache, self.handle, keys, timeout_s=1.0)
                assert found == [content(key) for key in keys[: len(found)]]
            elif what == 2:
                mode = self.random.choice((LoadMode.DIRECT, LoadMode.MAPPED))
                plan = self.cache.begin_load(self.handle.id, keys, mode=mode, timeout_s=1.0)
                self.cache.release(plan.id)
            else:
                self.cache.prefetch(self.handle.id, keys)
        except CapacityError:
            pass


def operate(cache: EmbeddedCache, handle: NamespaceHandle, seed: int) -> set[int]:
    """Put and remove documents at random; the seeds of those that are deleted in the end."""
    rng, deleted = random.Random(seed), set[int]()
    for _ in range(NUM_STEPS // 2):
        number = rng.randrange(NUM_SEEDS)
        keys = chain(handle.id, CHAIN_BLOCKS, number)
        if rng.random() < 0.5:
            cache.collections.put_document("docs", document(handle.id, f"{number}", keys))
            deleted.discard(number)
        elif cache.collections.list_collections():
            answer = cache.collections.remove("docs", [f"{number}"])
            deleted.update([number] if answer.num_documents else [])
        cache.manager.tick()
    keys = chain(handle.id, CHAIN_BLOCKS, 0)
    cache.collections.put_document("docs", document(handle.id, "0", keys))
    cache.collections.remove("docs", ["0"])
    return deleted | {0}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(3))
def test_documents_come_and_go_under_load(seed: int) -> None:
    with quick_folder() as folder:
        manager = Manager(config(folder / "data"))
        cache = EmbeddedCache(manager)
        handle = cache.open_namespace(tiny_spec())
        engines = [Engine(manager, 10 * seed + number) for number in range(3)]
        threads = [threading.Thread(target=engine.run) for engine in engines]
        for thread in threads:
            thread.start()
        deleted = operate(cache, handle, seed)
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert not any(engine.failures for engine in engines), engines[0].failures
        wait_until(lambda: cache.collections.deletions().num_waiting == 0)
        assert cache.flush(timeout_s=10)
        assert manager.check_integrity() == []
        gone = [key for each in deleted for key in chain(handle.id, CHAIN_BLOCKS, each)]
        assert gone
        assert not any(cache.lookup(handle.id, [key]).num_blocks for key in gone)
        cache.close()
        assert not any(bytes_on_disk(folder, gone))
        assert not any(names_on_disk(folder, gone))
        assert check_store(folder / "data", repair=False).findings == []
