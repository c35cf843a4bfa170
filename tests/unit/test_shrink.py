"""Segments that are given back: a lowered capacity, a lowered quota, and a neighbour in need."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.config import Config, QuotaConfig
from ucm.errors import TierUnavailableError
from ucm.eviction import RowView
from ucm.eviction_s3fifo import S3FifoPolicy
from ucm.shrink import BLOCKS_PER_MOVE, Shrinking
from ucm.storage.nvme import NvmeTier
from ucm.storage.shrink import Shrinker
from ucm.storage.tier import ReadOutcome, SlotRead, TierEntry
from ucm.testing.blocks import chain, content, get, put
from ucm.testing.nvme import quick_folder
from ucm.testing.stores import wait_until
from ucm.testing.tenants import SEGMENT_BYTES, SLOT_BYTES, TenantStore, tenant_config
from ucm.types import BlockKey, TierKind


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path / "store"


def disk_bytes(folder: Path) -> int:
    """What the file system says that all segments take."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*.seg"))


def fill(store: TenantStore, tenant: str, num_chains: int = 8) -> list[list[BlockKey]]:
    cache, handle = store.open(tenant)
    chains = [chain(handle.id, 4, seed) for seed in range(num_chains)]
    for keys in chains:
        store.clock.advance_us(1_000)
        put(cache, handle, keys)
        assert cache.flush(timeout_s=5)
    return chains


def cached(store: TenantStore, tenant: str, chains: list[list[BlockKey]]) -> list[int]:
    """Blocks of each chain that can be loaded, each verified."""
    cache, handle = store.open(tenant)
    found = []
    for keys in chains:
        blocks = get(cache, handle, keys)
        assert blocks == [content(key) for key in keys[: len(blocks)]]
        found.append(len(blocks))
    return found


def reopened(store: TenantStore, config: Config) -> TenantStore:
    store.close()
    return TenantStore(config)


def with_segments(config: Config, segments: int) -> Config:
    nvme = dataclasses.replace(config.nvme, capacity_bytes=segments * SEGMENT_BYTES)
    return dataclasses.replace(config, nvme=nvme)


def with_holes(store: TenantStore, chains: list[list[BlockKey]]) -> list[list[BlockKey]]:
    """Delete all but the first block of each chain from tenant a's segments; what is left."""
    found = store.manager._state.namespaces.get_locked(store.open("a")[1].id)
    assert found is not None
    assert found.nvme is not None
    by_key = {entry.key: entry.slot for entry in found.nvme.entries()}
    kept = [keys[:1] for keys in chains if keys[0] in by_key]
    for keys in chains:
        if keys[0] in by_key:
            found.nvme.delete([(by_key[key], key) for key in keys[1:] if key in by_key])
    return kept


def settled(store: TenantStore, tenant: str, held_bytes: int) -> None:
    store.open(tenant)
    wait_until(lambda: store.held_bytes()[TierKind.NVME].get(tenant, 0) <= held_bytes)
    wait_until(lambda: store.manager.status().write_queue_blocks == 0)


def test_a_lowered_capacity_gives_disk_space_back_at_opening(folder: Path) -> None:
    store = TenantStore(tenant_config(folder, {}, segments=8))
    chains = fill(store, "a")
    assert disk_bytes(folder) >= 7 * SEGMENT_BYTES
    store = reopened(store, with_segments(store.config, 3))
    settled(store, "a", 3 * SEGMENT_BYTES)
    assert disk_bytes(folder) <= 3 * SEGMENT_BYTES + 3 * 4096
    assert store.manager.check_integrity() == []
    assert store.manager.metrics.value("ucm_released_segments_total") >= 4
    found = cached(store, "a", chains)
    assert found[-1] == 4, "the last ones used stay"
    assert sum(found) >= 9
    again = reopened(store, with_segments(store.config, 8))  # and it may grow again
    chains = fill(again, "a")
    assert sum(cached(again, "a", chains)) >= 28
    assert again.manager.check_integrity() == []
    again.close()


def test_what_fits_is_moved_and_not_evicted(folder: Path) -> None:
    store = TenantStore(tenant_config(folder, {}, segments=8))
    chains = fill(store, "a")
    kept = with_holes(store, chains)
    store = reopened(store, with_segments(store.config, 2))
    settled(store, "a", 2 * SEGMENT_BYTES)
    assert cached(store, "a", kept) == [1] * len(kept)
    assert store.manager.metrics.value("ucm_evicted_blocks_total", tier="nvme") == 0
    assert store.manager.check_integrity() == []
    store.close()


