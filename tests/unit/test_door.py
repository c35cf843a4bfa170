"""The door: who may enter, what they get, what ends a session."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from ucm import door as door_module
from ucm.answers import Answers
from ucm.checksum import block_checksums
from ucm.config import ServiceConfig
from ucm.door import Door, SessionTokens
from ucm.door_client import DoorClient
from ucm.door_wire import MAX_PACKET_BYTES
from ucm.errors import (
    BlockNotFoundError,
    CapacityError,
    InvalidArgumentError,
    LayoutMismatchError,
    PermissionDeniedError,
    TierUnavailableError,
    UcmError,
)
from ucm.hashing import NamespaceSpec
from ucm.layout import KvDtype, KvLayout
from ucm.manager import Manager
from ucm.protos import cache_pb2 as pb
from ucm.testing.daemon import short_folder, small_config
from ucm.testing.stores import wait_until
from ucm.types import ROOT_KEY, BlockKey, NamespaceId
from ucm.wire import PROTOCOL_VERSION, spec_to_wire

LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=64, block_tokens=8, dtype=KvDtype.FLOAT32)
SPEC = NamespaceSpec(layout=LAYOUT, model_id="m", weights_digest="w")
MAX_KEYS = 100
HELLO = pb.DoorRequest(hello=pb.Hello(protocol_version=PROTOCOL_VERSION, client="test"))


@dataclass
class House:
    """A door over a manager with memory only."""

    path: Path
    manager: Manager
    answers: Answers
    tokens: SessionTokens
    door: Door
    clients: contextlib.ExitStack

    def connect(self) -> DoorClient:
        client = DoorClient(self.path, timeout_s=5)
        self.clients.callback(client.close)
        return client

    def raw(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(5)
        sock.connect(str(self.path))
        return sock

    def num_sessions(self) -> int:
        return self.manager.status().num_sessions


def make_house(folder: Path, service: Callable[[ServiceConfig], ServiceConfig]) -> House:
    config = small_config(folder, nvme=False)
    config = dataclasses.replace(config, service=service(config.service))
    manager, tokens = Manager(config), SessionTokens()
    answers = Answers(manager, config.service)
    door = Door(folder / "door", answers, tokens, config.service)
    door.start()
    return House(folder / "door", manager, answers, tokens, door, contextlib.ExitStack())


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture
def house(folder: Path) -> Iterator[House]:
    found = make_house(
        folder,
        lambda service: dataclasses.replace(service, max_sessions=3, max_keys_per_call=MAX_KEYS),
    )
    yield found
    found.clients.close()
    found.door.stop()
    found.answers.close()
    found.manager.close()


def test_hello_gives_a_token_and_staging_memory(house: House) -> None:
    client = house.connect()
    greeting = client.hello(timeout_s=5)
    assert house.tokens.session_of(greeting.token) == 1
    assert len(greeting.staging) == house.manager.config.service.staging_bytes
    greeting.staging[:4] = b"kvkv"
    ours = house.manager.staging(house.tokens.session_of(greeting.token)).view(0, 4)
    assert bytes(ours) == b"kvkv"
    client.close()


def test_a_namespace_comes_with_its_arena_read_only(house: House) -> None:
    client = house.connect()
    client.hello(timeout_s=5)
    arena = client.open_namespace(SPEC, SPEC.fingerprint(), timeout_s=5).arena
    assert arena.readonly
    assert len(arena) == house.manager.config.memory.capacity_bytes // LAYOUT.block_bytes * (
        LAYOUT.block_bytes
    )
    client.close()


def test_the_arenas_descriptor_cannot_be_written_through(house: House) -> None:
    with house.raw() as sock:
        sock.send(HELLO.SerializeToString())
        _, others, _, _ = socket.recv_fds(sock, MAX_PACKET_BYTES, 3)
        for each in others:
            os.close(each)
        request = pb.OpenNamespace(spec=spec_to_wire(SPEC), namespace=SPEC.fingerprint())
        sock.send(pb.DoorRequest(open_namespace=request).SerializeToString())
        _, (fd,), _, _ = socket.recv_fds(sock, MAX_PACKET_BYTES, 1)
    size = os.fstat(fd).st_size
    with pytest.raises(PermissionError):
        mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    os.close(fd)


def test_descriptors_that_come_are_not_for_programs_that_the_client_starts(house: House) -> None:
    client = house.connect()
    client.hello(timeout_s=5)
    _, signal_fd = client.open_progress(timeout_s=5)
    assert not os.get_inheritable(signal_fd)
    os.close(signal_fd)
    client.close()


def test_a_session_ends_with_its_connection(house: House) -> None:
    client = house.connect()
    token = client.hello(timeout_s=5).token
    assert house.num_sessions() == 1
    client.close()
    wait_until(lambda: house.num_sessions() == 0)
    wait_until(lambda: house.door.num_connections == 0)
    with pytest.raises(PermissionDeniedError):
        house.tokens.session_of(token)


def test_a_crowd_ends_with_its_sessions(house: House) -> None:
    gate, now_s = house.answers.gate, time.monotonic()
    clients = [house.connect() for _ in range(3)]
    sessions = [house.tokens.session_of(each.hello(timeout_s=5).token) for each in clients]
    while not gate.is_crowded:
        for session in sessions:
            with contextlib.suppress(CapacityError):
                gate.enter(session, now_s)
        now_s += 0.01
    for client in clients:
        client.close()
    wait_until(lambda: not gate.is_crowded)


def test_descriptors_and_threads_go_back_to_the_baseline(house: House) -> None:
    def counts() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def come_and_go() -> None:
        client = house.connect()
        client.hello(timeout_s=5)
        client.open_namespace(SPEC, SPEC.fingerprint(), timeout_s=5)
        client.close()
        wait_until(lambda: house.door.num_connections == 0 and house.num_sessions() == 0)

    come_and_go()  # the namespace's arena stays
    before = counts()
    for _ in range(10):
        come_and_go()
    # fewer is fine: a thread that makes memory ready may have been at work before
    wait_until(lambda: all(now <= was for now, was in zip(counts(), before, strict=True)))


def test_sessions_are_bounded(house: House) -> None:
    clients = [house.connect() for _ in range(3)]
    for client in clients:
        client.hello(timeout_s=5)
    with pytest.raises(CapacityError, match="max_sessions"):
        house.connect().hello(timeout_s=5)
    clients[0].close()
    wait_until(lambda: house.door.num_connections == 2)
    house.connect().hello(timeout_s=5)


def test_without_a_thread_a_client_is_refused_and_the_next_one_served(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "ucm-session":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(CapacityError, match="no thread for another session"):
            house.connect().hello(timeout_s=5)
    assert house.door.num_connections == 0
    house.connect().hello(timeout_s=5)


def test_another_user_is_refused(house: House) -> None:
    """A real process of another user; as nobody but root can become one, else by a fake door."""
    if os.geteuid() != 0:
        house.door._allowed_uids = frozenset({os.geteuid() + 1})
        with pytest.raises(PermissionDeniedError, match="allowed_uids"):
            house.connect().hello(timeout_s=5)
        return
    house.path.parent.chmod(0o755)
    house.path.chmod(0o666)
    script = (
        "import os, socket, sys; os.setgid(12345); os.setuid(12345);"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1]);"
        "sys.stdout.buffer.write(s.recv(65536))"
    )
    command = [sys.executable, "-c", script, str(house.path)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=15)
    reply = pb.DoorReply.FromString(done.stdout)
    assert reply.error.error == "PermissionDeniedError"
    assert "user 12345" in reply.error.message
    assert house.num_sessions() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_strangers_door_in_a_public_place_is_not_entered(folder: Path) -> None:
    folder.chmod(0o777)
    script = (
        "import os, socket, sys; os.setgid(12345); os.setuid(12345);"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.bind(sys.argv[1]);"
        "s.listen(1); print('listening', flush=True); c, _ = s.accept();"
        "print(len(c.recv(65536)))"
    )
    command = [sys.executable, "-c", script, str(folder / "door")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stranger:
        assert stranger.stdout is not None
        stranger.stdout.readline()
        with pytest.raises(PermissionDeniedError, match="user 12345 listens"):
            DoorClient(folder / "door", timeout_s=5)
        assert stranger.stdout.read().strip() == "0"  # nothing was said to it


def error_of(sock: socket.socket) -> UcmError:
    packet, fds, _, _ = socket.recv_fds(sock, MAX_PACKET_BYTES, 4)
    assert not fds
    reply = pb.DoorReply.FromString(packet)
    assert reply.WhichOneof("reply") == "error"
    return {leaf.__name__: leaf for leaf in UcmError.__subclasses__()}[reply.error.error](
        reply.error.message
    )


@pytest.mark.parametrize(
    "packet",
    [
        b"\xff\xff\xff",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x80\x04\x95\x0b.",
        pb.DoorRequest().SerializeToString() or b"\n\x00x",
        pb.DoorRequest(open_namespace=pb.OpenNamespace()).SerializeToString(),
        pb.DoorRequest(hello=pb.Hello(protocol_version=99)).SerializeToString(),
        bytes(MAX_PACKET_BYTES + 1),
    ],
)
def test_a_bad_greeting_gets_an_error_and_a_close(house: House, packet: bytes) -> None:
    with house.raw() as sock:
        sock.send(packet)
        assert isinstance(error_of(sock), InvalidArgumentError)
        assert sock.recv(1) == b""
    assert house.num_sessions() == 0
    house.connect().hello(timeout_s=5)


def test_a_bad_request_after_hello_ends_the_session(house: House) -> None:
    for packet in (b"\xff\xff", HELLO.SerializeToString(), bytes(MAX_PACKET_BYTES + 1)):
        with house.raw() as sock:
            sock.send(HELLO.SerializeToString())
            _, fds, _, _ = socket.recv_fds(sock, MAX_PACKET_BYTES, 3)
            assert len(fds) == 3
            for fd in fds:
                os.close(fd)
            sock.send(packet)
            assert isinstance(error_of(sock), InvalidArgumentError)
            assert sock.recv(1) == b""
    wait_until(lambda: house.num_sessions() == 0)


def test_descriptors_that_a_client_sends_are_not_kept(house: House) -> None:
    before = len(os.listdir("/proc/self/fd"))
    read_end, write_end = os.pipe()
    with house.raw() as sock:
        socket.send_fds(sock, [HELLO.SerializeToString()], [read_end])
        assert isinstance(error_of(sock), InvalidArgumentError)
    os.close(read_end)
    os.close(write_end)
    wait_until(lambda: house.door.num_connections == 0)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before)


def test_a_refused_namespace_leaves_the_session_usable(house: House) -> None:
    client = house.connect()
    client.hello(timeout_s=5)
    with pytest.raises(InvalidArgumentError, match="compute different ids"):
        client.open_namespace(SPEC, NamespaceId(bytes(32)), timeout_s=5)
    broken = spec_to_wire(SPEC)
    broken.layout.num_layers = 0
    request = pb.DoorRequest(open_namespace=pb.OpenNamespace(spec=broken, namespace=bytes(32)))
    with pytest.raises(LayoutMismatchError):
        client._ask(request, timeout_s=5)
    assert client.open_namespace(SPEC, SPEC.fingerprint(), timeout_s=5)
    client.close()


def test_who_says_nothing_is_closed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "HELLO_TIMEOUT_S", 0.05)
    with house.raw() as sock:
        assert isinstance(error_of(sock), InvalidArgumentError)
        assert sock.recv(1) == b""


def test_a_draining_door_refuses_new_sessions_and_keeps_the_old(house: House) -> None:
    client = house.connect()
    client.hello(timeout_s=5)
    house.door.drain()
    with pytest.raises(TierUnavailableError, match="stopping"):
        house.connect().hello(timeout_s=5)
    assert client.is_open()
    assert client.open_namespace(SPEC, SPEC.fingerprint(), timeout_s=5)
    client.close()


def test_stop_ends_every_session(house: House) -> None:
    clients = [house.connect() for _ in range(2)]
    clients[0].hello(timeout_s=5)  # the other one has not said hello yet
    house.door.stop()
    assert not any(client.is_open() for client in clients)
    assert house.num_sessions() == 0
    with pytest.raises(TierUnavailableError):
        house.connect()


def test_the_socket_is_for_user_and_group(house: House) -> None:
    assert house.path.stat().st_mode & 0o777 == 0o660


def test_a_daemon_that_passes_less_memory_than_it_says_is_not_believed(folder: Path) -> None:
    """Mapping past the end of a file would kill the client by SIGBUS at the first touch."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(folder / "door"))
    listener.listen(1)

    def lie() -> None:
        sock, _ = listener.accept()
        sock.recv(MAX_PACKET_BYTES)
        welcome = pb.Welcome(
            protocol_version=PROTOCOL_VERSION,
            token=bytes(32),
            staging_bytes=1 << 20,
            board_bytes=4096,
        )
        fd = os.memfd_create("short")
        os.ftruncate(fd, 4096)
        socket.send_fds(sock, [pb.DoorReply(welcome=welcome).SerializeToString()], [fd] * 3)
        os.close(fd)
        sock.close()

    thread = threading.Thread(target=lie)
    thread.start()
    client = DoorClient(folder / "door", timeout_s=5)
    with pytest.raises(TierUnavailableError, match="4096"):
        client.hello(timeout_s=5)
    client.close()
    thread.join()
    listener.close()


