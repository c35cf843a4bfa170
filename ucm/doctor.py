"""What this machine offers the store, one check each: found what, why it matters, what to do.

Looks and tries, changes nothing: a file that it writes has no name. A check that is not met either
*matters*, then the daemon would not run (well) as it is configured, or is a note: something works
in a slower way, or a feature is off. Blocks for as long as `ucm.storage.io_choice` may.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import importlib.metadata
import math
import os
import platform
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ucm.storage.arena import Arena, ArenaKind
from ucm.storage.file_io import aligned_buffer
from ucm.storage.folder import list_namespaces
from ucm.storage.io_choice import (
    INSTALL,
    Finding,
    IoChoice,
    IoKind,
    Machine,
    choose,
    preflight,
)
from ucm.storage.prefault import huge_page_errno

from .config import Config, NvmeConfig
from .errors import ConfigError, UcmError
from .layout import ALIGNMENT_BYTES, KvDtype, KvLayout
from .machine_memory import machine_memory
from .plurals import counted

MIN_PYTHON: Final = (3, 11)
FDS_BESIDES: Final = 128
"""Descriptors of the process itself, its sockets, LMDB and logs."""
FDS_PER_SESSION: Final = 6
FDS_PER_SEGMENT: Final = 3
"""Ours and, through kvikio, its two."""
FDS_PER_NAMESPACE: Final = 5
"""Two arenas and the index."""
USUAL_IO_THREADS: Final = range(4, 65)
HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage")


class CheckStatus(enum.StrEnum):
    """How a check came out."""

    OK = "ok"
    NOTE = "note"
    """Not met, and it runs nevertheless."""
    FAILED = "failed"
    """Not met, and it matters."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: CheckStatus
    found: str
    why: str
    """What it is for."""
    advice: str = ""
    """What to do; empty when it is ok."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Every check, and how block data would reach the device."""

    checks: tuple[Check, ...]
    io: IoChoice | None
    """None when what `nvme.io` asks for is not possible, or there is no NVMe tier."""

    @property
    def ok(self) -> bool:
        """Whether nothing that matters failed."""
        return all(check.status is not CheckStatus.FAILED for check in self.checks)


def diagnose(config: Config, machine: Machine | None = None) -> Diagnosis:
    """Look at everything that the store of this configuration needs."""
    findings = list(preflight(machine or Machine()))
    choice, io_check = _check_io(config.nvme, findings)
    checks = [
        _check_python(),
        _check_package("torch", "the reference engine and the connectors compute with it"),
        *_check_gpu(findings),
        io_check,
        *_check_folder(config.nvme),
        _check_sealing(),
        _check_io_threads(config.nvme),
        _check_open_files(config),
        _check_memory(config),
        _check_sizes(config),
        _check_locked_memory(config, choice),
        _check_huge_pages(HUGE_PAGES / "shmem_enabled"),
    ]
    return Diagnosis(tuple(checks), choice)


_WHEELS: Final = {"cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy")}
_WHY_GPU: Final = {
    "kvikio": "moves device memory",
    "gpu": "device memory is read and written only where there is a GPU",
    "driver": "everything on a GPU",
    "nvidia-fs": "GPUDirect Storage: NVMe straight to device memory",
    "udev": "cuFile looks there which device a file is on",
    "cufile": "GPUDirect Storage",
}


def _met(name: str, found: str, why: str) -> Check:
    return Check(name, CheckStatus.OK, found, why)


def _check_python() -> Check:
    why, found = "the language version that ucm is written in", platform.python_version()
    if sys.version_info >= MIN_PYTHON:
        return _met("python", found, why)
    advice = "install Python {}.{} or later".format(*MIN_PYTHON)
    return Check("python", CheckStatus.FAILED, found, why, advice)


def _check_package(name: str, why: str) -> Check:
    for wheel in _WHEELS.get(name, (name,)):
        try:
            return _met(name, f"{wheel} {importlib.metadata.version(wheel)}", why)
        except importlib.metadata.PackageNotFoundError:
            continue
    advice = INSTALL if name in _WHEELS else f"pip install {name}"
    return Check(name, CheckStatus.NOTE, "not installed", why, advice)


def _check_gpu(findings: Sequence[Finding]) -> Iterator[Check]:
    """What device memory needs; without a GPU only that there is none: the rest would not help."""
    gpu = next(finding for finding in findings if finding.name == "gpu")
    if not gpu.ok:
        advice = f"nothing, if this machine has none; otherwise {gpu.advice}"
        yield Check("gpu", CheckStatus.NOTE, gpu.found, _WHY_GPU["gpu"], advice)
        return
    for finding in findings:
        status = CheckStatus.OK if finding.ok else CheckStatus.NOTE
        yield Check(finding.name, status, finding.found, _WHY_GPU[finding.name], finding.advice)
    yield _check_package("cupy", "arrays in device memory for those who use them with ucm")


