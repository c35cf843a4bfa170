"""What the disk gives to a program that does nothing else: fio, or threads of our own without it.

Reads go to the very file that holds our blocks; writes go over a file of the same size beside it,
which was written before, and end in an fdatasync, as ours do. A scouting run tries every engine,
depth and request size (one slab, one block); the best few take part in every round beside ours,
and the one with the highest median is the ceiling. A job of fio takes a third of a second on top of
its work, so that a quick run tries less.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ucm.errors import TierUnavailableError
from ucm.storage.file_io import aligned_buffer

from .storage_measure import GB, gb_s

FIO_TIMEOUT_S = 300.0
PSYNC_JOBS = (4, 8, 16)
QUEUE_DEPTHS = (8, 32, 64)
SCOUT_REQUEST_BYTES = 1 << 20
IN_PROCESS = "in_process_threads"


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to read or write."""

    engine: str
    """fio's name, or `IN_PROCESS`."""
    depth: int
    """Requests in flight: jobs of psync, queue depth of the others."""
    request_bytes: int

    @property
    def name(self) -> str:
        """`libaio-32-64KiB`."""
        return f"{self.engine}-{self.depth}-{self.request_bytes >> 10}KiB"


@dataclass(frozen=True, slots=True)
class Target:
    """What is read and written."""

    read_path: Path
    """At least `size_bytes` long."""
    write_path: Path
    """Overwritten, created if need be."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting in one direction."""

    op: str
    """`read` or `write`."""
    setting: Setting

    @property
    def name(self) -> str:
        """`read:libaio-32-64KiB`."""
        return f"{self.op}:{self.setting.name}"


class Ceiling(Protocol):
    """Something that measures the disk."""

    tool: str
    """What measured, for the record."""

    def engines(self) -> Mapping[str, Sequence[int]]:
        """Depths to try for each engine."""

    def measure(self, target: Target, trials: Sequence[Trial]) -> dict[str, float]:
        """GB/s of each trial by its name; those that cannot run here are left out."""


def find_ceiling() -> Ceiling:
    """What there is: fio if it is installed, else our own threads."""
    fio = shutil.which("fio")
    return FioCeiling(fio) if fio else ThreadCeiling()


class Scout:
    """Finds the settings that are worth measuring beside ours."""

    def __init__(self, ceiling: Ceiling, candidates: int, *, thorough: bool) -> None:
        """Nothing is measured yet.

        Args:
            ceiling: what measures.
            candidates: how many settings to keep in each direction.
            thorough: try every depth with requests of a slab and of a block, for each layout;
                else find the best engines once, at a middle depth, and use them for all slabs.
        """
        self.ceiling = ceiling
        self._candidates = candidates
        self._thorough = thorough
        self._engines: list[Trial] = []

    def find(self, target: Target, slab_bytes: int, block_bytes: int) -> list[Trial]:
        """The best settings of each direction for blocks of such slabs."""
        if self._thorough:
            trials = self._trials(sorted({slab_bytes, block_bytes}))
            return best_trials(self.ceiling.measure(target, trials), trials, self._candidates)
        if not self._engines:
            trials = self._trials([SCOUT_REQUEST_BYTES])
            found = self.ceiling.measure(target, trials)
            self._engines = best_trials(found, trials, self._candidates)
        return [
            Trial(each.op, replace(each.setting, request_bytes=slab_bytes))
            for each in self._engines
        ]

    def _trials(self, request_bytes: Sequence[int]) -> list[Trial]:
        trials = []
        for engine, depths in self.ceiling.engines().items():
            tried = depths if self._thorough else depths[1:2]
            for depth, size in itertools.product(tried, request_bytes):
                setting = Setting(engine, depth, size)
                trials += [Trial("read", setting), Trial("write", setting)]
        return trials


def best_trials(found: Mapping[str, float], trials: Sequence[Trial], count: int) -> list[Trial]:
    """The `count` fastest of each direction."""
    chosen = []
    for op in ("read", "write"):
        able = [trial for trial in trials if trial.op == op and trial.name in found]
        chosen += sorted(able, key=lambda trial: -found[trial.name])[:count]
    return chosen