def look(client: DoorClient, request: pb.LookupRequest, *, timeout_s: float = 5) -> pb.LookupReply:
    return cast(pb.LookupReply, client.call(pb.DoorRequest(lookup=request), timeout_s=timeout_s))


def test_a_lookup_is_answered_like_any_other(house: House) -> None:
    client = house.connect()
    session = house.tokens.session_of(client.hello(timeout_s=5).token)
    client.open_namespace(SPEC, SPEC.fingerprint(), timeout_s=5)
    key, other = BlockKey(bytes([1] * 32)), bytes([2] * 32)
    grants = house.manager.prepare_store(session, SPEC.fingerprint(), ROOT_KEY, [key])
    slot = house.manager.staging(session).view(grants.slots[0].offset, LAYOUT.block_bytes)
    sums = {key: block_checksums(LAYOUT, slot)}
    house.manager.complete_store(session, grants.lease_id, sums)
    request = pb.LookupRequest(namespace=SPEC.fingerprint(), keys=key + other)
    assert client.takes(pb.DoorRequest(lookup=request))
    assert look(client, request).tiers == bytes([pb.TIER_MEMORY])


def test_a_refused_lookup_leaves_the_session(house: House) -> None:
    client = house.connect()
    client.hello(timeout_s=5)
    with pytest.raises(BlockNotFoundError):
        look(client, pb.LookupRequest(namespace=SPEC.fingerprint()))
    client.open_namespace(SPEC, SPEC.fingerprint(), timeout_s=5)
    for keys in (b"short", bytes(32 * (MAX_KEYS + 1))):
        request = pb.LookupRequest(namespace=SPEC.fingerprint(), keys=keys)
        with pytest.raises(InvalidArgumentError):
            look(client, request)
    request = pb.LookupRequest(namespace=SPEC.fingerprint(), keys=bytes(32))
    assert look(client, request).tiers == b""


def test_as_many_keys_as_the_client_says_pass_the_door(house: House) -> None:
    client = house.connect()
    client.hello(timeout_s=5)
    lookups = [
        pb.DoorRequest(
            lookup=pb.LookupRequest(namespace=SPEC.fingerprint(), keys=bytes(32 * count))
        )
        for count in range(2040, 2050)
    ]
    lengths = [len(each.SerializeToString()) for each in lookups]
    assert lengths[0] <= MAX_PACKET_BYTES < lengths[-1]
    assert [client.takes(each) for each in lookups] == [n <= MAX_PACKET_BYTES for n in lengths]


def test_a_silent_daemon_is_given_up_in_time(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / "door"))
        listener.listen(1)
        client = DoorClient(folder / "door", timeout_s=0.1)
        with pytest.raises(TierUnavailableError, match="does not answer"):
            client.hello(timeout_s=0.1)
        assert not client.is_open()
