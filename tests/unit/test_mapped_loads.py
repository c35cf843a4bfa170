"""Promotion layer by layer: order, sharing, cancelling, and a disk that lets it down."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.checksum import verify
from ucm.embedded import EmbeddedCache
from ucm.layer_reader import LayerReader, ReaderOptions
from ucm.layout import KvDtype, KvLayout
from ucm.load_plan import LoadPlan, LoadProgress
from ucm.reader_io import open_reader_io
from ucm.storage import layer_io
from ucm.testing.blocks import content, get, put, tiny_spec
from ucm.testing.extent_files import PAGE_LAYOUT, wait_for
from ucm.testing.gated_store import GatedStore, gated_config
from ucm.testing.nvme import quick_folder
from ucm.testing.slab_pool import SlabPool, slabs_of
from ucm.types import BlockKey, LoadMode, LoadStatus, SourceKind, TierKind

CODED_LAYOUT = KvLayout(
    num_layers=4, num_kv_heads=2, head_dim=64, block_tokens=32, dtype=KvDtype.BFLOAT16
)
LAYERS = PAGE_LAYOUT.num_layers
BLOCK = PAGE_LAYOUT.block_bytes
WAIT_S = 10.0


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path / "store"


@pytest.fixture
def store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GatedStore]:
    """Layers are read one by one."""
    monkeypatch.setattr(layer_io, "REQUEST_BYTES", 1)
    found = GatedStore(gated_config(folder))
    yield found
    found.io.open_gate()
    assert wait_for(lambda: not promotions(found))
    assert found.manager.check_integrity() == []
    found.close()


def promotions(store: GatedStore) -> int:
    return sum(len(each.promotions) for each in store.manager._state.namespaces)


def mapped(store: GatedStore, keys: list[BlockKey], cache: EmbeddedCache | None = None) -> LoadPlan:
    opened = cache or store.cache
    return opened.begin_load(store.handle.id, keys, mode=LoadMode.MAPPED, timeout_s=1)


def progress_of(plan: LoadPlan) -> LoadProgress:
    assert plan.progress is not None
    return plan.progress


def reader_of(store: GatedStore, plan: LoadPlan) -> tuple[LayerReader, SlabPool]:
    pool = SlabPool(PAGE_LAYOUT, len(plan.blocks))
    options = ReaderOptions(num_threads=2, read_ahead_layers=LAYERS)
    reader = LayerReader(plan, PAGE_LAYOUT, pool, open_reader_io(), options)
    reader.start()
    return reader, pool


def test_layers_come_in_order(store: GatedStore) -> None:
    """All blocks' slabs of one layer before the next one; nothing counts before it was read."""
    keys = store.on_disk(3)
    store.io.shut_gate()
    plan = mapped(store, keys)
    progress = progress_of(plan)
    assert [block.source for block in plan.blocks] == [SourceKind.PROMOTING] * 3
    assert not progress.wait(1, 0.0)
    for layer in range(LAYERS):
        assert progress.num_done() == 3 * layer
        store.io.let_pass(3)
        assert progress.wait(3 * (layer + 1), WAIT_S)
        assert progress.num_done() == 3 * (layer + 1)
    for rank, block in enumerate(plan.blocks):
        assert block.data is not None
        assert verify(PAGE_LAYOUT, block.data, progress.checksums(rank))
    assert store.cache.lookup(store.handle.id, keys).tiers == (TierKind.MEMORY,) * 3
    store.cache.complete_load(plan.id)


def test_a_load_that_ends_cancels_what_was_not_begun(store: GatedStore) -> None:
    """The slots go back; what is being read is waited for before they do."""
    keys = store.on_disk(3)
    store.io.shut_gate()
    plan = mapped(store, keys)
    store.io.let_pass(3)
    assert progress_of(plan).wait(3, WAIT_S)
    assert store.io.wait_arrived()
    store.cache.release(plan.id)
    assert (progress_of(plan).num_usable(), store.memory_blocks()) == (0, 3)
    store.io.open_gate()
    assert wait_for(lambda: not promotions(store))
    assert store.io.num_reads == 6
    assert store.memory_blocks() == 0
    assert get(store.cache, store.handle, keys) == [content(key, PAGE_LAYOUT) for key in keys]


