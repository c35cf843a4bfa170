"""What every `CacheApi` promises about pins; part of `CacheApiTests`."""

from __future__ import annotations

from typing import Protocol

import pytest

from ucm.api import CacheApi, NamespaceHandle
from ucm.errors import BlockNotFoundError, CapacityError, InvalidArgumentError, UcmError
from ucm.types import NamespaceId, TierKind

from .blocks import chain, content, get, put


class PinHarness(Protocol):
    """What these tests need of `CacheHarness`."""

    max_leases_per_session: int

    def open_session(self) -> CacheApi:
        """A fresh session on the same store."""

    def pass_time(self, seconds: float) -> None:
        """Make that much time pass on the store's clock."""

    def leased_bytes(self) -> int:
        """Bytes that all leases pin now."""


def flood(cache: CacheApi, handle: NamespaceHandle, first_seed: int) -> None:
    """Store more than memory holds."""
    for seed in range(first_seed, first_seed + 6):
        put(cache, handle, chain(handle.id, 8, seed))
        assert cache.flush(timeout_s=5)


class PinTests:
    """The suite. `harness`, `cache` and `handle` are `CacheApiTests`'."""

    def test_a_pinned_prefix_stays_in_memory(
        self, harness: PinHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """Whatever else is stored; and is promoted for it if need be."""
        keys = chain(handle.id, 4)
        put(cache, handle, keys)
        assert cache.flush(timeout_s=5)
        flood(cache, handle, 100)
        assert cache.lookup(handle.id, keys).tiers == (TierKind.NVME,) * 4
        pin = cache.pin(handle.id, keys, timeout_s=5)
        assert pin.num_blocks == 4
        flood(cache, handle, 200)
        assert cache.lookup(handle.id, keys).tiers == (TierKind.MEMORY,) * 4
        assert get(cache, handle, keys) == [content(key) for key in keys]
        cache.release(pin.id)
        harness.pass_time(600)  # whatever the policy: by then new blocks are worth more
        flood(cache, handle, 300)
        assert cache.lookup(handle.id, keys).tiers == (TierKind.NVME,) * 4

    def test_only_what_is_cached_is_pinned(self, cache: CacheApi, handle: NamespaceHandle) -> None:
        """And the answer says how much that is."""
        keys = chain(handle.id, 4)
        put(cache, handle, keys[:2])
        assert cache.pin(handle.id, keys, timeout_s=5).num_blocks == 2
        assert cache.pin(handle.id, chain(handle.id, 2, 9), timeout_s=5).num_blocks == 0

    def test_a_pin_outlives_other_leases_and_ends_at_its_own_time(
        self, harness: PinHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """Two pins of one block hold it until the later one has ended."""
        keys = chain(handle.id, 3)
        put(cache, handle, keys)
        size = handle.layout.block_bytes
        short = cache.pin(handle.id, keys, hold_s=100, timeout_s=5)
        long = cache.pin(handle.id, keys[:2], hold_s=1000, timeout_s=5)
        assert (short.hold_s, long.hold_s) == (100, 1000)
        harness.pass_time(90)
        assert harness.leased_bytes() == 5 * size
        harness.pass_time(11)
        assert harness.leased_bytes() == 2 * size
        harness.pass_time(900)
        assert harness.leased_bytes() == 0

    def test_a_pin_has_a_longest_time(self, cache: CacheApi, handle: NamespaceHandle) -> None:
        """Whatever is asked for; and no nonsense."""
        keys = chain(handle.id, 1)
        put(cache, handle, keys)
        assert cache.pin(handle.id, keys, hold_s=1e9, timeout_s=5).hold_s == 4 * 3600
        for nonsense in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(InvalidArgumentError):
                cache.pin(handle.id, keys, hold_s=nonsense, timeout_s=5)

    def test_pins_take_half_of_the_memory_at_most(
        self, harness: PinHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """A refused one holds nothing; what is pinned already counts once."""
        keys = chain(handle.id, 12)
        put(cache, handle, keys)
        cache.pin(handle.id, keys[:6], timeout_s=5)
        cache.pin(handle.id, keys[:6], timeout_s=5)
        held = harness.leased_bytes()
        with pytest.raises(CapacityError):
            cache.pin(handle.id, keys, timeout_s=5)
        assert harness.leased_bytes() == held

    def test_pins_end_with_their_session(
        self, harness: PinHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """As every lease does."""
        keys = chain(handle.id, 3)
        put(cache, handle, keys)
        cache.pin(handle.id, keys, timeout_s=5)
        assert harness.leased_bytes() == 3 * handle.layout.block_bytes
        cache.close()
        assert harness.leased_bytes() == 0

    def test_pins_are_leases_and_leases_are_bounded(
        self, harness: PinHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """Of one session; another may still pin."""
        keys = chain(handle.id, 1)
        put(cache, handle, keys)
        for _ in range(harness.max_leases_per_session):
            cache.pin(handle.id, keys, timeout_s=5)
        with pytest.raises(CapacityError):
            cache.pin(handle.id, keys, timeout_s=5)

    def test_pins_do_not_cross_sessions_or_namespaces(
        self, harness: PinHarness, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """Another session can neither pin in a namespace that it has not opened nor unpin ours."""
        keys = chain(handle.id, 2)
        put(cache, handle, keys)
        pin = cache.pin(handle.id, keys, timeout_s=5)
        other = harness.open_session()
        with pytest.raises(BlockNotFoundError):
            other.pin(handle.id, keys, timeout_s=5)
        other.release(pin.id)
        other.complete_load(pin.id)
        assert harness.leased_bytes() == 2 * handle.layout.block_bytes
        with pytest.raises(UcmError):
            cache.complete_store(pin.id, {})
        with pytest.raises(BlockNotFoundError):
            cache.pin(NamespaceId(bytes(32)), keys, timeout_s=5)
        cache.release(pin.id)
        assert harness.leased_bytes() == 0
