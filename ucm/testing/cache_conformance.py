"""What every `CacheApi` promises, as tests. Subclass `CacheApiTests` and give it a `harness`.

class TestEmbeddedCache(CacheApiTests):
    @pytest.fixture
    def harness(self) -> Iterator[CacheHarness]: ...
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from ucm.api import CacheApi, NamespaceHandle
from ucm.checksum import block_checksums
from ucm.errors import (
    BlockNotFoundError,
    CapacityError,
    InvalidArgumentError,
    LeaseExpiredError,
    UcmError,
)
from ucm.types import ROOT_KEY, BlockKey, LeaseId, LoadStatus, NamespaceId, StoreStatus, TierKind

from .blocks import chain, content, get, loaded, put, tiny_spec
from .pin_conformance import PinTests

MEMORY_BLOCKS = 16
"""Blocks of `TINY_LAYOUT` that the harness's host tier should hold, give or take a few."""

NO_LEASE = LeaseId(bytes(16))


class CacheHarness(Protocol):
    """A store under test. Small: see `MEMORY_BLOCKS`; with an NVMe tier that is larger."""

    lease_timeout_s: float
    """As configured."""
    max_leases_per_session: int
    """As configured; small, at least 4."""

    def open_session(self) -> CacheApi:
        """A fresh session on the same store; the harness closes what is left open."""

    def pass_time(self, seconds: float) -> None:
        """Make that much time pass on the store's clock."""

    def leased_bytes(self) -> int:
        """Bytes that all leases pin now, as the store reports them."""

    def store_folder(self) -> Path:
        """Where its files are."""

    def check_integrity(self) -> list[str]:
        """Violated invariants of the store."""


