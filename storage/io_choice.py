"""Which `FileIo` the NVMe tier gets, and why: GPUDirect, pinned buffers, or host memory only.

    finding      looked for                         needed by
    gpu          a device node of NVIDIA's driver   pinned, kvikio-compat, gds
    driver       libcuda loads, cuInit, a device    pinned, kvikio-compat, gds   in a subprocess
    kvikio       it can be imported (not imported)          kvikio-compat, gds
    nvidia-fs    /proc/modules lists it                                    gds
    udev         /run/udev is there                                        gds
    cufile       the cuFile driver opens                                   gds   in a subprocess

`auto` takes the last in the order posix, pinned, kvikio-compat, gds that lacks nothing.

Opening the cuFile driver hangs for ever on a machine without /proc/modules, and a sick CUDA driver
can hang anywhere: both are tried in a subprocess that is killed when its time is over. It is not
even begun without a device node, so a machine without a GPU decides in a millisecond.
Nothing is remembered: every start looks again.
"""

from __future__ import annotations

import enum
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ucm.errors import ConfigError

from .file_io import PosixFileIo

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ucm.config import NvmeConfig

    from .file_io import FileIo

PREFLIGHT_TIMEOUT_S: Final = 15.0
"""A first cuInit on a machine of many GPUs takes seconds."""

INSTALL: Final = "install the extra: pip install 'ucm-cache[gds]'"


class IoKind(enum.StrEnum):
    """How block data reaches the device."""

    POSIX = "posix"
    """preadv and pwritev with O_DIRECT; host memory only."""
    PINNED = "pinned"
    """The same, and device memory through pinned buffers of ours."""
    KVIKIO_COMPAT = "kvikio-compat"
    """kvikio without GPUDirect: device memory through its pinned buffers."""
    GDS = "gds"
    """kvikio with cuFile: NVMe straight to device memory."""


@dataclass(frozen=True, slots=True)
class IoChoice:
    """What was chosen."""

    kind: IoKind
    reason: str
    """One line, for an operator."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked for."""

    name: str
    ok: bool
    found: str
    advice: str = ""
    """What to do when it is not ok."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where to look; tests look elsewhere."""

    device_nodes: tuple[Path, ...] = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
    modules: Path = Path("/proc/modules")
    udev: Path = Path("/run/udev")
    probe: tuple[str, ...] = (sys.executable, "-P", "-m", "ucm.storage.gpu_probe")
    """The subprocess: it takes step names and prints a JSON object for each that it ends."""
    timeout_s: float = PREFLIGHT_TIMEOUT_S


PINNED_NEEDS: Final = ("gpu", "driver")
COMPAT_NEEDS: Final = (*PINNED_NEEDS, "kvikio")
GDS_NEEDS: Final = (*COMPAT_NEEDS, "nvidia-fs", "udev", "cufile")
_NEEDS: Final = {
    IoKind.GDS: GDS_NEEDS,
    IoKind.KVIKIO_COMPAT: COMPAT_NEEDS,
    IoKind.PINNED: PINNED_NEEDS,
}
"""Best first. POSIX needs nothing."""

_PROBE_ADVICE: Final = {
    "driver": "check `nvidia-smi`; in a container, start it with the GPU",
    "cufile": "run NVIDIA's `gdscheck -p`, and look at cufile.log",
}


_ALL_PASSED: Final = "every check of GPUDirect Storage passed"


def open_file_io(config: NvmeConfig, machine: Machine | None = None) -> tuple[FileIo, IoChoice]:
    """Make the `FileIo` that `nvme.io` asks for, or the best one that works.

    Blocks for up to `PREFLIGHT_TIMEOUT_S` on a machine with a GPU.

    Raises:
        ConfigError: what is asked for is not possible here; the message says why and what to do.
    """
    if config.io == IoKind.POSIX:
        choice = IoChoice(IoKind.POSIX, "nvme.io asks for it")
    else:
        choice = choose(config.io, list(preflight(machine or Machine())))
    if choice.kind is IoKind.POSIX:
        return PosixFileIo(config.io_threads), choice
    if choice.kind is IoKind.PINNED:
        return _pinned(config.io_threads), choice
    from .gds import GdsFileIo, GdsOptions

    options = GdsOptions(direct=choice.kind is IoKind.GDS, io_threads=config.io_threads)
    try:
        return GdsFileIo(options), choice
    except OSError as error:
        if config.io != "auto":
            raise ConfigError(f"nvme.io = {config.io} does not work: {error}") from error
        return _pinned(config.io_threads), IoChoice(IoKind.PINNED, str(error))


def _pinned(io_threads: int) -> FileIo:
    from .pinned_io import PinnedFileIo

    return PinnedFileIo(io_threads)


