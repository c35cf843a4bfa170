"""Limits on what is in service: refusals that say when to come again, partial loads, no hangs."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from ucm.client import RemoteCache, connect
from ucm.config import Config
from ucm.daemon import Daemon
from ucm.embedded import EmbeddedCache
from ucm.errors import CapacityError
from ucm.namespaces import TierFactory
from ucm.protos import cache_pb2 as pb
from ucm.testing.blocks import TINY_LAYOUT, chain, content, get, loaded, put, tiny_spec
from ucm.testing.daemon import running_daemon, short_folder, small_config
from ucm.testing.fake_tier import FakeDisk
from ucm.testing.partial_conformance import fill
from ucm.testing.stores import FakeStore, small_store_config, wait_until
from ucm.types import ROOT_KEY, BlockKey, LoadStatus, StoreStatus
from ucm.wire import RETRY_AFTER_METADATA, checksums_to_wire, keys_to_wire

READY, NO_SPACE = LoadStatus.READY, LoadStatus.NO_SPACE
BLOCK_BYTES = TINY_LAYOUT.block_bytes


def limited(config: Config, **limits: int) -> Config:
    """`config` with other limits of the service."""
    values: dict[str, Any] = dict(limits)
    return dataclasses.replace(config, service=dataclasses.replace(config.service, **values))


def on_disk_only(store: FakeStore, num_blocks: int, seed: int = 0) -> list[BlockKey]:
    keys = chain(store.handle.id, num_blocks, seed)
    put(store.cache, store.handle, keys)
    assert store.cache.flush(timeout_s=5)
    return keys


@pytest.fixture
def store() -> Iterator[FakeStore]:
    """Four blocks may be read for a session; two loads may wait."""
    config = limited(
        small_store_config(), inflight_bytes_per_session=4 * BLOCK_BYTES, rpc_threads=4
    )
    made = FakeStore(config)
    yield made
    made.disk.faults.reads_may_go.set()
    assert made.manager.check_integrity() == []
    made.close()


def test_a_load_beyond_the_sessions_credit_is_partial_and_says_so(store: FakeStore) -> None:
    keys = on_disk_only(store, 6)
    store.drop_from_memory()
    with loaded(store.cache, store.handle, keys) as lease:
        assert [block.status for block in lease.blocks] == [READY] * 4 + [NO_SPACE] * 2
    with loaded(store.cache, store.handle, keys) as lease:
        assert [block.status for block in lease.blocks] == [READY] * 6
    assert get(store.cache, store.handle, keys) == [content(key) for key in keys]


def test_one_block_is_always_read_and_a_read_pays_until_it_ends(store: FakeStore) -> None:
    config = limited(store.config, inflight_bytes_per_session=1)
    keys = on_disk_only(store, 3)
    store.drop_from_memory()
    other = FakeStore(config, disk=store.disk)
    other.disk.faults.reads_may_go.clear()
    with loaded(other.cache, other.handle, keys, timeout_s=0) as lease:
        assert [block.status for block in lease.blocks] == [LoadStatus.TIMED_OUT] * 3
    assert other.cache.prefetch(other.handle.id, keys) == 0  # the first is still being read
    other.disk.faults.reads_may_go.set()
    wait_until(lambda: other.cache.lookup(other.handle.id, keys[:1]).tiers == ("memory",))
    assert other.cache.prefetch(other.handle.id, keys) == 1
    other.close()


def test_loads_that_wait_are_bounded_and_those_from_memory_go_on(store: FakeStore) -> None:
    chains = [on_disk_only(store, 1, seed) for seed in range(4)]
    store.drop_from_memory()
    get(store.cache, store.handle, chains[3])
    store.disk.faults.reads_may_go.clear()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(get, store.cache, store.handle, keys) for keys in chains[:2]]
        wait_until(lambda: len(store.manager._loads._waits) == 2)
        with pytest.raises(CapacityError, match="2 loads wait") as caught:
            store.cache.prepare_load(store.handle.id, chains[2], timeout_s=5)
        assert caught.value.retry_after_s > 0
        assert get(store.cache, store.handle, chains[3]) == [content(chains[3][0])]
        store.disk.faults.reads_may_go.set()
        assert [each.result() for each in waiting] == [[content(keys[0])] for keys in chains[:2]]
    assert store.manager.status().num_leases == 0
    assert get(store.cache, store.handle, chains[2]) == [content(chains[2][0])]


def test_the_end_of_a_session_ends_its_waiting_load(store: FakeStore) -> None:
    keys = on_disk_only(store, 2)
    store.drop_from_memory()
    store.disk.faults.reads_may_go.clear()
    other = EmbeddedCache(store.manager, owns_manager=False)
    other.open_namespace(tiny_spec())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other.prepare_load, store.handle.id, keys, timeout_s=60)
        wait_until(lambda: len(store.manager._loads._waits) == 1)
        other.close()
        lease = waiting.result(5)
    assert [block.status for block in lease.blocks] == [LoadStatus.MISS] * 2


# ------------------------------------------------------------- the daemon


@pytest.fixture
def disk() -> FakeDisk:
    return FakeDisk()


@pytest.fixture
def daemon(disk: FakeDisk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    monkeypatch.setattr("ucm.manager.tiers_of", lambda _config: TierFactory(nvme=disk))
    with short_folder() as folder:
        config = limited(small_config(folder, nvme=False), rpc_threads=8, max_calls_per_session=2)
        with running_daemon(config) as found:
            yield found
            disk.faults.reads_may_go.set()


def prepared_disk(daemon: Daemon, num_chains: int) -> tuple[RemoteCache, list[list[BlockKey]]]:
    """A session, and chains of one block that only the disk has."""
    cache = connect(daemon.config.service.socket_path, timeout_s=10)
    handle = cache.open_namespace(tiny_spec())
    chains = [chain(handle.id, 1, seed) for seed in range(num_chains)]
    for keys in chains:
        put(cache, handle, keys)
    assert cache.flush(timeout_s=5)
    cache.close()
    wait_until(lambda: daemon.manager.status().num_sessions == 0)
    state = daemon.manager._state
    with state.lock:
        idle = state.namespaces._detach_idle_locked(1)
    for namespace in idle:  # forget what memory has
        namespace.memory.close()
        assert namespace.nvme is not None
        namespace.nvme.close()
    cache = connect(daemon.config.service.socket_path, timeout_s=10)
    cache.open_namespace(tiny_spec())
    return cache, chains


def num_copying(daemon: Daemon) -> int:
    state = daemon.manager._state
    with state.lock:
        return sum(found.num_copying for found in state.namespaces)


def test_one_client_cannot_hold_every_thread(daemon: Daemon, disk: FakeDisk) -> None:
    greedy, chains = prepared_disk(daemon, 3)
    namespace = tiny_spec().fingerprint()
    disk.faults.reads_may_go.clear()
    with ThreadPoolExecutor(2) as pool:
        waiting = [
            pool.submit(greedy.prepare_load, namespace, keys, timeout_s=30) for keys in chains[:2]
        ]
        wait_until(lambda: len(daemon.manager._loads._waits) == 2)
        started_s = time.monotonic()
        with pytest.raises(CapacityError, match="max_calls_per_session") as caught:
            greedy.prefetch(namespace, chains[0])
        assert caught.value.retry_after_s == 0.05
        # Asked at the door, where the session has a thread of its own.
        assert greedy.lookup(namespace, chains[0]).num_blocks == 1
        with connect(daemon.config.service.socket_path, timeout_s=10) as modest:
            handle = modest.open_namespace(tiny_spec())
            assert modest.lookup(handle.id, chains[2]).num_blocks == 1
        assert time.monotonic() - started_s < 5
        disk.faults.reads_may_go.set()
        assert [each.result().num_ready for each in waiting] == [1, 1]
    greedy.close()


def test_the_hint_travels_as_trailing_metadata(daemon: Daemon) -> None:
    with connect(daemon.config.service.socket_path, timeout_s=5) as cache:
        session = daemon.tokens.session_of(bytes.fromhex(cache._metadata[0][1]))
        credit = daemon.engine_service._calls
        credit.charge(session, 2)
        with pytest.raises(grpc.RpcError) as caught:
            cache._stub.Release(pb.ReleaseRequest(), metadata=cache._metadata, timeout=5)
        credit.give_back(session, 2)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(caught.value.trailing_metadata() or ())[RETRY_AFTER_METADATA] == "50"
        cache.release(cache.prepare_load(cache.open_namespace(tiny_spec()).id, [], timeout_s=0).id)


def test_a_refused_store_is_completed_once_there_is_room(daemon: Daemon) -> None:
    copies = daemon.engine_service._copies
    copies.charge(None, 2)
    with connect(daemon.config.service.socket_path, timeout_s=10) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 2, seed=9)
        later = threading.Timer(0.1, copies.give_back, (None, 2))
        later.start()
        assert put(cache, handle, keys) == (StoreStatus.ACCEPTED,) * 2
        later.join()
        cache._timeout_s = 0.3
        copies.charge(None, 2)
        with pytest.raises(CapacityError, match="the lease stays"):
            put(cache, handle, chain(handle.id, 1, seed=10))
        copies.give_back(None, 2)
        assert daemon.manager.status().num_leases == 1


def test_closing_the_daemon_does_not_wait_for_loads_that_wait(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ucm.manager.tiers_of", lambda _config: TierFactory(nvme=disk))
    with short_folder() as folder:
        config = limited(small_config(folder, nvme=False), rpc_threads=8)
        daemon = Daemon(config, environ={})
        daemon.start()
        cache, chains = prepared_disk(daemon, 1)
        disk.faults.reads_may_go.clear()
        with ThreadPoolExecutor(1) as pool:
            namespace = tiny_spec().fingerprint()
            waiting = pool.submit(cache.prepare_load, namespace, chains[0], timeout_s=600)
            wait_until(lambda: len(daemon.manager._loads._waits) == 1)
            release = threading.Timer(3.0, disk.faults.reads_may_go.set)
            release.start()
            started_s = time.monotonic()
            daemon.close()
            took_s = time.monotonic() - started_s
            statuses = [block.status for block in waiting.result(5).blocks]
            assert statuses == [LoadStatus.TIMED_OUT]
        release.join()
        cache.close()
        assert took_s < 10


def test_a_cancelled_store_is_whole_or_nowhere_and_leaves_nothing(daemon: Daemon) -> None:
    with connect(daemon.config.service.socket_path, timeout_s=10) as cache:
        handle = cache.open_namespace(tiny_spec())
        for seed in range(20, 30):
            keys = chain(handle.id, 4, seed)
            lease = cache.prepare_store(handle.id, ROOT_KEY, keys)
            sums = fill(handle, lease)
            request = pb.CompleteStoreRequest(
                lease_id=lease.id,
                keys=keys_to_wire(list(sums)),
                checksums=checksums_to_wire(sums.values()),
            )
            call = cache._stub.CompleteStore.future(request, metadata=cache._metadata, timeout=5)
            threading.Event().wait((seed - 20) / 5_000)  # 0 to 2 ms: each stage has its turn
            call.cancel()
            cache.release(lease.id)
            wait_until(lambda: daemon.manager.status().num_leases == 0)
            wait_until(lambda: not num_copying(daemon))
            num_found = cache.lookup(handle.id, keys).num_blocks
            assert num_found in (0, 4)
            assert get(cache, handle, keys) == [content(key) for key in keys[:num_found]]
