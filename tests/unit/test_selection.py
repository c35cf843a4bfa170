"""Selections of the manager: no block is read for one, waits end in time, refusals say when."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ucm.api import NamespaceHandle
from ucm.clock import SimClock
from ucm.config import MIB, Config, NvmeConfig, ServiceConfig, SummariesConfig
from ucm.embedded import EmbeddedCache
from ucm.errors import CapacityError, InvalidArgumentError
from ucm.kernels.block_scores import Budget
from ucm.kernels.summary_record import area_bytes
from ucm.layout import KvLayout
from ucm.manager import Manager
from ucm.namespaces import TierFactory
from ucm.placement import Victim
from ucm.storage.file_io import IoRequest
from ucm.storage.format import HEADER_BYTES
from ucm.storage.memory import MemoryTier
from ucm.storage.nvme import NvmeStore
from ucm.storage.tier import SlotId
from ucm.testing.extent_files import GatedIo
from ucm.testing.select_conformance import assert_same, expected
from ucm.testing.selections import (
    KIND,
    SELECT_LAYOUT,
    put_blocks,
    request_of,
    select_chain,
    select_spec,
)
from ucm.testing.stores import wait_until
from ucm.types import BlockKey, SummaryStatus, TierKind

REQUEST = request_of((0, 2), Budget(ratio=0.5))
READY, NO_SUMMARY = SummaryStatus.READY, SummaryStatus.NO_SUMMARY


class WatchedMemory(MemoryTier):
    """Counts who looks at the bytes of a block."""

    looks = 0

    def view(self, slot: SlotId) -> memoryview:
        WatchedMemory.looks += 1
        return super().view(slot)

    def verify(self, slot: SlotId, key: BlockKey) -> bool:
        WatchedMemory.looks += 1
        return super().verify(slot, key)


class WatchedIo(GatedIo):
    """Knows which bytes of the files were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int]] = []
        self.open_gate()

    def read_batch(self, requests: Sequence[IoRequest]) -> list[int]:
        for each in requests:
            self.asked.append((each.offset, sum(len(buffer) for buffer in each.buffers)))
        return super().read_batch(requests)


class Store:
    """A store on real tiers that is watched, and can be opened again."""

    def __init__(self, path: Path, layout: KvLayout = SELECT_LAYOUT) -> None:
        self.layout = layout
        self.config = Config(
            service=ServiceConfig(staging_bytes=4 * MIB, rpc_threads=4),
            nvme=NvmeConfig(
                path=path,
                capacity_bytes=32 * MIB,
                segment_bytes=4 * MIB,
                io_threads=2,
                index_map_bytes=16 * MIB,
            ),
            summaries=SummariesConfig(capacity_bytes=8 * MIB, table_bytes=4 * MIB),
        )
        self.open()

    def open(self) -> None:
        self.io = WatchedIo()
        nvme = NvmeStore(self.config.nvme, self.io)
        tiers = TierFactory(memory=WatchedMemory, nvme=nvme)
        self.manager = Manager(self.config, clock=SimClock(), tiers=tiers)
        self.cache = EmbeddedCache(self.manager)
        self.handle: NamespaceHandle = self.cache.open_namespace(select_spec(), summary=KIND)

    def on_disk(self, num_blocks: int, *, summaries: bool = True) -> list[BlockKey]:
        """Keys of a chain that NVMe has and memory does not: the store was opened again."""
        keys = select_chain(self.handle, num_blocks)
        if not summaries:
            self.cache.open_namespace(select_spec(), summary=None)
        put_blocks(self.cache, self.handle, keys, summaries=summaries)
        assert self.cache.flush(timeout_s=10)
        self.cache.close()
        self.open()
        return keys

    def close(self) -> None:
        self.io.open_gate()
        assert self.manager.check_integrity() == []
        self.cache.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "store")
    yield made
    made.close()


