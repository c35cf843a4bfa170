"""The facade on a disk that fails: promotion, write-behind, eviction, a full disk, bad memory."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from ucm.embedded import EmbeddedCache
from ucm.storage.arena import Arena
from ucm.storage.tier import IoStatus, SlotId
from ucm.testing.blocks import (
    TINY_LAYOUT,
    chain,
    content,
    get,
    loaded,
    put,
    tiny_spec,
)
from ucm.testing.fake_tier import FakeDisk
from ucm.testing.stores import FakeStore, small_store_config, wait_until
from ucm.types import (
    ROOT_KEY,
    BlockKey,
    LoadStatus,
    SessionId,
    StoreStatus,
    TierKind,
)
from ucm.write_behind import PROBE_INTERVAL_S

ACCEPTED, REFUSED = StoreStatus.ACCEPTED, StoreStatus.REFUSED
BLOCK_BYTES = TINY_LAYOUT.block_bytes


def no_slots(count: int, *, full: bool = False) -> list[SlotId]:
    """What `allocate` answers on a disk without room."""
    del count, full
    return []


def flushed_chain(store: FakeStore, num_blocks: int, seed: int = 0) -> list[BlockKey]:
    keys = chain(store.handle.id, num_blocks, seed)
    assert put(store.cache, store.handle, keys) == (ACCEPTED,) * num_blocks
    assert store.cache.flush(timeout_s=5)
    return keys


def chain_on_disk(store: FakeStore, num_blocks: int) -> list[BlockKey]:
    """A chain that only the disk has."""
    keys = flushed_chain(store, num_blocks)
    store.drop_from_memory()
    assert set(store.cache.lookup(store.handle.id, keys).tiers) == {TierKind.NVME}
    return keys


def load_statuses(
    store: FakeStore, keys: list[BlockKey], timeout_s: float = 5.0
) -> list[LoadStatus]:
    with loaded(store.cache, store.handle, keys, timeout_s) as lease:
        return [block.status for block in lease.blocks]


class TestPromotion:
    def test_a_restart_serves_what_was_flushed(self, store: FakeStore) -> None:
        keys = chain_on_disk(store, 6)
        with loaded(store.cache, store.handle, keys) as lease:
            assert {block.tier for block in lease.blocks} == {TierKind.NVME}
        assert get(store.cache, store.handle, keys) == [content(key) for key in keys]
        assert store.cache.lookup(store.handle.id, keys).tiers == (TierKind.MEMORY,) * 6
        assert store.metric("ucm_loaded_blocks_total", tier="nvme") == 6
        assert store.metric("ucm_loaded_blocks_total", tier="memory") == 6

    def test_slots_are_real_memory_before_they_are_filled(
        self, store: FakeStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        awaited: list[list[bytes]] = []

        def spy(arena: Arena, slots: list[SlotId]) -> None:
            awaited.append([bytes(arena.view(slot)[:8]) for slot in slots])

        monkeypatch.setattr(Arena, "wait_real", spy)
        keys = flushed_chain(store, 3)
        expected = [content(key)[:8] for key in keys]
        assert len(awaited) == 1, "a store waits once"
        assert not set(awaited.pop()) & set(expected), "and before it copies"
        store.drop_from_memory()
        assert get(store.cache, store.handle, keys) == [content(key) for key in keys]
        assert sum(map(len, awaited)) == 3

    def test_concurrent_loads_of_one_block_share_a_read(self, store: FakeStore) -> None:
        keys = chain_on_disk(store, 4)
        store.disk.faults.reads_may_go.clear()
        results: list[list[bytes]] = []
        threads = [
            threading.Thread(target=lambda: results.append(get(store.cache, store.handle, keys)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: store.manager.status().num_leases == 3)
        store.disk.faults.reads_may_go.set()
        for thread in threads:
            thread.join()
        assert results == [[content(key) for key in keys]] * 3
        assert sum(store.tier.read_batches) == 4

    def test_a_load_that_times_out_says_so_and_holds_nothing(self, store: FakeStore) -> None:
        keys = chain_on_disk(store, 3)
        store.disk.faults.reads_may_go.clear()
        lease = store.cache.prepare_load(store.handle.id, keys, timeout_s=0.02)
        assert [block.status for block in lease.blocks] == [LoadStatus.TIMED_OUT] * 3
        assert store.manager.status().leased_bytes == 0
        store.disk.faults.reads_may_go.set()
        store.cache.complete_load(lease.id)
        assert get(store.cache, store.handle, keys) == [content(key) for key in keys]
        assert sum(store.tier.read_batches) == 3  # the first load's reads were not in vain

    def test_a_corrupt_block_is_a_counted_miss_and_so_is_what_follows(
        self, store: FakeStore
    ) -> None:
        keys = chain_on_disk(store, 4)
        store.tier.flip_bit(keys[1])
        assert load_statuses(store, keys) == [
            LoadStatus.READY,
            LoadStatus.CORRUPT,
            LoadStatus.MISS,
            LoadStatus.MISS,
        ]
        assert store.metric("ucm_corrupt_blocks_total", tier="nvme") == 1
        assert store.cache.lookup(store.handle.id, keys).num_blocks == 1
        lease = store.cache.prepare_store(store.handle.id, ROOT_KEY, keys)
        assert [slot.status for slot in lease.slots] == [
            StoreStatus.PRESENT,
            StoreStatus.WANTED,
            StoreStatus.PRESENT,
            StoreStatus.PRESENT,
        ]
        store.cache.release(lease.id)
        put(store.cache, store.handle, keys)  # storing it again revives the rest
        assert get(store.cache, store.handle, keys) == [content(key) for key in keys]

    @pytest.mark.parametrize("raises", [True, False])
    def test_a_failing_disk_is_a_miss_never_an_exception(
        self, store: FakeStore, raises: bool
    ) -> None:
        keys = chain_on_disk(store, 3)
        store.disk.faults.raises = raises
        store.disk.faults.read_status = IoStatus.IO_ERROR
        assert load_statuses(store, keys) == [LoadStatus.MISS] * 3
        assert store.metric("ucm_load_failures_total", reason="miss") == 3
        store.disk.faults.raises = False
        store.disk.faults.read_status = IoStatus.OK
        assert put(store.cache, store.handle, keys) == (ACCEPTED,) * 3
        assert store.cache.flush(timeout_s=5)
        assert len(store.tier.blocks) == 3  # the old copies were deleted, not leaked

    def test_no_space_when_leases_hold_all_of_memory(self) -> None:
        store = FakeStore(small_store_config(memory_blocks=4))
        keys = chain_on_disk(store, 3)
        others = flushed_chain(store, 3, seed=1)
        with loaded(store.cache, store.handle, others) as lease:
            assert lease.num_ready == 3
            assert load_statuses(store, keys) == [
                LoadStatus.READY,
                LoadStatus.NO_SPACE,
                LoadStatus.NO_SPACE,
            ]
        assert load_statuses(store, keys) == [LoadStatus.READY] * 3
        assert store.manager.check_integrity() == []
        store.close()

    def test_a_session_that_ends_during_its_load_leaves_nothing(self, store: FakeStore) -> None:
        keys = chain_on_disk(store, 2)
        store.disk.faults.reads_may_go.clear()
        other = EmbeddedCache(store.manager, owns_manager=False)
        handle = other.open_namespace(tiny_spec())
        found: list[int] = []
        thread = threading.Thread(
            target=lambda: found.append(other.prepare_load(handle.id, keys, timeout_s=5).num_ready)
        )
        thread.start()
        wait_until(lambda: store.manager.status().num_leases == 1)
        other.close()
        assert store.manager.status().leased_bytes == 0
        store.disk.faults.reads_may_go.set()
        thread.join()
        assert found == [0]

    def test_a_queue_of_transfers_that_is_full_refuses(self) -> None:
        config = small_store_config()
        transfer = dataclasses.replace(config.transfer, max_queued_transfers=1)
        store = FakeStore(dataclasses.replace(config, transfer=transfer))
        keys = chain_on_disk(store, 3)
        assert load_statuses(store, keys) == [LoadStatus.NO_SPACE] * 3
        assert store.cache.prefetch(store.handle.id, keys) == 0
        assert load_statuses(store, keys[:1]) == [LoadStatus.READY]
        assert store.manager.check_integrity() == []
        store.close()


class TestWriteBehind:
    def test_a_full_queue_keeps_blocks_in_memory_only(self) -> None:
        store = FakeStore(small_store_config(queue_blocks=2))
        store.disk.faults.writes_may_go.clear()
        keys = chain(store.handle.id, 4)
        assert put(store.cache, store.handle, keys) == (ACCEPTED,) * 4
        assert store.metric("ucm_dropped_writes_total", reason="queue_full") == 2
        store.disk.faults.writes_may_go.set()
        wait_until(lambda: store.manager.status().write_queue_blocks == 0)
        assert store.tier.keys() == set(keys[:2])
        assert get(store.cache, store.handle, keys) == [content(key) for key in keys]
        store.close()

    def test_flush_takes_along_what_a_full_queue_refused(self) -> None:
        """`flush` promises all that was accepted, not all that was queued."""
        store = FakeStore(small_store_config(queue_blocks=2))
        store.disk.faults.writes_may_go.clear()
        keys = chain(store.handle.id, 7)
        assert put(store.cache, store.handle, keys) == (ACCEPTED,) * 7
        store.disk.faults.writes_may_go.set()
        assert store.cache.flush(timeout_s=5)
        assert store.tier.keys() == set(keys)
        assert store.manager.check_integrity() == []
        store.close()

    def test_flush_is_false_for_as_long_as_an_accepted_block_is_not_durable(
        self, store: FakeStore
    ) -> None:
        keys = chain(store.handle.id, 2)
        store.disk.faults.write_status = IoStatus.FULL
        assert put(store.cache, store.handle, keys) == (ACCEPTED,) * 2
        assert [store.cache.flush(timeout_s=5) for _ in range(3)] == [False] * 3
        store.disk.faults.write_status = IoStatus.OK
        store.clock.advance_us(int(PROBE_INTERVAL_S * 1_000_000))
        assert put(store.cache, store.handle, chain(store.handle.id, 1, seed=3)) == (ACCEPTED,)
        assert store.cache.flush(timeout_s=5)
        assert set(keys) <= store.tier.keys()

    def test_a_disk_that_cannot_delete_does_not_cost_more_blocks_each_time(self) -> None:
        store = FakeStore(small_store_config(memory_blocks=64), disk=FakeDisk(num_slots=20))
        for seed in range(4):
            flushed_chain(store, 4, seed)
        store.disk.faults.deletes_fail = True
        evicted = []
        for probe in range(7):
            store.clock.advance_us(int(PROBE_INTERVAL_S * 1_000_000))
            put(store.cache, store.handle, chain(store.handle.id, 4, seed=10 + probe))
            store.cache.flush(timeout_s=5)
            evicted.append(store.metric("ucm_evicted_blocks_total", tier="nvme"))
        assert evicted[-1] == evicted[-4], evicted
        assert evicted[-1] <= 8, evicted
        store.disk.faults.deletes_fail = False
        store.close()

    def test_a_later_child_takes_dropped_ancestors_along(self) -> None:
        store = FakeStore(small_store_config(queue_blocks=2))
        keys = chain(store.handle.id, 3)
        store.disk.faults.writes_may_go.clear()
        put(store.cache, store.handle, keys[:2])
        other = chain(store.handle.id, 1, seed=3)
        put(store.cache, store.handle, other)  # dropped: the queue holds two
        store.disk.faults.writes_may_go.set()
        wait_until(lambda: store.manager.status().write_queue_blocks == 0)
        assert not {other[0]} & store.tier.keys()
        child = chain(store.handle.id, 2, seed=3)[1:]
        put(store.cache, store.handle, child, other[0])
        assert store.cache.flush(timeout_s=5)
        assert {*other, *child} <= store.tier.keys()
        store.close()

    def test_a_child_never_gets_to_disk_without_its_parent(self, store: FakeStore) -> None:
        keys = chain(store.handle.id, 4)
        store.disk.faults.write_status_by_key[keys[1]] = IoStatus.IO_ERROR
        put(store.cache, store.handle, keys)
        assert not store.cache.flush(timeout_s=5)
        assert store.tier.keys() == {keys[0]}
        assert store.metric("ucm_dropped_writes_total", reason="orphan") == 2
        assert get(store.cache, store.handle, keys) == [content(key) for key in keys]

    def test_blocks_that_wait_for_the_disk_are_not_evicted(self) -> None:
        store = FakeStore(small_store_config(memory_blocks=8))
        store.disk.faults.writes_may_go.clear()
        keys = chain(store.handle.id, 6)
        put(store.cache, store.handle, keys)
        statuses = put(store.cache, store.handle, chain(store.handle.id, 6, seed=1))
        assert statuses == (ACCEPTED,) * 2 + (StoreStatus.NO_SPACE,) * 4
        assert get(store.cache, store.handle, keys) == [content(key) for key in keys]
        store.disk.faults.writes_may_go.set()
        assert store.cache.flush(timeout_s=5)
        assert put(store.cache, store.handle, chain(store.handle.id, 6, seed=1))[-1] is ACCEPTED
        store.close()

    def test_nvme_evicts_by_watermark_leaf_first(self) -> None:
        store = FakeStore(small_store_config(memory_blocks=64), disk=FakeDisk(num_slots=20))
        chains = [flushed_chain(store, 4, seed) for seed in range(8)]
        assert len(store.tier.blocks) <= 18
        assert store.metric("ucm_evicted_blocks_total", tier="nvme") >= 12
        assert store.tier.check_integrity() == []
        assert {chains[-1][-1]} <= store.tier.keys()
        assert store.manager.check_integrity() == []
        store.close()

    def test_a_delete_that_fails_is_tried_again(self) -> None:
        store = FakeStore(small_store_config(memory_blocks=64), disk=FakeDisk(num_slots=8))
        flushed_chain(store, 7, seed=0)
        store.disk.faults.deletes_fail = True
        put(store.cache, store.handle, chain(store.handle.id, 4, seed=1))
        assert not store.cache.flush(timeout_s=5)
        status = store.manager.status()
        assert any("deleting" in problem for problem in status.problems)
        store.disk.faults.deletes_fail = False
        store.clock.advance_us(int(PROBE_INTERVAL_S * 1_000_000))
        keys = chain(store.handle.id, 2, seed=2)
        put(store.cache, store.handle, keys)
        assert store.cache.flush(timeout_s=5)
        assert set(keys) <= store.tier.keys()
        assert store.manager.status().problems == ()
        assert store.manager.check_integrity() == []
        store.close()

    def test_flush_times_out(self, store: FakeStore) -> None:
        store.disk.faults.writes_may_go.clear()
        put(store.cache, store.handle, chain(store.handle.id, 1))
        assert not store.cache.flush(timeout_s=0.01)


class TestFullDisk:
    def test_stores_stop_loads_go_on_and_status_says_so(self, store: FakeStore) -> None:
        keys = chain(store.handle.id, 2)
        store.disk.faults.write_status = IoStatus.FULL
        assert put(store.cache, store.handle, keys) == (ACCEPTED,) * 2
        assert not store.cache.flush(timeout_s=5)
        others = chain(store.handle.id, 2, seed=1)
        assert put(store.cache, store.handle, others) == (REFUSED,) * 2
        assert get(store.cache, store.handle, keys) == [content(key) for key in keys]
        status = store.manager.status()
        assert status.problems[0].startswith("nvme: stores stop, loads go on: the disk is full")
        assert [tier.writable for tier in status.tiers] == [True, False]
        assert store.metric("ucm_nvme_writable") == 0

    def test_a_disk_that_promised_slots_and_has_none_is_full(self, store: FakeStore) -> None:
        """Preallocation fails: the tier hands out fewer slots than it said were free."""
        usage = dataclasses.replace(store.tier.usage(), disk_is_full=True)
        store.tier.allocate = no_slots  # type: ignore[method-assign]
        store.tier.usage = lambda: usage  # type: ignore[method-assign]
        put(store.cache, store.handle, chain(store.handle.id, 2))
        assert not store.cache.flush(timeout_s=5)
        assert "the disk is full" in store.manager.status().problems[0]

    def test_fewer_slots_than_promised_on_a_disk_with_room_stop_no_stores(
        self, store: FakeStore
    ) -> None:
        """Another namespace may have taken them in between."""
        allocate = store.tier.allocate
        store.tier.allocate = no_slots  # type: ignore[method-assign]
        keys = chain(store.handle.id, 2)
        put(store.cache, store.handle, keys)
        assert not store.cache.flush(timeout_s=5)
        assert store.manager.status().problems == ()
        store.tier.allocate = allocate  # type: ignore[method-assign]
        assert store.cache.flush(timeout_s=5)
        assert store.tier.keys() == set(keys)

    def test_it_is_probed_now_and_then_and_recovers(self, store: FakeStore) -> None:
        store.disk.faults.write_status = IoStatus.FULL
        put(store.cache, store.handle, chain(store.handle.id, 1))
        store.cache.flush(timeout_s=5)
        probe = chain(store.handle.id, 1, seed=1)
        assert put(store.cache, store.handle, probe) == (REFUSED,)
        store.clock.advance_us(int(PROBE_INTERVAL_S * 1_000_000))
        assert put(store.cache, store.handle, probe) == (ACCEPTED,)
        store.cache.flush(timeout_s=5)
        assert put(store.cache, store.handle, chain(store.handle.id, 1, seed=2)) == (REFUSED,)
        store.disk.faults.write_status = IoStatus.OK
        store.clock.advance_us(int(PROBE_INTERVAL_S * 1_000_000))
        assert put(store.cache, store.handle, chain(store.handle.id, 1, seed=3)) == (ACCEPTED,)
        assert store.cache.flush(timeout_s=5)
        assert store.metric("ucm_nvme_writable") == 1
        assert store.manager.status().problems == ()


class TestCorruptMemory:
    def test_bad_bytes_are_dropped_and_come_back_from_nvme(self, store: FakeStore) -> None:
        keys = flushed_chain(store, 2)
        arena = store.manager.arena(SessionId(1), store.handle.id)
        lease = store.cache.prepare_load(store.handle.id, keys, timeout_s=1)
        grants = store.manager.prepare_load(SessionId(1), store.handle.id, keys, timeout_s=1)
        offset = grants.offsets[1]
        arena._view[offset] ^= 1
        store.cache.complete_load(lease.id, corrupt=keys)
        store.manager.release(SessionId(1), grants.lease_id)
        assert store.metric("ucm_corrupt_blocks_total", tier="memory") == 1
        assert store.cache.lookup(store.handle.id, keys).tiers == (
            TierKind.MEMORY,
            TierKind.NVME,
        )
        assert get(store.cache, store.handle, keys) == [content(key) for key in keys]
        assert store.manager.status().tiers[0].quarantined_slots == 1

    def test_bad_bytes_never_reach_the_disk(self, store: FakeStore) -> None:
        """What goes bad while it waits is dropped; its child does not go without it."""
        store.disk.faults.writes_may_go.clear()
        first = chain(store.handle.id, 1, seed=7)
        put(store.cache, store.handle, first)  # the batch that holds the writer back
        wait_until(lambda: store.manager.status().write_queue_blocks == 1)
        keys = chain(store.handle.id, 2)
        put(store.cache, store.handle, keys)
        with store.manager._state.lock:
            found = store.manager._state.namespaces.get_locked(store.handle.id)
            assert found is not None
            slot = found.index.slot(found.index.find(keys[0]), TierKind.MEMORY)
        found.memory.view(slot)[0] ^= 1
        store.disk.faults.writes_may_go.set()
        assert not store.cache.flush(timeout_s=5)
        assert store.tier.keys() == set(first)
        assert store.cache.lookup(store.handle.id, keys).num_blocks == 0
