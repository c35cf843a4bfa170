"""The daemon's client keeps every promise of `CacheApi`, as embedded mode does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.api import CacheApi
from ucm.client import RemoteCache, connect
from ucm.clock import SimClock
from ucm.config import MIB, Config, MemoryConfig, TransferConfig
from ucm.daemon import Daemon
from ucm.testing.blocks import TINY_LAYOUT
from ucm.testing.cache_conformance import MEMORY_BLOCKS, CacheApiTests, CacheHarness
from ucm.testing.daemon import running_daemon, short_folder, small_config
from ucm.testing.load_plan_conformance import LoadPlanTests
from ucm.testing.partial_conformance import PartialResultTests
from ucm.testing.select_conformance import SelectTests

LEASE_TIMEOUT_S = 30.0
MAX_LEASES_PER_SESSION = 8


class RemoteHarness:
    """A daemon on threads of this process, its clients, and a clock turned by hand."""

    lease_timeout_s = LEASE_TIMEOUT_S
    max_leases_per_session = MAX_LEASES_PER_SESSION

    def __init__(self, daemon: Daemon, clock: SimClock) -> None:
        self._daemon = daemon
        self._clock = clock
        self._sessions: list[RemoteCache] = []

    def open_session(self) -> CacheApi:
        session = connect(self._daemon.config.service.socket_path, timeout_s=5.0)
        self._sessions.append(session)
        return session

    def pass_time(self, seconds: float) -> None:
        self._clock.advance_us(int(seconds * 1_000_000))

    def leased_bytes(self) -> int:
        self._daemon.manager.tick()
        return self._daemon.manager.status().leased_bytes

    def store_folder(self) -> Path:
        folder = self._daemon.config.nvme.path
        assert folder is not None
        return folder

    def check_integrity(self) -> list[str]:
        self._daemon.manager.flush(timeout_s=10)  # the check is meant for idle times
        return self._daemon.manager.check_integrity()

    def close(self) -> None:
        for session in self._sessions:
            session.close()


def tiny_config(folder: Path) -> Config:
    config = small_config(folder)
    return dataclasses.replace(
        config,
        service=dataclasses.replace(config.service, staging_bytes=1 * MIB),
        memory=MemoryConfig(capacity_bytes=MEMORY_BLOCKS * TINY_LAYOUT.block_bytes),
        nvme=dataclasses.replace(config.nvme, capacity_bytes=16 * MIB, segment_bytes=2 * MIB),
        transfer=TransferConfig(
            max_leases_per_session=MAX_LEASES_PER_SESSION, lease_timeout_s=LEASE_TIMEOUT_S
        ),
    )


class TestRemoteCache(CacheApiTests, PartialResultTests, LoadPlanTests, SelectTests):
    @pytest.fixture
    def harness(self) -> Iterator[CacheHarness]:
        clock = SimClock()
        with short_folder() as folder, running_daemon(tiny_config(folder), clock) as daemon:
            harness = RemoteHarness(daemon, clock)
            yield harness
            harness.close()
