"""The daemon's life: start, drain, stop, and what keeps it from starting."""

from __future__ import annotations

import dataclasses
import os
import socket
import stat
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.admin import AdminClient
from ucm.client import connect
from ucm.config import MetricsConfig
from ucm.daemon import Daemon
from ucm.errors import ConfigError, TierUnavailableError
from ucm.sockets import admin_path, door_path
from ucm.testing.blocks import chain, content, get, put, tiny_spec
from ucm.testing.daemon import running_daemon, short_folder, small_config
from ucm.types import ROOT_KEY, StoreStatus


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


def in_background(daemon: Daemon) -> threading.Thread:
    thread = threading.Thread(target=daemon.run)
    thread.start()
    return thread


def test_sockets_are_there_with_their_modes_and_go_away(folder: Path) -> None:
    config = small_config(folder)
    path = config.service.socket_path
    with running_daemon(config):
        modes = {
            each.name: stat.S_IMODE(each.stat().st_mode)
            for each in folder.iterdir()
            if each.is_socket()
        }
        assert modes == {
            path.name: 0o660,
            door_path(path).name: 0o660,
            admin_path(path).name: 0o600,
        }
    assert not [each for each in folder.iterdir() if each.is_socket()]


def test_a_path_with_special_characters_works(folder: Path) -> None:
    config = small_config(folder)
    path = folder / "a b%20c:d" / "ü.sock"
    service = dataclasses.replace(config.service, socket_path=path)
    with running_daemon(dataclasses.replace(config, service=service)):
        with connect(path) as cache:
            handle = cache.open_namespace(tiny_spec())
            assert cache.lookup(handle.id, []).num_blocks == 0
        with AdminClient(path) as admin:
            assert admin.status().socket_path == str(path)


def test_nothing_listens_but_the_three_sockets(folder: Path) -> None:
    def listening_ports() -> set[str]:
        found = set()
        for name in ("tcp", "tcp6"):
            for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    found.add(fields[9])
        ours = {
            os.readlink(f"/proc/self/fd/{fd}").removeprefix("socket:[").rstrip("]")
            for fd in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{fd}")
        }
        return found & ours

    with running_daemon(small_config(folder)):
        assert not listening_ports()


def test_a_restart_serves_what_was_flushed(folder: Path) -> None:
    config = small_config(folder)
    with running_daemon(config), connect(config.service.socket_path) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 8)
        assert set(put(cache, handle, keys)) == {StoreStatus.ACCEPTED}
        assert cache.flush(timeout_s=10)
    with running_daemon(config), connect(config.service.socket_path) as cache:
        handle = cache.open_namespace(tiny_spec())
        assert [tier.value for tier in cache.lookup(handle.id, keys).tiers] == ["nvme"] * 8
        assert get(cache, handle, keys) == [content(key) for key in keys]


def test_a_drain_flushes_what_was_accepted(folder: Path) -> None:
    config = small_config(folder)
    with running_daemon(config), connect(config.service.socket_path) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 200)
        put(cache, handle, keys)
    with running_daemon(config), connect(config.service.socket_path) as cache:
        handle = cache.open_namespace(tiny_spec())
        assert cache.lookup(handle.id, keys).num_blocks == 200


def test_a_draining_daemon_refuses_stores_and_sessions_and_waits_for_leases(folder: Path) -> None:
    config = small_config(folder)
    service = dataclasses.replace(config.service, drain_timeout_s=60)
    with Daemon(dataclasses.replace(config, service=service), environ={}) as daemon:
        thread = in_background(daemon)
        path = config.service.socket_path
        cache = connect(path)
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 2)
        put(cache, handle, keys)
        lease = cache.prepare_load(handle.id, keys, timeout_s=5)
        with AdminClient(path) as admin:
            admin.drain()
            while admin.status().store.state != "draining":
                threading.Event().wait(0.01)
        with pytest.raises(TierUnavailableError):
            connect(path)
        refused = cache.prepare_store(handle.id, keys[-1], chain(handle.id, 3)[2:])
        assert refused.slots[0].status is StoreStatus.REFUSED
        cache.release(refused.id)
        assert get(cache, handle, keys) == [content(key) for key in keys]  # loads go on
        assert thread.is_alive()
        cache.complete_load(lease.id)
        thread.join(10)
        assert not thread.is_alive()
        cache.close()


def test_a_drain_does_not_wait_forever(folder: Path) -> None:
    config = small_config(folder)
    service = dataclasses.replace(config.service, drain_timeout_s=0.2)
    with Daemon(dataclasses.replace(config, service=service), environ={}) as daemon:
        cache = connect(config.service.socket_path)
        handle = cache.open_namespace(tiny_spec())
        cache.prepare_store(handle.id, ROOT_KEY, chain(handle.id, 1))
        daemon.request_stop()
        start_s = time.monotonic()
        daemon.run()
        assert 0.2 <= time.monotonic() - start_s < 5
    cache.close()


