"""LMCache's local backends as a peer: a process of another environment that measures itself.

Our side writes the blocks to a file, starts `storage_lmcache_script.py` under the interpreter that
has LMCache, and asks it for a round when it is its turn.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from ucm.errors import UcmError

from .demo_processes import ChildProcess
from .storage_measure import Progress
from .storage_payload import Audit, BlockBuffer

SCRIPT = Path(__file__).with_name("storage_lmcache_script.py")
TIMEOUT_S = 300.0

NOTES: Mapping[str, str] = {
    "lmcache_disk": "LMCache LocalDiskBackend: O_DIRECT, 8 threads, no sync, no checksum",
    "lmcache_cpu": "LMCache LocalCPUBackend: copies inside one process, no checksum",
}


def find_lmcache(python: Path | None) -> Path | None:
    """The interpreter to use: the one given, else this one if it has LMCache."""
    if python is not None:
        return python
    return Path(sys.executable) if importlib.util.find_spec("lmcache") else None


class LmcacheBench:
    """A running script."""

    def __init__(self, process: ChildProcess, audit: Audit) -> None:
        self._process = process
        self._audit = audit

    def round(self) -> Mapping[str, float]:
        """Have it put and get every block."""
        self._process.send(op="round")
        done = self._process.next_event(TIMEOUT_S)
        self._audit.add(done["wrong_bytes"], done["checked_bytes"])
        rates: Mapping[str, float] = done["rates"]
        return rates

    def close(self) -> None:
        """End it."""
        self._process.close()


def start_lmcache(
    python: Path, folder: Path, blocks: BlockBuffer, audit: Audit, progress: Progress
) -> LmcacheBench | None:
    """Start the script; None, and a line that says why, when it cannot run there."""
    folder.mkdir()
    (folder / "source.bin").write_bytes(blocks.memory)
    settings = {
        "source": str(folder / "source.bin"),
        "folder": str(folder / "disk"),
        "block_bytes": blocks.nbytes // len(blocks.blocks),
    }
    arguments = [str(SCRIPT), json.dumps(settings)]
    try:
        process = ChildProcess("LMCache", arguments, folder / "log", (str(python),))
    except OSError as error:
        progress(f"LMCache left out: {python}: {error.strerror}")
        return None
    try:
        ready = process.next_event(TIMEOUT_S)
    except UcmError as error:
        ready = {"event": "unable", "message": str(error)}
    if ready["event"] != "ready":
        process.close()
        progress(f"LMCache left out: {ready['message'].strip().splitlines()[-1]}")
        return None
    progress(f"LMCache {ready['version']}")
    return LmcacheBench(process, audit)
