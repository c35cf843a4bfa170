"""Ten times too many clients on one daemon, all impatient: what they saw, and what it cost.

    loaders        load chains that are mostly on disk, verify each byte, come again at once
    slow readers   load, then hold the lease
    storers        store new chains, more than the disk takes

Everybody obeys retry hints and nothing else. A worker is a thread with a session of its own.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ucm.api import CacheApi, NamespaceHandle
from ucm.checksum import block_checksums
from ucm.client import connect
from ucm.config import MIB
from ucm.errors import CapacityError
from ucm.layout import KvDtype, KvLayout
from ucm.types import ROOT_KEY, BlockKey, StoreStatus

from .blocks import chain, content, put, tiny_spec

LAYOUT = KvLayout(
    num_layers=4, num_kv_heads=1, head_dim=64, block_tokens=128, dtype=KvDtype.FLOAT32
)
"""Blocks of 256 KiB."""

CHAIN_BLOCKS = 16
DEADLINE_S = 5.0
HOLD_S = 0.5
SPEC = tiny_spec("overload", LAYOUT)


_PAYLOAD = content(ROOT_KEY, LAYOUT)
_PAYLOAD_SUMS = block_checksums(LAYOUT, memoryview(_PAYLOAD))


@functools.lru_cache(512)
def right_bytes(key: BlockKey) -> bytes:
    """The content of a block that loaders load; made once, because that takes as long as a load."""
    return content(key, LAYOUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """How many of each kind; sizes of the daemon that they meet."""

    loaders: int = 40
    slow_readers: int = 8
    storers: int = 16
    chains: int = 24
    memory_bytes: int = 48 * MIB
    staging_bytes: int = 4 * MIB
    max_waiting_loads: int = 2

    @property
    def num_sessions(self) -> int:
        """Everybody."""
        return self.loaders + self.slow_readers + self.storers

    def settings(self, folder: Path) -> list[str]:
        """The daemon's arguments."""
        values = {
            "service.staging_bytes": self.staging_bytes,
            "service.max_sessions": self.num_sessions + 2,
            "service.max_waiting_loads": self.max_waiting_loads,
            "memory.capacity_bytes": self.memory_bytes,
            "nvme.capacity_bytes": 256 * MIB,
            "nvme.segment_bytes": 64 * MIB,
            "nvme.index_map_bytes": 16 * MIB,
            "nvme.write_queue_bytes": 16 * MIB,
        }
        arguments = ["--socket", str(folder / "ucm.sock"), "--store", str(folder / "store")]
        for name, value in values.items():
            arguments += ["--set", f"{name}={value}"]
        return arguments


