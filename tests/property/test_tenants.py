"""Random tenants on one real store: shares hold at every step, and no block is ever orphaned."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ucm.config import QuotaConfig
from ucm.testing.blocks import chain, content, get, put
from ucm.testing.nvme import quick_folder
from ucm.testing.tenants import BLOCK_BYTES, SEGMENT_BYTES, TenantStore, tenant_config

TENANTS = ("a", "b", "c")

QUOTAS = st.fixed_dictionaries(
    {
        "a": st.builds(
            QuotaConfig,
            memory_bytes=st.sampled_from([0, 12 * BLOCK_BYTES]),
            memory_reserved_bytes=st.integers(0, 10).map(lambda n: n * BLOCK_BYTES),
            nvme_bytes=st.sampled_from([0, 3 * SEGMENT_BYTES]),
            nvme_reserved_bytes=st.integers(0, 3).map(lambda n: n * SEGMENT_BYTES),
        ),
        "b": st.builds(
            QuotaConfig,
            memory_reserved_bytes=st.integers(0, 10).map(lambda n: n * BLOCK_BYTES),
            nvme_reserved_bytes=st.integers(0, 3).map(lambda n: n * SEGMENT_BYTES),
        ),
        "*": st.builds(
            QuotaConfig,
            memory_bytes=st.sampled_from([0, 6 * BLOCK_BYTES]),
            nvme_bytes=st.sampled_from([0, 2 * SEGMENT_BYTES]),
        ),
    }
)

STEPS = st.lists(
    st.tuples(
        st.sampled_from(TENANTS),
        st.sampled_from(["put", "put", "get", "flush", "leave"]),
        st.integers(0, 5),
        st.integers(1, 8),
    ),
    min_size=10,
    max_size=30,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(quota=QUOTAS, steps=STEPS)
def test_shares_hold_at_every_step(
    quota: dict[str, QuotaConfig], steps: list[tuple[str, str, int, int]]
) -> None:
    with quick_folder() as folder:
        run(folder, quota, steps)


def run(
    folder: Path, quota: dict[str, QuotaConfig], steps: list[tuple[str, str, int, int]]
) -> None:
    store = TenantStore(tenant_config(folder / "store", quota, blocks=24, segments=7))
    for tenant, action, seed, length in steps:
        store.clock.advance_us(1000)
        if action == "leave":
            store.leave(tenant)
            continue
        cache, handle = store.open(tenant)
        keys = chain(handle.id, length, seed)
        if action == "put":
            put(cache, handle, keys)
        elif action == "get":
            found = get(cache, handle, keys)
            assert found == [content(key) for key in keys[: len(found)]]
        else:
            cache.flush(timeout_s=5)
        assert store.check_shares() == []
    for cache, _ in store.caches.values():
        cache.flush(timeout_s=5)
    assert store.check_shares() == []
    assert store.manager.check_integrity() == []  # names every orphan
    store.close()
