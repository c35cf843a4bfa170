"""What is written behind: admission, and what a flush waits for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from ucm.errors import ConfigError
from ucm.storage.nvme import NvmeTier
from ucm.storage.tier import IoStatus, SlotWrite
from ucm.testing.blocks import chain, content, get, put
from ucm.testing.nvme import quick_folder
from ucm.testing.stores import FakeStore, small_store_config
from ucm.testing.tenants import TenantStore, tenant_config
from ucm.types import StoreStatus


@pytest.fixture
def store() -> Iterator[FakeStore]:
    config = small_store_config()
    nvme = dataclasses.replace(config.nvme, admission="second-touch")
    made = FakeStore(dataclasses.replace(config, nvme=nvme))
    yield made
    assert made.manager.check_integrity() == []
    made.close()


def test_what_is_stored_once_is_not_written_and_no_flush_waits_for_it(store: FakeStore) -> None:
    keys = chain(store.handle.id, 4)
    put(store.cache, store.handle, keys)
    assert store.cache.flush(timeout_s=5)
    assert store.tier.keys() == set()
    assert store.metric("ucm_rejected_admissions_total") == 4
    assert store.manager.status().rejected_admissions == 4
    assert store.metric("ucm_dropped_writes_total", reason="orphan") == 0


def test_a_load_admits_what_it_used(store: FakeStore) -> None:
    keys = chain(store.handle.id, 4)
    put(store.cache, store.handle, keys)
    assert len(get(store.cache, store.handle, keys[:2])) == 2
    assert store.cache.flush(timeout_s=5)
    assert store.tier.keys() == set(keys[:2])
    store.drop_from_memory()
    assert get(store.cache, store.handle, keys) == [content(key) for key in keys[:2]]


def test_a_load_from_the_middle_takes_all_ancestors_along(store: FakeStore) -> None:
    keys = chain(store.handle.id, 4)
    put(store.cache, store.handle, keys)
    get(store.cache, store.handle, keys[2:3])
    assert store.cache.flush(timeout_s=5)
    assert store.tier.keys() == set(keys[:3])


def test_a_second_offer_admits(store: FakeStore) -> None:
    keys = chain(store.handle.id, 3)
    put(store.cache, store.handle, keys)
    assert put(store.cache, store.handle, keys) == (StoreStatus.PRESENT,) * 3
    assert store.cache.flush(timeout_s=5)
    assert store.tier.keys() == set(keys)


def test_a_pin_admits(store: FakeStore) -> None:
    keys = chain(store.handle.id, 3)
    put(store.cache, store.handle, keys)
    store.cache.pin(store.handle.id, keys[:2], timeout_s=5)
    assert store.cache.flush(timeout_s=5)
    assert store.tier.keys() == set(keys[:2])


def test_a_block_that_memory_had_forgotten_is_admitted_when_it_is_stored_again(
    store: FakeStore,
) -> None:
    keys = chain(store.handle.id, 4)
    put(store.cache, store.handle, keys)
    for seed in range(1, 6):
        put(store.cache, store.handle, chain(store.handle.id, 4, seed))
    assert store.cache.lookup(store.handle.id, keys).num_blocks < 4
    put(store.cache, store.handle, keys)
    assert store.cache.flush(timeout_s=5)
    assert store.tier.keys() >= set(keys)


def test_a_touch_long_ago_does_not_count(store: FakeStore) -> None:
    keys = chain(store.handle.id, 2)
    put(store.cache, store.handle, keys)
    store.clock.advance_us(3_700 * 1_000_000)
    get(store.cache, store.handle, keys)
    assert store.cache.flush(timeout_s=5)
    assert store.tier.keys() == set()
    get(store.cache, store.handle, keys)
    assert store.cache.flush(timeout_s=5)
    assert store.tier.keys() == set(keys)


def test_what_is_used_while_its_write_waits_is_written_once(store: FakeStore) -> None:
    keys = chain(store.handle.id, 2)
    put(store.cache, store.handle, keys)
    store.disk.faults.writes_may_go.clear()
    for _ in range(4):
        get(store.cache, store.handle, keys)
    store.disk.faults.writes_may_go.set()
    assert store.cache.flush(timeout_s=5)
    get(store.cache, store.handle, keys)
    assert store.cache.flush(timeout_s=5)
    assert sum(store.tier.write_batches) == 2


def test_an_unknown_admission_is_refused() -> None:
    config = small_store_config()
    nvme = dataclasses.replace(config.nvme, admission="sometimes")
    with pytest.raises(ConfigError, match="always, second-touch"):
        FakeStore(dataclasses.replace(config, nvme=nvme))


def test_by_default_everything_is_written() -> None:
    store = FakeStore()
    keys = chain(store.handle.id, 3)
    put(store.cache, store.handle, keys)
    assert store.cache.flush(timeout_s=5)
    assert store.tier.keys() == set(keys)
    assert store.manager.status().rejected_admissions == 0
    store.close()


def use(store: TenantStore, seed: int, *, by_probe: bool) -> None:
    """Load a chain until it would be written, and offer another one to a disk that is probed."""
    cache, handle = store.open("")
    for _ in range(2):  # so small a store remembers only some touches
        get(cache, handle, chain(handle.id, 4, seed))
    cache.flush(timeout_s=5)
    if by_probe:
        store.clock.advance_us(6_000_000)
        put(cache, handle, chain(handle.id, 4, 100 + seed))
        get(cache, handle, chain(handle.id, 4, 100 + seed))
        cache.flush(timeout_s=5)


@pytest.mark.parametrize("by_probe", [False, True])
def test_a_disk_that_fails_writes_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch, *, by_probe: bool
) -> None:
    """Second touch: each load asked for a write, and each write that failed had made room first.

    So did the stores that are let through as probes.
    """
    with quick_folder() as folder:
        config = tenant_config(folder / "store", {}, blocks=200)
        nvme = dataclasses.replace(config.nvme, admission="second-touch")
        store = TenantStore(dataclasses.replace(config, nvme=nvme))
        cache, handle = store.open("")
        for seed in range(10):
            put(cache, handle, chain(handle.id, 4, seed))
            if seed < 4:
                get(cache, handle, chain(handle.id, 4, seed))
        assert cache.flush(timeout_s=5)
        durable = store.manager.status().namespaces[0].nvme_blocks
        assert durable == 16

        def fail(_tier: NvmeTier, items: list[SlotWrite]) -> list[IoStatus]:
            return [IoStatus.IO_ERROR] * len(items)

        with monkeypatch.context() as patch:
            patch.setattr(NvmeTier, "write", fail)
            for seed in range(4, 10):
                use(store, seed, by_probe=by_probe)
        assert store.manager.status().namespaces[0].nvme_blocks == durable
        store.close()
