"""Lives of a store in their own processes (see `io_workload`), and what they leave on disk."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ucm.config import NvmeConfig
from ucm.storage.fsck import check_store
from ucm.storage.nvme import NvmeStore
from ucm.storage.tier import IoStatus, SlotRead

from .blocks import TINY_LAYOUT, content, meaning
from .io_workload import SEGMENT_BYTES

MAX_STEP_S: Final = 5.0
MAX_LIFE_S: Final = 60.0


class LifeServer:
    """The process that forks lives."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        """Start it.

        Args:
            environ: what its environment has besides this process's.
        """
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ucm.testing.io_workload"],
            env={**os.environ, **(environ or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def say(self, line: str) -> str:
        """Send a line and wait for the answer; an empty one if the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], MAX_LIFE_S)
        assert ready, "the store hangs"
        return self.process.stdout.readline()

    def close(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def check_store_of_life(path: Path, accepted: set[str]) -> None:
    """Without faults it opens, and whatever is in it is right and was accepted."""
    config = NvmeConfig(
        path=path,
        capacity_bytes=3 * SEGMENT_BYTES,
        segment_bytes=SEGMENT_BYTES,
        io_threads=1,
        index_map_bytes=4 << 20,
    )
    store = NvmeStore(config)
    for namespace in store.namespaces():
        tier = store.open_namespace(namespace, TINY_LAYOUT)
        assert tier.check_integrity() == []
        for entry in list(tier.entries()):
            into = memoryview(bytearray(TINY_LAYOUT.block_bytes))
            (outcome,) = tier.read([SlotRead(entry.slot, entry.key, into)])
            assert outcome.status in (IoStatus.OK, IoStatus.CORRUPT)
            if outcome.status is IoStatus.OK:
                assert entry.key.hex() in accepted, "a put that failed is visible"
                assert meaning(into) == content(entry.key)
    store.close()
    assert check_store(path, repair=True).ok