def choose(setting: str, findings: Sequence[Finding]) -> IoChoice:
    """Decide; pure.

    Args:
        setting: `nvme.io`: `auto`, or a kind that must be possible.
        findings: from `preflight`.

    Raises:
        ConfigError: `setting` is not possible.
    """
    if setting != "auto":
        kind = IoKind(setting)
        lacks = _first_lacking(findings, _NEEDS.get(kind, ()))
        if lacks is not None:
            raise _impossible(setting, lacks)
        return IoChoice(kind, "nvme.io asks for it")
    reasons: list[str] = []
    for kind, needs in _NEEDS.items():
        lacks = _first_lacking(findings, needs)
        if lacks is None:
            said = "; ".join(dict.fromkeys(reasons))
            return IoChoice(kind, f"no GPUDirect: {said}" if said else _ALL_PASSED)
        reasons.append(lacks.found)
    return IoChoice(IoKind.POSIX, reasons[-1])


def preflight(machine: Machine) -> Iterator[Finding]:
    """Look for everything that GPUDirect needs; the order of the module's table.

    The subprocess runs only where a device node is, and tries cuFile only where nothing that it
    needs is missing; what was not tried for that reason is not ok. Blocks for up to
    `machine.timeout_s`.
    """
    gpu = _find_gpu(machine)
    yield gpu
    files = [_find_kvikio(gpu), _find_nvidia_fs(machine), _find_udev(machine)]
    probed: dict[str, Finding] = {}
    if gpu.ok:
        opens = all(finding.ok for finding in files)
        probed = _probe(machine, ["driver", "cufile"] if opens else ["driver"])
    yield probed.get("driver", _not_tried("driver", "the CUDA driver"))
    yield from files
    yield probed.get("cufile", _not_tried("cufile", "cuFile"))


def _not_tried(name: str, what: str) -> Finding:
    return Finding(name, ok=False, found=f"{what} was not tried: see above")


def _first_lacking(findings: Sequence[Finding], needs: Sequence[str]) -> Finding | None:
    return next((found for found in findings if found.name in needs and not found.ok), None)


def _impossible(setting: str, lacks: Finding) -> ConfigError:
    advice = f"{lacks.advice}, or set" if lacks.advice else "set"
    return ConfigError(
        f"nvme.io = {setting} is not possible: {lacks.found}; {advice} nvme.io = auto"
    )


def _find_kvikio(gpu: Finding) -> Finding:
    if importlib.util.find_spec("kvikio") is None:
        advice = INSTALL if gpu.ok else "nothing, without a GPU"
        return Finding("kvikio", ok=False, found="kvikio is not installed", advice=advice)
    return Finding("kvikio", ok=True, found="kvikio is installed")


def _find_gpu(machine: Machine) -> Finding:
    for node in machine.device_nodes:
        if node.exists():
            return Finding("gpu", ok=True, found=f"{node} is there")
    nodes = " nor ".join(str(node) for node in machine.device_nodes)
    advice = "install NVIDIA's driver; in a container, start it with the GPU"
    return Finding("gpu", ok=False, found=f"no GPU: neither {nodes} exists", advice=advice)


def _find_nvidia_fs(machine: Machine) -> Finding:
    name, advice = "nvidia-fs", "install nvidia-fs (package nvidia-gds) and `modprobe nvidia_fs`"
    try:
        modules = machine.modules.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        found = f"{machine.modules} cannot be read ({error.strerror})"
        return Finding(name, ok=False, found=found, advice="run on a kernel with modules")
    if any(line.startswith("nvidia_fs ") for line in modules.splitlines()):
        return Finding(name, ok=True, found="the kernel module nvidia_fs is loaded")
    return Finding(name, ok=False, found="the kernel module nvidia_fs is not loaded", advice=advice)


def _find_udev(machine: Machine) -> Finding:
    if machine.udev.is_dir():
        return Finding("udev", ok=True, found=f"{machine.udev} is there")
    found = f"{machine.udev} is missing: cuFile cannot tell which device a file is on"
    return Finding("udev", ok=False, found=found, advice="mount the host's into the container")


def _probe(machine: Machine, steps: Sequence[str]) -> dict[str, Finding]:
    """Try the steps in a subprocess, each after the last; one that fails ends it."""
    try:
        result = subprocess.run(
            [*machine.probe, *steps],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=machine.timeout_s,
            check=False,
        )
        output, end = result.stdout, f"ended with {result.returncode}"
    except subprocess.TimeoutExpired as error:
        output, end = error.stdout or b"", f"took more than {machine.timeout_s:g} s"
    except OSError as error:
        output, end = b"", f"could not be tried: {error.strerror}"
    return _findings_of(steps, output, end)


def _findings_of(steps: Sequence[str], output: bytes, end: str) -> dict[str, Finding]:
    """What the probe printed; the first step that it did not get to is what it failed at."""
    found: dict[str, Finding] = {}
    for line, step in zip(_answers(output), steps, strict=False):
        ok, text = bool(line.get("ok")), str(line.get("found"))
        found[step] = Finding(step, ok=ok, found=text, advice="" if ok else _PROBE_ADVICE[step])
    for step in steps[len(found) :]:
        if all(finding.ok for finding in found.values()):
            text = f"trying the {step} {end}"
            found[step] = Finding(step, ok=False, found=text, advice=_PROBE_ADVICE[step])
    return found


def _answers(output: bytes) -> Iterator[dict[str, object]]:
    """The whole lines of JSON; libraries may have said something in between."""
    for line in output.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict):
            yield said