def test_a_block_that_is_moved_has_not_left_for_its_policy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3-FIFO would send it back to the small queue, although it had come back from the ghosts."""
    left: list[BlockKey] = []
    removed = S3FifoPolicy.removed

    def watch(policy: S3FifoPolicy, row: int, view: RowView) -> None:
        left.append(view.key(row))
        removed(policy, row, view)

    config = tenant_config(folder, {}, segments=8)
    config = dataclasses.replace(config, nvme=dataclasses.replace(config.nvme, policy="s3-fifo"))
    store = TenantStore(config)
    kept = with_holes(store, fill(store, "a"))
    monkeypatch.setattr(S3FifoPolicy, "removed", watch)
    store = reopened(store, with_segments(store.config, 2))
    settled(store, "a", 2 * SEGMENT_BYTES)
    assert cached(store, "a", kept) == [1] * len(kept)
    assert left == []
    store.close()


def test_a_lowered_quota_shrinks_only_its_tenant(folder: Path) -> None:
    store = TenantStore(tenant_config(folder, {}, segments=8))
    mine, theirs = fill(store, "a", 4), fill(store, "b", 3)
    before = store.held_bytes()[TierKind.NVME]["b"]
    quota = {"a": QuotaConfig(nvme_bytes=2 * SEGMENT_BYTES)}
    store = reopened(store, dataclasses.replace(store.config, quota=quota))
    settled(store, "a", 2 * SEGMENT_BYTES)
    store.open("b")
    assert store.held_bytes()[TierKind.NVME]["b"] == before
    assert cached(store, "b", theirs) == [4] * 3
    assert cached(store, "a", mine)[-1] == 4
    assert store.check_shares() == []
    store.close()


def test_a_neighbour_in_need_gets_its_part(folder: Path) -> None:
    store = TenantStore(tenant_config(folder, {}, blocks=64, segments=8))
    fill(store, "a", 8)
    assert store.held_bytes()[TierKind.NVME]["a"] == 7 * SEGMENT_BYTES  # the watermark
    chains = fill(store, "b", 8)
    held = store.held_bytes()[TierKind.NVME]
    assert held == {"a": 4 * SEGMENT_BYTES, "b": 4 * SEGMENT_BYTES}
    assert sum(cached(store, "b", chains)) >= 14
    fill(store, "a", 8)
    assert store.held_bytes()[TierKind.NVME] == held, "it does not swing back"
    assert store.manager.check_integrity() == []
    assert not [line for line in store.manager.status().problems if "disk space" in line]
    store.close()


def test_a_neighbours_reservation_is_not_asked_for(folder: Path) -> None:
    quota = {"a": QuotaConfig(nvme_reserved_bytes=8 * SEGMENT_BYTES)}
    store = TenantStore(tenant_config(folder, quota, blocks=64, segments=8))
    fill(store, "a", 8)
    cache, handle = store.open("b")
    put(cache, handle, chain(handle.id, 4))
    cache.flush(timeout_s=5)
    assert store.held_bytes()[TierKind.NVME] == {"a": 7 * SEGMENT_BYTES, "b": 0}
    assert any("gets no disk space" in line for line in store.manager.status().problems)
    store.close()


def test_a_block_that_a_load_reads_now_is_not_moved(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The segment stays as it is and is asked for again later."""
    store = TenantStore(tenant_config(folder, {}, segments=4))
    chains = fill(store, "a", 3)
    store = reopened(store, store.config)
    cache, handle = store.open("a")
    read, entered, go_on = NvmeTier.read, threading.Event(), threading.Event()

    def slow(tier: NvmeTier, items: list[SlotRead]) -> list[ReadOutcome]:
        entered.set()
        assert go_on.wait(10)
        return read(tier, items)

    with monkeypatch.context() as patch:
        patch.setattr(NvmeTier, "read", slow)
        assert cache.prefetch(handle.id, chains[2]) == 4
        assert entered.wait(10)
        state = store.manager._state
        found = state.namespaces.get_locked(handle.id)
        assert found is not None
        assert found.nvme is not None
        assert store.manager._write_behind is not None
        shrinking = Shrinking(state, store.manager._write_behind._delete)
        assert not shrinking._shrink(found)
        assert found.nvme.shrinker is not None
        assert found.nvme.shrinker.num_free_slots == 4, "nothing is withdrawn any more"
        go_on.set()
    assert cached(store, "a", chains[2:]) == [4]
    assert not shrinking._shrink(found), "not so soon again"
    store.clock.advance_us(6_000_000)
    assert shrinking._shrink(found)
    assert cached(store, "a", chains[2:]) == [4]
    assert store.held_bytes()[TierKind.NVME]["a"] == 2 * SEGMENT_BYTES
    store.close()


