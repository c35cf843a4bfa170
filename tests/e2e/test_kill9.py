"""100 x `kill -9` of the real daemon under load: no wrong bytes, no flushed block lost.

The test's own process keeps the expected state. Two writers store chains of blocks whose bytes
follow from their keys, and note what was answered `accepted` and what a successful `flush` made
durable; two readers load what is accepted. At a random moment the daemon is killed. The next one
must be ready in time and serve every durable block, and whatever else it serves must be right to
the byte. `UCM_KILL9_SEED=N` replays a run's choices, though not the threads' order.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from ucm.api import NamespaceHandle
from ucm.client import RemoteCache, connect
from ucm.errors import TierUnavailableError, UcmError
from ucm.storage.fsck import check_store
from ucm.testing.blocks import chain, content, get, loaded, put, tiny_spec
from ucm.testing.daemon import DaemonNursery, ForkedDaemon, short_folder, small_settings
from ucm.testing.lanes import IS_DEEP, LANE
from ucm.types import LoadStatus, StoreStatus

NUM_KILLS: Final = LANE.kills
FULL_CHECK_EVERY: Final = 10
CHAIN_BLOCKS: Final = 12
MAX_CHAINS_A_ROUND: Final = 24
CHAINS_A_FLUSH: Final = 2
MAX_LIFE_S: Final = 0.35
DEADLINE_S: Final = 30.0
RECENT_ROUNDS: Final = 3


@dataclass
class Journal:
    """What the daemon has promised. A chain is named by its seed."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    accepted: dict[int, int] = field(default_factory=dict)
    """Blocks of each chain that were accepted by any daemon so far."""
    durable: dict[int, int] = field(default_factory=dict)
    """Blocks of each chain that a flush has made durable."""
    num_reads: int = 0
    next_seed: int = 0

    def take_seed(self) -> int:
        with self.lock:
            self.next_seed += 1
            return self.next_seed

    def accept(self, seed: int, num_blocks: int) -> None:
        with self.lock:
            self.accepted[seed] = num_blocks

    def snapshot(self) -> dict[int, int]:
        with self.lock:
            return dict(self.accepted)

    def make_durable(self, chains: dict[int, int]) -> None:
        with self.lock:
            self.durable.update(chains)

    def forget_what_was_not_durable(self) -> None:
        """After a kill: what was only in memory is gone, and may be."""
        with self.lock:
            self.accepted = dict(self.durable)


