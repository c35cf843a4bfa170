"""The real daemon in its own process: life, refusals, clients that die, a daemon that hangs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from ucm.admin import AdminClient
from ucm.client import connect
from ucm.errors import TierUnavailableError
from ucm.storage import format as disk_format
from ucm.testing.blocks import chain, content, get, put, tiny_spec
from ucm.testing.daemon import (
    DaemonStartError,
    SpawnedDaemon,
    short_folder,
    small_settings,
    spawn_daemon,
    spawned_daemon,
)
from ucm.testing.stores import wait_until
from ucm.types import LoadStatus, StoreStatus

pytestmark = pytest.mark.timeout(120)

WAIT_S = 20.0


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture
def daemon(folder: Path) -> Iterator[SpawnedDaemon]:
    with spawned_daemon(small_settings(folder), folder / "log") as found:
        yield found


def ucm(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ucm.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


# ---------------------------------------------------------------- life


def test_store_load_stop_restart(folder: Path) -> None:
    with spawned_daemon(small_settings(folder), folder / "log") as daemon:
        with connect(daemon.socket_path, timeout_s=10) as cache:
            handle = cache.open_namespace(tiny_spec())
            keys = chain(handle.id, 100)
            assert set(put(cache, handle, keys)) == {StoreStatus.ACCEPTED}
            assert get(cache, handle, keys) == [content(key) for key in keys]
        status = json.loads(ucm("status", "--socket", daemon.socket_path, "--json").stdout)
        assert (status["pid"], status["state"]) == (daemon.pid, "serving")
        assert status["leased_bytes"] == 0
        assert daemon.stop() == 0  # without a flush: the drain does it
        assert daemon.process.stdout is not None
        assert json.loads(daemon.process.stdout.read())["event"] == "stopped"
    assert not [path for path in folder.iterdir() if path.is_socket()]
    fsck = ucm("fsck", folder / "store", "--json")
    assert (fsck.returncode, json.loads(fsck.stdout)["num_blocks"]) == (0, 100)
    with spawned_daemon(small_settings(folder), folder / "log") as daemon:
        with connect(daemon.socket_path, timeout_s=10) as cache:
            handle = cache.open_namespace(tiny_spec())
            assert {tier.value for tier in cache.lookup(handle.id, keys).tiers} == {"nvme"}
            assert get(cache, handle, keys) == [content(key) for key in keys]
        daemon.process.send_signal(signal.SIGINT)
        assert daemon.process.wait(30) == 0


def test_a_second_sigterm_skips_the_drain(folder: Path) -> None:
    arguments = [*small_settings(folder), "--set", "service.drain_timeout_s=60"]
    with spawned_daemon(arguments, folder / "log") as daemon:
        cache = connect(daemon.socket_path, timeout_s=10)
        handle = cache.open_namespace(tiny_spec())
        lease = cache.prepare_store(handle.id, bytes(32), chain(handle.id, 1))  # type: ignore[arg-type]
        assert lease.slots[0].data is not None
        daemon.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining" in daemon.log(), WAIT_S)
        assert daemon.process.poll() is None
        assert daemon.stop() == 0
        cache.close()


def test_the_log_names_no_tokens_and_no_paths_of_keys(folder: Path) -> None:
    arguments = [*small_settings(folder), "--set", "log.level=DEBUG"]
    with spawned_daemon(arguments, folder / "log") as daemon:
        with connect(daemon.socket_path, timeout_s=10) as cache:
            token = cache._metadata[0][1]
            handle = cache.open_namespace(tiny_spec())
            keys = chain(handle.id, 2)
            put(cache, handle, keys)
            get(cache, handle, keys)
        daemon.stop()
        log = daemon.log()
    assert "session 1 began" in log
    assert token not in log
    assert not any(key.hex() in log for key in keys)


# ---------------------------------------------------------------- refusals


def refused(arguments: Sequence[str], folder: Path) -> str:
    """What a daemon that may not start says; its exit code is 2 and it leaves nothing behind."""
    with pytest.raises(DaemonStartError) as caught:
        spawn_daemon(arguments, folder / "refused.log")
    assert caught.value.exit_code == 2, caught.value
    return (folder / "refused.log").read_text()


def test_a_second_daemon_on_the_same_folder(folder: Path, daemon: SpawnedDaemon) -> None:
    arguments = [*small_settings(folder), "--socket", str(folder / "other.sock")]
    text = refused(arguments, folder)
    assert f"in use by process {daemon.pid}" in text
    connect(daemon.socket_path, timeout_s=10).close()


def test_a_socket_in_use(folder: Path, daemon: SpawnedDaemon) -> None:
    arguments = [*small_settings(folder), "--store", str(folder / "other")]
    assert "is in use: a daemon answers there" in refused(arguments, folder)
    connect(daemon.socket_path, timeout_s=10).close()


def test_a_socket_path_that_is_too_long(folder: Path) -> None:
    arguments = [*small_settings(folder), "--socket", str(folder / ("x" * 120))]
    text = refused(arguments, folder)
    assert "choose a shorter one with --socket" in text
    assert not (folder / "store").exists()


def test_an_unknown_configuration_key(folder: Path) -> None:
    (folder / "ucm.toml").write_text("[service]\nmax_session = 3\n")
    text = refused(["--config", str(folder / "ucm.toml")], folder)
    assert "did you mean max_sessions?" in text
    assert len(text.splitlines()) == 1


def test_a_folder_of_another_format_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with spawned_daemon(small_settings(folder), folder / "log") as daemon:
        with connect(daemon.socket_path, timeout_s=10) as cache:
            put(cache, cache.open_namespace(tiny_spec()), [])
        daemon.stop()
    (path,) = (folder / "store").rglob("superblock")
    superblock = disk_format.decode_superblock(path.read_bytes(), "x")
    monkeypatch.setattr(disk_format, "FORMAT_VERSION", 77)
    path.write_bytes(disk_format.encode_superblock(superblock))
    assert "has disk format 77" in refused(small_settings(folder), folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_owner(folder: Path) -> None:
    (folder / "store").mkdir()
    os.chown(folder / "store", 12345, 12345)
    assert "belongs to user 12345" in refused(small_settings(folder), folder)


def test_what_a_killed_daemon_left_is_no_obstacle(folder: Path) -> None:
    with spawned_daemon(small_settings(folder), folder / "log") as daemon:
        daemon.kill()
    assert [path for path in folder.iterdir() if path.is_socket()]
    with spawned_daemon(small_settings(folder), folder / "log") as daemon:
        connect(daemon.socket_path, timeout_s=10).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_full_disk_stops_stores_and_loads_go_on(folder: Path) -> None:
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        arguments = [*small_settings(folder), "--store", str(disk / "store")]
        arguments += ["--set", "nvme.segment_bytes=4MiB", "--set", "memory.capacity_bytes=64MiB"]
        with spawned_daemon(arguments, folder / "log") as daemon:
            _on_a_full_disk(daemon, disk / "ballast")
            daemon.stop()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill_disk(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(64 << 10))


def _on_a_full_disk(daemon: SpawnedDaemon, ballast: Path) -> None:
    with connect(daemon.socket_path, timeout_s=10) as cache:
        handle = cache.open_namespace(tiny_spec())
        first = chain(handle.id, 64)
        assert set(put(cache, handle, first)) == {StoreStatus.ACCEPTED}
        assert cache.flush(timeout_s=10)
        fill_disk(ballast)
        put(cache, handle, chain(handle.id, 64, seed=1))
        assert not cache.flush(timeout_s=10)
        assert set(put(cache, handle, chain(handle.id, 64, seed=2))) == {StoreStatus.REFUSED}
        assert get(cache, handle, first) == [content(key) for key in first]
        status = ucm("status", "--socket", daemon.socket_path)
        assert status.returncode == 0
        assert "stores stop, loads go on" in status.stdout
        found = json.loads(ucm("status", "--socket", daemon.socket_path, "--json").stdout)
        assert [tier["writable"] for tier in found["tiers"]] == [True, False]
        assert "full" in found["tiers"][1]["reason"]
        ballast.unlink()
        seeds = iter(range(3, 1000))

        def stores_again() -> bool:
            statuses = put(cache, handle, chain(handle.id, 4, seed=next(seeds)))
            return cache.flush(timeout_s=10) and set(statuses) == {StoreStatus.ACCEPTED}

        wait_until(stores_again, WAIT_S, every_s=0.02)
    with AdminClient(daemon.socket_path, timeout_s=10) as admin:
        assert admin.status().store.problems == ()


def test_flipped_bits_on_disk_are_misses(folder: Path) -> None:
    with spawned_daemon(small_settings(folder), folder / "log") as daemon:
        with connect(daemon.socket_path, timeout_s=10) as cache:
            handle = cache.open_namespace(tiny_spec())
            keys = chain(handle.id, 8)
            put(cache, handle, keys)
        assert daemon.stop() == 0
    wanted = content(keys[3])[: handle.layout.slab_bytes]
    (segment,) = (folder / "store").rglob("*.seg")
    data = bytearray(segment.read_bytes())
    data[data.index(wanted) + 7] ^= 16
    segment.write_bytes(data)
    with (
        spawned_daemon(small_settings(folder), folder / "log") as daemon,
        connect(daemon.socket_path, timeout_s=10) as cache,
    ):
        handle = cache.open_namespace(tiny_spec())
        lease = cache.prepare_load(handle.id, keys, timeout_s=10)
        assert [block.status for block in lease.blocks[:4]] == [
            *[LoadStatus.READY] * 3,
            LoadStatus.CORRUPT,
        ]
        cache.complete_load(lease.id)
        assert get(cache, handle, keys) == [content(key) for key in keys[:3]]


# ---------------------------------------------------------------- clients that die


def test_a_client_that_hangs_loses_its_leases_by_deadline(folder: Path) -> None:
    arguments = [*small_settings(folder), "--set", "transfer.lease_timeout_s=0.5"]
    with (
        spawned_daemon(arguments, folder / "log") as daemon,
        connect(daemon.socket_path, timeout_s=10) as cache,
        AdminClient(daemon.socket_path, timeout_s=10) as admin,
    ):
        handle = cache.open_namespace(tiny_spec())
        cache.prepare_store(handle.id, chain(handle.id, 1)[0], chain(handle.id, 2)[1:])
        put(cache, handle, chain(handle.id, 2))
        cache.prepare_load(handle.id, chain(handle.id, 2), timeout_s=5)
        wait_until(lambda: admin.status().store.num_leases == 0, WAIT_S)
        assert admin.status().store.leased_bytes == 0


FORK_SCRIPT = """
import os, signal, sys
from ucm.client import connect
from ucm.errors import TierUnavailableError
from ucm.testing.blocks import tiny_spec
cache = connect(sys.argv[1], timeout_s=10)
namespace = cache.open_namespace(tiny_spec()).id
child = os.fork()
if child == 0:
    try:
        cache.lookup(namespace, [])
    except TierUnavailableError:
        os.write(1, b"refused\\n")
    signal.pause()
