"""A store's whole life in a process of its own, to have its system calls failed from outside.

    python -m ucm.testing.io_workload

reads a folder's path a line and answers each with a process id: a child, forked with everything
imported, that waits for the next line ("go") and then opens an embedded store in the folder, puts,
flushes, gets and evicts, and closes. The next answer is what became of it:

    {"status": 0 | a signal or exit code, "accepted": [keys], "wrong": n, "slowest_s": s}

With `UCM_FIU_PROBABILITY` in the environment, and libfiu's POSIX wrapper preloaded, each call on
files fails with that probability while the store lives.

An error of ours is an outcome, any other ends the child with status 1. What is never imported late
is never failed: the first life, without faults, happens before the fork.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ucm.config import MIB, Config, MemoryConfig, NvmeConfig, ServiceConfig
from ucm.embedded import EmbeddedCache
from ucm.errors import UcmError
from ucm.manager import Manager
from ucm.types import StoreStatus

from .blocks import TINY_LAYOUT, chain, content, get, put, tiny_spec

NUM_CHAINS = 5
CHAIN_BLOCKS = 4
SEGMENT_BYTES = 64 << 10
TIMEOUT_S = 2.0
_FAILURE_POINTS = (
    "posix/io/oc/open",
    *(f"posix/io/rw/{call}" for call in ("read", "pread", "readv", "write", "pwrite", "writev")),
    *(f"posix/io/rw/{call}" for call in ("preadv", "pwritev")),
    *(f"posix/io/sync/{call}" for call in ("fsync", "fdatasync")),
)
"""Names of libfiu's. Its short transfers are left out (it divides by a length that may be 0), and
so are failures of `close`, of which it does not close the file."""


class Life:
    """One store's life and what it saw."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.accepted: list[str] = []
        self.num_wrong = 0
        self.slowest_s = 0.0

    def run(self) -> None:
        """Twice: the second opening finds what the first left."""
        for life in range(2):
            with self._step():
                self._live(life)

    def _live(self, life: int) -> None:
        cache = EmbeddedCache(Manager(_config(self.path)))
        try:
            for number in range(NUM_CHAINS):
                with self._step():
                    self._use(cache, 10 * life + number)
        finally:
            with self._step():
                cache.close()

    def _use(self, cache: EmbeddedCache, seed: int) -> None:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, CHAIN_BLOCKS, seed)
        statuses = put(cache, handle, keys)
        kept = (StoreStatus.ACCEPTED, StoreStatus.PRESENT)
        self.accepted += [k.hex() for k, s in zip(keys, statuses, strict=True) if s in kept]
        cache.flush(timeout_s=TIMEOUT_S)
        for asked in (keys, chain(handle.id, CHAIN_BLOCKS, seed - 3)):
            found = get(cache, handle, asked, timeout_s=TIMEOUT_S)
            self.num_wrong += found != [content(key) for key in asked[: len(found)]]

    @contextmanager
    def _step(self) -> Iterator[None]:
        """A failure of ours is an outcome; how long it took is one too."""
        start_s = time.monotonic()
        try:
            yield
        except UcmError:
            pass
        finally:
            self.slowest_s = max(self.slowest_s, time.monotonic() - start_s)


def _config(path: Path) -> Config:
    """Memory for 6 blocks, disk for 15: later chains push earlier ones out of both."""
    return Config(
        service=ServiceConfig(staging_bytes=1 * MIB, drain_timeout_s=TIMEOUT_S),
        memory=MemoryConfig(capacity_bytes=6 * TINY_LAYOUT.block_bytes),
        nvme=NvmeConfig(
            path=path,
            capacity_bytes=3 * SEGMENT_BYTES,
            segment_bytes=SEGMENT_BYTES,
            io_threads=1,
            commit_interval_s=0.0,
            index_map_bytes=4 * MIB,
        ),
    )


@contextmanager
def _random_faults(probability: float) -> Iterator[None]:
    if not probability:
        yield
        return
    fiu = ctypes.CDLL("libfiu.so.0")
    for name in _FAILURE_POINTS:
        assert not fiu.fiu_enable_random(name.encode(), 1, None, 0, ctypes.c_float(probability))
    try:
        yield
    finally:
        for name in _FAILURE_POINTS:
            fiu.fiu_disable(name.encode())


def _child(path: Path, go: int, report: int) -> None:
    """Wait for the word, live, report; never returns."""
    code = 1
    try:
        os.read(go, 1)
        life = Life(path)
        with _random_faults(float(os.environ.get("UCM_FIU_PROBABILITY", "0"))):
            life.run()
        outcome = {
            "accepted": life.accepted,
            "wrong": life.num_wrong,
            "slowest_s": life.slowest_s,
        }
        os.write(report, json.dumps(outcome).encode())
        code = 0
    except BaseException:  # noqa: BLE001  the outermost frame: whatever it is, it is reported
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _serve(read_line: Callable[[], str], answer: Callable[[str], object]) -> None:
    while path := read_line().strip():
        (go_read, go_write), (report_read, report_write) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            _child(Path(path), go_read, report_write)
        os.close(go_read)
        os.close(report_write)
        answer(f"{pid}\n")
        read_line()
        os.write(go_write, b"g")
        os.close(go_write)
        with os.fdopen(report_read) as report:
            text = report.read()
        _, status = os.waitpid(pid, 0)
        outcome = json.loads(text) if text else {}
        answer(json.dumps(outcome | {"status": os.waitstatus_to_exitcode(status)}) + "\n")


def main() -> None:
    """Serve lives until the input ends."""
    with tempfile.TemporaryDirectory(prefix="ucm") as folder:
        Life(Path(folder) / "warm").run()

    def answer(line: str) -> None:
        sys.stdout.write(line)
        sys.stdout.flush()

    _serve(sys.stdin.readline, answer)


if __name__ == "__main__":
    main()
