"""A daemon's collections, over its admin socket, keep every promise of `CollectionApi`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm import collection_service
from ucm.admin import AdminClient
from ucm.api import CacheApi
from ucm.client import RemoteCache, connect
from ucm.clock import SimClock
from ucm.collection_api import CollectionApi
from ucm.config import MIB, Config, MemoryConfig
from ucm.daemon import Daemon
from ucm.testing.blocks import TINY_LAYOUT
from ucm.testing.collection_conformance import CollectionHarness, CollectionTests
from ucm.testing.daemon import running_daemon, short_folder, small_config


class RemoteHarness:
    """A daemon on threads of this process, its clients, and a clock turned by hand."""

    def __init__(self, daemon: Daemon, clock: SimClock) -> None:
        self._daemon = daemon
        self._clock = clock
        self._sessions: list[RemoteCache] = []
        self._admin = AdminClient(daemon.config.service.socket_path)

    def open_session(self) -> CacheApi:
        session = connect(self._daemon.config.service.socket_path, timeout_s=5.0)
        self._sessions.append(session)
        return session

    def collections(self) -> CollectionApi:
        return self._admin.collections

    def pass_time(self, seconds: float) -> None:
        self._clock.advance_us(int(seconds * 1_000_000))

    def tick(self) -> None:
        """The daemon does so itself."""

    def store_folder(self) -> Path:
        folder = self._daemon.config.nvme.path
        assert folder is not None
        return folder

    def check_integrity(self) -> list[str]:
        self._daemon.manager.flush(timeout_s=10)
        return self._daemon.manager.check_integrity()

    def close(self) -> None:
        self._admin.close()
        for session in self._sessions:
            session.close()


def tiny_config(folder: Path) -> Config:
    config = small_config(folder)
    return dataclasses.replace(
        config,
        service=dataclasses.replace(config.service, staging_bytes=1 * MIB),
        memory=MemoryConfig(capacity_bytes=16 * TINY_LAYOUT.block_bytes),
        nvme=dataclasses.replace(config.nvme, capacity_bytes=4 * MIB, segment_bytes=MIB // 2),
    )


class TestRemoteCollections(CollectionTests):
    @pytest.fixture
    def harness(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[CollectionHarness]:
        monkeypatch.setattr(collection_service, "PAGE_DOCUMENTS", 3)
        clock = SimClock()
        with short_folder() as folder, running_daemon(tiny_config(folder), clock) as daemon:
            harness = RemoteHarness(daemon, clock)
            yield harness
            harness.close()
