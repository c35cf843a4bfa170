"""Put, get and evict at a steady state: the daemon's private memory and descriptors stay put.

The steady state is reached by work, not by time: heaps and tables have their size after some rounds
of all chains, however slow the machine is. Then three minutes in the fast lane; `UCM_SOAK_S` sets
the length of the deep one (8 hours: 28800).
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from ucm.client import connect
from ucm.testing.blocks import chain, content, get, put, tiny_spec
from ucm.testing.daemon import SpawnedDaemon, short_folder, small_settings, spawned_daemon
from ucm.testing.lanes import LANE

CHAIN_BLOCKS = 16
LIVE_CHAINS = 400
"""More than the 64 MiB of the store hold: every put pushes something out."""
NUM_CHAINS = 1500
WARM_CHAINS = 3 * NUM_CHAINS
"""Measured: +6 MiB in the first 2,500, +1 up to 8,000, then flat up to 16,000."""
NOISE_BYTES = 1.5 * (1 << 20)
ALLOWED_BYTES_AN_HOUR = 0.5 * (1 << 20)


def private_bytes(pid: int) -> int:
    """Anonymous memory, which is what leaks; the arena is shared memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def num_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def work(daemon: SpawnedDaemon, chance: random.Random, first_seed: int) -> int:
    """One session's worth of it; returns how many blocks were read."""
    num_read = 0
    with connect(daemon.socket_path, timeout_s=30) as cache:
        handle = cache.open_namespace(tiny_spec())
        for number in range(first_seed, first_seed + 40):
            seed = 1 + number % NUM_CHAINS
            put(cache, handle, chain(handle.id, CHAIN_BLOCKS, seed))
            keys = chain(handle.id, CHAIN_BLOCKS, max(1, seed - chance.randrange(LIVE_CHAINS)))
            found = get(cache, handle, keys, timeout_s=10)
            assert found == [content(key) for key in keys[: len(found)]]
            num_read += len(found)
        cache.flush(timeout_s=30)
    return num_read


@pytest.mark.fixed_time
@pytest.mark.timeout(LANE.soak_s * 2 + 240)
def test_memory_and_descriptors_stay() -> None:
    chance, seed, num_read = random.Random(0), 1, 0
    samples: list[tuple[float, int, int]] = []
    with (
        short_folder() as folder,
        spawned_daemon(small_settings(folder), folder / "log") as daemon,
    ):
        while seed < WARM_CHAINS:
            work(daemon, chance, seed)
            seed += 40
        start_s = time.monotonic()
        while (now_s := time.monotonic() - start_s) < LANE.soak_s or len(samples) < 12:
            num_read += work(daemon, chance, seed)
            seed += 40
            samples.append((now_s, private_bytes(daemon.pid), num_descriptors(daemon.pid)))
        assert daemon.stop() == 0
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    growth = min(size for _, size, _ in last) - min(size for _, size, _ in middle)
    hours = (samples[-1][0] - samples[third][0]) / 3600
    print(
        f"{seed} chains, {num_read} blocks read, {growth / 2**20:+.2f} MiB, {len(samples)} samples"
    )
    assert growth <= NOISE_BYTES + ALLOWED_BYTES_AN_HOUR * hours, samples
    assert max(count for _, _, count in last) <= max(count for _, _, count in middle), samples
    assert num_read > 1000
