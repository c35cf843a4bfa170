"""The facade: namespaces under one budget, sessions, limits, status, drain and close."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence

import pytest

from ucm.embedded import EmbeddedCache
from ucm.errors import (
    BlockNotFoundError,
    CapacityError,
    CorruptionError,
    InvalidArgumentError,
    LayoutMismatchError,
    TierUnavailableError,
    UcmError,
)
from ucm.hashing import NamespaceSpec
from ucm.layout import KvDtype, KvLayout
from ucm.manager import Manager
from ucm.namespaces import TierFactory
from ucm.storage.tier import SlotId, TierEntry
from ucm.testing.blocks import (
    TINY_LAYOUT,
    chain,
    content,
    get,
    loaded,
    put,
    tiny_spec,
)
from ucm.testing.fake_tier import FakeDisk, FakeTier
from ucm.testing.stores import FakeStore, small_store_config
from ucm.types import (
    ROOT_KEY,
    BlockKey,
    NamespaceId,
    StoreStatus,
    SummaryKind,
    TierKind,
)

ACCEPTED, REFUSED = StoreStatus.ACCEPTED, StoreStatus.REFUSED
BLOCK_BYTES = TINY_LAYOUT.block_bytes


def flushed_chain(store: FakeStore, num_blocks: int) -> list[BlockKey]:
    keys = chain(store.handle.id, num_blocks)
    assert put(store.cache, store.handle, keys) == (ACCEPTED,) * num_blocks
    assert store.cache.flush(timeout_s=5)
    return keys


class TestNamespaces:
    def test_the_same_id_with_another_layout(self, store: FakeStore) -> None:
        class Forged(NamespaceSpec):
            def fingerprint(self) -> NamespaceId:
                return tiny_spec().fingerprint()

        other = KvLayout(
            num_layers=3, num_kv_heads=1, head_dim=8, block_tokens=4, dtype=KvDtype.FLOAT32
        )
        forged = Forged(layout=other, model_id="tiny", weights_digest="0" * 64)
        with pytest.raises(LayoutMismatchError):
            store.cache.open_namespace(forged)

    def test_a_folder_with_another_layout(self) -> None:
        disk = FakeDisk()
        disk.open_error = LayoutMismatchError("another layout on disk")
        with pytest.raises(LayoutMismatchError):
            FakeStore(disk=disk)

    def test_a_broken_folder_means_memory_only_and_a_line_in_status(self) -> None:
        disk = FakeDisk()
        disk.open_error = TierUnavailableError("injected")
        store = FakeStore(disk=disk)
        keys = chain(store.handle.id, 2)
        assert put(store.cache, store.handle, keys) == (ACCEPTED,) * 2
        assert store.cache.flush(timeout_s=5)
        assert "runs without NVMe: injected" in store.manager.status().problems[0]
        store.close()

    def test_a_tier_that_opens_but_cannot_say_what_it_holds_is_not_used(self) -> None:
        class Mute(FakeTier):
            def entries(self) -> Iterator[TierEntry]:
                if self.is_open:
                    raise CorruptionError("injected")
                return super().entries()

            def reopen(self) -> None:
                self.is_open = True

        disk = FakeDisk()
        mute = Mute(TINY_LAYOUT, 8, disk.faults)
        disk.tiers[tiny_spec().fingerprint()] = mute
        store = FakeStore(disk=disk)
        assert "runs without NVMe: injected" in store.manager.status().problems[0]
        assert not mute.is_open
        put(store.cache, store.handle, chain(store.handle.id, 2))
        assert store.cache.flush(timeout_s=5)
        assert mute.blocks == {}
        store.close()

    def test_an_opening_that_takes_long_does_not_hold_up_loads(self) -> None:
        """A load that lacks room does not wait for another namespace's recovery."""
        entered, go_on = threading.Event(), threading.Event()

        class Slow(FakeDisk):
            def open_namespace(
                self,
                namespace: NamespaceId,
                layout: KvLayout,
                tenant: str = "",
                *,
                accepts_lossy: bool = False,
                summary: SummaryKind | None = None,
            ) -> FakeTier:
                if namespace == tiny_spec("slow").fingerprint():
                    entered.set()
                    assert go_on.wait(10)
                return super().open_namespace(namespace, layout, tenant)

        store = FakeStore(small_store_config(memory_blocks=4), disk=Slow())
        other = EmbeddedCache(store.manager, owns_manager=False)
        idle = other.open_namespace(tiny_spec("idle"))
        put(other, idle, chain(idle.id, 3))
        assert other.flush(timeout_s=5)
        other.close()
        opener = EmbeddedCache(store.manager, owns_manager=False)
        thread = threading.Thread(target=opener.open_namespace, args=(tiny_spec("slow"),))
        thread.start()
        assert entered.wait(10)
        done = threading.Event()

        def store_and_load() -> None:
            keys = chain(store.handle.id, 3)
            put(store.cache, store.handle, keys)
            with loaded(store.cache, store.handle, keys, timeout_s=0):
                done.set()

        worker = threading.Thread(target=store_and_load)
        worker.start()
        in_time = done.wait(5)
        go_on.set()
        worker.join()
        thread.join()
        opener.close()
        store.close()
        assert in_time

    def test_it_stays_open_until_the_last_transfer_of_its_blocks_has_ended(self) -> None:
        """Also for what a commit still has to clean up after it settled its blocks."""
        store = FakeStore()
        free, states = store.tier.free, []

        def watched(slots: Sequence[SlotId]) -> None:
            with store.manager._state.lock:
                found = store.manager._state.namespaces.get_locked(store.handle.id)
                assert found is not None
                states.append(found.num_writing)
            free(slots)

        store.tier.free = watched  # type: ignore[method-assign]
        put(store.cache, store.handle, chain(store.handle.id, 2))
        assert store.cache.flush(timeout_s=5)
        assert states == [2]
        store.close()

    def test_their_number_is_bounded_and_idle_ones_make_way(self, store: FakeStore) -> None:
        for name in ("a", "b"):
            store.cache.open_namespace(tiny_spec(name))
        with pytest.raises(CapacityError):
            store.cache.open_namespace(tiny_spec("c"))
        other = EmbeddedCache(store.manager, owns_manager=False)
        other.open_namespace(tiny_spec("a"))
        with pytest.raises(CapacityError):
            other.open_namespace(tiny_spec("c"))

    def test_an_idle_namespace_gives_its_memory_to_another(self) -> None:
        store = FakeStore(small_store_config(memory_blocks=8))
        other = EmbeddedCache(store.manager, owns_manager=False)
        handle = other.open_namespace(tiny_spec("other"))
        keys = chain(handle.id, 7)
        assert put(other, handle, keys) == (ACCEPTED,) * 7
        assert other.flush(timeout_s=5)
        mine = chain(store.handle.id, 4)
        assert put(store.cache, store.handle, mine)[1] is StoreStatus.NO_SPACE
        other.close()
        assert put(store.cache, store.handle, mine) == (
            StoreStatus.PRESENT,
            ACCEPTED,
            ACCEPTED,
            ACCEPTED,
        )
        assert [each.id for each in store.manager.status().namespaces] == [store.handle.id]
        again = EmbeddedCache(store.manager, owns_manager=False)
        assert again.open_namespace(tiny_spec("other")) == handle
        assert again.lookup(handle.id, keys).tiers == (TierKind.NVME,) * 7
        store.close()


