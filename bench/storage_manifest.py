"""Where and with what the storage benchmark ran: machine, file system, settings, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from ucm import __version__

from .storage_ceilings import find_ceiling, is_direct
from .storage_measure import Result, StorageBenchOptions

LIBRARIES = ("numpy", "grpcio", "lmdb", "xxhash")


@dataclass(frozen=True, slots=True)
class FileSystem:
    """What a folder lies on."""

    kind: str
    """`ext4`, `xfs`, `tmpfs`, ..."""
    device: str
    options: str
    """Of the mount and of the file system."""


def manifest(folder: Path, options: StorageBenchOptions) -> Result:
    """Everything that a figure depends on."""
    probe = folder / "probe"
    probe.write_bytes(bytes(4096))
    mount = file_system(folder)
    return {
        "cpu": cpu_model(Path("/proc/cpuinfo").read_text(encoding="utf-8")),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "filesystem": {**asdict(mount), "o_direct": is_direct(probe)},
        "ceiling_tool": find_ceiling().tool,
        "redis": shutil.which("redis-server") is not None,
        "settings": _settings(options),
        "versions": {
            "ucm": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in LIBRARIES},
        },
    }


def _settings(options: StorageBenchOptions) -> Result:
    values = asdict(options)
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def file_system(folder: Path) -> FileSystem:
    """What `folder` lies on, by the kernel's table of mounts."""
    table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    return parse_mounts(table, folder.resolve())


def parse_mounts(table: str, folder: Path) -> FileSystem:
    """The mount of `/proc/self/mountinfo` that `folder` is under; the last one wins."""
    found, depth = FileSystem("unknown", "", ""), -1
    for line in table.splitlines():
        left, _, right = line.partition(" - ")
        fields, tail = left.split(), right.split()
        if len(fields) < 6 or len(tail) < 3:
            continue
        point = Path(fields[4].replace("\\040", " "))
        if folder.is_relative_to(point) and len(point.parts) >= depth:
            depth = len(point.parts)
            found = FileSystem(tail[0], tail[1], f"{fields[5]},{tail[2]}")
    return found


def cpu_model(text: str) -> str:
    """The processor's name in /proc/cpuinfo."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