@dataclass(slots=True)
class Seen:
    """What workers saw; lists and counters only grow."""

    load_s: list[float] = field(default_factory=list)
    """Time to the answer of each load that was admitted and complete."""
    answer_s: list[float] = field(default_factory=list)
    """Time to the answer of every call, refusals too."""
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: list[BaseException] = field(default_factory=list)

    def p(self, share: float) -> float:
        """Quantile of `load_s`."""
        ordered = sorted(self.load_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Worker:
    """One client. `seen` is its own."""

    def __init__(self, socket_path: Path, chains: Sequence[list[BlockKey]]) -> None:
        self.seen = Seen()
        self._chains = chains
        self._cache: CacheApi = connect(socket_path, timeout_s=DEADLINE_S)
        self._handle: NamespaceHandle = self._cache.open_namespace(SPEC)

    def run(self, step: Callable[[int], None], stop: threading.Event, first: int) -> None:
        """Take steps until `stop`, waiting only when told to."""
        try:
            for number in itertools.count(first):
                if stop.is_set():
                    break
                started_s = time.monotonic()
                try:
                    step(number)
                except CapacityError as error:
                    self.seen.outcomes["refused"] += 1
                    self.seen.answer_s.append(time.monotonic() - started_s)
                    stop.wait(error.retry_after_s)
        except BaseException as error:  # noqa: BLE001  the thread's outermost frame; tests see it
            self.seen.errors.append(error)
        finally:
            self._cache.close()

    def load(self, number: int, hold: threading.Event | None = None) -> None:
        """Load one chain and verify it; with `hold`, keep it for a while."""
        keys = self._chains[number % len(self._chains)]
        started_s = time.monotonic()
        lease = self._cache.prepare_load(self._handle.id, keys, timeout_s=DEADLINE_S)
        took_s = time.monotonic() - started_s
        self.seen.answer_s.append(took_s)
        statuses = [block.status for block in lease.blocks]
        assert len(statuses) == len(keys)
        if lease.num_ready == len(keys):
            self.seen.load_s.append(took_s)
        self.seen.outcomes.update(status.value for status in statuses)
        last = lease.blocks[max(lease.num_ready - 1, 0)]
        if last.data is not None:
            assert bytes(last.data) == right_bytes(last.key), "wrong bytes"
        if hold is not None:
            hold.wait(HOLD_S)
        self._give_back(lambda: self._cache.complete_load(lease.id))

    def store(self, number: int) -> None:
        """Store one new chain."""
        head = self._handle.id + str(number).encode()
        keys = [BlockKey(hashlib.sha256(head + bytes([index])).digest()) for index in range(8)]
        started_s = time.monotonic()
        lease = self._cache.prepare_store(self._handle.id, ROOT_KEY, keys)
        for slot in lease.slots:
            if slot.data is not None:
                slot.data[:] = _PAYLOAD
        wanted = {slot.key: _PAYLOAD_SUMS for slot in lease.slots if slot.data is not None}
        statuses = self._cache.complete_store(lease.id, wanted)
        self.seen.answer_s.append(time.monotonic() - started_s)
        self.seen.outcomes.update(f"store {status.value}" for status in statuses)
        assert len(statuses) == len(keys)
        assert not {StoreStatus.WANTED, StoreStatus.CORRUPT} & set(statuses)

    def _give_back(self, call: Callable[[], None]) -> None:
        while True:
            try:
                call()
            except CapacityError as error:
                time.sleep(error.retry_after_s)
            else:
                return


def fill(socket_path: Path, num_chains: int) -> list[list[BlockKey]]:
    """Store the chains that everybody loads, and wait until they are on disk."""
    with connect(socket_path, timeout_s=30.0) as cache:
        handle = cache.open_namespace(SPEC)
        chains = [chain(handle.id, CHAIN_BLOCKS, seed) for seed in range(num_chains)]
        for keys in chains:
            put(cache, handle, keys)
            assert cache.flush(timeout_s=30.0)
    return chains


def run_crowd(
    socket_path: Path, chains: Sequence[list[BlockKey]], crowd: Crowd, duration_s: float
) -> dict[str, Seen]:
    """Let the crowd loose; what each kind saw, together."""
    stop = threading.Event()
    kinds = {"load": crowd.loaders, "hold": crowd.slow_readers, "store": crowd.storers}
    workers = {
        kind: [Worker(socket_path, chains) for _ in range(count)] for kind, count in kinds.items()
    }
    threads = []
    for kind, members in workers.items():
        for number, worker in enumerate(members):
            steps: dict[str, Callable[[int], None]] = {
                "load": worker.load,
                "hold": lambda n, worker=worker: worker.load(n, stop),  # type: ignore[misc]
                "store": worker.store,
            }
            arguments = (steps[kind], stop, number * 1_000)
            threads.append(threading.Thread(target=worker.run, args=arguments, daemon=True))
    for thread in threads:
        thread.start()
    stop.wait(duration_s)
    stop.set()
    for thread in threads:
        thread.join(4 * DEADLINE_S)
    assert not any(thread.is_alive() for thread in threads), "a client hangs"
    return {kind: _together([each.seen for each in found]) for kind, found in workers.items()}


def _together(parts: Sequence[Seen]) -> Seen:
    total = Seen()
    for part in parts:
        total.load_s += part.load_s
        total.answer_s += part.answer_s
        total.outcomes += part.outcomes
        total.errors += part.errors
    return total
