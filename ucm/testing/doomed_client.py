"""A client that goes to one state of the protocol and stays there until it is killed.

    python -m ucm.testing.doomed_client SOCKET STATE

It prints the state's name on a line of its own once it is there. Without STATE it reads states, a
line each, forks a client for each, which prints the state's name and its process id, and prints
"gone" once that was killed. Leases of the tests' daemons outlast any test, so what is given back
was given back because the connection ended.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ucm.api import NamespaceHandle
from ucm.checksum import block_checksums
from ucm.client import RemoteCache, connect
from ucm.door_client import DoorClient
from ucm.sockets import door_path
from ucm.types import ROOT_KEY, LoadMode

from .blocks import chain, content, put, tiny_spec

NUM_BLOCKS: Final = 16
"""Blocks of the chain of seed 0, which the test has stored and flushed."""


def _connected(path: Path) -> object:
    return DoorClient(door_path(path), timeout_s=5)


def _greeted(path: Path) -> object:
    client = DoorClient(door_path(path), timeout_s=5)
    return client, client.hello(timeout_s=5)


def _open(path: Path) -> tuple[RemoteCache, NamespaceHandle]:
    cache = connect(path, timeout_s=10)
    return cache, cache.open_namespace(tiny_spec())


def _looked_up(path: Path) -> object:
    cache, handle = _open(path)
    return cache, cache.lookup(handle.id, chain(handle.id, NUM_BLOCKS))


def _prefetched(path: Path) -> object:
    cache, handle = _open(path)
    return cache, cache.prefetch(handle.id, chain(handle.id, NUM_BLOCKS))


def _load_leased(path: Path) -> object:
    cache, handle = _open(path)
    return cache, cache.prepare_load(handle.id, chain(handle.id, NUM_BLOCKS), timeout_s=10)


def _load_being_read(path: Path) -> object:
    cache, handle = _open(path)
    lease = cache.prepare_load(handle.id, chain(handle.id, NUM_BLOCKS), timeout_s=10)
    data = lease.blocks[0].data
    assert data is not None

    def read_on() -> None:
        while True:
            bytes(data)

    threading.Thread(target=read_on, daemon=True).start()
    return cache, lease


def _load_completed(path: Path) -> object:
    cache, handle = _open(path)
    lease = cache.prepare_load(handle.id, chain(handle.id, NUM_BLOCKS), timeout_s=10)
    cache.complete_load(lease.id)
    return cache, lease


def _load_called(path: Path) -> object:
    """Calls that never end, so that the kill comes in the middle of one."""
    cache, handle = _open(path)
    keys = chain(handle.id, NUM_BLOCKS)

    def call_on() -> None:
        while True:
            cache.complete_load(cache.prepare_load(handle.id, keys, timeout_s=10).id)

    threading.Thread(target=call_on, daemon=True).start()
    return cache


def _layer_loads_begun(path: Path) -> object:
    """Plans in both modes, and all that the door gives out for them."""
    cache, handle = _open(path)
    keys = chain(handle.id, NUM_BLOCKS)
    plans = [cache.begin_load(handle.id, keys, mode=mode, timeout_s=10) for mode in [*LoadMode] * 3]
    door = cache._door  # noqa: SLF001  blocks are in memory here: nothing else asks for these
    return (
        (cache, plans),
        door.open_progress(timeout_s=10),
        door.open_segment(handle.id, 0, timeout_s=10),
    )


def _store_prepared(path: Path) -> object:
    cache, handle = _open(path)
    return cache, cache.prepare_store(handle.id, ROOT_KEY, chain(handle.id, 8, seed=1))


def _store_half_filled(path: Path) -> object:
    cache, handle = _open(path)
    lease = cache.prepare_store(handle.id, ROOT_KEY, chain(handle.id, 8, seed=2))
    for slot in lease.slots[:4]:
        assert slot.data is not None
        slot.data[:] = content(slot.key)
    half = lease.slots[4].data
    assert half is not None
    half[:100] = content(lease.slots[4].key)[:100]
    return cache, lease


def _store_filled(path: Path) -> object:
    cache, handle = _open(path)
    lease = cache.prepare_store(handle.id, ROOT_KEY, chain(handle.id, 8, seed=3))
    sums = {}
    for slot in lease.slots:
        assert slot.data is not None
        slot.data[:] = content(slot.key)
        sums[slot.key] = block_checksums(handle.layout, slot.data)
    return cache, lease, sums


def _store_called(path: Path) -> object:
    cache, handle = _open(path)

    def call_on() -> None:
        seed = 1000
        while True:
            seed += 1
            put(cache, handle, chain(handle.id, 8, seed))

    threading.Thread(target=call_on, daemon=True).start()
    return cache


def _many_leases(path: Path) -> object:
    cache, handle = _open(path)
    keys = chain(handle.id, NUM_BLOCKS)
    loads = [cache.prepare_load(handle.id, keys[:length], timeout_s=10) for length in range(1, 9)]
    stores = [
        cache.prepare_store(handle.id, keys[-1], chain(handle.id, NUM_BLOCKS + 1)[-1:])
        for _ in range(4)
    ]
    return cache, loads, stores


STATES: Final[dict[str, Callable[[Path], object]]] = {
    "connected": _connected,
    "greeted": _greeted,
    "namespace_open": _open,
    "looked_up": _looked_up,
    "prefetched": _prefetched,
    "load_leased": _load_leased,
    "load_being_read": _load_being_read,
    "load_completed": _load_completed,
    "load_called": _load_called,
    "layer_loads_begun": _layer_loads_begun,
    "store_prepared": _store_prepared,
    "store_half_filled": _store_half_filled,
    "store_filled": _store_filled,
    "store_called": _store_called,
    "many_leases": _many_leases,
}


def _stay(path: Path, state: str, suffix: str = "") -> None:
    """Go to the state, say so, and never return."""
    held = STATES[state](path)
    sys.stdout.write(f"{state}{suffix}\n")
    sys.stdout.flush()
    threading.Event().wait()
    del held


def _fork_each(path: Path) -> None:
    while state := sys.stdin.readline().strip():
        pid = os.fork()
        if pid == 0:
            try:
                _stay(path, state, f" {os.getpid()}")
            finally:
                os._exit(1)
        os.waitpid(pid, 0)
        sys.stdout.write("gone\n")
        sys.stdout.flush()


def main() -> None:
    """Go to the state that the command line names, and stay; or fork those who do."""
    path = Path(sys.argv[1])
    if len(sys.argv) == 2:
        _fork_each(path)
    else:
        _stay(path, sys.argv[2])


if __name__ == "__main__":
    main()