@dataclass
class Round:
    """One daemon's life under load."""

    daemon: ForkedDaemon
    journal: Journal
    rng: random.Random
    failures: list[BaseException] = field(default_factory=list)

    def run(self) -> None:
        """Load it from four threads, kill it at a random moment, and end the threads."""
        writers = [self._thread(self._write, self.rng.random()) for _ in range(2)]
        readers = [self._thread(self._read, self.rng.random()) for _ in range(2)]
        for thread in (*writers, *readers):
            thread.start()
        threading.Event().wait(self.rng.uniform(0.02, MAX_LIFE_S))
        self.daemon.kill()
        for thread in (*writers, *readers):
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), "a client hangs after the daemon's death"
        if self.failures:
            raise self.failures[0]

    def _thread(
        self, work: Callable[[RemoteCache, NamespaceHandle, random.Random], None], seed: float
    ) -> threading.Thread:
        def run() -> None:
            try:
                with connect(self.daemon.socket_path, timeout_s=DEADLINE_S) as cache:
                    work(cache, cache.open_namespace(tiny_spec()), random.Random(seed))
            except TierUnavailableError:
                pass  # the kill
            except (UcmError, AssertionError) as error:
                self.failures.append(error)

        return threading.Thread(target=run)

    def _write(self, cache: RemoteCache, handle: NamespaceHandle, rng: random.Random) -> None:
        for number in range(1, MAX_CHAINS_A_ROUND // 2 + 1):
            seed = self.journal.take_seed()
            keys = chain(handle.id, CHAIN_BLOCKS, seed)
            statuses = put(cache, handle, keys)
            assert set(statuses) == {StoreStatus.ACCEPTED}, statuses
            self.journal.accept(seed, len(keys))
            if number % CHAINS_A_FLUSH == 0:
                before = self.journal.snapshot()
                if cache.flush(timeout_s=DEADLINE_S):
                    self.journal.make_durable(before)

    def _read(self, cache: RemoteCache, handle: NamespaceHandle, rng: random.Random) -> None:
        while True:
            known = self.journal.snapshot()
            if known:
                seed = rng.choice(sorted(known))
                check_chain(cache, handle, seed, known[seed])
                self.journal.num_reads += 1
            else:
                cache.lookup(handle.id, [])


def check_chain(cache: RemoteCache, handle: NamespaceHandle, seed: int, num_blocks: int) -> None:
    """At least `num_blocks` of the chain are there, and all that is there is right."""
    keys = chain(handle.id, CHAIN_BLOCKS, seed)
    found = get(cache, handle, keys, timeout_s=DEADLINE_S)
    assert found == [content(key) for key in keys[: len(found)]], f"wrong bytes in chain {seed}"
    if len(found) < num_blocks:
        with loaded(cache, handle, keys, DEADLINE_S) as lease:
            statuses = [block.status for block in lease.blocks]
        # Two readers share a small memory: no room to promote is no loss.
        assert LoadStatus.NO_SPACE in statuses, f"chain {seed} lost blocks: {statuses}"


def check_recovered(daemon: ForkedDaemon, journal: Journal, since: int, seeds: list[int]) -> None:
    """The daemon serves every durable block of chains from `since`, and `seeds` to the byte."""
    with connect(daemon.socket_path, timeout_s=DEADLINE_S) as cache:
        handle = cache.open_namespace(tiny_spec())
        durable = {seed: n for seed, n in journal.durable.items() if seed >= since}
        for seed, num_blocks in durable.items():
            found = cache.lookup(handle.id, chain(handle.id, num_blocks, seed)).num_blocks
            assert found == num_blocks, (
                f"chain {seed}: {found} of {num_blocks} durable blocks left\n{daemon.log()}"
            )
        for seed in seeds:
            check_chain(cache, handle, seed, journal.durable.get(seed, 0))


def settings(folder: Path) -> list[str]:
    """Room for everything that the test stores, so that nothing is evicted from NVMe."""
    return [*small_settings(folder), "--set", "nvme.capacity_bytes=1GiB"]


@contextlib.contextmanager
def nursery(folder: Path) -> Iterator[DaemonNursery]:
    found = DaemonNursery(settings(folder), folder / "log")
    try:
        yield found
    finally:
        found.close()


def started(nursery: DaemonNursery, num_records: int) -> ForkedDaemon:
    """The next daemon: ready within 2 s, and 1 s more for each 100,000 records."""
    start_s = time.monotonic()
    daemon = nursery.start()
    took_s = time.monotonic() - start_s
    leeway = 3.0  # of a machine that runs other things at the same time
    assert took_s < leeway * (2.0 + num_records / 100_000), f"a restart took {took_s:.1f} s"
    return daemon


@pytest.mark.timeout(14_400 if IS_DEEP else 600)
def test_kills_under_load() -> None:
    seed = int(os.environ.get("UCM_KILL9_SEED") or time.time_ns() % 2**32)
    print(f"UCM_KILL9_SEED={seed}")
    rng = random.Random(seed)
    journal = Journal()
    first_seeds: list[int] = []
    with short_folder() as folder, nursery(folder) as daemons:
        for number in range(NUM_KILLS):
            daemon = started(daemons, sum(journal.durable.values()))
            recent = [1, *first_seeds][-RECENT_ROUNDS:][0]
            since = 1 if number % FULL_CHECK_EVERY == 0 else recent
            check_recovered(daemon, journal, since, list(range(recent, journal.next_seed + 1)))
            first_seeds.append(journal.next_seed + 1)
            Round(daemon, journal, rng).run()
            journal.forget_what_was_not_durable()
        daemon = started(daemons, sum(journal.durable.values()))
        check_recovered(daemon, journal, 1, list(range(1, journal.next_seed + 1)))
        assert daemon.stop() == 0
        report = check_store(folder / "store", repair=False)
    print(
        f"{len(journal.durable)} chains durable of {journal.next_seed}, {journal.num_reads} reads"
    )
    assert report.ok, report.findings
    assert report.num_blocks >= sum(journal.durable.values())
    # The load was one: without these the test would prove nothing. How many chains a life flushes
    # is the disk's doing: one that syncs slowly lets fewer than one a life become durable.
    assert len(journal.durable) >= NUM_KILLS // 4
    assert journal.num_reads >= NUM_KILLS
