"""Summaries through the whole store: kept, written, read without their blocks, computed."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ucm import summary_fills
from ucm.api import NamespaceHandle
from ucm.checksum import block_checksums
from ucm.config import MIB, Config, MemoryConfig, NvmeConfig, ServiceConfig, SummariesConfig
from ucm.embedded import EmbeddedCache
from ucm.errors import InvalidArgumentError
from ucm.hashing import NamespaceSpec, chain_keys
from ucm.kernels.summarize import summarize_blocks
from ucm.kernels.summary_record import decode_summary, encode_summary
from ucm.layer_reader import LayerReader, ReaderOptions
from ucm.layout import KvDtype, KvLayout
from ucm.manager import Manager
from ucm.reader_io import open_reader_io
from ucm.storage.format import HEADER_BYTES
from ucm.storage.summary_areas import SummaryAreas
from ucm.summary_fills import SummaryGrants
from ucm.testing.slab_pool import SlabPool, slabs_of
from ucm.testing.stores import wait_until
from ucm.types import (
    ROOT_KEY,
    BlockKey,
    LoadMode,
    LoadStatus,
    SessionId,
    StoreStatus,
    SummaryKind,
    SummaryStatus,
)

LAYOUT = KvLayout(
    num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=16, dtype=KvDtype.BFLOAT16
)
"""A codec saves a page of such blocks, where they fit it: compact and full slots are both used."""
SPEC = NamespaceSpec(layout=LAYOUT, model_id="summarised", weights_digest="1" * 64)
KIND = SummaryKind.GSA_K4
WAIT_S = 10.0


def block_of(key: BlockKey) -> bytes:
    """A block's keys and values: normal numbers that follow from its key."""
    chance = np.random.default_rng(list(key[:8]))
    shape = (LAYOUT.num_layers, LAYOUT.slab_bytes // 2)
    words = chance.standard_normal(shape, np.float32).view(np.uint32)
    slabs = (words >> 16).astype(np.uint16)  # bfloat16, rounded towards zero
    padding = bytes(LAYOUT.slab_stride_bytes - LAYOUT.slab_bytes)
    return b"".join(slab.tobytes() + padding for slab in slabs)


def summary_of(data: bytes, kind: SummaryKind = KIND) -> bytes:
    """The encoded summary that a client would send."""
    records = summarize_blocks(LAYOUT, kind, [data])[0]
    return encode_summary(LAYOUT, kind, records, block_checksums(LAYOUT, memoryview(data)))


class Store:
    """A manager, one session, and its namespace opened with a kind of summaries, or without."""

    def __init__(self, config: Config, kind: SummaryKind | None = KIND) -> None:
        self.manager = Manager(config)
        self.session: SessionId = self.manager.open_session("test")
        self.handle: NamespaceHandle = self.manager.open_namespace(self.session, SPEC, summary=kind)

    def keys(self, count: int) -> list[BlockKey]:
        return chain_keys(self.handle.id, list(range(count * 16)), 16)

    def put(self, keys: Sequence[BlockKey], summaries: Sequence[bytes] = ()) -> None:
        """Store a chain, with what it is given as summaries behind the blocks."""
        manager = self.manager
        grants = manager.prepare_store(self.session, self.handle.id, ROOT_KEY, keys)
        staging, checksums = manager.staging(self.session), {}
        for number, grant in enumerate(grants.slots):
            data = block_of(grant.key)
            staging.view(grant.offset, len(data))[:] = data
            checksums[grant.key] = block_checksums(LAYOUT, memoryview(data))
            if number < len(summaries):
                at = grant.offset + len(data)
                size = len(summaries[number])
                staging.view(at, size)[:] = summaries[number]
        done = manager.complete_store(self.session, grants.lease_id, checksums)
        assert set(done) == {StoreStatus.ACCEPTED}

    def ask(self, keys: Sequence[BlockKey], timeout_s: float = WAIT_S) -> SummaryGrants:
        return self.manager.summaries.await_summaries(
            self.session, self.handle.id, keys, timeout_s=timeout_s
        )

    def expect_all(self, keys: Sequence[BlockKey], kind: SummaryKind = KIND) -> None:
        """Every key has just the summary of its block."""
        grants = self.ask(keys)
        assert set(grants.statuses) == {SummaryStatus.READY}
        for index, key in enumerate(keys):
            view = grants.view(index)
            assert view is not None
            assert bytes(view) == summary_of(block_of(key), kind)
        self.manager.summaries.release(grants)

    def kept(self, source: str) -> float:
        return self.manager.metrics.value("ucm_summaries_kept_total", source=source)

    def read_bytes(self) -> float:
        return self.manager.metrics.value("ucm_io_bytes_total", tier="nvme", op="read")

    def close(self) -> None:
        assert self.manager.flush(timeout_s=WAIT_S)  # nothing may be under way at the check
        assert self.manager.check_integrity() == []
        assert self.manager.close()


def config_of(path: Path | None, *, memory_blocks: int = 64, codec: str = "raw") -> Config:
    return Config(
        service=ServiceConfig(staging_bytes=4 * MIB, drain_timeout_s=5.0),
        memory=MemoryConfig(capacity_bytes=memory_blocks * LAYOUT.block_bytes),
        nvme=NvmeConfig(
            path=path,
            capacity_bytes=8 * MIB,
            segment_bytes=1 * MIB,
            codec=codec,
            index_map_bytes=16 * MIB,
            commit_interval_s=0.0,
        ),
        summaries=SummariesConfig(capacity_bytes=1 * MIB, table_bytes=1 * MIB),
    )


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return config_of(tmp_path / "data")


@pytest.mark.parametrize("codec", ["raw", "bp-zstd"])
def test_a_clients_summaries_survive_a_restart_and_come_back_without_their_blocks(
    tmp_path: Path, codec: str
) -> None:
    config = config_of(tmp_path / "data", codec=codec)
    store = Store(config)
    keys = store.keys(8)
    store.put(keys, [summary_of(block_of(key)) for key in keys])
    assert store.kept("client") == 8
    store.expect_all(keys)
    assert store.manager.flush(timeout_s=WAIT_S)
    store.close()

    store = Store(config)
    store.expect_all(keys)
    assert store.kept("nvme") == 8
    assert store.kept("computed") == 0
    assert store.read_bytes() == 0, "no block was read for its summary"
    store.close()


def test_a_block_that_came_without_gets_its_summary_computed(config: Config) -> None:
    store = Store(config)
    keys = store.keys(5)
    store.put(keys)
    store.expect_all(keys)
    assert store.kept("computed") == 5
    store.close()


def test_a_promotion_brings_the_summary_along_or_has_it_computed(config: Config) -> None:
    store = Store(config, kind=None)
    keys = store.keys(4)
    store.put(keys)  # on NVMe without areas
    assert store.manager.flush(timeout_s=WAIT_S)
    store.close()

    store = Store(config)
    grants = store.ask(keys)
    assert set(grants.statuses) == {SummaryStatus.NO_SUMMARY}, "no block is fetched for a summary"
    store.manager.summaries.release(grants)
    lease = store.manager.prepare_load(store.session, store.handle.id, keys, timeout_s=WAIT_S)
    store.expect_all(keys)
    store.manager.complete_load(store.session, lease.lease_id)
    assert store.kept("computed") == 4
    store.close()


def test_summaries_of_another_content_version_or_kind_are_refused(config: Config) -> None:
    store = Store(config)
    keys = store.keys(4)
    right = [summary_of(block_of(key)) for key in keys]
    torn = bytearray(right[2])
    torn[-1] ^= 1
    other_kind = summary_of(block_of(keys[3]), SummaryKind.MEAN).ljust(len(right[3]), b"\0")
    store.put(keys, [right[1], right[0], bytes(torn), other_kind])
    assert store.manager.metrics.value("ucm_summaries_refused_total") == 4
    assert store.kept("client") == 0
    store.expect_all(keys)  # computed instead
    store.close()


def test_another_kind_than_the_disks_lives_in_memory_only(config: Config) -> None:
    store = Store(config)
    keys = store.keys(3)
    store.put(keys, [summary_of(block_of(key)) for key in keys])
    store.manager.open_namespace(store.session, SPEC, summary=SummaryKind.BOX)
    store.expect_all(keys, SummaryKind.BOX)
    assert store.manager.flush(timeout_s=WAIT_S)
    store.close()

    store = Store(config, SummaryKind.BOX)
    grants = store.ask(keys)
    assert set(grants.statuses) == {SummaryStatus.NO_SUMMARY}
    store.manager.summaries.release(grants)
    store.manager.open_namespace(store.session, SPEC, summary=KIND)
    store.expect_all(keys)
    store.close()


def test_a_key_that_nobody_stored_is_a_miss_and_no_kind_is_an_error(config: Config) -> None:
    store = Store(config)
    keys = store.keys(2)
    store.put(keys[:1])
    grants = store.ask(keys)
    assert grants.statuses == (SummaryStatus.READY, SummaryStatus.MISS)
    store.manager.summaries.release(grants)
    other = store.manager.open_session("other")
    store.manager.open_namespace(other, SPEC)
    with pytest.raises(InvalidArgumentError, match="without summaries"):
        store.manager.summaries.await_summaries(other, store.handle.id, keys, timeout_s=0)
    store.close()


def test_a_full_queue_drops_and_whoever_asks_later_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path / "data")
    config = replace(config, summaries=replace(config.summaries, max_queued_blocks=2))
    store = Store(config)
    may_go = threading.Event()

    def slow(*arguments: Any) -> Any:
        assert may_go.wait(WAIT_S)
        return summarize_blocks(*arguments)

    monkeypatch.setattr(summary_fills, "summarize_blocks", slow)
    keys = store.keys(8)
    store.put(keys)
    assert store.manager.metrics.value("ucm_summaries_dropped_total") >= 5
    grants = store.ask(keys, timeout_s=0)
    assert set(grants.statuses) == {SummaryStatus.NO_SUMMARY}
    store.manager.summaries.release(grants)
    may_go.set()
    for key in keys:
        store.expect_all([key])
    store.close()