def test_a_selection_of_blocks_in_memory_looks_at_none_of_them(store: Store) -> None:
    keys = select_chain(store.handle, 12)
    put_blocks(store.cache, store.handle, keys)
    assert store.cache.flush(timeout_s=10)
    before, reads = WatchedMemory.looks, store.io.num_reads
    for _ in range(3):
        result = store.cache.select(store.handle.id, keys, REQUEST, timeout_s=5)
        store.cache.release(store.cache.map_summaries(store.handle.id, keys, timeout_s=5).id)
    assert_same(result.layers, expected(keys, REQUEST))
    assert (WatchedMemory.looks, store.io.num_reads) == (before, reads)


def test_a_selection_of_blocks_on_nvme_reads_their_summaries_and_no_more(store: Store) -> None:
    keys = store.on_disk(12)
    store.io.asked.clear()
    before = WatchedMemory.looks
    for _ in range(3):
        result = store.cache.select(store.handle.id, keys, REQUEST, timeout_s=5)
    assert result.statuses == (READY,) * 12
    assert_same(result.layers, expected(keys, REQUEST))
    assert WatchedMemory.looks == before
    head_bytes = HEADER_BYTES + area_bytes(SELECT_LAYOUT, KIND)
    assert len(store.io.asked) == 12  # once each
    assert {length for _, length in store.io.asked} == {head_bytes}
    slot_bytes = head_bytes + SELECT_LAYOUT.block_bytes
    assert all(offset % slot_bytes == 0 for offset, _ in store.io.asked)  # in front of the block
    assert set(store.cache.lookup(store.handle.id, keys).tiers) == {TierKind.NVME}


def test_a_selection_is_no_use_of_a_block(store: Store) -> None:
    """An engine selects in every step; that says nothing of the next prompt."""
    keys = select_chain(store.handle, 3)
    put_blocks(store.cache, store.handle, keys)
    (found,) = store.manager._state.namespaces
    rows = found.index.usable_prefix(keys)
    used_us = [found.index.last_use_us(row) for row in rows]
    clock = store.manager._state.clock
    assert isinstance(clock, SimClock)
    clock.advance_us(1_000_000)
    store.cache.select(store.handle.id, keys, REQUEST, timeout_s=5)
    assert [found.index.last_use_us(row) for row in rows] == used_us
    assert [found.index.pins(row) for row in rows] == [0, 0, 0]


def test_a_disk_that_hangs_costs_no_more_than_the_time_allowed(store: Store) -> None:
    keys = store.on_disk(6)
    store.io.shut_gate()
    started_s = time.monotonic()
    result = store.cache.select(store.handle.id, keys, REQUEST, timeout_s=0.2)
    assert 0.05 < time.monotonic() - started_s < 5
    assert result.statuses == (NO_SUMMARY,) * 6
    for found in result.layers:
        assert found.blocks.tolist() == list(range(6))
        assert found.mass == 1.0
    lease = store.cache.map_summaries(store.handle.id, keys, timeout_s=0.05)
    assert lease.entries == (None,) * 6
    store.cache.release(lease.id)
    store.io.open_gate()
    wait_until(
        lambda: (
            store.cache.select(store.handle.id, keys, REQUEST, timeout_s=1).statuses == (READY,) * 6
        )
    )
    assert_same(
        store.cache.select(store.handle.id, keys, REQUEST, timeout_s=1).layers,
        expected(keys, REQUEST),
    )


def waiting(store: Store) -> bool:
    with store.manager._state.lock:
        return bool(store.manager.summaries._waits)


@pytest.mark.parametrize("end", ["session", "process"])
def test_who_waits_for_a_hung_disk_is_answered_when_the_end_comes(store: Store, end: str) -> None:
    keys = store.on_disk(3)
    other = EmbeddedCache(store.manager, owns_manager=False)
    other.open_namespace(select_spec(), summary=KIND)
    store.io.shut_gate()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(other.select, store.handle.id, keys, REQUEST, timeout_s=600)
        wait_until(lambda: waiting(store))
        if end == "session":
            other.close()
        else:
            store.manager.interrupt()
        assert answer.result(10).statuses == (NO_SUMMARY,) * 3
    store.io.open_gate()
    other.close()