def _check_io(config: NvmeConfig, findings: Sequence[Finding]) -> tuple[IoChoice | None, Check]:
    name, why = "nvme.io", "whether device memory can be read into, and how"
    if config.path is None:
        return None, _met(name, "no NVMe tier: nvme.path is none", why)
    if config.io == IoKind.POSIX:
        choice = IoChoice(IoKind.POSIX, "nvme.io asks for it")
    else:
        try:
            choice = choose(config.io, findings)
        except ConfigError as error:
            return None, Check(name, CheckStatus.FAILED, str(error), why, "set nvme.io = auto")
    return choice, _met(name, f"{choice.kind}: {choice.reason}", why)


def _check_folder(config: NvmeConfig) -> Iterator[Check]:
    """Its file system: may we write, directly, and is there room."""
    name, why = "data folder", "blocks survive a restart there"
    if config.path is None:
        yield _met(name, "none: memory only", why)
        return
    where = str(config.path)
    try:
        # What may not be looked into raises; the daemon could not use it either.
        folder = next(path for path in (config.path, *config.path.parents) if path.exists())
        where = f"{config.path} ({_file_system_of(folder)})"
        is_direct = _writes_directly(folder)
    except OSError as error:
        advice = "give the daemon's user a folder that it may write: nvme.path, or --store"
        yield Check(name, CheckStatus.FAILED, f"{where}: {error.strerror}", why, advice)
        return
    yield _met(name, where, why)
    yield _check_direct(is_direct)
    yield _check_room(config, folder)


def _check_direct(is_direct: bool) -> Check:
    name, why = "O_DIRECT", "without it every block is in memory twice"
    if is_direct:
        return _met(name, "the file system takes it", why)
    advice = "use ext4 or XFS on the device itself"
    return Check(name, CheckStatus.NOTE, "refused: through the page cache", why, advice)


def _check_room(config: NvmeConfig, folder: Path) -> Check:
    name, why = "disk space", "a segment is reserved whole when it is created"
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    found = f"{free >> 20} MiB free, nvme.capacity_bytes is {config.capacity_bytes >> 20} MiB"
    taken = sum(path.stat().st_size for path in folder.glob("ns/*/segments/*.seg"))
    if free + taken >= config.capacity_bytes:
        return _met(name, found, why)
    status = CheckStatus.FAILED if free + taken < config.segment_bytes else CheckStatus.NOTE
    return Check(name, status, found, why, "lower nvme.capacity_bytes, or free space")


def _file_system_of(folder: Path) -> str:
    """Its type, from the longest mount point above it; `unknown` when the kernel does not say."""
    best, kind = "", "unknown"
    path = str(folder.resolve())
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return kind
    for line in mounts.splitlines():
        point, file_system = line.split()[1:3]
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, file_system
    return kind


