"""Pins and the life of the store: shutdown, corruption, two pins at once, status."""

from __future__ import annotations

import threading

import pytest

from ucm.errors import CapacityError, TierUnavailableError
from ucm.testing.blocks import chain, put
from ucm.testing.stores import FakeStore, wait_until
from ucm.types import TierKind


def test_status_and_the_gauge_count_each_block_once(store: FakeStore) -> None:
    keys = chain(store.handle.id, 4)
    put(store.cache, store.handle, keys)
    first = store.cache.pin(store.handle.id, keys, timeout_s=5)
    store.cache.pin(store.handle.id, keys[:2], timeout_s=5)
    size = store.handle.layout.block_bytes
    assert store.manager.status().namespaces[0].pinned_bytes == 4 * size
    assert store.metric("ucm_pinned_bytes") == 4 * size
    store.cache.release(first.id)
    assert store.manager.status().namespaces[0].pinned_bytes == 2 * size


def test_a_drain_ends_pins_and_refuses_new_ones(store: FakeStore) -> None:
    keys = chain(store.handle.id, 2)
    put(store.cache, store.handle, keys)
    store.cache.pin(store.handle.id, keys, timeout_s=5)
    assert store.manager.drain(timeout_s=5)
    assert store.manager.status().num_leases == 0
    with pytest.raises(TierUnavailableError):
        store.cache.pin(store.handle.id, keys, timeout_s=5)


def test_two_pins_that_race_for_the_last_room(store: FakeStore) -> None:
    """Both were told that there is room before they loaded; one of them is refused then."""
    chains = [chain(store.handle.id, 6, seed) for seed in (1, 2)]
    for keys in chains:
        put(store.cache, store.handle, keys)
    assert store.cache.flush(timeout_s=5)
    store.drop_from_memory()
    store.disk.faults.reads_may_go.clear()
    outcomes: list[object] = []

    def pin(number: int) -> None:
        try:
            outcomes.append(store.cache.pin(store.handle.id, chains[number], timeout_s=5))
        except CapacityError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=pin, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: store.manager.status().num_leases == 2)
    store.disk.faults.reads_may_go.set()
    for thread in threads:
        thread.join()
    assert sorted(type(each).__name__ for each in outcomes) == ["CapacityError", "PinLease"]
    assert store.manager.status().num_leases == 1
    assert store.manager.status().leased_bytes == 6 * store.handle.layout.block_bytes


def test_a_pin_that_waits_no_longer_pins_what_is_there(store: FakeStore) -> None:
    keys = chain(store.handle.id, 3)
    put(store.cache, store.handle, keys)
    assert store.cache.flush(timeout_s=5)
    store.drop_from_memory()
    store.disk.faults.reads_may_go.clear()
    pin = store.cache.pin(store.handle.id, keys, timeout_s=0.01)
    assert pin.num_blocks == 0
    store.disk.faults.reads_may_go.set()
    assert store.cache.pin(store.handle.id, keys, timeout_s=5).num_blocks == 3
    assert store.cache.lookup(store.handle.id, keys).tiers == (TierKind.MEMORY,) * 3
