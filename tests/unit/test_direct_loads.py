"""Blocks that clients read in place: what keeps them there, and what shows when nothing does."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.layer_reader import LayerReader, ReaderOptions
from ucm.load_plan import LoadPlan
from ucm.shrink import Shrinking
from ucm.storage.nvme import NvmeTier
from ucm.testing.blocks import chain, content, put
from ucm.testing.extent_files import PAGE_LAYOUT, GatedIo, wait_for
from ucm.testing.gated_store import GatedStore, gated_config
from ucm.testing.nvme import quick_folder
from ucm.testing.slab_pool import SlabPool
from ucm.types import BlockKey, LoadMode, LoadStatus, SourceKind, TierKind

LAYERS = PAGE_LAYOUT.num_layers
WAIT_S = 10.0
ONE_BY_ONE = ReaderOptions(request_bytes=1, num_threads=1, read_ahead_layers=LAYERS)


@pytest.fixture
def store() -> Iterator[GatedStore]:
    with quick_folder() as folder:
        found = GatedStore(gated_config(folder / "store"))
        yield found
        assert found.manager.check_integrity() == []
        found.close()


def direct(store: GatedStore, keys: list[BlockKey]) -> LoadPlan:
    return store.cache.begin_load(store.handle.id, keys, mode=LoadMode.DIRECT, timeout_s=1)


def tier_of(store: GatedStore) -> NvmeTier:
    (namespace,) = store.manager._state.namespaces
    assert isinstance(namespace.nvme, NvmeTier)
    return namespace.nvme


def flood(store: GatedStore, num_chains: int) -> None:
    """Store so much that the disk has to evict."""
    for seed in range(100, 100 + num_chains):
        put(store.cache, store.handle, chain(store.handle.id, 24, seed))
        assert store.cache.flush(timeout_s=10)


def test_a_lease_keeps_blocks_in_their_slots(store: GatedStore) -> None:
    """However much comes after them; without a lease they go."""
    keys = store.on_disk(6)
    plan = direct(store, keys)
    flood(store, 14)
    assert store.cache.lookup(store.handle.id, keys).tiers == (TierKind.NVME,) * 6
    places = [(block.extent.slot, block.extent.generation) for block in plan.blocks if block.extent]
    again = direct(store, keys)
    assert [(b.extent.slot, b.extent.generation) for b in again.blocks if b.extent] == places
    store.cache.release(again.id)
    store.cache.release(plan.id)
    flood(store, 14)
    assert store.cache.lookup(store.handle.id, keys).num_blocks == 0


def test_the_shrinker_leaves_blocks_that_are_read_in_place(store: GatedStore) -> None:
    """A segment with one of them stays until the lease is over."""
    keys = store.on_disk(6)
    state = store.manager._state
    assert store.manager._write_behind is not None
    shrinking = Shrinking(state, store.manager._write_behind._delete)
    (namespace,) = state.namespaces
    assert tier_of(store).shrinker is not None
    entries = tier_of(store).shrinker.blocks_in(0)
    assert len(entries) == 6
    plan = direct(store, keys[:2])
    assert shrinking._move(namespace, entries) is False
    assert store.cache.lookup(store.handle.id, keys).num_blocks == 6
    store.cache.release(plan.id)
    assert shrinking._move(namespace, entries) is True
    assert store.cache.lookup(store.handle.id, keys).num_blocks == 6


def test_a_block_on_the_move_has_no_place(store: GatedStore) -> None:
    """It, and what is behind it, is answered as if there were no room."""
    keys = store.on_disk(4)
    (namespace,) = store.manager._state.namespaces
    row = namespace.index.find(keys[2])
    namespace.index.begin_flight(row, 2)
    for mode in LoadMode:
        plan = store.cache.begin_load(store.handle.id, keys, mode=mode, timeout_s=1)
        assert [block.status for block in plan.blocks[2:]] == [LoadStatus.NO_SPACE] * 2
        assert plan.num_ready == 2
        store.cache.release(plan.id)
    namespace.index.end_flight(row, 2)


@pytest.mark.parametrize("layers_before", [0, 1, 3])
def test_slots_that_are_reused_under_a_slow_reader_are_noticed(
    store: GatedStore, layers_before: int
) -> None:
    """The lease runs out and other blocks take the place: nothing of them counts as ours."""
    keys = store.on_disk(3)
    plan = direct(store, keys)
    slots = {block.extent.slot for block in plan.blocks if block.extent is not None}
    io, pool = GatedIo(), SlabPool(PAGE_LAYOUT, 3)
    reader = LayerReader(plan, PAGE_LAYOUT, pool, io, ONE_BY_ONE)
    reader.start()
    io.let_pass(3 * layers_before)
    if layers_before:
        assert reader.wait_layer(layers_before - 1, WAIT_S) == 3
    store.clock.advance_us(int((plan.timeout_s + 1) * 1e6))
    flood(store, 14)
    assert store.cache.lookup(store.handle.id, keys).num_blocks == 0
    later = direct(store, chain(store.handle.id, 24, 113))
    assert later.num_ready == 24
    used = {entry.slot for entry in tier_of(store).entries()}
    assert slots <= used
    io.open_gate()
    assert reader.wait_layer(LAYERS - 1, WAIT_S) == 0
    assert reader.corrupt_keys()
    assert reader.cancel(WAIT_S)
    store.cache.complete_load(plan.id, reader.corrupt_keys())
    store.cache.release(later.id)


@pytest.mark.parametrize("fault", ["shrunk", "punched", "quarantined"])
def test_a_segment_that_goes_bad_under_a_lease(store: GatedStore, fault: str) -> None:
    """Reads of it fail by header, checksum or length; nobody dies of it."""
    keys = store.on_disk(3)
    plan = direct(store, keys)
    (path,) = (store.config.nvme.path or Path()).rglob("*.seg")
    if fault == "shrunk":
        os.truncate(path, 4096)
    elif fault == "punched":
        path.write_bytes(bytes(path.stat().st_size))
    else:
        tier_of(store)._retire(0)
    pool = SlabPool(PAGE_LAYOUT, 3)
    io = GatedIo()
    io.open_gate()
    reader = LayerReader(plan, PAGE_LAYOUT, pool, io, ONE_BY_ONE)
    reader.start()
    expected = 3 if fault == "quarantined" else 0  # what lies there is still right
    assert reader.wait_layer(LAYERS - 1, WAIT_S) == expected
    assert reader.cancel(WAIT_S)
    store.cache.complete_load(plan.id, reader.corrupt_keys())
    after = direct(store, keys)
    if fault == "quarantined":
        assert [block.source for block in after.blocks] == [SourceKind.PROMOTING] * 3
        progress = after.progress
        assert progress is not None
        assert progress.wait(3 * LAYERS, WAIT_S)
        assert progress.num_usable() == 0
        assert wait_for(lambda: not store.cache.lookup(store.handle.id, keys).num_blocks)
    else:
        assert after.num_ready == 0
        os.truncate(path, store.config.nvme.segment_bytes)
    store.cache.release(after.id)


def test_a_sick_disk_does_not_hold_up_a_report(store: GatedStore) -> None:
    """The daemon looks for itself, on another thread; the lease pins the blocks until then."""
    keys = store.on_disk(2)
    plan = direct(store, keys)
    store.io.shut_gate()
    store.cache.complete_load(plan.id, keys[:1])
    (namespace,) = store.manager._state.namespaces
    assert namespace.in_place
    store.io.open_gate()
    assert wait_for(lambda: not namespace.in_place)
    assert store.cache.lookup(store.handle.id, keys).num_blocks == 2


def test_reads_obey_the_limit_of_the_store(store: GatedStore) -> None:
    """Clients are told what it is."""
    assert store.handle.max_read_bytes_per_s == 0
    nvme = dataclasses.replace(store.config.nvme, max_read_bytes_per_s=5 << 20)
    store.config = dataclasses.replace(store.config, nvme=nvme)
    keys = store.on_disk(2)
    assert store.handle.max_read_bytes_per_s == 5 << 20
    plan = direct(store, keys)
    pool = SlabPool(PAGE_LAYOUT, 2)
    reader = LayerReader(plan, PAGE_LAYOUT, pool, store.io)
    reader.start()
    assert reader.wait_layer(LAYERS - 1, WAIT_S) == 2
    assert pool.block(0) == content(keys[0], PAGE_LAYOUT)
    store.cache.complete_load(plan.id)
