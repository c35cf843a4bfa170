"""Embedded mode keeps every promise of `CacheApi`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.api import CacheApi
from ucm.clock import SimClock
from ucm.config import MIB, Config, MemoryConfig, NvmeConfig, ServiceConfig, TransferConfig
from ucm.embedded import EmbeddedCache
from ucm.manager import Manager
from ucm.testing.blocks import TINY_LAYOUT
from ucm.testing.cache_conformance import MEMORY_BLOCKS, CacheApiTests, CacheHarness
from ucm.testing.load_plan_conformance import LoadPlanTests
from ucm.testing.partial_conformance import PartialResultTests
from ucm.testing.select_conformance import SelectTests


class EmbeddedHarness:
    """A manager on real tiers in a folder; time is turned by hand."""

    lease_timeout_s = 30.0
    max_leases_per_session = 8

    def __init__(self, folder: Path) -> None:
        self._clock = SimClock()
        self._folder = folder
        config = Config(
            service=ServiceConfig(staging_bytes=1 * MIB),
            memory=MemoryConfig(capacity_bytes=MEMORY_BLOCKS * TINY_LAYOUT.block_bytes),
            nvme=NvmeConfig(
                path=folder, capacity_bytes=16 * MIB, segment_bytes=2 * MIB, io_threads=2
            ),
            transfer=TransferConfig(
                max_leases_per_session=self.max_leases_per_session,
                lease_timeout_s=self.lease_timeout_s,
            ),
        )
        self.manager = Manager(config, clock=self._clock)
        self._sessions: list[EmbeddedCache] = []

    def open_session(self) -> CacheApi:
        session = EmbeddedCache(self.manager, owns_manager=False)
        self._sessions.append(session)
        return session

    def pass_time(self, seconds: float) -> None:
        self._clock.advance_us(int(seconds * 1_000_000))

    def leased_bytes(self) -> int:
        self.manager.tick()
        return self.manager.status().leased_bytes

    def store_folder(self) -> Path:
        return self._folder

    def check_integrity(self) -> list[str]:
        self.manager.flush(timeout_s=10)  # between a commit and its settling, both are right
        return self.manager.check_integrity()

    def close(self) -> None:
        for session in self._sessions:
            session.close()
        start = time.monotonic()
        self.manager.close()
        assert time.monotonic() - start < 10


class TestEmbeddedCache(CacheApiTests, PartialResultTests, LoadPlanTests, SelectTests):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[CacheHarness]:
        harness = EmbeddedHarness(tmp_path / "store")
        yield harness
        harness.close()
