"""Requests at the door that are cut off: no answer is ever taken for another request's."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ucm import door_client
from ucm.client import connect
from ucm.daemon import Daemon
from ucm.door_client import DoorClient
from ucm.door_wire import MAX_PACKET_BYTES
from ucm.errors import TierUnavailableError
from ucm.protos import cache_pb2 as pb
from ucm.testing.blocks import chain, put, tiny_spec
from ucm.testing.daemon import running_daemon, short_folder, small_config
from ucm.types import NamespaceId

NAMESPACE = NamespaceId(bytes([1] * 32))
LOOKUP = pb.DoorRequest(lookup=pb.LookupRequest(namespace=NAMESPACE, keys=bytes(32)))
FOUND = pb.DoorReply(found=pb.LookupReply(tiers=bytes([pb.TIER_MEMORY])))


class CutOffError(BaseException):
    """What a signal raises, wherever the main thread is: as Ctrl-C does."""


def cut_off() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    def cut(*_arguments: object) -> None:
        raise CutOffError

    before = signal.signal(signal.SIGUSR1, cut)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture
def daemon(folder: Path) -> Iterator[Daemon]:
    with running_daemon(small_config(folder, nvme=False)) as found:
        yield found


@contextlib.contextmanager
def door(folder: Path, answer: Callable[[socket.socket], None]) -> Iterator[DoorClient]:
    """A client of a door that does `answer` whenever a request has come."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / "door"))
        listener.listen(1)

        def serve() -> None:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):  # the client may have hung up
                while sock.recv(MAX_PACKET_BYTES):
                    answer(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        client = DoorClient(folder / "door", timeout_s=5)
        try:
            yield client
        finally:
            client.close()
            thread.join()


def says(reply: pb.DoorReply) -> Callable[[socket.socket], None]:
    def answer(sock: socket.socket) -> None:
        sock.send(reply.SerializeToString())

    return answer


def test_a_cut_off_request_ends_the_connection(folder: Path) -> None:
    """Else the next lookup is answered with what belongs to the one before."""
    with door(folder, lambda _sock: cut_off()) as client:
        with pytest.raises(CutOffError):
            client.open_summaries(NAMESPACE, timeout_s=5)
        assert not client.is_open()
        with pytest.raises(TierUnavailableError):
            client.call(LOOKUP, timeout_s=5)


def test_a_cut_off_lookup_ends_the_connection_and_owes_nothing(folder: Path) -> None:
    with door(folder, lambda _sock: cut_off()) as client:
        with pytest.raises(CutOffError):
            client.call(LOOKUP, timeout_s=5)
        assert not client.is_open()
        assert not client._owes_answer
        started_s = time.monotonic()
        with pytest.raises(TierUnavailableError):
            client.open_summaries(NAMESPACE, timeout_s=5)
        assert time.monotonic() - started_s < 1.0, "an answer that came was waited for"


def test_a_lookup_cut_off_behind_its_answer_ends_the_connection(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with door(folder, says(FOUND)) as client:
        monkeypatch.setattr(client, "_receive", _cut_behind(client._receive))
        with pytest.raises(CutOffError):
            client.call(LOOKUP, timeout_s=5)
        assert not client.is_open()
        assert not client._owes_answer


def test_a_late_answer_whose_dropping_is_cut_off_ends_the_connection(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = threading.Event()

    def answer(sock: socket.socket) -> None:
        late.wait(10)
        sock.send(FOUND.SerializeToString())

    with door(folder, answer) as client:
        with pytest.raises(TierUnavailableError):
            client.call(LOOKUP, timeout_s=0.05)
        assert client.is_open()
        monkeypatch.setattr(client, "_receive", _cut_behind(client._receive))
        late.set()
        with pytest.raises(CutOffError):
            _ask_until_it_came(client)
        assert not client.is_open()


def _ask_until_it_came(client: DoorClient) -> None:
    for _ in range(500):
        client.takes(LOOKUP)
        threading.Event().wait(0.01)


def _cut_behind(receive: Callable[[float], Any]) -> Callable[[float], Any]:
    """A signal that comes right behind the system call."""

    def cut(deadline_s: float) -> Any:
        receive(deadline_s)
        raise CutOffError

    return cut


@pytest.mark.parametrize(
    "reply",
    [
        FOUND,
        pb.DoorReply(),
        pb.DoorReply(elsewhere=pb.Elsewhere()),
        pb.DoorReply(summaries=pb.SummariesOpened(area_bytes=4096)),
    ],
    ids=["of another kind", "of none", "nowhere else to ask", "without its memory"],
)
def test_an_answer_to_something_else_ends_the_connection(folder: Path, reply: pb.DoorReply) -> None:
    with door(folder, says(reply)) as client:
        with pytest.raises(TierUnavailableError):
            client.open_summaries(NAMESPACE, timeout_s=5)
        assert not client.is_open()


def test_the_arena_of_another_namespace_is_not_mapped(folder: Path) -> None:
    def answer(sock: socket.socket) -> None:
        opened = pb.NamespaceOpened(namespace=bytes([2] * 32), arena_bytes=4096)
        fd = os.memfd_create("other")
        os.ftruncate(fd, 4096)
        socket.send_fds(sock, [pb.DoorReply(opened=opened).SerializeToString()], [fd])
        os.close(fd)

    spec = tiny_spec()
    with door(folder, answer) as client:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(TierUnavailableError, match="garbled"):
            client.open_namespace(spec, spec.fingerprint(), timeout_s=5)
        assert not client.is_open()
        assert len(os.listdir("/proc/self/fd")) < before


def test_a_session_whose_opening_was_cut_off_reads_nobody_elses_blocks(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens, go_on = daemon.manager.open_namespace, threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        cut_off()
        go_on.wait(10)
        return opens(*arguments, **options)

    path = daemon.config.service.socket_path
    with connect(path, timeout_s=5) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 3)
        put(cache, handle, keys)
        assert cache.lookup(handle.id, keys).num_blocks == 3
        with monkeypatch.context() as slowed:
            slowed.setattr(daemon.manager, "open_namespace", slow)
            with pytest.raises(CutOffError):
                cache.open_namespace(dataclasses.replace(tiny_spec(), model_id="second"))
            go_on.set()
        with pytest.raises(TierUnavailableError):
            cache.open_namespace(dataclasses.replace(tiny_spec(), model_id="third"))
        with pytest.raises(TierUnavailableError):
            cache.lookup(handle.id, keys)
    with connect(path, timeout_s=5) as cache:
        cache.open_namespace(tiny_spec())
        assert cache.lookup(handle.id, keys).num_blocks == 3


def test_close_ends_another_threads_hanging_lookup(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, go_on, failures = threading.Event(), threading.Event(), list[BaseException]()

    def hang(*_arguments: Any) -> Any:
        asked.set()
        go_on.wait(30)
        raise TierUnavailableError("nobody waits for this")

    cache = connect(daemon.config.service.socket_path, timeout_s=15)
    namespace = cache.open_namespace(tiny_spec()).id
    monkeypatch.setattr(daemon.manager, "lookup", hang)

    def look() -> None:
        try:
            cache.lookup(namespace, chain(namespace, 1))
        except TierUnavailableError as error:
            failures.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        assert asked.wait(5)
        started_s = time.monotonic()
        cache.close()
        thread.join(5)
        assert time.monotonic() - started_s < 2.0
        assert len(failures) == 1
    finally:
        go_on.set()
        thread.join()


def test_an_answer_that_was_cut_is_not_believed() -> None:
    """Even if what came of it can be read: its last lists may lack something."""
    packet = FOUND.SerializeToString()
    assert door_client._parse(packet, [], 0, LOOKUP) == FOUND
    for flag in (socket.MSG_TRUNC, socket.MSG_CTRUNC):
        with pytest.raises(TierUnavailableError, match="garbled"):
            door_client._parse(packet, [], flag, LOOKUP)


def test_a_door_whose_folder_vanishes_is_no_daemon(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(*_where: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(door_client, "_check_listener", vanish)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / "door"))
        listener.listen(1)
        with pytest.raises(TierUnavailableError, match="no daemon answers"):
            DoorClient(folder / "door", timeout_s=5)
