"""The two stores that the conformance suites test: in this process, and behind a daemon.

Both are `CacheHarness` and `CollectionHarness`: small, on real tiers in a folder, with a clock that
is turned by hand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ucm.admin import AdminClient
from ucm.api import CacheApi
from ucm.client import RemoteCache, connect
from ucm.clock import SimClock
from ucm.collection_api import CollectionApi
from ucm.config import MIB, Config, MemoryConfig, TransferConfig
from ucm.embedded import EmbeddedCache
from ucm.manager import Manager

from .blocks import TINY_LAYOUT
from .cache_conformance import MEMORY_BLOCKS
from .daemon import running_daemon, small_config

LEASE_TIMEOUT_S = 30.0
MAX_LEASES_PER_SESSION = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSize:
    """How much a store under test holds."""

    memory_blocks: int
    nvme_bytes: int
    segment_bytes: int

    def config(self, folder: Path) -> Config:
        """The configuration of a store with everything in `folder`."""
        config = small_config(folder)
        return dataclasses.replace(
            config,
            service=dataclasses.replace(config.service, staging_bytes=1 * MIB),
            memory=MemoryConfig(capacity_bytes=self.memory_blocks * TINY_LAYOUT.block_bytes),
            nvme=dataclasses.replace(
                config.nvme, capacity_bytes=self.nvme_bytes, segment_bytes=self.segment_bytes
            ),
            transfer=TransferConfig(
                max_leases_per_session=MAX_LEASES_PER_SESSION, lease_timeout_s=LEASE_TIMEOUT_S
            ),
        )


CACHE_SIZE = StoreSize(memory_blocks=MEMORY_BLOCKS, nvme_bytes=16 * MIB, segment_bytes=2 * MIB)
COLLECTION_SIZE = dataclasses.replace(CACHE_SIZE, nvme_bytes=4 * MIB, segment_bytes=MIB // 2)
"""Of small segments: what is deleted is looked for in their files."""


class _Harness:
    """What both have in common: a manager on a clock."""

    lease_timeout_s = LEASE_TIMEOUT_S
    max_leases_per_session = MAX_LEASES_PER_SESSION

    def __init__(self, manager: Manager, clock: SimClock) -> None:
        self.manager = manager
        self._clock = clock

    def pass_time(self, seconds: float) -> None:
        """Turn the clock."""
        self._clock.advance_us(int(seconds * 1_000_000))

    def leased_bytes(self) -> int:
        """Bytes that all leases pin now."""
        self.manager.tick()
        return self.manager.status().leased_bytes

    def store_folder(self) -> Path:
        """Where the store's files are."""
        folder = self.manager.config.nvme.path
        assert folder is not None
        return folder

    def check_integrity(self) -> list[str]:
        """Violated invariants; between a commit and its settling two states are right."""
        self.manager.flush(timeout_s=10)
        return self.manager.check_integrity()


class EmbeddedHarness(_Harness):
    """A manager of this process."""

    def __init__(self, config: Config) -> None:
        """Open the store."""
        clock = SimClock()
        super().__init__(Manager(config, clock=clock), clock)
        self._sessions: list[EmbeddedCache] = []

    def open_session(self) -> CacheApi:
        """A fresh session."""
        session = EmbeddedCache(self.manager, owns_manager=False)
        self._sessions.append(session)
        return session

    def collections(self) -> CollectionApi:
        """The store's collections."""
        return self.manager.collections

    def tick(self) -> None:
        """What an idle daemon does now and then."""
        self.manager.tick()

    def close(self) -> None:
        """Close everything; a store that hangs fails here."""
        for session in self._sessions:
            session.close()
        start = time.monotonic()
        self.manager.close()
        assert time.monotonic() - start < 10


class RemoteHarness(_Harness):
    """A daemon on threads of this process, and its clients."""

    def __init__(self, manager: Manager, clock: SimClock, socket_path: Path) -> None:
        """Of a daemon that runs."""
        super().__init__(manager, clock)
        self._socket_path = socket_path
        self._sessions: list[RemoteCache] = []
        self._admin = AdminClient(socket_path)

    def open_session(self) -> CacheApi:
        """A fresh session."""
        session = connect(self._socket_path, timeout_s=5.0)
        self._sessions.append(session)
        return session

    def collections(self) -> CollectionApi:
        """The store's collections, over the operators' socket."""
        return self._admin.collections

    def tick(self) -> None:
        """The daemon does so itself."""

    def close(self) -> None:
        """Close the clients."""
        self._admin.close()
        for session in self._sessions:
            session.close()


@contextlib.contextmanager
def embedded_harness(folder: Path, size: StoreSize) -> Iterator[EmbeddedHarness]:
    """A store in this process with everything in `folder`, closed in the end."""
    harness = EmbeddedHarness(size.config(folder))
    yield harness
    harness.close()


@contextlib.contextmanager
def remote_harness(folder: Path, size: StoreSize) -> Iterator[RemoteHarness]:
    """A daemon with everything in `folder`, whose path is short, stopped in the end."""
    clock = SimClock()
    config = size.config(folder)
    with running_daemon(config, clock) as daemon:
        harness = RemoteHarness(daemon.manager, clock, config.service.socket_path)
        yield harness
        harness.close()
