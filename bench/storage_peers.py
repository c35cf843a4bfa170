"""Other ways to keep the same blocks on the same disk, measured in the same rounds.

    ucm           our tier: checksums, an index, durable when `write` returned, O_DIRECT
    files_fsync   one file a block, fsync each (durable), eight threads
    files         the same without fsync: nothing is promised
    lmdb          raw values in one transaction (durable)
    lmcache_*     LMCache's local backends, in a process of their own (`storage_lmcache.py`)
    redis         SET and GET over a Unix socket, four connections, memory only, no persistence

Before each load of files and LMDB the page cache is dropped for them, so that they read the disk as
we do. None of them checks what it reads; we compare all of it, for all of them, outside the time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import lmdb
import numpy as np

from ucm.config import MIB
from ucm.errors import TierUnavailableError
from ucm.types import BlockKey

from .storage_lmcache import NOTES as LMCACHE_NOTES
from .storage_lmcache import find_lmcache, start_lmcache
from .storage_measure import (
    MIB_LAYOUT,
    Progress,
    Result,
    StorageBenchOptions,
    Task,
    gb_s,
    interleave,
    medians,
)
from .storage_nvme import TierBench
from .storage_payload import Audit, BlockBuffer, Payload, bench_chain, bench_spec, require
from .storage_redis import RedisConnection

THREADS = 8
REDIS_CONNECTIONS = 4
REDIS_START_S = 10.0

NOTES: Mapping[str, str] = {
    "ucm": "NvmeTier: O_DIRECT, every slab verified, durable",
    "files": "8 threads, no fsync; page cache dropped before loads",
    "files_fsync": "8 threads, fsync of every file; page cache dropped before loads",
    "lmdb": "raw values, one durable transaction; page cache dropped before loads",
    "redis": "host memory over a Unix socket, no persistence",
    **LMCACHE_NOTES,
}


class Peer(Protocol):
    """Keeps blocks under keys."""

    def put_all(self, keys: Sequence[BlockKey], blocks: Sequence[memoryview]) -> None:
        """Store every block; returns when it is as safe as this peer makes it."""

    def get_all(self, keys: Sequence[BlockKey], blocks: Sequence[memoryview]) -> None:
        """Load every block into the caller's memory."""

    def make_cold(self) -> None:
        """Forget what the page cache holds of it."""

    def close(self) -> None:
        """End it."""


class FilePeer:
    """One file a block."""

    def __init__(self, folder: Path, *, fsync: bool) -> None:
        folder.mkdir()
        self._folder = folder
        self._fsync = fsync
        self._pool = ThreadPoolExecutor(THREADS)

    def put_all(self, keys: Sequence[BlockKey], blocks: Sequence[memoryview]) -> None:
        """See `Peer`."""
        list(self._pool.map(self._put, keys, blocks))

    def get_all(self, keys: Sequence[BlockKey], blocks: Sequence[memoryview]) -> None:
        """See `Peer`."""
        list(self._pool.map(self._get, keys, blocks))

    def make_cold(self) -> None:
        """See `Peer`."""
        for path in self._folder.iterdir():
            drop_page_cache(path)

    def close(self) -> None:
        """See `Peer`."""
        self._pool.shutdown()

    def _put(self, key: BlockKey, block: memoryview) -> None:
        with (self._folder / key.hex()).open("wb", buffering=0) as file:
            file.write(block)
            if self._fsync:
                os.fsync(file.fileno())

    def _get(self, key: BlockKey, block: memoryview) -> None:
        with (self._folder / key.hex()).open("rb", buffering=0) as file:
            require(file.readinto(block) == block.nbytes, "a file is too short")


class LmdbPeer:
    """Blocks as values of one LMDB."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        folder.mkdir()
        self._folder = folder
        self._map_bytes = 4 * nbytes + 64 * MIB
        self._pool = ThreadPoolExecutor(THREADS)
        self._env = self._open()

    def _open(self) -> lmdb.Environment:
        return lmdb.open(str(self._folder), map_size=self._map_bytes, readahead=True)

    def put_all(self, keys: Sequence[BlockKey], blocks: Sequence[memoryview]) -> None:
        """See `Peer`."""
        with self._env.begin(write=True) as transaction:
            for key, block in zip(keys, blocks, strict=True):
                transaction.put(key, block)

    def get_all(self, keys: Sequence[BlockKey], blocks: Sequence[memoryview]) -> None:
        """See `Peer`."""
        list(self._pool.map(self._get, keys, blocks))

    def _get(self, key: BlockKey, block: memoryview) -> None:
        with self._env.begin(buffers=True) as transaction:
            value = transaction.get(key)
            require(value is not None, "LMDB lost a block")
            assert value is not None
            np.copyto(np.frombuffer(block, np.uint8), np.frombuffer(value, np.uint8))

    def make_cold(self) -> None:
        """See `Peer`."""
        self._env.close()
        drop_page_cache(self._folder / "data.mdb")
        self._env = self._open()

    def close(self) -> None:
        """See `Peer`."""
        self._pool.shutdown()
        self._env.close()


class RedisPeer:
    """A Redis server of our own."""

    def __init__(self, folder: Path, server: str, nbytes: int) -> None:
        folder.mkdir()
        self._sockets = Path(tempfile.mkdtemp(prefix="ucm", dir="/tmp"))
        path = self._sockets / "redis.sock"
        arguments = [server, "--port", "0", "--unixsocket", str(path), "--save", ""]
        arguments += ["--appendonly", "no", "--dir", str(folder)]
        arguments += ["--maxmemory", str(2 * nbytes + 256 * MIB)]
        self._process = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._connections: list[RedisConnection] = []
        self._pool = ThreadPoolExecutor(REDIS_CONNECTIONS)
        try:
            for _ in range(REDIS_CONNECTIONS):
                self._connections.append(RedisConnection(_connected(path, self._process)))
        except TierUnavailableError:
            self.close()
            raise

    def put_all(self, keys: Sequence[BlockKey], blocks: Sequence[memoryview]) -> None:
        """See `Peer`."""
        self._share(RedisConnection.set, keys, blocks)

    def get_all(self, keys: Sequence[BlockKey], blocks: Sequence[memoryview]) -> None:
        """See `Peer`."""
        self._share(RedisConnection.get_into, keys, blocks)

    def make_cold(self) -> None:
        """See `Peer`: it is memory."""

    def close(self) -> None:
        """See `Peer`."""
        self._pool.shutdown()
        for connection in self._connections:
            connection.close()
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _share(
        self,
        move: Callable[[RedisConnection, BlockKey, memoryview], None],
        keys: Sequence[BlockKey],
        blocks: Sequence[memoryview],
    ) -> None:
        """Move every block, each connection its share."""

        def work(number: int) -> None:
            for n in range(number, len(keys), REDIS_CONNECTIONS):
                move(self._connections[number], keys[n], blocks[n])

        list(self._pool.map(work, range(REDIS_CONNECTIONS)))


def _connected(path: Path, process: subprocess.Popen[bytes]) -> socket.socket:
    deadline = time.monotonic() + REDIS_START_S
    while time.monotonic() < deadline and process.poll() is None:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
        except OSError:
            connection.close()
            time.sleep(0.02)
        else:
            return connection
    raise TierUnavailableError("redis-server does not answer on its socket")


def drop_page_cache(path: Path) -> None:
    """Write a file out and have the kernel forget its pages."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


