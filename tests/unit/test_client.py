"""The client: deadlines, the end of a session, forks, what a daemon's lies do."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from ucm.api import CacheApi
from ucm.client import RemoteCache, connect
from ucm.daemon import Daemon
from ucm.door_wire import MAX_PACKET_BYTES
from ucm.errors import CapacityError, ConfigError, InvalidArgumentError, TierUnavailableError
from ucm.protos import cache_pb2 as pb
from ucm.testing.blocks import chain, content, get, put, tiny_spec
from ucm.testing.daemon import running_daemon, short_folder, small_config
from ucm.types import KEY_BYTES, ROOT_KEY, LeaseId, NamespaceId

NO_LEASE = LeaseId(bytes(16))


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with short_folder() as folder, running_daemon(small_config(folder, nvme=False)) as found:
        yield found


@pytest.fixture
def socket_path(daemon: Daemon) -> Path:
    return daemon.config.service.socket_path


def every_call_fails(cache: CacheApi, namespace: NamespaceId) -> None:
    with pytest.raises(TierUnavailableError):
        cache.open_namespace(tiny_spec("another"))
    with pytest.raises(TierUnavailableError):
        cache.lookup(namespace, [])
    with pytest.raises(TierUnavailableError):
        cache.prefetch(namespace, [])
    with pytest.raises(TierUnavailableError):
        cache.prepare_load(namespace, [], timeout_s=5)
    with pytest.raises(TierUnavailableError):
        cache.complete_load(NO_LEASE)
    with pytest.raises(TierUnavailableError):
        cache.prepare_store(namespace, ROOT_KEY, [])
    with pytest.raises(TierUnavailableError):
        cache.complete_store(NO_LEASE, {})
    with pytest.raises(TierUnavailableError):
        cache.map_summaries(namespace, [], timeout_s=5)
    with pytest.raises(TierUnavailableError):
        cache.release(NO_LEASE)
    with pytest.raises(TierUnavailableError):
        cache.flush(timeout_s=5)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(TierUnavailableError, match="ucm serve"):
        connect(tmp_path / "none.sock")


def test_a_path_that_no_socket_can_have() -> None:
    with pytest.raises(ConfigError, match="choose a shorter one"):
        connect(Path("/tmp") / ("x" * 200))


def test_a_closed_session_fails_at_once(socket_path: Path) -> None:
    cache = connect(socket_path)
    namespace = cache.open_namespace(tiny_spec()).id
    cache.close()
    cache.close()
    every_call_fails(cache, namespace)


def test_a_stopped_daemon_fails_every_call_at_once() -> None:
    with short_folder() as folder:
        config = small_config(folder, nvme=False)
        with running_daemon(config):
            cache = connect(config.service.socket_path, timeout_s=60)
            namespace = cache.open_namespace(tiny_spec()).id
        start_s = time.monotonic()
        every_call_fails(cache, namespace)
        assert time.monotonic() - start_s < 5
        cache.close()


def test_memory_that_is_still_held_stays_mapped(socket_path: Path) -> None:
    cache = connect(socket_path)
    handle = cache.open_namespace(tiny_spec())
    keys = chain(handle.id, 1)
    put(cache, handle, keys)
    lease = cache.prepare_load(handle.id, keys, timeout_s=5)
    cache.close()
    assert lease.blocks[0].data is not None
    assert bytes(lease.blocks[0].data) == content(keys[0])


def test_close_gives_everything_back(daemon: Daemon, socket_path: Path) -> None:
    """Descriptors, threads, mappings: after a first connection all counts stay the same."""

    def come_and_go() -> None:
        with connect(socket_path) as cache:
            handle = cache.open_namespace(tiny_spec())
            keys = chain(handle.id, 2)
            put(cache, handle, keys)
            get(cache, handle, keys)
        assert daemon.manager.status().num_sessions == 0

    def counts() -> tuple[int, int, int]:
        with open("/proc/self/maps") as maps:
            mapped = sum("memfd:" in line for line in maps)
        return len(os.listdir("/proc/self/fd")), threading.active_count(), mapped

    for _ in range(3):
        come_and_go()
    before = counts()
    for _ in range(10):
        come_and_go()

    def settled() -> bool:
        # The daemon's pool starts its threads on demand: fewer than one a session.
        descriptors, threads, mapped = counts()
        return descriptors <= before[0] and threads <= before[1] + 4 and mapped <= before[2]

    deadline_s = time.monotonic() + 10
    while not settled() and time.monotonic() < deadline_s:
        threading.Event().wait(0.01)  # grpc closes its sockets on threads of its own
    assert settled(), (before, counts())


def test_a_fork_cannot_use_nor_keep_the_session(daemon: Daemon, socket_path: Path) -> None:
    cache = connect(socket_path)
    namespace = cache.open_namespace(tiny_spec()).id
    before = cache._door._socket.fileno()
    assert before >= 0
    cache._pid = -1  # as it looks from a child
    every_call_fails(cache, namespace)
    cache._pid = os.getpid()
    cache.lookup(namespace, [])
    cache._abandon_in_child()
    every_call_fails(cache, namespace)
    deadline_s = time.monotonic() + 10
    while daemon.manager.status().num_sessions and time.monotonic() < deadline_s:
        threading.Event().wait(0.01)
    assert daemon.manager.status().num_sessions == 0
    cache.close()


def test_threads_share_a_session(socket_path: Path) -> None:
    failures: list[BaseException] = []
    with connect(socket_path, timeout_s=10) as cache:

        def work(seed: int) -> None:
            try:
                handle = cache.open_namespace(tiny_spec(f"model-{seed % 2}"))
                keys = chain(handle.id, 4, seed)
                for _ in range(5):
                    put(cache, handle, keys)
                    assert get(cache, handle, keys) == [content(key) for key in keys]
            except BaseException as error:  # noqa: BLE001  reported by the test below
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_lookup_goes_by_grpc_where_the_door_does_not_take_it(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many keys for a packet, or another thread at the door: the answers are the same."""
    by_grpc: list[int] = []
    with connect(socket_path, timeout_s=5) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 3)
        put(cache, handle, keys)
        lookup = cache._stub.Lookup

        def through(request: pb.LookupRequest, **options: Any) -> pb.LookupReply:
            by_grpc.append(len(request.keys) // KEY_BYTES)
            return cast(pb.LookupReply, lookup(request, **options))

        monkeypatch.setattr(cache._stub, "Lookup", through)
        assert cache.lookup(handle.id, keys).num_blocks == 3
        assert by_grpc == []
        with cache._at_door():
            assert cache.lookup(handle.id, keys).num_blocks == 3
        assert by_grpc == [3]
        too_many = [*keys, *chain(handle.id, MAX_PACKET_BYTES // KEY_BYTES, seed=1)]
        assert cache.lookup(handle.id, too_many).num_blocks == 3
        assert by_grpc == [3, len(too_many)]


def test_unequal_checksums_are_refused_before_they_are_sent(socket_path: Path) -> None:
    with connect(socket_path) as cache:
        keys = chain(NamespaceId(bytes(32)), 2)
        with pytest.raises(InvalidArgumentError, match="as many checksums"):
            cache.complete_store(NO_LEASE, {keys[0]: (1,), keys[1]: (1, 2)})


def test_full_staging_is_a_status(socket_path: Path) -> None:
    with connect(socket_path) as cache:
        handle = cache.open_namespace(tiny_spec())
        room = 8 * (1 << 20) // handle.layout.block_bytes
        lease = cache.prepare_store(handle.id, ROOT_KEY, chain(handle.id, room + 1))
        assert [slot.status for slot in lease.slots[-2:]] == ["wanted", "no_space"]
        cache.release(lease.id)


def test_sessions_are_bounded() -> None:
    with short_folder() as folder:
        config = small_config(folder, nvme=False)
        config = dataclasses.replace(
            config, service=dataclasses.replace(config.service, max_sessions=1)
        )
        with running_daemon(config), connect(config.service.socket_path) as first:
            with pytest.raises(CapacityError):
                connect(config.service.socket_path)
            first.close()
            connect(config.service.socket_path).close()


class _Answers:
    """A stub whose answers a test chooses."""

    def __init__(self, reply: object) -> None:
        self._reply = reply

    def __getattr__(self, name: str) -> object:
        return lambda *_args, **_options: self._reply


READY, MEMORY = bytes([pb.LOAD_STATUS_READY]), bytes([pb.TIER_MEMORY])


@pytest.mark.parametrize(
    "reply",
    [
        pb.PrepareLoadReply(),
        pb.PrepareLoadReply(statuses=READY, tiers=MEMORY),
        pb.PrepareLoadReply(statuses=READY, tiers=MEMORY, offsets=[1 << 62], checksums=bytes(16)),
        pb.PrepareLoadReply(
            statuses=bytes([pb.LOAD_STATUS_MISS]),
            tiers=MEMORY,
            offsets=[0],
            checksums=bytes(16),
        ),
        pb.PrepareLoadReply(statuses=bytes([99])),  # from the future
        pb.PrepareLoadReply(statuses=READY, tiers=bytes(1), offsets=[0], checksums=bytes(16)),
    ],
)
def test_a_daemon_that_answers_nonsense_is_not_believed(
    socket_path: Path, reply: pb.PrepareLoadReply, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(socket_path) as cache:
        namespace = cache.open_namespace(tiny_spec()).id
        keys = chain(namespace, 1)
        with monkeypatch.context() as at_door:
            at_door.setattr(cache._door, "call", lambda *_args, **_options: reply)
            with pytest.raises(TierUnavailableError):
                cache.prepare_load(namespace, keys, timeout_s=1)
        monkeypatch.setattr(cache, "_stub", _Answers(reply))
        with cache._at_door(), pytest.raises(TierUnavailableError):
            cache.prepare_load(namespace, keys, timeout_s=1)


def test_client_is_what_it_says(socket_path: Path) -> None:
    with connect(socket_path) as cache:
        assert isinstance(cache, RemoteCache)
        as_seam: CacheApi = cache
        assert as_seam.lookup(cache.open_namespace(tiny_spec()).id, []).num_blocks == 0
