"""A daemon of its own for the storage benchmark, in a process of its own, and its memory."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ucm.client import RemoteCache, connect
from ucm.config import MIB

from .demo_processes import START_TIMEOUT_S, ChildProcess

CONNECT_TIMEOUT_S = 300.0
"""Opening a namespace is a call with this deadline; a large index takes seconds."""


@dataclass(frozen=True, slots=True)
class BenchDaemon:
    """A running daemon."""

    process: ChildProcess
    socket_path: Path

    def connect(self) -> RemoteCache:
        """A new session."""
        return connect(self.socket_path, timeout_s=CONNECT_TIMEOUT_S)


@contextlib.contextmanager
def bench_daemon(store: Path, settings: Mapping[str, str]) -> Iterator[BenchDaemon]:
    """Run `ucm serve` on `store` for the time of a `with` block; it ends by SIGTERM.

    Args:
        store: its data folder.
        settings: `section.field` -> value.

    Raises:
        UcmError: it does not start, or does not stop.
    """
    folder = Path(tempfile.mkdtemp(prefix="ucm", dir="/tmp"))
    socket_path = folder / "ucm.sock"
    arguments = ["ucm.cli", "serve", "--json", "--socket", str(socket_path), "--store", str(store)]
    for name, value in settings.items():
        arguments += ["--set", f"{name}={value}"]
    process = ChildProcess("daemon", arguments, folder / "daemon.log")
    try:
        while process.next_event(START_TIMEOUT_S).get("event") != "ready":
            pass
        yield BenchDaemon(process, socket_path)
        process.terminate()
    finally:
        process.close()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class PrivateMemory:
    """What a process has that no other process has, without arenas."""

    total_mib: float
    anonymous_mib: float
    """Of it, what the kernel cannot drop: not backed by a file."""


def private_memory(pid: int) -> PrivateMemory:
    """The private memory of a process now, from /proc."""
    return parse_smaps(Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace"))


def parse_smaps(text: str) -> PrivateMemory:
    """Sum the private pages of all mappings but memfds (arenas and staging memory)."""
    total_kib = anonymous_kib = private_kib = 0
    is_arena = False
    for line in text.splitlines():
        head, *rest = line.split(maxsplit=1)
        if not head.endswith(":"):
            is_arena = "/memfd:" in line
        elif head in ("Private_Clean:", "Private_Dirty:") and not is_arena:
            private_kib = int(rest[0].split()[0])
            total_kib += private_kib
        elif head == "Anonymous:" and not is_arena:
            anonymous_kib += int(rest[0].split()[0])
    return PrivateMemory(total_kib * 1024 / MIB, anonymous_kib * 1024 / MIB)
