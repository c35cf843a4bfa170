"""A client is killed in each of its states, several times: the daemon is left as it was.

Leases and leased bytes go to zero, and descriptors and memfds of the daemon's process return to
their number before. So do its threads, but for those of pools that start on demand: fewer over all
deaths of all states than one a death of any single state would make. The clients are forked from
one process that has the code loaded.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ucm.admin import AdminClient
from ucm.client import connect
from ucm.testing.blocks import chain, content, get, put, tiny_spec
from ucm.testing.daemon import SpawnedDaemon, short_folder, small_settings, spawned_daemon
from ucm.testing.doomed_client import NUM_BLOCKS, STATES
from ucm.testing.lanes import IS_DEEP, LANE
from ucm.testing.stores import wait_until

pytestmark = pytest.mark.timeout(3600 if IS_DEEP else 120)

LATE_POOL_THREADS = 4
WAIT_S = 20.0
LEASED = ("load_leased", "load_being_read", "layer_loads_begun", "store_prepared", "many_leases")


@dataclass(frozen=True)
class Held:
    """What the daemon's process holds."""

    descriptors: int
    memfds: int
    threads: int

    @classmethod
    def by(cls, pid: int) -> Held:
        process, targets = Path(f"/proc/{pid}"), []
        for entry in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                targets.append(str(entry.readlink()))
        memfds = [target for target in targets if target.startswith("/memfd:")]
        return cls(len(targets), len(memfds), len(list((process / "task").iterdir())))


class DoomedClients:
    """The process that forks clients."""

    def __init__(self, socket: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ucm.testing.doomed_client", str(socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    @contextlib.contextmanager
    def one_in(self, state: str) -> Iterator[None]:
        """A client in `state` for the length of the block, and then none."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(state + "\n")
        reached, pid = self.process.stdout.readline().split()
        assert reached == state
        try:
            yield
        finally:
            os.kill(int(pid), signal.SIGKILL)
            assert self.process.stdout.readline() == "gone\n"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture(scope="module")
def daemon() -> Iterator[SpawnedDaemon]:
    """One daemon for all deaths: a leak of any of them shows in the later ones' baseline."""
    with (
        short_folder() as folder,
        spawned_daemon(small_settings(folder), folder / "log") as found,
    ):
        with connect(found.socket_path, timeout_s=10) as cache:
            handle = cache.open_namespace(tiny_spec())
            put(cache, handle, chain(handle.id, NUM_BLOCKS))
            assert cache.flush(timeout_s=20)
            for seed in range(1, 5):  # so that every thread of every pool has started
                get(cache, handle, chain(handle.id, NUM_BLOCKS))
                put(cache, handle, chain(handle.id, 8, 100 + seed))
            assert cache.flush(timeout_s=20)
        yield found


@pytest.fixture(scope="module")
def threads_at_first(daemon: SpawnedDaemon) -> int:
    return Held.by(daemon.pid).threads


@pytest.fixture(scope="module")
def clients(daemon: SpawnedDaemon) -> Iterator[DoomedClients]:
    found = DoomedClients(daemon.socket_path)
    yield found
    found.close()


@pytest.mark.parametrize("state", STATES)
def test_deaths_in_any_state_leave_nothing(
    daemon: SpawnedDaemon, clients: DoomedClients, threads_at_first: int, state: str
) -> None:
    assert LANE.deaths_each > LATE_POOL_THREADS
    with AdminClient(daemon.socket_path, timeout_s=10) as admin:

        def is_empty() -> bool:
            return admin.status().store.num_sessions == 0

        wait_until(is_empty, WAIT_S, what="sessions of the test before are left")
        before = Held.by(daemon.pid)
        for _ in range(LANE.deaths_each):
            with clients.one_in(state):
                store = admin.status().store
                assert store.num_sessions == (0 if state == "connected" else 1)
                assert store.leased_bytes > 0 or state not in LEASED
            wait_until(is_empty, WAIT_S, what="the dead client's session is left")
            store = admin.status().store
            assert (store.num_leases, store.leased_bytes) == (0, 0)

        def is_back() -> bool:
            now = Held.by(daemon.pid)
            return (
                now.descriptors <= before.descriptors
                and now.memfds <= before.memfds
                and now.threads <= threads_at_first + LATE_POOL_THREADS
            )

        left = f"more than {before} and {threads_at_first} threads is left"
        wait_until(is_back, WAIT_S, what=left, every_s=0.02)
    with connect(daemon.socket_path, timeout_s=10) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, NUM_BLOCKS)
        assert get(cache, handle, keys) == [content(key) for key in keys]
