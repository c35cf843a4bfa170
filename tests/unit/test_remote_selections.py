"""Selections over a socket: what passes the door, limits, and daemons that die, hang or lie."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ucm.api import NamespaceHandle
from ucm.client import RemoteCache, connect
from ucm.daemon import Daemon
from ucm.door_client import DoorClient
from ucm.errors import (
    BlockNotFoundError,
    CapacityError,
    InvalidArgumentError,
    TierUnavailableError,
    UcmError,
)
from ucm.protos import cache_pb2 as pb
from ucm.select_api import SelectRequest
from ucm.sockets import door_path
from ucm.testing.daemon import (
    running_daemon,
    short_folder,
    small_config,
    small_settings,
    spawned_daemon,
)
from ucm.testing.select_conformance import assert_same, expected
from ucm.testing.selections import (
    KIND,
    put_blocks,
    queries_of,
    request_of,
    select_chain,
    select_spec,
)
from ucm.types import LoadMode, NamespaceId, SummaryKind, SummaryStatus

READY = bytes([pb.SUMMARY_STATUS_READY])
SPEC = select_spec()


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with short_folder() as folder:
        config = small_config(folder, nvme=False)
        service = dataclasses.replace(config.service, rpc_threads=8, max_message_bytes=64 << 10)
        with running_daemon(dataclasses.replace(config, service=service)) as found:
            yield found


@pytest.fixture
def cache(daemon: Daemon) -> Iterator[RemoteCache]:
    with connect(daemon.config.service.socket_path, timeout_s=10) as found:
        yield found


@pytest.fixture
def handle(cache: RemoteCache) -> NamespaceHandle:
    return cache.open_namespace(SPEC, summary=KIND)


def test_the_door_passes_the_memory_of_summaries_read_only(daemon: Daemon) -> None:
    client = DoorClient(door_path(daemon.config.service.socket_path), timeout_s=5)
    client.hello(timeout_s=5)
    with pytest.raises(BlockNotFoundError):
        client.open_summaries(NamespaceId(bytes(32)), timeout_s=5)
    assert client.open_namespace(SPEC, SPEC.fingerprint(), timeout_s=5).summary is None
    with pytest.raises(InvalidArgumentError, match="without summaries"):
        client.open_summaries(SPEC.fingerprint(), timeout_s=5)
    opened = client.open_namespace(SPEC, SPEC.fingerprint(), KIND, timeout_s=5)
    assert opened.summary is KIND
    assert client.open_summaries(SPEC.fingerprint(), timeout_s=5).readonly
    client.close()


def test_a_client_cannot_write_to_summaries(
    cache: RemoteCache, handle: NamespaceHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[int] = []

    def keep(fd: int, size_bytes: int, *, writable: bool) -> memoryview:
        assert not writable
        passed.append(fd)
        return memoryview(bytearray(size_bytes))

    monkeypatch.setattr("ucm.door_client._map", keep)
    keys = select_chain(handle, 1, seed=7)
    put_blocks(cache, handle, keys)
    cache.map_summaries(handle.id, keys, timeout_s=5)
    with pytest.raises(OSError, match="not permitted"):
        os.pwrite(passed[-1], b"x", 0)
    os.close(passed[-1])


def test_a_session_that_changes_its_kind_maps_other_memory(cache: RemoteCache) -> None:
    handle = cache.open_namespace(SPEC, summary=KIND)
    keys = select_chain(handle, 2, seed=1)
    put_blocks(cache, handle, keys)
    one = cache.map_summaries(handle.id, keys, timeout_s=5)
    cache.open_namespace(SPEC, summary=SummaryKind.MEAN)
    other = cache.map_summaries(handle.id, keys, timeout_s=5)
    assert (one.kind, other.kind) == (KIND, SummaryKind.MEAN)
    assert one.entries[0] is not None
    assert other.entries[0] is not None
    assert len(one.entries[0]) > len(other.entries[0])
    cache.release(one.id)
    cache.release(other.id)


# ----------------------------------------------------------------- limits


def test_selections_in_service_are_bounded_and_other_calls_go_on(
    daemon: Daemon, cache: RemoteCache, handle: NamespaceHandle
) -> None:
    places = daemon.engine_service._selections
    places.charge(None, 2)
    keys = select_chain(handle, 2)
    for call in (
        lambda: cache.select(handle.id, keys, request_of(), timeout_s=1),
        lambda: cache.map_summaries(handle.id, keys, timeout_s=1),
        lambda: cache.select_and_load(
            handle.id, keys, request_of(), mode=LoadMode.MAPPED, timeout_s=1
        ),
    ):
        with pytest.raises(CapacityError, match="selections are in service") as caught:
            call()
        assert 0 < caught.value.retry_after_s <= 0.05
    cache.lookup(handle.id, keys)
    places.give_back(None, 2)
    assert cache.select(handle.id, keys, request_of(), timeout_s=1).statuses
    assert places.used() == 0
    assert daemon.answers.gate.num_inside == 0


def test_a_message_too_long_is_refused_before_it_is_sent(
    cache: RemoteCache, handle: NamespaceHandle
) -> None:
    request = SelectRequest((0, 1, 2), queries_of(3, 300), request_of().budget)
    with pytest.raises(InvalidArgumentError, match="max_message_bytes"):
        cache.select(handle.id, [], request, timeout_s=1)


def test_an_answer_too_long_is_refused_before_it_is_made(
    cache: RemoteCache, handle: NamespaceHandle
) -> None:
    request = SelectRequest((0, 1, 2), queries_of(3, 40), request_of().budget)
    keys = select_chain(handle, 30, seed=5)
    with pytest.raises(InvalidArgumentError, match="without bounds"):
        cache.select(handle.id, keys, request, timeout_s=1)
    small = dataclasses.replace(request, bounds=False)
    assert cache.select(handle.id, keys, small, timeout_s=5).statuses


def test_the_daemon_checks_for_itself(cache: RemoteCache, handle: NamespaceHandle) -> None:
    bad = dataclasses.replace(request_of(), queries=np.full_like(queries_of(2), np.nan))
    message = pb.SelectRequest(
        namespace=handle.id,
        layers=[0, 2],
        queries=bad.queries.tobytes(),
        num_queries=1,
        num_heads=6,
        budget=pb.Budget(ratio=0.5, max_ratio=1),
        mode=pb.SELECT_MODE_SHARED,
    )
    with pytest.raises(InvalidArgumentError, match="not finite"):
        cache._call(cache._stub.Select, message)
    message.ClearField("budget")
    with pytest.raises(InvalidArgumentError, match="budget"):
        cache._call(cache._stub.Select, message)
    message.timeout_s = -1
    with pytest.raises(InvalidArgumentError):
        cache._call(cache._stub.Select, message)


# ------------------------------------------------- daemons that die, hang or lie


def every_selection_fails(cache: RemoteCache, handle: NamespaceHandle) -> None:
    keys = select_chain(handle, 1)
    with pytest.raises(TierUnavailableError):
        cache.select(handle.id, keys, request_of(), timeout_s=1)
    with pytest.raises(TierUnavailableError):
        cache.select_and_load(handle.id, keys, request_of(), mode=LoadMode.DIRECT, timeout_s=1)
    with pytest.raises(TierUnavailableError):
        cache.map_summaries(handle.id, keys, timeout_s=1)


def test_a_daemon_that_hangs_or_dies_costs_the_time_allowed(tmp_path: Path) -> None:
    with (
        short_folder() as folder,
        spawned_daemon(small_settings(folder), tmp_path / "log") as daemon,
        connect(daemon.socket_path, timeout_s=5) as cache,
    ):
        handle = cache.open_namespace(SPEC, summary=KIND)
        keys = select_chain(handle, 4)
        put_blocks(cache, handle, keys)
        result = cache.select(handle.id, keys, request_of(), timeout_s=5)
        assert_same(result.layers, expected(keys, request_of()))
        lease = cache.map_summaries(handle.id, keys, timeout_s=5)
        before = [bytes(entry or b"") for entry in lease.entries]
        with daemon.frozen():
            started_s = time.monotonic()
            every_selection_fails(cache, handle)
            assert time.monotonic() - started_s < 8
        assert cache.select(handle.id, keys, request_of(), timeout_s=5).statuses
        daemon.kill()
        started_s = time.monotonic()
        every_selection_fails(cache, handle)
        assert time.monotonic() - started_s < 5
        assert [bytes(entry or b"") for entry in lease.entries] == before  # still mapped


class _Answers:
    """A stub whose answers a test chooses."""

    def __init__(self, reply: object) -> None:
        self._reply = reply

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *_args, **_options: self._reply


@pytest.mark.parametrize(
    "reply",
    [
        pb.MapSummariesReply(),
        pb.MapSummariesReply(statuses=READY),
        pb.MapSummariesReply(statuses=READY, offsets=[0]),
        pb.MapSummariesReply(statuses=READY, offsets=[1 << 62], contents=[1], summary_bytes=9),
        pb.MapSummariesReply(statuses=READY, offsets=[0], contents=[1], summary_bytes=1 << 62),
        pb.MapSummariesReply(statuses=b"\x09"),
        pb.MapSummariesReply(statuses=READY * 2, offsets=[0, 0], contents=[1, 1]),
    ],
)
def test_a_lease_of_nonsense_is_not_believed(
    cache: RemoteCache,
    handle: NamespaceHandle,
    reply: pb.MapSummariesReply,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache, "_stub", _Answers(reply))
    with pytest.raises(TierUnavailableError):
        cache.map_summaries(handle.id, select_chain(handle, 1), timeout_s=1)


@pytest.mark.parametrize(
    "reply",
    [
        pb.SelectReply(),
        pb.SelectReply(statuses=READY, counts=[1, 1]),
        pb.SelectReply(statuses=READY, counts=[1 << 31, 0]),
    ],
)
def test_a_selection_of_nonsense_is_not_believed(
    cache: RemoteCache,
    handle: NamespaceHandle,
    reply: pb.SelectReply,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = select_chain(handle, 1)
    monkeypatch.setattr(cache, "_stub", _Answers(reply))
    with pytest.raises(TierUnavailableError):
        cache.select(handle.id, keys, request_of(), timeout_s=1)
    both = pb.SelectAndLoadReply(selection=reply)
    monkeypatch.setattr(cache, "_stub", _Answers(both))
    with pytest.raises(TierUnavailableError):
        cache.select_and_load(handle.id, keys, request_of(), mode=LoadMode.DIRECT, timeout_s=1)


def test_a_plan_that_cannot_be_used_is_given_back(
    daemon: Daemon, cache: RemoteCache, handle: NamespaceHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = select_chain(handle, 3, seed=2)
    put_blocks(cache, handle, keys)
    before = daemon.manager.status().num_leases

    def refuse(*_arguments: object) -> object:
        raise TierUnavailableError("no file")

    monkeypatch.setattr(cache._plans, "plan", refuse)
    with pytest.raises(UcmError):
        cache.select_and_load(handle.id, keys, request_of(), mode=LoadMode.MAPPED, timeout_s=5)
    assert daemon.manager.status().num_leases == before


def test_many_clients_select_at_once(daemon: Daemon) -> None:
    """Each is answered rightly or refused with a hint; nothing is left in service."""

    def work(seed: int) -> int:
        with connect(daemon.config.service.socket_path, timeout_s=20) as cache:
            handle = cache.open_namespace(SPEC, summary=KIND)
            keys = select_chain(handle, 6, seed=20 + seed % 2)
            put_blocks(cache, handle, keys)
            num_answered = 0
            while num_answered < 5:
                try:
                    found = cache.select(handle.id, keys, request_of(), timeout_s=5)
                except CapacityError as error:
                    time.sleep(error.retry_after_s)
                    continue
                num_cached = len(keys) - found.statuses.count(SummaryStatus.MISS)
                assert_same(found.layers, expected(keys[:num_cached], request_of()))
                num_answered += 1
            return num_answered

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [5] * 4
    assert daemon.engine_service._selections.used() == 0
