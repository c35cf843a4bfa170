"""Layer by layer loads over a real daemon that is frozen, killed, or asked to be slow."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from ucm.api import NamespaceHandle
from ucm.client import RemoteCache, connect
from ucm.errors import UcmError
from ucm.layer_reader import LayerReader, ReaderOptions
from ucm.load_plan import LoadPlan
from ucm.reader_io import open_reader_io
from ucm.testing.blocks import chain, content, put, tiny_spec
from ucm.testing.daemon import SpawnedDaemon, short_folder, small_settings, spawned_daemon
from ucm.testing.slab_pool import SlabPool, slabs_of
from ucm.types import BlockKey, LoadMode, SourceKind, TierKind

NUM_BLOCKS = 12
LAST = 1
WAIT_S = 20.0
STALL_S = 1.0
"""More than a deadline of 0.1 s may cost on a busy machine, far less than a hang."""

SLOW = ["memory.capacity_bytes=256KiB", "nvme.max_read_bytes_per_s=64KiB"]
"""Room for 32 blocks, and a disk that takes an eighth of a second for each."""


@pytest.fixture
def daemon() -> Iterator[SpawnedDaemon]:
    with short_folder() as folder:
        settings = small_settings(folder)
        for setting in SLOW:
            settings += ["--set", setting]
        with spawned_daemon(settings, folder / "log") as found:
            yield found


@pytest.fixture
def cache(daemon: SpawnedDaemon) -> Iterator[RemoteCache]:
    with connect(daemon.socket_path, timeout_s=10) as found:
        yield found


@pytest.fixture
def handle(cache: RemoteCache) -> NamespaceHandle:
    return cache.open_namespace(tiny_spec())


@pytest.fixture
def keys(cache: RemoteCache, handle: NamespaceHandle) -> list[BlockKey]:
    """Of a chain that only NVMe has."""
    found = chain(handle.id, NUM_BLOCKS)
    put(cache, handle, found)
    assert cache.flush(timeout_s=20)
    for seed in (1, 2, 3):
        put(cache, handle, chain(handle.id, 16, seed))
        assert cache.flush(timeout_s=20)
    assert set(cache.lookup(handle.id, found).tiers) == {TierKind.NVME}
    return found


def begin(
    cache: RemoteCache, handle: NamespaceHandle, keys: list[BlockKey], mode: LoadMode
) -> tuple[LoadPlan, LayerReader, SlabPool]:
    plan = cache.begin_load(handle.id, keys, mode=mode, timeout_s=5)
    pool = SlabPool(handle.layout, len(keys))
    options = ReaderOptions(num_threads=2, request_bytes=1, read_ahead_layers=2)
    reader = LayerReader(plan, handle.layout, pool, open_reader_io(), options)
    reader.start()
    return plan, reader, pool


def check_blocks(keys: list[BlockKey], handle: NamespaceHandle, pool: SlabPool, count: int) -> None:
    for index in range(count):
        assert pool.block(index) == slabs_of(content(keys[index]), handle.layout)


def test_a_frozen_daemon_costs_a_mapped_load_its_deadline(
    daemon: SpawnedDaemon, cache: RemoteCache, handle: NamespaceHandle, keys: list[BlockKey]
) -> None:
    """What was promoted counts, the rest is computed; it goes on when the daemon does."""
    plan, reader, pool = begin(cache, handle, keys, LoadMode.MAPPED)
    assert plan.blocks[0].source is SourceKind.PROMOTING
    with daemon.frozen():
        start = time.monotonic()
        count = reader.wait_layer(LAST, 0.1)
        assert time.monotonic() - start < STALL_S
        assert count < len(keys)
        check_blocks(keys, handle, pool, count)
        assert reader.cancel(0.0)
    cache.complete_load(plan.id, reader.corrupt_keys())


def test_a_frozen_daemon_does_not_stop_direct_reads(
    daemon: SpawnedDaemon, cache: RemoteCache, handle: NamespaceHandle, keys: list[BlockKey]
) -> None:
    """The client reads the files itself; only the end of the lease needs the daemon."""
    assert handle.max_read_bytes_per_s == 64 << 10
    plan = cache.begin_load(handle.id, keys, mode=LoadMode.DIRECT, timeout_s=5)
    assert {block.source for block in plan.blocks} == {SourceKind.EXTENT}
    with daemon.frozen():
        pool = SlabPool(handle.layout, len(keys))
        reader = LayerReader(plan, handle.layout, pool, open_reader_io())
        start = time.monotonic()
        reader.start()
        assert reader.wait_layer(LAST, WAIT_S) == len(keys)
        num_bytes = len(keys) * handle.layout.block_bytes
        assert time.monotonic() - start >= 0.9 * num_bytes / handle.max_read_bytes_per_s - 0.02
        check_blocks(keys, handle, pool, len(keys))
        assert reader.cancel(WAIT_S)
    cache.complete_load(plan.id, reader.corrupt_keys())


@pytest.mark.parametrize("mode", LoadMode)
def test_a_daemon_that_dies_in_the_middle(
    daemon: SpawnedDaemon,
    cache: RemoteCache,
    handle: NamespaceHandle,
    keys: list[BlockKey],
    mode: LoadMode,
) -> None:
    """A mapped load ends where it is, soon; a direct one need not notice. Nothing is wrong."""
    plan, reader, pool = begin(cache, handle, keys, mode)
    daemon.kill()
    start = time.monotonic()
    count = reader.wait_layer(LAST, WAIT_S)
    assert time.monotonic() - start < WAIT_S / 2
    assert count == len(keys) if mode is LoadMode.DIRECT else count < len(keys)
    check_blocks(keys, handle, pool, count)
    assert reader.cancel(WAIT_S)
    with pytest.raises(UcmError):
        cache.complete_load(plan.id, reader.corrupt_keys())