def _writes_directly(folder: Path) -> bool:
    """Write a page to a file without a name; whether O_DIRECT took it.

    Raises:
        OSError: nothing can be written there.
    """
    page = aligned_buffer(ALIGNMENT_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.pwrite(file.fileno(), page, 0)
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        try:
            fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
            os.pwrite(file.fileno(), page, 0)
        except OSError:
            return False
    return True


def _check_sealing() -> Check:
    name, why = "memfd sealing", "clients map the arena and cannot write or shrink it"
    layout = KvLayout(
        num_layers=1, num_kv_heads=1, head_dim=1, block_tokens=1, dtype=KvDtype.FLOAT32
    )
    try:
        for kind in ArenaKind:
            Arena(layout, 1, kind).close()
    except UcmError as error:
        return Check(name, CheckStatus.FAILED, str(error), why, "use Linux 5.1 or later")
    return _met(name, "works", why)


def _check_io_threads(config: NvmeConfig) -> Check:
    name, why = "I/O threads", "8 to 16 reach the ceiling of one device"
    found = f"nvme.io_threads is {config.io_threads}, {os.cpu_count()} CPUs"
    if config.io_threads in USUAL_IO_THREADS:
        return _met(name, found, why)
    return Check(name, CheckStatus.NOTE, found, why, "set nvme.io_threads to 8")


def _check_open_files(config: Config) -> Check:
    name, why = "open files", "sessions and segments each hold descriptors"
    segments = math.ceil(config.nvme.capacity_bytes / config.nvme.segment_bytes)
    needed = FDS_BESIDES + FDS_PER_SESSION * config.service.max_sessions
    needed += FDS_PER_SEGMENT * segments if config.nvme.path is not None else 0
    needed += FDS_PER_NAMESPACE * _num_namespaces(config.nvme)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    found = f"at most {_limit_text(limit)}, {needed} may be needed"
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return _met(name, found, why)
    advice = f"ulimit -n {needed}, or LimitNOFILE={needed} in the unit"
    return Check(name, CheckStatus.FAILED, found, why, advice)


def _check_memory(config: Config) -> Check:
    """Whether there is room for all that the store may take, and for one session."""
    name, why = "memory", "arenas fill as they are used; where none is left the kernel kills"
    memory, session_bytes = machine_memory(), config.service.staging_bytes
    block_bytes = config.memory.capacity_bytes
    summary_bytes = config.summaries.capacity_bytes + config.summaries.table_bytes
    store_bytes = block_bytes + summary_bytes
    found = (
        f"{memory.total_bytes >> 20} MiB, {memory.available_bytes >> 20} MiB available; over all "
        f"namespaces the store takes up to {block_bytes >> 20} MiB for blocks and "
        f"{summary_bytes >> 20} MiB for summaries, each session up to {session_bytes >> 20} MiB"
    )
    needed = store_bytes + session_bytes
    if needed <= memory.available_bytes:
        return _met(name, found, why)
    advice = (
        "lower memory.capacity_bytes, service.staging_bytes, or, if namespaces have summaries, "
        "summaries.capacity_bytes and summaries.table_bytes"
    )
    if needed > memory.total_bytes:
        return Check(name, CheckStatus.FAILED, found, why, advice)
    advice += ", or free memory (if it is not this store's daemon that takes it)"
    return Check(name, CheckStatus.NOTE, found, why, advice)


def _check_sizes(config: Config) -> Check:
    """Whether limits of the process let it make arenas and segments, and map them.

    What namespaces share as a budget each of them maps whole: pages come as they are written.
    """
    name, why = "size limits", "arenas and segments are files of their whole size, and are mapped"
    nvme, num_namespaces = config.nvme, max(1, _num_namespaces(config.nvme))
    arena_bytes = [config.memory.capacity_bytes, config.summaries.capacity_bytes]
    file_bytes = [*arena_bytes, config.service.staging_bytes]
    mapped_bytes = num_namespaces * sum(arena_bytes) + config.service.staging_bytes
    if nvme.path is not None:
        file_bytes.append(nvme.segment_bytes)
        mapped_bytes += num_namespaces * nvme.index_map_bytes + config.collections.map_bytes
    limits = (
        ("files", "-f", "LimitFSIZE", resource.RLIMIT_FSIZE, max(file_bytes)),
        ("addresses", "-v", "LimitAS", resource.RLIMIT_AS, mapped_bytes),
    )
    found = []
    for what, flag, setting, kind, needed in limits:
        limit = resource.getrlimit(kind)[0]
        text = f"{what}: at most {_limit_text(limit)} bytes"
        if limit != resource.RLIM_INFINITY and limit < needed:
            text += f", {needed} may be needed for {counted(num_namespaces, 'namespace')}"
            advice = f"ulimit {flag} unlimited, or {setting}=infinity in the unit"
            return Check(name, CheckStatus.FAILED, text, why, advice)
        found.append(text)
    return _met(name, "; ".join(found), why)


def _num_namespaces(config: NvmeConfig) -> int:
    """Namespaces in the data folder; 0 when there is none, or none that can be looked into."""
    try:
        return 0 if config.path is None else len(list_namespaces(config.path / "ns"))
    except OSError:
        return 0


def _check_locked_memory(config: Config, choice: IoChoice | None) -> Check:
    name, why = "locked memory", "buffers for device memory are pinned; POSIX needs none"
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    found = f"at most {_limit_text(limit)} bytes"
    needed = config.nvme.io_threads * (4 << 20)
    uses_it = choice is not None and choice.kind is not IoKind.POSIX
    if not uses_it or limit == resource.RLIM_INFINITY or limit >= needed:
        return _met(name, found, why)
    advice = "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit"
    return Check(name, CheckStatus.NOTE, found, why, advice)


def _limit_text(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def _check_huge_pages(setting: Path) -> Check:
    """Whether an arena gets 2 MiB pages: tried, on one of them."""
    name, why = "huge pages", "less processor time for loads from the disk and for copies"
    code = huge_page_errno()
    if code == 0:
        return _met(name, "2 MiB pages under the arena", why)
    try:
        denied = "[deny]" in setting.read_text()
    except OSError:
        denied = False
    advice = "use Linux 6.1 or later" if code == errno.EINVAL else "leave more memory free"
    advice = f"echo never > {setting}" if denied else advice
    found = f"4 KiB pages: {os.strerror(code)}"
    return Check(name, CheckStatus.NOTE, found, why, advice)