@contextlib.contextmanager
def open_peers(folder: Path, nbytes: int, progress: Progress) -> Iterator[dict[str, Peer]]:
    """Every peer that this machine has."""
    with contextlib.ExitStack() as stack:
        peers: dict[str, Peer] = {
            "files": FilePeer(folder / "files", fsync=False),
            "files_fsync": FilePeer(folder / "files_fsync", fsync=True),
            "lmdb": LmdbPeer(folder / "lmdb", nbytes),
        }
        for peer in peers.values():
            stack.callback(peer.close)
        server = shutil.which("redis-server")
        if server is None:
            progress("redis-server is not installed: left out")
        else:
            peers["redis"] = redis = RedisPeer(folder / "redis", server, nbytes)
            stack.callback(redis.close)
        yield peers


def measure_peers(
    folder: Path, options: StorageBenchOptions, audit: Audit, progress: Progress
) -> Result:
    """Every peer, and our tier, on the same blocks of 1 MiB.

    Args:
        folder: on the file system to measure; left empty.
        options: how many bytes, how often, and where LMCache is.
        audit: counts what was read wrongly, whoever read it.
        progress: told what is left out.
    """
    num_blocks = max(1, options.peer_bytes // MIB_LAYOUT.block_bytes)
    folder.mkdir()
    ours = TierBench(folder / "ucm", MIB_LAYOUT, num_blocks, audit)
    try:
        with contextlib.ExitStack() as stack:
            peers = stack.enter_context(open_peers(folder, ours.nbytes, progress))
            progress(f"peers: ucm, {', '.join(peers)}")
            bench = _PeerBench(num_blocks, audit)
            tasks: list[Task] = [bench.task(name, peer) for name, peer in peers.items()]
            tasks.append(lambda: {"ucm store": ours.store(), "ucm load": ours.load()["load"]})
            python = find_lmcache(options.lmcache_python)
            if python is None:
                progress("LMCache is not installed (--lmcache-python): left out")
            elif other := start_lmcache(python, folder / "lmcache", bench.source, audit, progress):
                stack.callback(other.close)
                tasks.append(other.round)
            samples = interleave(tasks, options.peers)
    finally:
        ours.close()
        shutil.rmtree(folder, ignore_errors=True)
    return _by_peer(samples)


def _by_peer(samples: Mapping[str, Sequence[float]]) -> Result:
    middle = medians(samples)
    names = dict.fromkeys(name.partition(" ")[0] for name in middle)
    return {
        name: {
            "load_gb_s": round(middle[f"{name} load"], 3),
            "store_gb_s": round(middle[f"{name} store"], 3),
            "n": len(samples[f"{name} load"]),
            "note": NOTES[name],
        }
        for name in sorted(names, key=list(NOTES).index)
    }


class _PeerBench:
    """The blocks that every peer gets."""

    def __init__(self, num_blocks: int, audit: Audit) -> None:
        self._audit = audit
        self._payload = Payload(MIB_LAYOUT)
        namespace = bench_spec(MIB_LAYOUT).fingerprint()
        self._keys = bench_chain(namespace, MIB_LAYOUT, num_blocks)
        self.source, self._target = (BlockBuffer(MIB_LAYOUT, num_blocks) for _ in range(2))
        for key, block in zip(self._keys, self.source.blocks, strict=True):
            self._payload.fill(key, block)

    def task(self, name: str, peer: Peer) -> Callable[[], Mapping[str, float]]:
        """Store, forget the cache, load, compare."""

        def run() -> Mapping[str, float]:
            begin = time.perf_counter()
            peer.put_all(self._keys, self.source.blocks)
            store = gb_s(self.source.nbytes, begin)
            peer.make_cold()
            self._target.wipe()
            begin = time.perf_counter()
            peer.get_all(self._keys, self._target.blocks)
            load = gb_s(self._target.nbytes, begin)
            self._audit.check(self._payload, self._keys, self._target.blocks)
            return {f"{name} store": store, f"{name} load": load}

        return run