class FioCeiling:
    """fio with O_DIRECT."""

    def __init__(self, program: str) -> None:
        self._program = program
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        self.tool = version.stdout.strip()

    def engines(self) -> Mapping[str, Sequence[int]]:
        """See `Ceiling`."""
        return {"psync": PSYNC_JOBS, "libaio": QUEUE_DEPTHS, "io_uring": QUEUE_DEPTHS}

    def measure(self, target: Target, trials: Sequence[Trial]) -> dict[str, float]:
        """See `Ceiling`. One process of fio; one for each engine when that fails.

        Raises:
            TierUnavailableError: fio runs with no engine at all.
        """
        found = self._run(target, trials)
        if not found:
            for engine in sorted({trial.setting.engine for trial in trials}):
                found |= self._run(target, [t for t in trials if t.setting.engine == engine])
        if trials and not found:
            raise TierUnavailableError(f"{self.tool} measures nothing on {target.read_path.parent}")
        return found

    def _run(self, target: Target, trials: Sequence[Trial]) -> dict[str, float]:
        job_file = target.write_path.with_suffix(".fio")
        job_file.write_text(fio_jobs(target, trials, direct=is_direct(target.read_path)))
        try:
            result = subprocess.run(
                [self._program, "--output-format=json", str(job_file)],
                capture_output=True,
                text=True,
                check=False,
                timeout=FIO_TIMEOUT_S,
                cwd=job_file.parent,
            )
        finally:
            job_file.unlink()
        return parse_fio(result.stdout)


def fio_jobs(target: Target, trials: Sequence[Trial], *, direct: bool) -> str:
    """A job file that runs one trial after the other."""
    lines = ["[global]", f"direct={int(direct)}", "thread=1", "group_reporting=1"]
    lines += ["allow_file_create=1", "overwrite=0", "invalidate=1", "randrepeat=1"]
    for trial in trials:
        setting = trial.setting
        jobs = setting.depth if setting.engine == "psync" else 1
        share = target.size_bytes // jobs // 4096 * 4096
        path = target.read_path if trial.op == "read" else target.write_path
        lines += ["", f"[{trial.name}]", "stonewall", f"rw={trial.op}"]
        lines += [f"filename={str(path).replace(':', chr(92) + ':')}"]
        lines += [f"ioengine={setting.engine}", f"bs={setting.request_bytes}", f"size={share}"]
        lines += [f"numjobs={jobs}", f"offset_increment={share}"] if jobs > 1 else []
        lines += [f"iodepth={setting.depth}"] if jobs == 1 else []
        lines += ["end_fsync=1"] if trial.op == "write" else []
    return "\n".join(lines) + "\n"


def parse_fio(text: str) -> dict[str, float]:
    """GB/s by job from fio's JSON, which warnings may precede; failed jobs are left out."""
    start = text.find("{")
    try:
        jobs = json.loads(text[start:])["jobs"] if start >= 0 else []
    except (ValueError, KeyError):
        return {}
    found = {}
    for job in jobs:
        name, rate = job["jobname"], _fio_rate(job)
        if not job.get("error") and rate > 0:
            found[name] = rate
    return found


def _fio_rate(job: Mapping[str, Any]) -> float:
    side = job[job["jobname"].partition(":")[0]]
    return float(side["bw_bytes"]) / GB if side["io_bytes"] else 0.0


class ThreadCeiling:
    """Threads of preadv and pwritev with O_DIRECT in this process."""

    tool = IN_PROCESS

    def engines(self) -> Mapping[str, Sequence[int]]:
        """See `Ceiling`."""
        return {IN_PROCESS: PSYNC_JOBS}

    def measure(self, target: Target, trials: Sequence[Trial]) -> dict[str, float]:
        """See `Ceiling`."""
        return {trial.name: self._measure(target, trial) for trial in trials}

    def _measure(self, target: Target, trial: Trial) -> float:
        reading = trial.op == "read"
        fd = _open_direct(target.read_path if reading else target.write_path, reading=reading)
        offsets = iter(range(0, target.size_bytes, trial.setting.request_bytes))
        size = trial.setting.request_bytes

        def work(buffer: memoryview) -> None:
            for offset in offsets:  # `next` of a range's iterator is atomic
                part = buffer[: min(size, target.size_bytes - offset)]
                os.preadv(fd, [part], offset) if reading else os.pwritev(fd, [part], offset)

        buffers = [aligned_buffer(size) for _ in range(trial.setting.depth)]
        try:
            with ThreadPoolExecutor(trial.setting.depth) as pool:
                begin = time.perf_counter()
                for future in [pool.submit(work, buffer) for buffer in buffers]:
                    future.result()
                if not reading:
                    os.fdatasync(fd)
                return gb_s(target.size_bytes, begin)
        finally:
            os.close(fd)


def _open_direct(path: Path, *, reading: bool) -> int:
    flags = (os.O_RDONLY if reading else os.O_RDWR | os.O_CREAT) | os.O_CLOEXEC
    with contextlib.suppress(OSError):
        return os.open(path, flags | os.O_DIRECT, 0o600)
    return os.open(path, flags, 0o600)


def is_direct(path: Path) -> bool:
    """Whether the file can be read past the page cache."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.preadv(fd, [memoryview(mmap.mmap(-1, 4096))], 0)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
