"""Loads at the door: answered there if nothing waits, else by gRPC; leased once, counted once."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ucm import client
from ucm.client import RemoteCache, connect
from ucm.daemon import Daemon
from ucm.door_wire import MAX_PACKET_BYTES, load_reply_bytes
from ucm.errors import CapacityError, InvalidArgumentError, TierUnavailableError
from ucm.manager import Manager
from ucm.protos import cache_pb2 as pb
from ucm.testing.blocks import TINY_LAYOUT, chain, content, get, put, tiny_spec
from ucm.testing.daemon import running_daemon, short_folder, small_config
from ucm.testing.stores import wait_until
from ucm.types import BlockKey, LoadMode, LoadStatus, NamespaceId
from ucm.wire import keys_to_wire

NUM_BLOCKS = 4
NAMESPACE = tiny_spec().fingerprint()
KEYS = chain(NAMESPACE, NUM_BLOCKS)
TOO_MANY = MAX_PACKET_BYTES // load_reply_bytes(1, TINY_LAYOUT.num_layers) + 1000


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture
def daemon(folder: Path) -> Iterator[Daemon]:
    with running_daemon(small_config(folder)) as found:
        yield found


@pytest.fixture
def cache(daemon: Daemon) -> Iterator[RemoteCache]:
    """A session; its blocks are in memory."""
    with connect(daemon.config.service.socket_path, timeout_s=10) as found:
        put(found, found.open_namespace(tiny_spec()), KEYS)
        yield found


@pytest.fixture
def by_grpc(cache: RemoteCache, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls that were made by gRPC."""
    return noted(cache, monkeypatch)


def noted(cache: RemoteCache, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []

    def note(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def through(request: object, **options: Any) -> Any:
            calls.append(name)
            return call(request, **options)

        return through

    for name in ("PrepareLoad", "BeginLoad", "CompleteLoad", "Release"):
        monkeypatch.setattr(cache._stub, name, note(name, getattr(cache._stub, name)))
    return calls


def num_leases(daemon: Daemon) -> int:
    return daemon.manager.status().num_leases


def load_and_give_back(cache: RemoteCache) -> None:
    """A load of each kind, given back in each way."""
    handle = cache._opened(NAMESPACE).handle
    assert get(cache, handle, KEYS) == [content(key) for key in KEYS]
    for mode in LoadMode:
        plan = cache.begin_load(NAMESPACE, KEYS, mode=mode, timeout_s=5)
        assert [block.status for block in plan.blocks] == [LoadStatus.READY] * NUM_BLOCKS
        cache.release(plan.id)


def test_loads_from_memory_need_no_grpc(
    daemon: Daemon, cache: RemoteCache, by_grpc: list[str]
) -> None:
    load_and_give_back(cache)
    assert by_grpc == []
    assert num_leases(daemon) == 0
    loaded = daemon.metrics.value("ucm_loaded_blocks_total", tier="memory")
    assert loaded == NUM_BLOCKS * (1 + len(LoadMode))
    assert daemon.answers.gate.num_inside == 0


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e12, 0.0])
def test_a_time_out_may_be_of_any_length(cache: RemoteCache, timeout_s: float) -> None:
    for _ in range(2):
        cache.complete_load(cache.prepare_load(NAMESPACE, KEYS, timeout_s=timeout_s).id)


@pytest.mark.parametrize("timeout_s", [float("nan"), -1.0])
def test_a_time_out_that_is_none_is_refused_and_the_session_stays(
    cache: RemoteCache, timeout_s: float
) -> None:
    with pytest.raises(InvalidArgumentError, match="time-out"):
        cache.prepare_load(NAMESPACE, KEYS, timeout_s=timeout_s)
    load_and_give_back(cache)


def test_who_finds_another_thread_at_the_door_asks_by_grpc(
    daemon: Daemon, cache: RemoteCache, by_grpc: list[str]
) -> None:
    with cache._at_door():
        load_and_give_back(cache)
    assert by_grpc == ["PrepareLoad", "CompleteLoad", *["BeginLoad", "Release"] * len(LoadMode)]
    assert num_leases(daemon) == 0


