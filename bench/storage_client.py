"""A process of the storage benchmark that holds several clients of one daemon.

`python -m ucm.bench.storage_client SETTINGS` takes a JSON object as its argument and then commands,
a JSON object a line: `{"op": "run", "clients": n, "kind": "load" | "store", "start_s", "stop_s"}`,
times on the monotonic clock, which all processes share. It answers each with one line:
`{"event": "done", "ms": [[...] a client], "refused", "bytes", "wrong_bytes", "checked_bytes"}`.
Every client has a connection, a thread and memory of its own.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ucm.api import NamespaceHandle
from ucm.client import RemoteCache, connect
from ucm.errors import CapacityError, UcmError
from ucm.types import ROOT_KEY, LoadStatus, StoreStatus

from .storage_measure import MIB_LAYOUT
from .storage_payload import (
    Audit,
    BlockBuffer,
    Payload,
    bench_chain,
    bench_spec,
    copy_verified,
    fill_slot,
    require,
)

BLOCKS_PER_CALL = 8
CALL_TIMEOUT_S = 30.0
STORE_SEED = 1 << 30
"""Chains with seeds from here on are new ones, never loaded."""

STORES_A_CLIENT = 1 << 16
EXTRA_S = 5.0
"""A client that has not finished anything when the time is over goes on so long."""

RETRY_S = 0.05
NO_ROOM = (LoadStatus.NO_SPACE, LoadStatus.MISS)
"""Miss: what follows a block without room in its chain is answered so."""


def load_chain_seed(number: int) -> int:
    """The seed of the loaded chain `number`."""
    return 1000 + number


class Client:
    """One connection that loads or stores chains of `BLOCKS_PER_CALL` blocks of 1 MiB."""

    def __init__(self, socket_path: Path, number: int, num_chains: int) -> None:
        self._cache: RemoteCache = connect(socket_path, timeout_s=CALL_TIMEOUT_S)
        self._handle: NamespaceHandle = self._cache.open_namespace(bench_spec(MIB_LAYOUT))
        self._payload = Payload(MIB_LAYOUT)
        self._buffer = BlockBuffer(MIB_LAYOUT, BLOCKS_PER_CALL)
        self._chains = itertools.cycle(
            [
                bench_chain(
                    self._handle.id,
                    MIB_LAYOUT,
                    BLOCKS_PER_CALL,
                    load_chain_seed((number + step) % num_chains),
                )
                for step in range(num_chains)
            ]
        )
        self.num_refused = 0
        self._stored = itertools.count(STORE_SEED + number * STORES_A_CLIENT)

    def run(self, kind: str, stop_s: float, audit: Audit) -> list[float]:
        """Work until `stop_s`; the milliseconds of every operation."""
        took_ms: list[float] = []
        while (now_s := time.monotonic()) < stop_s or (not took_ms and now_s < stop_s + EXTRA_S):
            try:
                one_ms = self._load(audit) if kind == "load" else self._store()
            except CapacityError as error:  # back-pressure: a client comes again a little later
                one_ms = None
                time.sleep(getattr(error, "retry_after_s", RETRY_S))
            if one_ms is None:
                self.num_refused += 1
            else:
                took_ms.append(one_ms)
        return took_ms

    def _load(self, audit: Audit) -> float | None:
        """Milliseconds; None when the daemon had no room to bring the blocks to host memory."""
        keys = next(self._chains)
        self._buffer.wipe()
        begin = time.perf_counter()
        lease = self._cache.prepare_load(self._handle.id, keys, timeout_s=CALL_TIMEOUT_S)
        try:
            blocks = tuple(lease.blocks)  # each is made when it is asked for: once is enough
            lacking = {block.status for block in blocks} - {LoadStatus.READY}
            if lacking and lacking.issubset(NO_ROOM):
                return None
            for target, block in zip(self._buffer.blocks, blocks, strict=True):
                copy_verified(MIB_LAYOUT, block, target)
        finally:
            self._cache.complete_load(lease.id)
        took_ms = (time.perf_counter() - begin) * 1e3
        audit.check(self._payload, keys, self._buffer.blocks)
        return took_ms

    def _store(self) -> float:
        keys = bench_chain(self._handle.id, MIB_LAYOUT, BLOCKS_PER_CALL, next(self._stored))
        for key, block in zip(keys, self._buffer.blocks, strict=True):
            self._payload.fill(key, block)
        begin = time.perf_counter()
        lease = self._cache.prepare_store(self._handle.id, ROOT_KEY, keys)
        sums = {}
        for source, slot in zip(self._buffer.blocks, lease.slots, strict=True):
            if slot.data is not None:
                sums[slot.key] = fill_slot(MIB_LAYOUT, slot, source)
        statuses = self._cache.complete_store(lease.id, sums)
        took_ms = (time.perf_counter() - begin) * 1e3
        full = {StoreStatus.NO_SPACE, StoreStatus.ORPHAN}  # a full store says so, and does not wait
        require(set(statuses) <= full | {StoreStatus.ACCEPTED}, f"stores ended with {statuses}")
        return took_ms

    def close(self) -> None:
        """End the session."""
        self._cache.close()


def main() -> int:
    """Serve commands until standard input ends."""
    settings = json.loads(sys.argv[1])
    path, first = Path(settings["socket"]), settings["first_number"]
    clients: list[Client] = []
    try:
        clients += [
            Client(path, first + number, settings["chains"])
            for number in range(settings["clients"])
        ]
        _say(event="ready")
        for line in sys.stdin:
            _say(event="done", **_run(clients, json.loads(line)))
    except UcmError as error:
        _say(event="error", kind=type(error).__name__, message=str(error))
        return 1
    finally:
        for client in clients:
            client.close()
    return 0


def _run(clients: list[Client], command: dict[str, Any]) -> dict[str, Any]:
    chosen = clients[: command["clients"]]
    audits = [Audit() for _ in chosen]
    barrier = threading.Barrier(max(1, len(chosen)))

    def work(client: Client, audit: Audit) -> list[float]:
        barrier.wait()
        time.sleep(max(0.0, command["start_s"] - time.monotonic()))
        return client.run(command["kind"], command["stop_s"], audit)

    with ThreadPoolExecutor(max(1, len(chosen))) as pool:
        took_ms = list(pool.map(work, chosen, audits))
    refused = sum(client.num_refused for client in chosen)
    for client in chosen:
        client.num_refused = 0
    return {
        "ms": took_ms,
        "refused": refused,
        "bytes": sum(map(len, took_ms)) * BLOCKS_PER_CALL * MIB_LAYOUT.block_bytes,
        "wrong_bytes": sum(audit.wrong_bytes for audit in audits),
        "checked_bytes": sum(audit.checked_bytes for audit in audits),
    }


def _say(**event: object) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    sys.exit(main())