def test_a_second_load_keeps_the_promotion_alive(store: GatedStore) -> None:
    """Of another session, begun in the middle: it starts from what is there."""
    keys = store.on_disk(3)
    store.io.shut_gate()
    first = mapped(store, keys)
    store.io.let_pass(3)
    assert progress_of(first).wait(3, WAIT_S)
    other = EmbeddedCache(store.manager, owns_manager=False)
    other.open_namespace(tiny_spec(layout=PAGE_LAYOUT))
    second = mapped(store, keys[:2], other)
    assert progress_of(second).num_done() == 2
    store.cache.release(first.id)
    store.io.open_gate()
    assert progress_of(second).wait(2 * LAYERS, WAIT_S)
    assert progress_of(second).num_usable() == 2
    assert store.io.num_reads <= 3 + 3 + 2 * (LAYERS - 2)
    other.close()


def test_a_plain_load_joins(store: GatedStore) -> None:
    """And gets whole blocks; the layered one's end takes nothing from it."""
    keys = store.on_disk(2)
    store.io.shut_gate()
    plan = mapped(store, keys)
    lease = store.cache.prepare_load(store.handle.id, keys, timeout_s=0.01)
    assert [block.status for block in lease.blocks] == [LoadStatus.TIMED_OUT] * 2
    store.io.open_gate()
    assert get(store.cache, store.handle, keys) == [content(key, PAGE_LAYOUT) for key in keys]
    store.cache.release(plan.id)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("code", [errno.EIO, errno.EBADMSG, errno.ENODATA])
def test_a_read_that_fails_ends_what_is_usable(store: GatedStore, layer: int, code: int) -> None:
    """At any layer; the reader gets the blocks in front of it, and nobody waits for the others."""
    keys = store.on_disk(4)
    store.fail_layer(keys, 2, layer, code)
    plan = mapped(store, keys)
    reader, pool = reader_of(store, plan)
    assert reader.wait_layer(LAYERS - 1, WAIT_S) == 2
    for index in range(2):
        assert pool.block(index) == slabs_of(content(keys[index], PAGE_LAYOUT), PAGE_LAYOUT)
    assert progress_of(plan).num_usable() in (0, 2)  # 0 once the reader has closed it
    assert (reader.cancel(WAIT_S), reader.corrupt_keys()) == (True, ())
    store.cache.complete_load(plan.id)
    assert store.cache.lookup(store.handle.id, keys).num_blocks == 2


def test_a_read_that_hangs_costs_no_more_than_the_wait(store: GatedStore) -> None:
    """The reader's target is its own at once: promotions are copied, not read, into it."""
    keys = store.on_disk(3)
    store.io.shut_gate()
    plan = mapped(store, keys)
    reader, pool = reader_of(store, plan)
    assert reader.wait_layer(0, 0.02) == 0
    assert reader.cancel(0.0) is True
    store.cache.complete_load(plan.id, reader.corrupt_keys())
    assert pool.is_untouched(0, 0)
    assert store.manager.status().leased_bytes == 0


def test_a_session_that_ends_in_the_middle(store: GatedStore) -> None:
    """Its area goes; the promotions are let go of; a reader of it finds nothing usable."""
    keys = store.on_disk(3)
    store.io.shut_gate()
    other = EmbeddedCache(store.manager, owns_manager=False)
    other.open_namespace(tiny_spec(layout=PAGE_LAYOUT))
    plan = mapped(store, keys, other)
    assert store.io.wait_arrived()
    other.close()
    assert progress_of(plan).wait(3 * LAYERS, WAIT_S)
    assert progress_of(plan).num_usable() == 0
    store.io.open_gate()
    assert wait_for(lambda: not promotions(store))
    assert store.memory_blocks() == 0


