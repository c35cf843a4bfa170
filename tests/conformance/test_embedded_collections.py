"""Collections of a store in this process keep every promise of `CollectionApi`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.api import CacheApi
from ucm.clock import SimClock
from ucm.collection_api import CollectionApi
from ucm.config import MIB, Config, MemoryConfig, NvmeConfig, ServiceConfig
from ucm.embedded import EmbeddedCache
from ucm.manager import Manager
from ucm.testing.blocks import TINY_LAYOUT
from ucm.testing.collection_conformance import CollectionHarness, CollectionTests
from ucm.testing.nvme import quick_folder


class EmbeddedHarness:
    """A manager on real tiers in a folder; time is turned by hand."""

    def __init__(self, folder: Path, codec: str = "raw") -> None:
        self._clock = SimClock()
        self._folder = folder
        config = Config(
            service=ServiceConfig(staging_bytes=1 * MIB),
            memory=MemoryConfig(capacity_bytes=16 * TINY_LAYOUT.block_bytes),
            nvme=NvmeConfig(
                path=folder,
                capacity_bytes=4 * MIB,
                segment_bytes=MIB // 2,
                io_threads=2,
                codec=codec,
            ),
        )
        self.manager = Manager(config, clock=self._clock)
        self._sessions: list[EmbeddedCache] = []

    def open_session(self) -> CacheApi:
        session = EmbeddedCache(self.manager, owns_manager=False)
        self._sessions.append(session)
        return session

    def collections(self) -> CollectionApi:
        return self.manager.collections

    def pass_time(self, seconds: float) -> None:
        self._clock.advance_us(int(seconds * 1_000_000))

    def tick(self) -> None:
        self.manager.tick()

    def store_folder(self) -> Path:
        return self._folder

    def check_integrity(self) -> list[str]:
        self.manager.flush(timeout_s=10)
        return self.manager.check_integrity()

    def close(self) -> None:
        for session in self._sessions:
            session.close()
        self.manager.close()


class TestEmbeddedCollections(CollectionTests):
    @pytest.fixture
    def harness(self) -> Iterator[CollectionHarness]:
        with quick_folder() as folder:
            harness = EmbeddedHarness(folder / "store")
            yield harness
            harness.close()
