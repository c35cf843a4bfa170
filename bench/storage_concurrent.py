"""Many clients of one daemon: how long loads take, how fairly, and what stores do to them.

Clients load chains of 8 blocks of 1 MiB, one after the other without a pause; a
storing client puts new chains of the same size without a pause, which the daemon accepts, evicts
for, and writes to the disk. Each number of clients runs with and without it, in turns. With more
chains than host memory holds, loads read the disk.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .demo_processes import ChildProcess
from .storage_client import BLOCKS_PER_CALL, load_chain_seed
from .storage_daemon import BenchDaemon
from .storage_dram import put_chain
from .storage_measure import (
    GB,
    MIB_LAYOUT,
    Progress,
    Result,
    StorageBenchOptions,
    jain_fairness,
    percentile,
    rounded,
)
from .storage_payload import Audit, Payload, bench_chain, bench_spec, require

READY_TIMEOUT_S = 120.0
FLUSH_TIMEOUT_S = 60.0
LEAD_S = 0.05
"""Commands reach every process before the work begins."""

TURNS = 2
"""Times that each number of clients runs without stores and with them."""


class Crew:
    """Processes that hold clients: loaders, and one that stores."""

    def __init__(
        self, socket_path: Path, folder: Path, options: StorageBenchOptions, num_chains: int
    ) -> None:
        self._loaders: list[ChildProcess] = []
        self._each: list[int] = []
        num_clients = max(options.clients)
        num_processes = min(num_clients, options.client_processes)
        first = 0
        for number in range(num_processes):
            count = (num_clients - first) // (num_processes - number)
            log = folder / f"client{number}.log"
            self._loaders.append(_start(socket_path, first, count, num_chains, log))
            self._each.append(count)
            first += count
        self._storer = _start(socket_path, first, 1, num_chains, folder / "storer.log")
        for process in (*self._loaders, self._storer):
            process.next_event(READY_TIMEOUT_S)

    def run(self, num_clients: int, seconds: float, *, with_stores: bool, audit: Audit) -> Turn:
        """Have `num_clients`, spread over all processes, load for so long."""
        start_s = time.monotonic() + LEAD_S
        times = {"start_s": start_s, "stop_s": start_s + seconds}
        shares = spread(num_clients, self._each)
        for process, share in zip(self._loaders, shares, strict=True):
            process.send(op="run", clients=share, kind="load", **times)
        if with_stores:
            self._storer.send(op="run", clients=1, kind="store", **times)
        turn = Turn([], 0)
        for process in self._loaders:
            done = process.next_event(READY_TIMEOUT_S)
            turn.ms += done["ms"]
            turn.refused += done["refused"]
            audit.add(done["wrong_bytes"], done["checked_bytes"])
        if with_stores:
            turn.stored_bytes = self._storer.next_event(READY_TIMEOUT_S)["bytes"]
        return turn

    def close(self) -> None:
        """End the processes."""
        for process in (*self._loaders, self._storer):
            process.close()


class Turn:
    """What one turn measured."""

    def __init__(self, ms: list[list[float]], stored_bytes: int) -> None:
        self.ms = ms
        """Milliseconds of every load, a list for each client."""
        self.stored_bytes = stored_bytes
        self.refused = 0
        """Loads that found no room in host memory; they are in no percentile."""


def spread(count: int, room: list[int]) -> list[int]:
    """`count` over places with limited room, one at a time, as evenly as possible."""
    shares = [0] * len(room)
    while count > sum(shares):
        free = [place for place in range(len(room)) if shares[place] < room[place]]
        shares[min(free, key=shares.__getitem__)] += 1
    return shares


def _start(
    socket_path: Path, first_number: int, clients: int, num_chains: int, log_path: Path
) -> ChildProcess:
    settings = {
        "socket": str(socket_path),
        "first_number": first_number,
        "clients": clients,
        "chains": num_chains,
    }
    return ChildProcess("client", ["ucm.bench.storage_client", json.dumps(settings)], log_path)


@contextlib.contextmanager
def _crew(socket_path: Path, options: StorageBenchOptions, num_chains: int) -> Iterator[Crew]:
    folder = Path(tempfile.mkdtemp(prefix="ucm"))
    crew = None
    try:
        crew = Crew(socket_path, folder, options, num_chains)
        yield crew
    finally:
        if crew is not None:
            crew.close()
        shutil.rmtree(folder, ignore_errors=True)


def measure_concurrent(
    daemon: BenchDaemon,
    num_chains: int,
    options: StorageBenchOptions,
    audit: Audit,
    progress: Progress,
) -> Result:
    """Every number of clients of `options`, with and without stores.

    Args:
        daemon: whose host memory has room for the chains, or not: then loads read the disk.
        num_chains: that are loaded, in turns, 8 MiB each.
        options: how many clients, for how long.
        audit: counts what was read wrongly.
        progress: told before each number of clients.
    """
    payload = Payload(MIB_LAYOUT)
    with daemon.connect() as cache:
        handle = cache.open_namespace(bench_spec(MIB_LAYOUT))
        for number in range(num_chains):
            seed = load_chain_seed(number)
            keys = bench_chain(handle.id, MIB_LAYOUT, BLOCKS_PER_CALL, seed)
            put_chain(cache, handle, payload, keys)
            require(cache.flush(timeout_s=FLUSH_TIMEOUT_S), "the store did not flush")
    found: Result = {}
    with _crew(daemon.socket_path, options, num_chains) as crew:
        crew.run(max(options.clients), options.cell_s / 4, with_stores=False, audit=audit)
        for count in options.clients:
            progress(f"{count} clients, without and with stores")
            found[str(count)] = _measure_count(crew, count, options.cell_s, audit)
    return found


def _measure_count(crew: Crew, count: int, seconds: float, audit: Audit) -> Result:
    turns: dict[bool, list[Turn]] = {False: [], True: []}
    for number in range(2 * TURNS):
        busy = number % 4 in (1, 2)  # without, with, with, without
        turns[busy].append(crew.run(count, seconds / TURNS, with_stores=busy, audit=audit))
    return compare_turns(turns[False], turns[True], seconds)


def compare_turns(quiet: list[Turn], busy: list[Turn], seconds: float) -> Result:
    """Figures of the loads of both kinds of turns; all turns of a kind took `seconds` together."""
    alone, beside = _figures(quiet, seconds), _figures(busy, seconds)
    return {
        **alone,
        "with_stores": beside,
        "slowdown_by_stores": round(beside["p50_ms"] / alone["p50_ms"] - 1, 3),
        "store_gb_s": round(sum(turn.stored_bytes for turn in busy) / seconds / GB, 3),
    }


def _figures(turns: list[Turn], seconds: float) -> Result:
    per_client = zip(*(turn.ms for turn in turns), strict=True)
    by_client = [list(itertools.chain.from_iterable(each)) for each in per_client]
    every = [value for values in by_client for value in values]
    counts = [float(len(values)) for values in by_client]
    require(bool(every), "not one load was admitted")
    p50, p99 = percentile(every, 50), percentile(every, 99)
    figures = {
        "p50_ms": p50,
        "p99_ms": p99,
        "p99_over_p50": p99 / p50,
        "load_gb_s": len(every) * BLOCKS_PER_CALL * MIB_LAYOUT.block_bytes / seconds / GB,
        "jain": jain_fairness(counts),
        "max_over_min": max(counts) / max(1.0, min(counts)),
    }
    return {**rounded(figures), "n": len(every), "refused": sum(turn.refused for turn in turns)}