class CacheApiTests(PinTests):
    """The suite. One store a test; integrity is checked after each."""

    @pytest.fixture
    def harness(self) -> Iterator[CacheHarness]:
        """The store under test; the subclass provides it."""
        raise NotImplementedError

    @pytest.fixture
    def cache(self, harness: CacheHarness) -> Iterator[CacheApi]:
        """One session."""
        yield harness.open_session()
        problems = harness.check_integrity()
        assert problems == [], problems

    @pytest.fixture
    def handle(self, cache: CacheApi) -> NamespaceHandle:
        """One open namespace of it."""
        return cache.open_namespace(tiny_spec())

    # ------------------------------------------------------------ namespaces

    def test_opening_again_gives_the_same_namespace(self, cache: CacheApi) -> None:
        """Same spec, same id and layout; another model, another id."""
        first, again = cache.open_namespace(tiny_spec()), cache.open_namespace(tiny_spec())
        assert first == again
        assert first.layout == tiny_spec().layout
        assert cache.open_namespace(tiny_spec("other")).id != first.id

    def test_a_namespace_must_be_opened_first(self, cache: CacheApi) -> None:
        """Knowing an id gives no access."""
        with pytest.raises(BlockNotFoundError):
            cache.lookup(NamespaceId(bytes(32)), [])

    def test_a_namespace_is_open_in_its_own_session_only(
        self, harness: CacheHarness, handle: NamespaceHandle
    ) -> None:
        """Another session has to open it too."""
        with pytest.raises(BlockNotFoundError):
            harness.open_session().lookup(handle.id, chain(handle.id, 1))

    def test_nothing_crosses_namespaces(self, cache: CacheApi, handle: NamespaceHandle) -> None:
        """A key stored in one is not found in another."""
        keys = chain(handle.id, 2)
        put(cache, handle, keys)
        other = cache.open_namespace(tiny_spec("other"))
        assert cache.lookup(other.id, keys).num_blocks == 0

    # ----------------------------------------------------------- store, load

    def test_a_get_returns_what_was_put(self, cache: CacheApi, handle: NamespaceHandle) -> None:
        """Byte for byte, in order."""
        keys = chain(handle.id, 5)
        assert put(cache, handle, keys) == (StoreStatus.ACCEPTED,) * 5
        assert get(cache, handle, keys) == [content(key) for key in keys]

    def test_a_loaded_block_is_read_only(self, cache: CacheApi, handle: NamespaceHandle) -> None:
        """A reader cannot change what others read."""
        keys = chain(handle.id, 1)
        put(cache, handle, keys)
        with loaded(cache, handle, keys) as lease:
            data = lease.blocks[0].data
            assert data is not None
            assert data.readonly
            assert len(data) == handle.layout.block_bytes

    def test_accepted_blocks_are_seen_by_other_sessions(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """At once, without a flush."""
        keys = chain(handle.id, 3)
        put(cache, handle, keys)
        reader = harness.open_session()
        again = reader.open_namespace(tiny_spec())
        assert get(reader, again, keys) == [content(key) for key in keys]

    def test_a_block_is_invisible_until_its_store_completes(
        self, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """Prepared and filled is not stored."""
        keys = chain(handle.id, 1)
        lease = cache.prepare_store(handle.id, ROOT_KEY, keys)
        assert lease.slots[0].data is not None
        lease.slots[0].data[:] = content(keys[0])
        assert cache.lookup(handle.id, keys).num_blocks == 0
        cache.release(lease.id)
        assert cache.lookup(handle.id, keys).num_blocks == 0

    def test_lookup_finds_the_longest_prefix(
        self, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """And says in which tier; it pins nothing."""
        keys = chain(handle.id, 5)
        put(cache, handle, keys[:3])
        assert cache.lookup(handle.id, keys).tiers == (TierKind.MEMORY,) * 3
        assert cache.lookup(handle.id, [keys[0], keys[2]]).num_blocks == 1
        assert cache.lookup(handle.id, chain(handle.id, 2, seed=9)).num_blocks == 0
        assert cache.lookup(handle.id, []).num_blocks == 0

    def test_a_lookup_may_start_in_the_middle_of_a_chain(
        self, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """What an engine holds already need not be asked for."""
        keys = chain(handle.id, 5)
        put(cache, handle, keys)
        assert cache.lookup(handle.id, keys[2:]).num_blocks == 3
        assert get(cache, handle, keys[2:]) == [content(key) for key in keys[2:]]

    def test_a_load_says_what_is_missing(self, cache: CacheApi, handle: NamespaceHandle) -> None:
        """One entry for every key, in order."""
        keys = chain(handle.id, 4)
        put(cache, handle, keys[:2])
        with loaded(cache, handle, keys) as lease:
            assert [block.key for block in lease.blocks] == keys
            statuses = [block.status for block in lease.blocks]
            assert statuses == [LoadStatus.READY] * 2 + [LoadStatus.MISS] * 2
            assert lease.num_ready == 2
            assert lease.blocks[2].data is None

    def test_a_chain_can_be_continued(self, cache: CacheApi, handle: NamespaceHandle) -> None:
        """The second store names the first one's last block as its parent."""
        keys = chain(handle.id, 6)
        put(cache, handle, keys[:3])
        assert put(cache, handle, keys[3:], keys[2]) == (StoreStatus.ACCEPTED,) * 3
        assert cache.lookup(handle.id, keys).num_blocks == 6

    def test_what_is_there_is_not_wanted(self, cache: CacheApi, handle: NamespaceHandle) -> None:
        """PRESENT at once, and no slot."""
        keys = chain(handle.id, 3)
        put(cache, handle, keys[:2])
        lease = cache.prepare_store(handle.id, ROOT_KEY, keys)
        assert [slot.status for slot in lease.slots] == [
            StoreStatus.PRESENT,
            StoreStatus.PRESENT,
            StoreStatus.WANTED,
        ]
        assert [slot.data is None for slot in lease.slots] == [True, True, False]
        cache.release(lease.id)

    def test_the_first_of_two_stores_wins(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """The second finds the block present."""
        other = harness.open_session()
        other.open_namespace(tiny_spec())
        keys = chain(handle.id, 1)
        lease = other.prepare_store(handle.id, ROOT_KEY, keys)
        assert put(cache, handle, keys) == (StoreStatus.ACCEPTED,)
        assert lease.slots[0].data is not None
        lease.slots[0].data[:] = content(keys[0])
        checksums = {keys[0]: block_checksums(handle.layout, lease.slots[0].data)}
        assert other.complete_store(lease.id, checksums) == (StoreStatus.PRESENT,)

    def test_concurrent_stores_of_one_chain_all_end_well(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """Many sessions offer the same blocks at once."""
        keys = chain(handle.id, 6)
        outcomes: list[tuple[StoreStatus, ...]] = []

        def store() -> None:
            session = harness.open_session()
            outcomes.append(put(session, session.open_namespace(tiny_spec()), keys))

        threads = [threading.Thread(target=store) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seen = {status for outcome in outcomes for status in outcome}
        assert seen <= {StoreStatus.ACCEPTED, StoreStatus.PRESENT, StoreStatus.NO_SPACE}
        found = get(cache, handle, keys)
        assert found == [content(key) for key in keys[: len(found)]]
        assert found

    def test_an_unknown_parent_makes_orphans(
        self, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """Nobody could ever reach them."""
        keys = chain(handle.id, 4)
        assert put(cache, handle, keys[2:], keys[1]) == (StoreStatus.ORPHAN,) * 2
        assert cache.lookup(handle.id, keys[2:]).num_blocks == 0

    def test_wrong_bytes_are_refused(self, cache: CacheApi, handle: NamespaceHandle) -> None:
        """A checksum that does not match, and everything behind that block."""
        keys = chain(handle.id, 3)
        lease = cache.prepare_store(handle.id, ROOT_KEY, keys)
        checksums = {}
        for slot in lease.slots:
            assert slot.data is not None
            slot.data[:] = content(slot.key)
            checksums[slot.key] = block_checksums(handle.layout, slot.data)
        assert lease.slots[1].data is not None
        lease.slots[1].data[7] ^= 1
        assert cache.complete_store(lease.id, checksums) == (
            StoreStatus.ACCEPTED,
            StoreStatus.CORRUPT,
            StoreStatus.ORPHAN,
        )
        assert cache.lookup(handle.id, keys).num_blocks == 1

    def test_a_slot_left_out_is_dropped(self, cache: CacheApi, handle: NamespaceHandle) -> None:
        """A store may hand over less than it was granted."""
        keys = chain(handle.id, 2)
        lease = cache.prepare_store(handle.id, ROOT_KEY, keys)
        assert StoreStatus.ACCEPTED not in cache.complete_store(lease.id, {})
        assert cache.lookup(handle.id, keys).num_blocks == 0
        assert put(cache, handle, keys) == (StoreStatus.ACCEPTED,) * 2

    # ---------------------------------------------------------------- leases

    def test_leases_give_back_what_they_hold(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """By completion and by release, of both kinds; twice is once."""
        keys = chain(handle.id, 3)
        put(cache, handle, keys[:2])
        load = cache.prepare_load(handle.id, keys, timeout_s=1)
        store = cache.prepare_store(handle.id, keys[1], keys[2:])
        assert harness.leased_bytes() == 3 * handle.layout.block_bytes
        cache.complete_load(load.id)
        cache.complete_load(load.id)
        cache.release(store.id)
        cache.release(store.id)
        cache.release(NO_LEASE)
        assert harness.leased_bytes() == 0

    def test_a_lease_expires(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """A late store is an error and stores nothing; a late load is none."""
        keys = chain(handle.id, 2)
        put(cache, handle, keys[:1])
        load = cache.prepare_load(handle.id, keys[:1], timeout_s=1)
        store = cache.prepare_store(handle.id, keys[0], keys[1:])
        assert store.timeout_s == pytest.approx(harness.lease_timeout_s)
        assert store.slots[0].data is not None
        store.slots[0].data[:] = content(keys[1])
        checksums = {keys[1]: block_checksums(handle.layout, store.slots[0].data)}
        harness.pass_time(harness.lease_timeout_s + 0.01)
        with pytest.raises(LeaseExpiredError):
            cache.complete_store(store.id, checksums)
        cache.complete_load(load.id)
        assert cache.lookup(handle.id, keys).num_blocks == 1
        assert harness.leased_bytes() == 0

    def test_a_lease_means_nothing_in_another_session(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """Neither completed nor released there."""
        keys = chain(handle.id, 1)
        put(cache, handle, keys)
        lease = cache.prepare_load(handle.id, keys, timeout_s=1)
        other = harness.open_session()
        other.open_namespace(tiny_spec())
        other.release(lease.id)
        other.complete_load(lease.id)
        with pytest.raises(LeaseExpiredError):
            other.complete_store(lease.id, {})
        assert harness.leased_bytes() == handle.layout.block_bytes
        cache.complete_load(lease.id)

    def test_a_load_lease_is_no_store_lease(self, cache: CacheApi, handle: NamespaceHandle) -> None:
        """The kinds do not mix."""
        keys = chain(handle.id, 1)
        put(cache, handle, keys)
        with loaded(cache, handle, keys) as lease, pytest.raises(InvalidArgumentError):
            cache.complete_store(lease.id, {})

    def test_a_session_end_releases_everything(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """Of that session, and of no other."""
        keys = chain(handle.id, 2)
        put(cache, handle, keys)
        other = harness.open_session()
        other.open_namespace(tiny_spec())
        other.prepare_load(handle.id, keys, timeout_s=1)
        other.prepare_store(handle.id, keys[1], chain(handle.id, 3)[2:])
        with loaded(cache, handle, keys[:1]):
            assert harness.leased_bytes() == 4 * handle.layout.block_bytes
            other.close()
            other.close()
            assert harness.leased_bytes() == handle.layout.block_bytes

    def test_leases_have_a_limit(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """One more than allowed is refused, and goes again after a release."""
        leases = [
            cache.prepare_load(handle.id, [], timeout_s=0)
            for _ in range(harness.max_leases_per_session)
        ]
        with pytest.raises(CapacityError):
            cache.prepare_load(handle.id, [], timeout_s=0)
        cache.release(leases[0].id)
        cache.prepare_load(handle.id, [], timeout_s=0)

    # -------------------------------------------------------- tiers, pressure

    def test_flushed_blocks_outlive_eviction_from_memory(
        self, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """More chains than memory holds come back, from NVMe."""
        chains = [chain(handle.id, MEMORY_BLOCKS // 4, seed) for seed in range(1, 9)]
        for keys in chains:
            assert put(cache, handle, keys) == (StoreStatus.ACCEPTED,) * len(keys)
            assert cache.flush(timeout_s=10)
        assert TierKind.NVME in cache.lookup(handle.id, chains[0]).tiers
        for keys in chains:
            assert get(cache, handle, keys) == [content(key) for key in keys]

    def test_a_prefetch_promotes(self, cache: CacheApi, handle: NamespaceHandle) -> None:
        """What is on NVMe only is queued once; what is in memory is not."""
        chains = [chain(handle.id, MEMORY_BLOCKS // 4, seed) for seed in range(1, 9)]
        for keys in chains:
            put(cache, handle, keys)
            cache.flush(timeout_s=10)
        tiers = cache.lookup(handle.id, chains[0]).tiers
        assert cache.prefetch(handle.id, chains[0]) == tiers.count(TierKind.NVME) > 0
        assert get(cache, handle, chains[0]) == [content(key) for key in chains[0]]
        assert cache.prefetch(handle.id, chains[0]) == 0

    def test_leased_blocks_are_never_evicted(
        self, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """Their bytes stay in place while others come and go."""
        keys = chain(handle.id, 4)
        put(cache, handle, keys)
        with loaded(cache, handle, keys) as lease:
            for seed in range(1, 9):
                put(cache, handle, chain(handle.id, MEMORY_BLOCKS // 4, seed))
                cache.flush(timeout_s=10)
            assert [bytes(block.data or b"") for block in lease.blocks] == [
                content(key) for key in keys
            ]

    def test_a_report_of_sound_bytes_changes_nothing(
        self, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """The store checks for itself."""
        keys = chain(handle.id, 2)
        put(cache, handle, keys)
        lease = cache.prepare_load(handle.id, keys, timeout_s=1)
        cache.complete_load(lease.id, corrupt=keys)
        assert get(cache, handle, keys) == [content(key) for key in keys]

    # ------------------------------------------------------------- bad input

    @pytest.mark.parametrize("length", [0, 31, 33])
    def test_a_key_of_the_wrong_length(
        self, cache: CacheApi, handle: NamespaceHandle, length: int
    ) -> None:
        """Refused by every call that takes keys."""
        bad = BlockKey(bytes(length))
        with pytest.raises(InvalidArgumentError):
            cache.lookup(handle.id, [bad])
        with pytest.raises(InvalidArgumentError):
            cache.prefetch(handle.id, [bad])
        with pytest.raises(InvalidArgumentError):
            cache.prepare_load(handle.id, [bad], timeout_s=0)
        with pytest.raises(InvalidArgumentError):
            cache.prepare_store(handle.id, ROOT_KEY, [bad])
        with pytest.raises(InvalidArgumentError):
            cache.prepare_store(handle.id, bad, chain(handle.id, 1))

    def test_keys_that_are_no_chain(self, cache: CacheApi, handle: NamespaceHandle) -> None:
        """A key twice, the root as a key, a known key under another parent."""
        keys = chain(handle.id, 3)
        put(cache, handle, keys)
        for parent, wrong in (
            (ROOT_KEY, [keys[0], keys[0]]),
            (ROOT_KEY, [ROOT_KEY]),
            (ROOT_KEY, [keys[1]]),
            (keys[2], [keys[2]]),
        ):
            with pytest.raises(InvalidArgumentError):
                cache.prepare_store(handle.id, parent, wrong)

    def test_checksums_that_do_not_fit_the_layout(
        self, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """One too few is a wrong checksum."""
        keys = chain(handle.id, 1)
        lease = cache.prepare_store(handle.id, ROOT_KEY, keys)
        assert cache.complete_store(lease.id, {keys[0]: (1,)}) == (StoreStatus.CORRUPT,)

    def test_checksums_for_a_block_that_was_not_wanted(
        self, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """An error, and the lease goes on."""
        keys = chain(handle.id, 1)
        lease = cache.prepare_store(handle.id, ROOT_KEY, keys)
        with pytest.raises(InvalidArgumentError):
            cache.complete_store(lease.id, {chain(handle.id, 1, seed=5)[0]: (1, 2)})
        cache.release(lease.id)

    def test_after_close_every_call_fails_and_says_so(
        self, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """With one of our errors; closing again is fine."""
        cache.close()
        cache.close()
        with pytest.raises(UcmError):
            cache.lookup(handle.id, [])
        with pytest.raises(UcmError):
            cache.prepare_load(handle.id, [], timeout_s=0)
        with pytest.raises(UcmError):
            cache.flush(timeout_s=0)