def test_no_room_in_the_progress_area(folder: Path) -> None:
    """What is in memory is answered as ever, the rest says so; room comes back with a lease."""
    config = gated_config(folder)
    transfer = dataclasses.replace(config.transfer, progress_bytes=4096)
    store = GatedStore(dataclasses.replace(config, transfer=transfer))
    keys = store.on_disk(12)
    assert len(get(store.cache, store.handle, keys[:2])) == 2
    store.io.shut_gate()
    plans = [mapped(store, keys) for _ in range(11)]
    for plan in plans[:-1]:
        assert plan.num_ready == 12
    assert [block.source for block in plans[-1].blocks[:2]] == [SourceKind.MEMORY] * 2
    assert [block.status for block in plans[-1].blocks[2:]] == [LoadStatus.NO_SPACE] * 10
    assert plans[-1].progress is None
    store.cache.release(plans[0].id)
    assert mapped(store, keys).num_ready == 12
    store.close()


def test_credit_and_memory_bound_what_is_promoted(folder: Path) -> None:
    """The leading blocks come, the others say NO_SPACE; nothing stays behind."""
    config = gated_config(folder)
    service = dataclasses.replace(config.service, inflight_bytes_per_session=5 * BLOCK)
    store = GatedStore(dataclasses.replace(config, service=service))
    keys = store.on_disk(12)
    store.io.shut_gate()
    plan = mapped(store, keys)
    assert plan.num_ready == 5
    assert [block.status for block in plan.blocks[5:]] == [LoadStatus.NO_SPACE] * 7
    assert store.manager.status().leased_bytes == 5 * BLOCK
    store.io.open_gate()
    assert progress_of(plan).wait(5 * LAYERS, WAIT_S)
    store.cache.complete_load(plan.id)
    assert mapped(store, keys).num_ready == 10
    store.close()


def test_encoded_blocks_come_whole_in_both_modes(folder: Path) -> None:
    """They cannot be read in place; progress counts them block by block."""
    config = gated_config(folder, CODED_LAYOUT)
    nvme = dataclasses.replace(config.nvme, codec="bp-zstd")
    store = GatedStore(dataclasses.replace(config, nvme=nvme), CODED_LAYOUT)
    half = CODED_LAYOUT.block_bytes // 2
    smooth = bytes(half) + bytes([64]) * half
    keys = store.on_disk(6, content_of=lambda key: smooth)
    for mode in LoadMode:
        plan = store.cache.begin_load(store.handle.id, keys, mode=mode, timeout_s=1)
        assert SourceKind.EXTENT not in [block.source for block in plan.blocks]
        pool = SlabPool(CODED_LAYOUT, 6)
        reader = LayerReader(plan, CODED_LAYOUT, pool, open_reader_io())
        reader.start()
        assert reader.wait_layer(CODED_LAYOUT.num_layers - 1, WAIT_S) == 6
        assert all(pool.block(index) == smooth for index in range(6))
        store.cache.complete_load(plan.id)
    store.close()


def test_a_block_that_does_not_compress_is_read_in_place(folder: Path) -> None:
    """It lies in a full slot, among others that are encoded."""
    config = gated_config(folder, CODED_LAYOUT)
    nvme = dataclasses.replace(config.nvme, codec="bp-zstd")
    store = GatedStore(dataclasses.replace(config, nvme=nvme), CODED_LAYOUT)
    keys = store.on_disk(3)
    plan = store.cache.begin_load(store.handle.id, keys, mode=LoadMode.DIRECT, timeout_s=1)
    assert [block.source for block in plan.blocks] == [SourceKind.EXTENT] * 3
    pool = SlabPool(CODED_LAYOUT, 3)
    reader = LayerReader(plan, CODED_LAYOUT, pool, open_reader_io())
    reader.start()
    assert reader.wait_layer(CODED_LAYOUT.num_layers - 1, WAIT_S) == 3
    assert [pool.block(i) for i in range(3)] == [content(key, CODED_LAYOUT) for key in keys]
    store.close()


def test_a_store_that_closes_in_the_middle_ends_its_promotions(folder: Path) -> None:
    store = GatedStore(gated_config(folder))
    keys = store.on_disk(3)
    store.io.shut_gate()
    plan = mapped(store, keys)
    assert store.io.wait_arrived()
    store.io.open_gate()
    store.close()
    assert progress_of(plan).wait(3 * LAYERS, WAIT_S)
    again = GatedStore(store.config)
    assert get(again.cache, again.handle, keys) == [content(key, PAGE_LAYOUT) for key in keys]
    put(again.cache, again.handle, keys)
    again.close()