def test_unreadable_blocks_are_lost_and_do_not_hold_the_segment(folder: Path) -> None:
    store = TenantStore(tenant_config(folder, {}, segments=4))
    chains = fill(store, "a", 3)
    store.close()
    for path in sorted(folder.rglob("*.seg")):
        data = bytearray(path.read_bytes())
        data[SEGMENT_BYTES // 4 + 4096 + 10] ^= 1  # the second slot's first slab
        path.write_bytes(data)
    store = TenantStore(with_segments(store.config, 1))
    settled(store, "a", SEGMENT_BYTES)
    cached(store, "a", chains)  # asserts that every byte is right
    assert store.manager.check_integrity() == []
    assert disk_bytes(folder) <= SEGMENT_BYTES + 4096
    store.close()


def test_a_move_that_fails_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TenantStore(tenant_config(folder, {}, segments=4))
    chains = fill(store, "a", 3)
    store.close()

    def fail(_tier: NvmeTier, items: list[SlotRead]) -> list[ReadOutcome]:
        raise OSError(5, f"injected for {len(items)}")

    store = TenantStore(with_segments(store.config, 2))
    with monkeypatch.context() as patch:
        patch.setattr(NvmeTier, "read", fail)
        store.open("a")
        wait_until(lambda: store.manager.status().write_queue_blocks == 0)
    assert store.held_bytes()[TierKind.NVME]["a"] == 3 * SEGMENT_BYTES
    assert store.manager.check_integrity() == []
    store.clock.advance_us(6_000_000)
    cache, handle = store.open("a")
    put(cache, handle, chain(handle.id, 1, 99))
    assert cache.flush(timeout_s=5)
    settled(store, "a", 2 * SEGMENT_BYTES)
    assert cached(store, "a", chains)[-1] == 4
    store.close()


def test_more_blocks_than_one_move_takes_leave_at_once(folder: Path) -> None:
    """What the first move freed in the segment must not take the next ones in."""
    slots = 5 * BLOCKS_PER_MOVE
    config = tenant_config(folder, {}, blocks=256)
    nvme = dataclasses.replace(
        config.nvme,
        segment_bytes=slots * SLOT_BYTES,
        capacity_bytes=3 * slots * SLOT_BYTES,
        high_watermark=1.0,
        low_watermark=0.99,
    )
    store = TenantStore(dataclasses.replace(config, nvme=nvme))
    chains = fill(store, "a", 3 * slots // 4)
    (found,) = store.manager._state.namespaces
    assert found.nvme is not None
    slot_of = {entry.key: entry.slot for entry in found.nvme.entries()}
    for number, keys in enumerate(chains):  # the first segment is the emptiest
        if number % 2 == 0 or (number == 1 and slot_of[keys[0]] < slots):
            found.nvme.delete([(slot_of[key], key) for key in keys])
    less = dataclasses.replace(nvme, capacity_bytes=2 * slots * SLOT_BYTES)
    store = reopened(store, dataclasses.replace(config, nvme=less))
    settled(store, "a", 2 * slots * SLOT_BYTES)
    assert store.manager.metrics.value("ucm_released_segments_total") == 1
    assert store.manager.metrics.value("ucm_evicted_blocks_total", tier="nvme") == 0
    assert cached(store, "a", chains)[3::2] == [4] * (len(chains) // 2 - 1)
    store.close()


def test_a_donor_that_cannot_give_may_be_closed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TenantStore(tenant_config(folder, {}, blocks=64, segments=8))
    fill(store, "a", 8)

    def fail(_shrinker: Shrinker, _segment: int) -> list[TierEntry]:
        raise TierUnavailableError("injected: the index cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(Shrinker, "blocks_in", fail)
        fill(store, "b", 4)
    store.leave("a")
    (donor,) = [found for found in store.manager._state.namespaces if found.tenant == "a"]
    assert donor.num_writing == 0
    assert donor.idle
    store.close()


def test_nothing_is_asked_for_while_the_disk_refuses(folder: Path) -> None:
    """A thousand empty commits a second, until the disk recovered, were the price."""
    store = TenantStore(tenant_config(folder, {}, segments=8))
    fill(store, "a")
    store = reopened(store, with_segments(store.config, 3))
    write_behind = store.manager._write_behind
    assert write_behind is not None
    write_behind._refuse("injected: the disk fails writes")
    _, handle = store.open("a")
    found = store.manager._state.namespaces.get_locked(handle.id)
    assert found is not None
    assert found.num_writing == 0
    write_behind._recover()
    cache, _ = store.open("a")
    put(cache, handle, chain(handle.id, 1, 99))
    settled(store, "a", 3 * SEGMENT_BYTES)
    store.close()