def test_who_waits_is_let_go_when_the_process_ends(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(config)
    may_go, is_computing = threading.Event(), threading.Event()

    def held(*arguments: Any) -> Any:
        is_computing.set()
        assert may_go.wait(WAIT_S)
        return summarize_blocks(*arguments)

    monkeypatch.setattr(summary_fills, "summarize_blocks", held)
    keys = store.keys(1)
    store.put(keys)
    assert is_computing.wait(WAIT_S)
    answers: list[SummaryGrants] = []
    waiting = threading.Thread(target=lambda: answers.append(store.ask(keys, timeout_s=600)))
    waiting.start()
    wait_until(lambda: bool(store.manager.summaries._waits))
    store.manager.interrupt()
    waiting.join(WAIT_S)
    assert answers[0].statuses == (SummaryStatus.NO_SUMMARY,)
    store.manager.summaries.release(answers[0])
    may_go.set()
    assert store.manager.close()


def test_a_damaged_area_costs_the_summary_and_not_the_block(config: Config) -> None:
    store = Store(config)
    keys = store.keys(3)
    store.put(keys, [summary_of(block_of(key)) for key in keys])
    assert store.manager.flush(timeout_s=WAIT_S)
    store.close()
    assert config.nvme.path is not None
    (segment,) = config.nvme.path.rglob("*.seg")
    with segment.open("r+b") as file:
        file.seek(HEADER_BYTES + 300)  # in the records of the first slot's summary
        file.write(b"\xff\x00\xff")
    store = Store(config)
    grants = store.ask(keys)
    assert sorted(grants.statuses) == [SummaryStatus.NO_SUMMARY] + [SummaryStatus.READY] * 2
    store.manager.summaries.release(grants)
    lease = store.manager.prepare_load(store.session, store.handle.id, keys, timeout_s=WAIT_S)
    assert set(lease.statuses) == {LoadStatus.READY}
    store.manager.complete_load(store.session, lease.lease_id)
    store.expect_all(keys)
    assert store.kept("computed") == 1
    store.close()


def test_a_read_that_fails_in_an_unforeseen_way_keeps_nobody_waiting(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(config)
    keys = store.keys(3)
    store.put(keys, [summary_of(block_of(key)) for key in keys])
    store.close()
    store = Store(config)

    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(SummaryAreas, "read", no_memory)
        started_s = time.monotonic()
        grants = store.ask(keys, timeout_s=WAIT_S)
    assert time.monotonic() - started_s < WAIT_S / 2
    assert set(grants.statuses) == {SummaryStatus.NO_SUMMARY}
    store.manager.summaries.release(grants)
    assert not store.manager.summaries._reading
    store.close()


def test_summaries_of_blocks_that_only_memory_has() -> None:
    store = Store(config_of(None))
    keys = store.keys(2)
    store.put(keys, [summary_of(block_of(keys[0]))])
    store.expect_all(keys)
    assert (store.kept("client"), store.kept("computed")) == (1, 1)
    store.close()


def test_a_lossy_codec_never_leaves_a_summary_of_what_was_lost(tmp_path: Path) -> None:
    config = config_of(tmp_path / "data", codec="int8")
    lossy = replace(SPEC, accepts_lossy=True)
    manager = Manager(config)
    session = manager.open_session("test")
    handle = manager.open_namespace(session, lossy, summary=KIND)
    store = Store.__new__(Store)
    store.manager, store.session, store.handle = manager, session, handle
    keys = store.keys(4)
    store.put(keys, [summary_of(block_of(key)) for key in keys])
    assert manager.flush(timeout_s=WAIT_S)
    store.close()

    manager = Manager(config)
    session = manager.open_session("test")
    handle = manager.open_namespace(session, lossy, summary=KIND)
    store.manager, store.session, store.handle = manager, session, handle
    grants = store.ask(keys)
    assert set(grants.statuses) == {SummaryStatus.NO_SUMMARY}
    manager.summaries.release(grants)
    lease = manager.prepare_load(session, handle.id, keys, timeout_s=WAIT_S)
    grants = store.ask(keys)
    arena = manager.arena(session, handle.id)
    for index, offset in enumerate(lease.offsets):
        data = bytes(arena.view(offset // arena.slot_bytes))  # type: ignore[arg-type]
        assert data != block_of(keys[index])
        view = grants.view(index)
        assert view is not None
        assert bytes(view) == summary_of(data)
        sums = block_checksums(LAYOUT, memoryview(data))
        assert decode_summary(LAYOUT, view, sums) is not None
    manager.summaries.release(grants)
    manager.complete_load(session, lease.lease_id)
    store.close()


@pytest.mark.parametrize("codec", ["raw", "bp-zstd"])
@pytest.mark.parametrize("mode", LoadMode)
def test_layer_by_layer_loads_skip_the_areas_and_bring_summaries_along(
    tmp_path: Path, mode: LoadMode, codec: str
) -> None:
    config = config_of(tmp_path / "data", codec=codec)
    store = Store(config)
    keys = store.keys(6)
    store.put(keys, [summary_of(block_of(key)) for key in keys])
    assert store.manager.flush(timeout_s=WAIT_S)
    store.close()

    store = Store(config)
    with EmbeddedCache(store.manager, owns_manager=False) as cache:
        handle = cache.open_namespace(SPEC, summary=KIND)
        plan = cache.begin_load(handle.id, keys, mode=mode, timeout_s=WAIT_S)
        extents = [block.extent for block in plan.blocks if block.extent is not None]
        expected = 4096 if extents else 0
        assert codec != "raw" or bool(extents) == (mode is LoadMode.DIRECT)
        assert plan.summary_bytes == expected
        pool = SlabPool(LAYOUT, len(keys))
        io = open_reader_io()
        options = ReaderOptions(request_bytes=1)
        for each in (options, ReaderOptions()) if extents else (options,):
            reader = LayerReader(plan, LAYOUT, pool, io, each)
            reader.start()
            assert reader.wait_layer(LAYOUT.num_layers - 1, WAIT_S) == len(keys)
            assert reader.cancel(WAIT_S)
        io.close()
        for number, key in enumerate(keys):
            assert pool.block(number) == slabs_of(block_of(key), LAYOUT)
        cache.release(plan.id)
    store.expect_all(keys)
    if mode is LoadMode.MAPPED:
        assert store.kept("nvme") == 6
    assert store.kept("computed") == 0
    store.close()
