"""How much memory the machine has, or the container that this process is in. Linux."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CGROUP: Final = Path("/sys/fs/cgroup")
"""Of a container, with control groups of version 2; of version 1 no limit is found."""
MEMINFO: Final = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """In bytes."""

    total_bytes: int
    available_bytes: int
    """What could be taken now: free, or files that can be read again."""


def machine_memory() -> MachineMemory:
    """What there is now."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = _numbers(MEMINFO).get("MemAvailable:", total >> 10) << 10
    limit = _number(CGROUP / "memory.max")
    if limit is not None and limit < total:
        files = _numbers(CGROUP / "memory.stat")
        used = _number(CGROUP / "memory.current") or 0
        used -= files.get("active_file", 0) + files.get("inactive_file", 0)
        total, available = limit, min(available, limit - max(0, used))
    return MachineMemory(total, max(0, available))


def _number(path: Path) -> int | None:
    """The number in a file; None without the file, or where it says `max`."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _numbers(path: Path) -> dict[str, int]:
    """The first number behind each line's name; nothing without the file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