def test_asked_twice_it_does_not_wait(folder: Path) -> None:
    config = small_config(folder)
    service = dataclasses.replace(config.service, drain_timeout_s=60)
    with Daemon(dataclasses.replace(config, service=service), environ={}) as daemon:
        cache = connect(config.service.socket_path)
        handle = cache.open_namespace(tiny_spec())
        cache.prepare_store(handle.id, ROOT_KEY, chain(handle.id, 1))
        daemon.request_stop()
        daemon.request_stop()
        start_s = time.monotonic()
        daemon.run()
        assert time.monotonic() - start_s < 10
    cache.close()


def test_the_service_manager_is_told(folder: Path) -> None:
    address = str(folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.settimeout(10)
        with Daemon(small_config(folder), environ={"NOTIFY_SOCKET": address}) as daemon:
            assert sock.recv(4096).startswith(b"READY=1\nSTATUS=serving at ")
            daemon.request_stop()
            daemon.run()
            assert sock.recv(4096) == b"STOPPING=1\nSTATUS=draining\n"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_metrics_are_served_on_loopback_when_asked(folder: Path) -> None:
    port = free_port()
    config = dataclasses.replace(small_config(folder), metrics=MetricsConfig(port=port))
    with running_daemon(config), connect(config.service.socket_path) as cache:
        handle = cache.open_namespace(tiny_spec())
        put(cache, handle, chain(handle.id, 3))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
            text = reply.read().decode()
    assert 'ucm_stored_blocks_total{status="accepted"} 3.0' in text
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)


def test_a_metrics_port_in_use_is_an_error_and_leaves_nothing_open(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        config = dataclasses.replace(small_config(folder), metrics=MetricsConfig(port=port))
        with pytest.raises(ConfigError, match=r"metrics\.port"):
            Daemon(config, environ={})
    with running_daemon(small_config(folder)):
        pass


def test_a_second_daemon_on_the_same_socket_or_folder_is_refused(folder: Path) -> None:
    config = small_config(folder)
    other_socket = dataclasses.replace(config.service, socket_path=folder / "other.sock")
    with running_daemon(config):
        with pytest.raises(ConfigError, match="in use"):
            Daemon(config, environ={})
        with pytest.raises(ConfigError, match="store"):
            Daemon(dataclasses.replace(config, service=other_socket), environ={})
        with connect(config.service.socket_path) as cache:
            cache.open_namespace(tiny_spec())


def test_threads_and_descriptors_go_back_to_the_baseline(folder: Path) -> None:
    def counts() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def once() -> None:
        config = small_config(folder)
        with running_daemon(config), connect(config.service.socket_path) as cache:
            handle = cache.open_namespace(tiny_spec())
            put(cache, handle, chain(handle.id, 3))

    once()
    before = counts()
    for _ in range(3):
        once()

    def settled() -> bool:
        return all(now <= then for now, then in zip(counts(), before, strict=True))

    deadline_s = time.monotonic() + 10
    while not settled() and time.monotonic() < deadline_s:
        threading.Event().wait(0.01)  # grpc closes its sockets on threads of its own
    assert settled(), (before, counts())


def test_status_says_what_there_is(folder: Path) -> None:
    config = small_config(folder)
    with (
        running_daemon(config),
        connect(config.service.socket_path) as cache,
        AdminClient(config.service.socket_path) as admin,
    ):
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 4)
        put(cache, handle, keys)
        assert admin.flush(timeout_s=10)
        lease = cache.prepare_load(handle.id, keys, timeout_s=5)
        status = admin.status()
        assert (status.pid, status.store_path) == (os.getpid(), str(config.nvme.path))
        store = status.store
        assert (store.state, store.num_sessions, store.num_leases) == ("serving", 1, 1)
        assert store.leased_bytes == 4 * handle.layout.block_bytes
        assert [(tier.kind.value, tier.num_blocks) for tier in store.tiers] == [
            ("memory", 4),
            ("nvme", 4),
        ]
        assert [namespace.id for namespace in store.namespaces] == [handle.id]
        assert store.problems == ()
        cache.complete_load(lease.id)


def test_an_operator_without_a_daemon_hears_so(folder: Path) -> None:
    with (
        AdminClient(folder / "ucm.sock") as admin,
        pytest.raises(TierUnavailableError, match="ucm serve"),
    ):
        admin.status()
