"""Tenants on one store: quotas, reservations, who makes way for whom, and what status says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.config import QuotaConfig
from ucm.embedded import EmbeddedCache
from ucm.errors import CapacityError, ConfigError
from ucm.manager import Manager
from ucm.testing.blocks import chain, content, get, put, tiny_spec
from ucm.testing.nvme import quick_folder
from ucm.testing.tenants import BLOCK_BYTES, SEGMENT_BYTES, TenantStore, tenant_config
from ucm.types import StoreStatus, TierKind

ACCEPTED = StoreStatus.ACCEPTED
RESERVED = QuotaConfig(
    memory_reserved_bytes=10 * BLOCK_BYTES, nvme_reserved_bytes=3 * SEGMENT_BYTES
)


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path / "store"


def flood(store: TenantStore, tenant: str, num_chains: int) -> None:
    cache, handle = store.open(tenant)
    for seed in range(num_chains):
        put(cache, handle, chain(handle.id, 8, 1000 + seed))
        cache.flush(timeout_s=5)


@pytest.mark.parametrize("b_comes", ["first", "last"])
def test_ten_times_the_load_of_one_leaves_the_reservation_of_another(
    folder: Path, b_comes: str
) -> None:
    store = TenantStore(tenant_config(folder, {"b": RESERVED}))
    if b_comes == "last":
        flood(store, "a", 40)
    cache, handle = store.open("b")
    keys = chain(handle.id, 9)
    assert put(cache, handle, keys) == (ACCEPTED,) * 9
    assert cache.flush(timeout_s=5)
    flood(store, "a", 40)
    assert cache.lookup(handle.id, keys).tiers == (TierKind.MEMORY,) * 9
    assert get(cache, handle, keys) == [content(key) for key in keys]
    assert store.check_shares() == []
    held = store.held_bytes()
    assert held[TierKind.MEMORY]["a"] <= 22 * BLOCK_BYTES
    assert held[TierKind.NVME] == {"a": 5 * SEGMENT_BYTES, "b": 3 * SEGMENT_BYTES}
    store.close()
    store = TenantStore(store.config)  # only what is on the disk
    flood(store, "a", 5)
    cache, handle = store.open("b")
    assert cache.lookup(handle.id, keys).tiers == (TierKind.NVME,) * 9
    assert get(cache, handle, keys) == [content(key) for key in keys]
    store.close()


def test_at_its_quota_a_tenant_evicts_its_own(folder: Path) -> None:
    quota = QuotaConfig(memory_bytes=10 * BLOCK_BYTES, nvme_bytes=3 * SEGMENT_BYTES)
    store = TenantStore(tenant_config(folder, {"*": quota, "b": QuotaConfig()}))
    cache, handle = store.open("b")
    keys = chain(handle.id, 9)
    put(cache, handle, keys)
    assert cache.flush(timeout_s=5)
    flood(store, "a", 20)
    flood(store, "c", 20)
    assert cache.lookup(handle.id, keys).tiers == (TierKind.MEMORY,) * 9
    held = store.held_bytes()
    assert held[TierKind.MEMORY] == dict.fromkeys("abc", 9 * BLOCK_BYTES)  # the watermark's
    assert held[TierKind.NVME]["a"] == 3 * SEGMENT_BYTES
    other, theirs = store.open("a")
    last = chain(theirs.id, 8, 1019)
    assert other.lookup(theirs.id, last).num_blocks == 8  # it is the old ones that went
    assert store.manager.check_integrity() == []
    store.close()


def test_the_namespaces_of_a_tenant_share_its_quota(folder: Path) -> None:
    store = TenantStore(tenant_config(folder, {"a": QuotaConfig(nvme_bytes=2 * SEGMENT_BYTES)}))
    flood(store, "a", 4)
    store.leave("a")
    cache = EmbeddedCache(store.manager, owns_manager=False)
    handle = cache.open_namespace(dataclasses.replace(tiny_spec("other"), tenant="a"))
    put(cache, handle, chain(handle.id, 8))
    assert cache.flush(timeout_s=5)
    assert cache.lookup(handle.id, chain(handle.id, 8)).num_blocks == 8
    assert store.check_shares() == []
    cache.close()
    store.close()


def test_an_idle_namespace_keeps_what_is_reserved_for_it(folder: Path) -> None:
    store = TenantStore(tenant_config(folder, {"b": RESERVED}))
    cache, handle = store.open("b")
    keys = chain(handle.id, 9)
    put(cache, handle, keys)
    assert cache.flush(timeout_s=5)
    store.leave("b")
    flood(store, "a", 40)
    cache, handle = store.open("b")
    assert cache.lookup(handle.id, keys).tiers == (TierKind.MEMORY,) * 9
    assert get(cache, handle, keys) == [content(key) for key in keys]
    store.close()


def test_who_gets_no_memory_is_named_in_status() -> None:
    store = TenantStore(tenant_config(None, {}))
    flood(store, "greedy", 10)
    cache, handle = store.open("late")
    assert StoreStatus.NO_SPACE in put(cache, handle, chain(handle.id, 8))
    problem = next(line for line in store.manager.status().problems if "gets no memory" in line)
    assert "'late'" in problem
    assert "[quota]" in problem
    store.leave("greedy")
    assert put(cache, handle, chain(handle.id, 8))[-1] is ACCEPTED
    assert store.manager.status().problems == ()
    store.close()


def test_status_says_what_is_held_and_allowed(folder: Path) -> None:
    quota = QuotaConfig(memory_bytes=20 * BLOCK_BYTES, nvme_reserved_bytes=SEGMENT_BYTES)
    store = TenantStore(tenant_config(folder, {"a": quota}))
    cache, handle = store.open("a")
    put(cache, handle, chain(handle.id, 3))
    assert cache.flush(timeout_s=5)
    (namespace,) = store.manager.status().namespaces
    assert namespace.tenant == "a"
    memory, nvme = namespace.shares
    assert (memory.held_bytes, memory.quota_bytes) == (3 * BLOCK_BYTES, 20 * BLOCK_BYTES)
    assert (nvme.held_bytes, nvme.reserved_bytes) == (SEGMENT_BYTES, SEGMENT_BYTES)
    store.close()


def test_a_quota_below_one_block_is_said_at_opening() -> None:
    store = TenantStore(tenant_config(None, {"a": QuotaConfig(memory_bytes=BLOCK_BYTES - 1)}))
    with pytest.raises(CapacityError, match="no room for one block"):
        store.open("a")
    store.close()


def test_quotas_that_cannot_be_kept_are_refused_without_a_loader() -> None:
    with pytest.raises(ConfigError, match="reserved"):
        Manager(tenant_config(None, {"a": QuotaConfig(memory_reserved_bytes=33 * BLOCK_BYTES)}))