class TestSessionsAndLimits:
    def test_sessions_are_bounded(self, store: FakeStore) -> None:
        sessions = [store.manager.open_session() for _ in range(3)]
        with pytest.raises(CapacityError):
            store.manager.open_session()
        store.manager.close_session(sessions[0])
        store.manager.close_session(sessions[0])
        store.manager.open_session()

    def test_an_ended_session_is_refused(self, store: FakeStore) -> None:
        session = store.manager.open_session()
        store.manager.close_session(session)
        with pytest.raises(BlockNotFoundError):
            store.manager.open_namespace(session, tiny_spec())
        with pytest.raises(BlockNotFoundError):
            store.manager.staging_arena(session)

    def test_too_many_keys(self) -> None:
        config = small_store_config()
        service = dataclasses.replace(config.service, max_keys_per_call=2)
        store = FakeStore(dataclasses.replace(config, service=service))
        with pytest.raises(InvalidArgumentError):
            store.cache.lookup(store.handle.id, chain(store.handle.id, 3))
        store.close()

    def test_staging_memory_is_bounded(self, store: FakeStore) -> None:
        """1 MiB of staging holds 128 tiny blocks; the rest of a chain gets no slot."""
        keys = chain(store.handle.id, 130)
        lease = store.cache.prepare_store(store.handle.id, ROOT_KEY, keys)
        statuses = [slot.status for slot in lease.slots]
        assert statuses == [StoreStatus.WANTED] * 128 + [StoreStatus.NO_SPACE] * 2
        store.cache.release(lease.id)
        assert store.manager.status().leased_bytes == 0