print(child, cache.lookup(namespace, []).num_blocks, flush=True)
signal.pause()
"""


def test_a_forked_child_cannot_use_nor_keep_its_parents_session(daemon: SpawnedDaemon) -> None:
    command = [sys.executable, "-c", FORK_SCRIPT, str(daemon.socket_path)]
    with (
        AdminClient(daemon.socket_path, timeout_s=10) as admin,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent,
    ):
        assert parent.stdout is not None
        lines = sorted(parent.stdout.readline().split() for _ in range(2))
        child = int(lines[0][0])
        try:
            assert lines == [[str(child), "0"], ["refused"]]
            assert admin.status().store.num_sessions == 1
            parent.kill()
            wait_until(lambda: admin.status().store.num_sessions == 0, WAIT_S)
        finally:
            os.kill(child, signal.SIGKILL)


# ---------------------------------------------------------------- a daemon that hangs or dies


def test_a_frozen_daemon_costs_no_more_than_the_deadline(daemon: SpawnedDaemon) -> None:
    cache = connect(daemon.socket_path, timeout_s=0.5)
    handle = cache.open_namespace(tiny_spec())
    keys = chain(handle.id, 2)
    put(cache, handle, keys)
    calls: list[tuple[float, Callable[[], object]]] = [
        (0.5, lambda: cache.lookup(handle.id, keys)),
        (0.5, lambda: cache.prepare_store(handle.id, keys[-1], chain(handle.id, 3)[2:])),
        (1.0, lambda: cache.prepare_load(handle.id, keys, timeout_s=1.0)),
        (0.3, lambda: cache.flush(timeout_s=0.3)),
        (0.5, lambda: connect(daemon.socket_path, timeout_s=0.5)),
        (0.5, lambda: cache.open_namespace(tiny_spec("other"))),
    ]
    with daemon.frozen():
        for deadline_s, call in calls:
            start_s = time.monotonic()
            with pytest.raises(TierUnavailableError):
                call()
            assert time.monotonic() - start_s < deadline_s + 0.5  # a busy machine's leeway
    cache.close()
    with connect(daemon.socket_path, timeout_s=10) as again:
        handle = again.open_namespace(tiny_spec())
        assert get(again, handle, keys) == [content(key) for key in keys]
        with AdminClient(daemon.socket_path, timeout_s=10) as admin:
            wait_until(lambda: admin.status().store.num_sessions == 1, WAIT_S)
            assert admin.status().store.num_leases == 0


def test_a_killed_daemon_fails_calls_at_once(daemon: SpawnedDaemon) -> None:
    cache = connect(daemon.socket_path, timeout_s=30)
    handle = cache.open_namespace(tiny_spec())
    keys = chain(handle.id, 2)
    put(cache, handle, keys)
    lease = cache.prepare_load(handle.id, keys, timeout_s=10)
    daemon.kill()
    start_s = time.monotonic()
    with pytest.raises(TierUnavailableError):
        cache.lookup(handle.id, keys)
    with pytest.raises(TierUnavailableError):
        cache.complete_load(lease.id)
    assert time.monotonic() - start_s < 5
    # The memory outlives the daemon: a reader in the middle of a copy does not crash.
    assert [bytes(block.data or b"") for block in lease.blocks] == [content(key) for key in keys]
    cache.close()