def test_a_selection_that_runs_out_of_time_says_how_far_it_came(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = select_chain(store.handle, 3)
    put_blocks(store.cache, store.handle, keys)
    request = request_of((0, 1, 2))
    now_s = iter([0.0, 0.5, 2.0])
    monkeypatch.setattr("ucm.selection.time", Ticking(now_s))
    with pytest.raises(CapacityError, match="of 3 layers") as caught:
        store.cache.select(store.handle.id, keys, request, timeout_s=1.0)
    assert caught.value.retry_after_s > 0
    monkeypatch.undo()
    assert len(store.cache.select(store.handle.id, keys, request, timeout_s=5).layers) == 3


class Ticking:
    """The module `time` as a test wants it."""

    def __init__(self, now_s: Iterator[float]) -> None:
        self.monotonic = lambda: next(now_s)
        self.perf_counter = time.perf_counter


def test_a_table_larger_than_allowed_is_a_mistake_of_the_configuration(tmp_path: Path) -> None:
    made = Store(tmp_path / "store")
    made.manager.selections.tables._capacity_bytes = 1000
    keys = select_chain(made.handle, 3)
    put_blocks(made.cache, made.handle, keys)
    with pytest.raises(InvalidArgumentError, match=r"summaries\.table_bytes"):
        made.cache.select(made.handle.id, keys, REQUEST, timeout_s=5)
    made.close()


def test_an_evicted_block_is_never_in_a_selection(store: Store) -> None:
    keys = select_chain(store.handle, 6)
    put_blocks(store.cache, store.handle, keys)
    store.cache.select(store.handle.id, keys, REQUEST, timeout_s=5)
    (found,) = store.manager._state.namespaces
    assert store.cache.flush(timeout_s=10)
    with store.manager._state.lock:
        row = found.index.find(keys[4])
        found.memory.delete([(found.index.lose(row, TierKind.MEMORY), keys[4])])
        found.undeleted.append(Victim(keys[4], found.index.lose(row, TierKind.NVME)))
    result = store.cache.select(store.handle.id, keys, REQUEST, timeout_s=5)
    assert result.statuses == (READY,) * 4 + (SummaryStatus.MISS,) * 2
    assert_same(result.layers, expected(keys[:4], REQUEST))


def test_selections_and_stores_at_the_same_time(store: Store) -> None:
    """Chains grow under their readers, on few threads, and every answer is right."""
    chains = [select_chain(store.handle, 16, seed) for seed in range(3)]
    done = threading.Event()
    answered = [0, 0, 0]

    def write() -> None:
        for start in range(0, 16, 4):
            for keys in chains:
                parent = {"parent": keys[start - 1]} if start else {}
                put_blocks(store.cache, store.handle, keys[start : start + 4], **parent)  # type: ignore[arg-type]
        done.set()

    def read(number: int) -> None:
        keys = chains[number]
        while not done.is_set() or not answered[number]:
            result = store.cache.select(store.handle.id, keys, REQUEST, timeout_s=10)
            count = len(result.statuses) - result.statuses.count(SummaryStatus.MISS)
            if count and READY in result.statuses and NO_SUMMARY not in result.statuses:
                assert_same(result.layers, expected(keys[:count], REQUEST))
                answered[number] += 1

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(write), *[pool.submit(read, number) for number in range(3)]]
        for job in jobs:
            job.result(60)
    for keys in chains:
        result = store.cache.select(store.handle.id, keys, REQUEST, timeout_s=10)
        assert_same(result.layers, expected(keys, REQUEST))
    assert store.cache.flush(timeout_s=10)  # integrity is of an idle store


def test_selections_are_counted(store: Store) -> None:
    keys = select_chain(store.handle, 6)
    put_blocks(store.cache, store.handle, keys)
    store.cache.select(store.handle.id, keys, REQUEST, timeout_s=5)
    metrics = store.manager.metrics
    assert metrics.value("ucm_selects_total") == 1
    assert metrics.value("ucm_select_candidates_total") == 12
    assert metrics.value("ucm_select_chosen_total") == 6
    assert metrics.value("ucm_select_table_bytes") > 0