class TestStatusAndEnd:
    def test_a_snapshot(self, store: FakeStore) -> None:
        keys = flushed_chain(store, 3)
        with loaded(store.cache, store.handle, keys[:2]):
            status = store.manager.status()
        assert (status.state, status.num_sessions, status.num_leases) == ("serving", 1, 1)
        assert status.leased_bytes == 2 * BLOCK_BYTES
        assert [tier.num_blocks for tier in status.tiers] == [3, 3]
        assert status.tiers[0].used_bytes == 3 * BLOCK_BYTES
        (namespace,) = status.namespaces
        assert (namespace.id, namespace.num_blocks) == (store.handle.id, 3)
        assert store.metric("ucm_leases") == 1
        assert store.metric("ucm_tier_used_bytes", tier="memory") == 3 * BLOCK_BYTES
        assert store.metric("ucm_flushed_blocks_total") == 3

    def test_a_drain_refuses_stores_and_finishes_the_queue(self, store: FakeStore) -> None:
        store.disk.faults.writes_may_go.clear()
        keys = chain(store.handle.id, 2)
        lease = store.cache.prepare_store(store.handle.id, ROOT_KEY, keys)
        other = chain(store.handle.id, 1, seed=1)
        put(store.cache, store.handle, other)
        assert not store.manager.drain(timeout_s=0.01)
        assert put(store.cache, store.handle, chain(store.handle.id, 1, seed=2)) == (REFUSED,)
        assert get(store.cache, store.handle, other) == [content(other[0])]
        with pytest.raises(TierUnavailableError):
            store.manager.open_session()
        assert store.manager.status().state == "draining"
        store.cache.release(lease.id)
        store.disk.faults.writes_may_go.set()
        assert store.manager.drain(timeout_s=5)
        assert store.tier.keys() == set(other)

    def test_close_flushes_and_is_final(self) -> None:
        store = FakeStore()
        keys = chain(store.handle.id, 3)
        put(store.cache, store.handle, keys)
        assert store.manager.close()
        assert store.manager.close()
        assert store.tier.keys() == set(keys)
        assert not store.tier.is_open
        with pytest.raises(TierUnavailableError):
            store.cache.lookup(store.handle.id, keys)
        assert store.manager.status().state == "closed"

    def test_a_close_that_ran_out_of_time_never_claims_to_have_flushed(self) -> None:
        before = set(threading.enumerate())
        store = FakeStore()
        store.disk.faults.writes_may_go.clear()
        put(store.cache, store.handle, chain(store.handle.id, 3))
        assert not store.manager.close(timeout_s=0)
        assert not store.manager.close()
        store.disk.faults.writes_may_go.set()
        for thread in set(threading.enumerate()) - before:
            thread.join(10)

    def test_close_waits_for_what_is_being_verified(self) -> None:
        store = FakeStore()
        keys = flushed_chain(store, 1)
        with store.manager._state.lock:
            found = store.manager._state.namespaces.get_locked(store.handle.id)
            assert found is not None
        verify, entered, go_on = found.memory.verify, threading.Event(), threading.Event()

        def slow(slot: SlotId, key: BlockKey) -> bool:
            entered.set()
            assert go_on.wait(10)
            return verify(slot, key)

        found.memory.verify = slow  # type: ignore[method-assign]
        lease = store.cache.prepare_load(store.handle.id, keys, timeout_s=1)
        errors: list[BaseException] = []

        def complain() -> None:
            try:
                store.cache.complete_load(lease.id, corrupt=keys)
            except (AssertionError, ValueError, UcmError) as error:
                errors.append(error)

        thread = threading.Thread(target=complain)
        thread.start()
        assert entered.wait(10)
        closer = threading.Thread(target=store.manager.close)
        closer.start()
        closer.join(0.3)
        assert store.tier.is_open
        go_on.set()
        thread.join()
        closer.join()
        assert errors == []
        assert not store.tier.is_open
        store.close()

    def test_a_namespace_is_not_opened_behind_the_end(self) -> None:
        store = FakeStore()
        store.close()
        with pytest.raises(TierUnavailableError):
            store.manager._state.namespaces.open(tiny_spec("late"), lambda _: None)
        assert list(store.manager._state.namespaces) == []

    def test_a_time_out_may_be_infinite(self, store: FakeStore) -> None:
        keys = flushed_chain(store, 1)
        for timeout_s in (float("inf"), 1e12):
            lease = store.cache.prepare_load(store.handle.id, keys, timeout_s=timeout_s)
            store.cache.complete_load(lease.id)
            assert store.cache.flush(timeout_s=timeout_s)

    def test_close_leaves_no_thread(self) -> None:
        before = threading.active_count()
        FakeStore().close()
        assert threading.active_count() == before

    def test_expiry_is_applied_by_tick(self, store: FakeStore) -> None:
        keys = flushed_chain(store, 2)
        store.cache.prepare_load(store.handle.id, keys, timeout_s=1)
        store.clock.advance_us(40_000_000)
        assert store.manager.status().num_leases == 1
        store.manager.tick()
        assert store.manager.status().num_leases == 0
        assert store.metric("ucm_expired_leases_total") == 1

    def test_memory_only(self) -> None:
        manager = Manager(small_store_config(), tiers=TierFactory())
        cache = EmbeddedCache(manager)
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 3)
        assert put(cache, handle, keys) == (ACCEPTED,) * 3
        assert cache.flush(timeout_s=0)
        assert [tier.kind for tier in manager.status().tiers] == [TierKind.MEMORY]
        cache.close()
