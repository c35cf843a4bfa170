"""A disk that is really full: stores stop, loads go on, `status` says why, and it recovers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.clock import SimClock
from ucm.config import MIB, Config, MemoryConfig, NvmeConfig, ServiceConfig
from ucm.embedded import EmbeddedCache
from ucm.manager import Manager
from ucm.testing.blocks import chain, content, get, put, tiny_spec
from ucm.types import StoreStatus
from ucm.write_behind import PROBE_INTERVAL_S


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 3 MiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(command, check=False).returncode:
        pytest.skip("mounting a tmpfs needs privileges")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def config_of(path: Path) -> Config:
    """A store that may have more than the disk has."""
    return Config(
        service=ServiceConfig(staging_bytes=1 * MIB),
        memory=MemoryConfig(capacity_bytes=8 * MIB),
        nvme=NvmeConfig(
            path=path,
            capacity_bytes=64 * MIB,
            segment_bytes=1 * MIB,
            index_map_bytes=1 * MIB,
            io_threads=2,
        ),
    )


def test_it_grows_again_when_others_free_the_disk(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(3 * MIB // 2))
    clock = SimClock()
    with EmbeddedCache(Manager(config_of(small_disk / "store"), clock=clock)) as cache:
        handle = cache.open_namespace(tiny_spec())
        for seed in range(10):
            put(cache, handle, chain(handle.id, 20, seed))
            cache.flush(timeout_s=10)
        assert any("the disk is full" in line for line in cache.manager.status().problems)
        assert cache.manager.status().namespaces[0].nvme_blocks <= 85, "one segment"
        ballast.unlink()
        clock.advance_us(int(PROBE_INTERVAL_S * 1_000_000))
        put(cache, handle, chain(handle.id, 20, seed=50))
        assert cache.flush(timeout_s=10)
        put(cache, handle, chain(handle.id, 20, seed=51))
        assert cache.flush(timeout_s=10)
        status = cache.manager.status()
        assert status.problems == ()
        assert status.namespaces[0].nvme_blocks > 85, "two segments"


def test_stores_stop_and_loads_go_on(small_disk: Path) -> None:
    config = config_of(small_disk / "store")
    clock = SimClock()
    with EmbeddedCache(Manager(config, clock=clock)) as cache:
        handle = cache.open_namespace(tiny_spec())
        stored = []
        for seed in range(20):
            keys = chain(handle.id, 20, seed)
            if StoreStatus.REFUSED in put(cache, handle, keys):
                break
            stored.append(keys)
            cache.flush(timeout_s=10)
        assert 1 < len(stored) < 20
        assert any("the disk is full" in line for line in cache.manager.status().problems)
        assert not cache.manager.status().tiers[1].writable
        for keys in stored:
            assert get(cache, handle, keys) == [content(key) for key in keys]
        # Long enough to be probed, and for what was used twice to be worth less than what is new.
        clock.advance_us(int((PROBE_INTERVAL_S + 3600) * 1_000_000))
        fresh = chain(handle.id, 5, seed=99)
        assert put(cache, handle, fresh) == (StoreStatus.ACCEPTED,) * 5
        assert cache.flush(timeout_s=10)  # old blocks made way
        assert cache.manager.status().tiers[1].writable
        assert cache.manager.check_integrity() == []
    with EmbeddedCache(Manager(config)) as cache:
        handle = cache.open_namespace(tiny_spec())
        assert get(cache, handle, fresh) == [content(key) for key in fresh]