def test_what_only_nvme_has_is_read_by_grpc_and_counted_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reopened(folder) as (daemon, cache):
        by_grpc = noted(cache, monkeypatch)
        plan = cache.begin_load(NAMESPACE, KEYS, mode=LoadMode.DIRECT, timeout_s=5)
        assert plan.num_ready == NUM_BLOCKS
        cache.release(plan.id)
        assert by_grpc == [], "extents are read by the client: nobody waits"
        gate_enter = daemon.answers.gate.enter
        entered: list[object] = []

        def enter(*arguments: Any) -> None:
            entered.append(arguments)
            gate_enter(*arguments)

        monkeypatch.setattr(daemon.answers.gate, "enter", enter)
        lease = cache.prepare_load(NAMESPACE, KEYS, timeout_s=10)
        assert lease.num_ready == NUM_BLOCKS
        assert by_grpc == ["PrepareLoad"]
        assert (len(entered), num_leases(daemon)) == (1, 1)
        cache.complete_load(lease.id)
        assert daemon.metrics.value("ucm_loaded_blocks_total", tier="nvme") == 2 * NUM_BLOCKS


def test_mapped_plans_of_what_is_on_nvme_go_by_grpc(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room may have to be made for what is promoted, and that takes a disk."""
    with reopened(folder) as (daemon, cache):
        by_grpc = noted(cache, monkeypatch)
        plan = cache.begin_load(NAMESPACE, KEYS, mode=LoadMode.MAPPED, timeout_s=5)
        assert (plan.num_ready, by_grpc, num_leases(daemon)) == (NUM_BLOCKS, ["BeginLoad"], 1)
        cache.release(plan.id)


def connect_to(daemon: Daemon) -> RemoteCache:
    return connect(daemon.config.service.socket_path, timeout_s=10)


@contextmanager
def reopened(folder: Path) -> Iterator[tuple[Daemon, RemoteCache]]:
    """A daemon that has the blocks on NVMe only, and a session."""
    with running_daemon(small_config(folder)) as before, connect_to(before) as cache:
        put(cache, cache.open_namespace(tiny_spec()), KEYS)
        assert cache.flush(timeout_s=10)
    with running_daemon(small_config(folder)) as daemon, connect_to(daemon) as cache:
        cache.open_namespace(tiny_spec())
        yield daemon, cache


def test_a_load_whose_answer_is_too_long_goes_by_grpc(
    daemon: Daemon, cache: RemoteCache, by_grpc: list[str]
) -> None:
    many = [*KEYS, *chain(NAMESPACE, TOO_MANY, seed=1)]
    assert load_reply_bytes(len(many), TINY_LAYOUT.num_layers) > MAX_PACKET_BYTES
    lease = cache.prepare_load(NAMESPACE, many, timeout_s=5)
    plan = cache.begin_load(NAMESPACE, many, mode=LoadMode.DIRECT, timeout_s=5)
    assert (lease.num_ready, plan.num_ready) == (NUM_BLOCKS, NUM_BLOCKS)
    assert by_grpc == ["PrepareLoad", "BeginLoad"]


@pytest.mark.parametrize("kind", ["prepare_load", "begin_load"])
def test_the_daemon_leases_nothing_whose_answer_is_too_long(
    daemon: Daemon, cache: RemoteCache, kind: str
) -> None:
    keys = keys_to_wire([*KEYS, *chain(NAMESPACE, TOO_MANY, seed=1)])
    requests = {
        "prepare_load": pb.PrepareLoadRequest(namespace=NAMESPACE, keys=keys),
        "begin_load": pb.BeginLoadRequest(
            namespace=NAMESPACE, keys=keys, mode=pb.LOAD_MODE_DIRECT, timeout_s=1
        ),
    }
    request = pb.DoorRequest(**{kind: requests[kind]})  # type: ignore[arg-type]
    assert cache._door.takes(request)
    assert cache._door.call(request, timeout_s=5) is None
    assert num_leases(daemon) == 0
    assert daemon.answers.gate.num_inside == 0


def test_every_answer_that_is_said_to_fit_does() -> None:
    """The longest numbers that the types hold."""
    for num_layers in (1, 30, 80):
        num_keys = (MAX_PACKET_BYTES - load_reply_bytes(0, 0)) // (
            load_reply_bytes(1, num_layers) - load_reply_bytes(0, 0)
        )
        assert load_reply_bytes(num_keys, num_layers) <= MAX_PACKET_BYTES
        word, sums, most = bytes([5] * num_keys), bytes(8 * num_layers * num_keys), [2**64 - 1]
        prepared = pb.PrepareLoadReply(
            lease_id=bytes(16), timeout_s=1, statuses=word, tiers=word, checksums=sums
        )
        prepared.offsets.extend(most * num_keys)
        begun = pb.BeginLoadReply(
            lease_id=bytes(16),
            timeout_s=1,
            statuses=word,
            sources=word,
            tiers=word,
            slots=most * num_keys,
            segments=[2**32 - 1] * num_keys,
            file_ids=most * num_keys,
            slot_offsets=most * num_keys,
            generations=most * num_keys,
            progress_offset=most[0],
            progress_serial=most[0],
            summary_bytes=most[0],
        )
        in_memory = pb.BeginLoadReply(
            statuses=word, sources=word, tiers=word, offsets=most * num_keys, checksums=sums
        )
        for reply in (
            pb.DoorReply(prepared=prepared),
            pb.DoorReply(begun=begun),
            pb.DoorReply(begun=in_memory),
        ):
            assert reply.ByteSize() <= MAX_PACKET_BYTES


def test_corrupt_blocks_are_reported_by_grpc(
    daemon: Daemon, cache: RemoteCache, by_grpc: list[str]
) -> None:
    lease = cache.prepare_load(NAMESPACE, KEYS, timeout_s=5)
    cache.complete_load(lease.id, KEYS[:1])
    assert by_grpc == ["CompleteLoad"]
    request = pb.CompleteLoadRequest(lease_id=lease.id, corrupt=KEYS[0])
    assert cache._door.call(pb.DoorRequest(complete_load=request), timeout_s=5) is None
    assert num_leases(daemon) == 0


@contextlib.contextmanager
def slow_loads(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[threading.Event, list[str]]]:
    """Loads at the door lease, and answer when the event is set; ids of what was leased."""
    go_on, leased = threading.Event(), list[str]()
    prepare, begin = manager.at_once.prepare, manager.at_once.begin

    def late(load: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*arguments: Any, **options: Any) -> Any:
            grants = load(*arguments, **options)
            leased.append(grants.lease_id.hex())
            go_on.wait(10)
            return grants

        return answer

    with monkeypatch.context() as slowed:
        slowed.setattr(manager.at_once, "prepare", late(prepare))
        slowed.setattr(manager.at_once, "begin", late(begin))
        yield go_on, leased
        go_on.set()


def ask(cache: RemoteCache, kind: str, timeout_s: float) -> None:
    if kind == "prepare_load":
        cache.prepare_load(NAMESPACE, KEYS, timeout_s=timeout_s)
    else:
        cache._timeout_s = timeout_s
        cache.begin_load(NAMESPACE, KEYS, mode=LoadMode.MAPPED, timeout_s=5)


@pytest.mark.parametrize("kind", ["prepare_load", "begin_load"])
def test_a_load_that_was_given_up_leaves_no_lease(
    daemon: Daemon,
    cache: RemoteCache,
    by_grpc: list[str],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with slow_loads(daemon.manager, monkeypatch) as (go_on, leased):
        with pytest.raises(TierUnavailableError, match="does not answer"):
            ask(cache, kind, timeout_s=0.25)
        assert (len(leased), num_leases(daemon)) == (1, 1)
        cache._timeout_s = 10
        load_and_give_back(cache)
        assert by_grpc[:2] == ["PrepareLoad", "CompleteLoad"], "an answer is owed at the door"
        assert num_leases(daemon) == 1
        go_on.set()
        wait_until(lambda: num_leases(daemon) == 0)
    wait_until(lambda: cache._door.takes(pb.DoorRequest()))
    by_grpc.clear()
    load_and_give_back(cache)
    assert by_grpc == []
    assert num_leases(daemon) == 0


def test_a_lease_that_cannot_be_read_is_given_back(
    daemon: Daemon, cache: RemoteCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def garbled(*_arguments: object) -> None:
        raise TierUnavailableError("garbled")

    for name in ("load_lease", "store_lease"):
        monkeypatch.setattr(client, name, garbled)
    with pytest.raises(TierUnavailableError, match="garbled"):
        cache.prepare_load(NAMESPACE, KEYS, timeout_s=5)
    with pytest.raises(TierUnavailableError, match="garbled"):
        cache.prepare_store(NAMESPACE, KEYS[-1], chain(NAMESPACE, NUM_BLOCKS + 1)[-1:])
    assert num_leases(daemon) == 0


def test_giving_up_a_lookup_or_nothing_takes_no_lease_away(
    daemon: Daemon, cache: RemoteCache
) -> None:
    lease = cache.prepare_load(NAMESPACE, KEYS, timeout_s=5)
    assert cache.lookup(NAMESPACE, KEYS).num_blocks == NUM_BLOCKS
    for _ in range(2):
        cache._door._socket.sendall(pb.DoorRequest(give_up=pb.GiveUp()).SerializeToString())
    assert cache.lookup(NAMESPACE, KEYS).num_blocks == NUM_BLOCKS
    assert num_leases(daemon) == 1
    cache.complete_load(lease.id)


def test_a_load_that_is_cut_off_ends_the_session_and_its_lease(
    daemon: Daemon, cache: RemoteCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CutOffError(BaseException):
        """As Ctrl-C."""

    def cut(*_arguments: object) -> None:
        raise CutOffError

    main, prepare = threading.main_thread().ident or 0, daemon.manager.at_once.prepare
    go_on = threading.Event()

    def interrupted(*arguments: Any) -> Any:
        grants = prepare(*arguments)
        signal.pthread_kill(main, signal.SIGUSR1)
        go_on.wait(10)
        return grants

    before = signal.signal(signal.SIGUSR1, cut)
    monkeypatch.setattr(daemon.manager.at_once, "prepare", interrupted)
    try:
        with pytest.raises(CutOffError):
            cache.prepare_load(NAMESPACE, KEYS, timeout_s=5)
    finally:
        signal.signal(signal.SIGUSR1, before)
    go_on.set()
    with pytest.raises(TierUnavailableError):
        cache.lookup(NAMESPACE, KEYS)
    wait_until(lambda: daemon.manager.status().num_sessions == 0)
    assert num_leases(daemon) == 0


@pytest.mark.parametrize("kind", ["prepare_load", "begin_load"])
def test_a_refusal_at_the_door_says_when_to_come_again(
    daemon: Daemon,
    cache: RemoteCache,
    by_grpc: list[str],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_arguments: object) -> None:
        raise CapacityError("a crowd", retry_after_s=0.75)

    monkeypatch.setattr(daemon.answers.gate, "enter", refuse)
    with pytest.raises(CapacityError, match="a crowd") as caught:
        ask(cache, kind, timeout_s=5)
    assert caught.value.retry_after_s == 0.75
    assert by_grpc == [], "a refused load is not made again"
    assert num_leases(daemon) == 0
    assert daemon.metrics.value("ucm_refused_loads_total", by="daemon") == 1
    assert cache.lookup(NAMESPACE, KEYS).num_blocks == NUM_BLOCKS


def test_what_a_load_says_of_itself_arrives_at_the_gate(
    daemon: Daemon, cache: RemoteCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tickets and refusals in the client count at the door as they do by gRPC."""
    made: list[tuple[bool, int]] = []
    enter = daemon.answers.gate.enter

    def note(caller: Any, now_s: float, said: Any) -> None:
        made.append((said.has_ticket, said.num_refused))
        enter(caller, now_s, said)

    monkeypatch.setattr(daemon.answers.gate, "enter", note)
    monkeypatch.setattr(cache._board, "pass_load", lambda: (("ucm-made", f"{1} {3} {1}"),))
    get(cache, cache.open_namespace(tiny_spec()), KEYS)
    with cache._at_door():
        lease = cache.prepare_load(NAMESPACE, KEYS, timeout_s=5)
    cache.complete_load(lease.id)
    assert made == [(True, 3)] * 2
    assert daemon.metrics.value("ucm_refused_loads_total", by="client") == 6


def test_a_load_at_the_door_takes_none_of_the_sessions_calls(folder: Path) -> None:
    config = small_config(folder, nvme=False)
    service = dataclasses.replace(config.service, max_calls_per_session=1)
    config = dataclasses.replace(config, service=service)
    with running_daemon(config) as daemon, connect_to(daemon) as cache:
        put(cache, cache.open_namespace(tiny_spec()), KEYS)
        session = daemon.tokens.session_of(bytes.fromhex(cache._metadata[0][1]))
        daemon.engine_service._calls.charge(session, 1)
        load_and_give_back(cache)
        daemon.engine_service._calls.give_back(session, 1)


def test_unknown_namespaces_and_leases(cache: RemoteCache) -> None:
    other: list[BlockKey] = chain(NamespaceId(bytes(32)), 1)
    request = pb.PrepareLoadRequest(namespace=bytes(32), keys=other[0])
    with pytest.raises(Exception, match="has not opened"):
        cache._door.call(pb.DoorRequest(prepare_load=request), timeout_s=5)
    for lease_id in (b"short", bytes(17)):
        with pytest.raises(Exception, match="lease id has"):
            cache._door.call(
                pb.DoorRequest(release=pb.ReleaseRequest(lease_ids=[lease_id])), timeout_s=5
            )
    assert cache.lookup(NAMESPACE, KEYS).num_blocks == NUM_BLOCKS
