"""Clients in processes of their own that load chains, one after the other: what they were answered.

    driver   starts processes, tells them "run COUNT SECONDS", collects what they saw
    process  as many clients as asked, each a thread with a session of its own; one line in and one
             line of JSON out a turn

A client's load is over when its bytes are copied out of the arena. What is refused is made again
when it was told to, and the refused attempts are no part of its time. Clients of one process share
an interpreter: few a process, and most of them sleep.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from ucm.client import RemoteCache, connect
from ucm.errors import CapacityError
from ucm.types import BlockKey

from .blocks import chain
from .overload import CHAIN_BLOCKS, DEADLINE_S, LAYOUT, SPEC, right_bytes

CONNECT_TIMEOUT_S: Final = 30.0
_STOP_TIMEOUT_S: Final = 60.0


@dataclass(slots=True)
class Turn:
    """What the clients of one turn saw; times in seconds."""

    load_s: list[float] = field(default_factory=list)
    """From call to the last byte, of the attempts that were admitted."""
    refused_s: list[float] = field(default_factory=list)
    """From call to refusal."""
    loads: list[int] = field(default_factory=list)
    """Of each client."""
    num_partial: int = 0
    """Admitted loads without all blocks."""
    duration_s: float = 0.0

    @property
    def loads_a_s(self) -> float:
        """Complete loads a second, of all together."""
        return sum(self.loads) / self.duration_s

    def p(self, share: float) -> float:
        """Quantile of `load_s`."""
        return quantile(self.load_s, share)

    def add(self, other: Turn) -> None:
        """Take in what others saw in the same turn."""
        self.load_s += other.load_s
        self.refused_s += other.refused_s
        self.loads += other.loads
        self.num_partial += other.num_partial
        self.duration_s = max(self.duration_s, other.duration_s)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class LoadProcesses:
    """Client processes of one daemon. Use it within `with`."""

    def __init__(self, socket_path: Path, *, num_chains: int, processes: int, clients: int) -> None:
        """Start and connect them, a few at a time.

        Args:
            socket_path: the daemon's.
            num_chains: that `overload.fill` stored.
            processes: so many.
            clients: of each process.
        """
        self._clients = clients
        command = [sys.executable, "-m", __name__, str(socket_path), str(num_chains), str(clients)]
        self._processes = []
        for _ in range(processes):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self._processes.append(process)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.communicate(timeout=_STOP_TIMEOUT_S)

    def run(self, count: int, *, settle_s: float, measure_s: float) -> Turn:
        """Let `count` clients load, over all processes; what they saw after `settle_s`."""
        share, more = divmod(count, len(self._processes))
        counts = [share + (number < more) for number in range(len(self._processes))]
        for process, each in zip(self._processes, counts, strict=True):
            assert process.stdin is not None
            process.stdin.write(f"{each} {settle_s} {measure_s}\n")
            process.stdin.flush()
        turn = Turn()
        for process in self._processes:
            assert process.stdout is not None
            turn.add(Turn(**json.loads(process.stdout.readline())))
        return turn


class _Client:
    """One session."""

    def __init__(self, cache: RemoteCache, chains: Sequence[list[BlockKey]], seed: int) -> None:
        self._cache = cache
        self._handle = cache.open_namespace(SPEC)
        self._chains = chains
        self._random = random.Random(seed)
        self._copy = bytearray(LAYOUT.block_bytes * CHAIN_BLOCKS)

    def run(self, start_s: float, turn: Turn) -> None:
        """Load until the turn is over; what begins after `start_s` counts."""
        stop_s, loads = start_s + turn.duration_s, 0
        while (began_s := time.monotonic()) < stop_s:
            keys = self._random.choice(self._chains)
            try:
                is_whole = self._load(keys)
            except CapacityError as error:
                now_s = time.monotonic()
                if began_s >= start_s:
                    turn.refused_s.append(now_s - began_s)
                time.sleep(max(min(error.retry_after_s, stop_s - now_s), 0.0))
                continue
            if began_s >= start_s:
                turn.load_s.append(self._done_s - began_s)
                turn.num_partial += not is_whole
                loads += is_whole
        turn.loads.append(loads)

    def _load(self, keys: list[BlockKey]) -> bool:
        lease = self._cache.prepare_load(self._handle.id, keys, timeout_s=DEADLINE_S)
        size = LAYOUT.block_bytes
        for index, block in enumerate(lease.blocks[: lease.num_ready]):
            assert block.data is not None
            self._copy[index * size : (index + 1) * size] = block.data
        self._done_s = time.monotonic()
        if lease.num_ready:
            assert self._copy[:4096] == right_bytes(keys[0])[:4096], "wrong bytes"
        self._cache.complete_load(lease.id)
        return lease.num_ready == len(keys)


def _take_turn(clients: Sequence[_Client], settle_s: float, measure_s: float) -> Turn:
    start_s = time.monotonic() + settle_s
    turns = [Turn(duration_s=measure_s) for _ in clients]
    threads = [
        threading.Thread(target=client.run, args=(start_s, turn))
        for client, turn in zip(clients, turns, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = Turn()
    for turn in turns:
        together.add(turn)
    return together


def main(arguments: Sequence[str]) -> None:
    """One process: connect, then a turn for each line of standard input, until its end."""
    path, num_chains, count = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    chains = [chain(SPEC.fingerprint(), CHAIN_BLOCKS, seed) for seed in range(num_chains)]
    caches = [connect(path, timeout_s=CONNECT_TIMEOUT_S) for _ in range(count)]
    clients = [_Client(cache, chains, 1000 * os.getpid() + n) for n, cache in enumerate(caches)]
    for keys in chains:
        right_bytes(keys[0])
    _say("ready")
    for line in sys.stdin:
        asked, settle_s, measure_s = line.split()
        turn = _take_turn(clients[: int(asked)], float(settle_s), float(measure_s))
        names: tuple[str, ...] = tuple(Turn.__dataclass_fields__)
        found: dict[str, Any] = {name: getattr(turn, name) for name in names}
        _say(json.dumps(found))
    for cache in caches:
        cache.close()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
