"""Which FileIo is chosen: on machines that are not there, by a probe that may hang or die."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ucm.config import NvmeConfig
from ucm.errors import ConfigError
from ucm.storage import io_choice
from ucm.storage.file_io import PosixFileIo
from ucm.storage.io_choice import (
    COMPAT_NEEDS,
    GDS_NEEDS,
    PINNED_NEEDS,
    Finding,
    IoChoice,
    IoKind,
    Machine,
    choose,
    open_file_io,
    preflight,
)
from ucm.storage.pinned_io import PinnedFileIo


def findings(*failed: str) -> list[Finding]:
    return [
        Finding(name, ok=name not in failed, found=f"found {name}", advice=f"mend {name}")
        for name in GDS_NEEDS
    ]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """One that has all that can be seen without trying."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    (tmp_path / "modules").write_text("ext4 1 0\nnvidia_fs 262144 0 - Live 0x0\n")
    (tmp_path / "udev").mkdir()
    (tmp_path / "nvidiactl").touch()
    return Machine(
        device_nodes=(tmp_path / "nvidiactl",),
        modules=tmp_path / "modules",
        udev=tmp_path / "udev",
        probe=probe_that("say(True, 'driver'); say(True, 'cufile')"),
        timeout_s=10.0,
    )


def probe_that(does: str) -> tuple[str, ...]:
    """A probe that runs a line of Python."""
    say = (
        "import json, os, sys, time\n"
        "def say(ok, found): print(json.dumps({'ok': ok, 'found': found}), flush=True)\n"
    )
    return (sys.executable, "-c", say + does)


def by_name(machine: Machine) -> dict[str, Finding]:
    found = list(preflight(machine))
    assert tuple(sorted(f.name for f in found)) == tuple(sorted(GDS_NEEDS))
    return {finding.name: finding for finding in found}


@pytest.mark.parametrize(
    "failed", [combo for n in range(3) for combo in itertools.combinations(GDS_NEEDS, n)]
)
def test_every_combination_is_decided(failed: tuple[str, ...]) -> None:
    found = findings(*failed)
    possible = {
        IoKind.GDS: not failed,
        IoKind.KVIKIO_COMPAT: not set(failed) & set(COMPAT_NEEDS),
        IoKind.PINNED: not set(failed) & set(PINNED_NEEDS),
        IoKind.POSIX: True,
    }
    best = next(kind for kind, is_possible in possible.items() if is_possible)
    chosen = choose("auto", found)
    assert chosen.kind is best
    if failed:
        assert any(f"found {name}" in chosen.reason for name in failed)
    for kind, is_possible in possible.items():
        if is_possible:
            assert choose(kind.value, found).kind is kind
        else:
            with pytest.raises(ConfigError, match=r"found .*mend .* nvme.io = auto"):
                choose(kind.value, found)


def test_a_machine_with_everything_gets_gds(machine: Machine) -> None:
    assert all(finding.ok for finding in preflight(machine))
    assert choose("auto", list(preflight(machine))).kind is IoKind.GDS


def test_a_machine_without_a_gpu_starts_no_process(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", refuse)
    found = by_name(replace(machine, device_nodes=(Path("/dev/none"),)))
    assert not found["gpu"].ok
    assert not found["driver"].ok
    assert found["nvidia-fs"].ok
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    found = by_name(replace(machine, device_nodes=(Path("/dev/none"),)))
    assert found["kvikio"].found == "kvikio is not installed"
    assert choose("auto", list(found.values())).reason.startswith("no GPU: neither /dev/none")
    assert found["kvikio"].advice == "nothing, without a GPU"


def test_without_kvikio_device_memory_goes_through_pinned_buffers(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    found = by_name(machine)
    assert found["driver"].ok
    assert "cuFile was not tried" in found["cufile"].found
    chosen = choose("auto", list(found.values()))
    assert chosen == IoChoice(IoKind.PINNED, "no GPUDirect: kvikio is not installed")
    io, choice = open_file_io(NvmeConfig(), machine)
    assert choice == chosen
    assert isinstance(io, PinnedFileIo)
    io.close()


def test_a_kvikio_that_cannot_be_loaded_is_done_without(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is installed, and its libraries are not what it was made for."""
    monkeypatch.setitem(sys.modules, "kvikio", None)
    io, choice = open_file_io(NvmeConfig(), machine)
    assert choice.kind is IoKind.PINNED
    assert "kvikio cannot be loaded" in choice.reason
    io.close()
    with pytest.raises(ConfigError, match=r"gds does not work: .*kvikio cannot be loaded"):
        open_file_io(NvmeConfig(io="gds"), machine)


@pytest.mark.parametrize(
    ("does", "kind", "reason"),
    [
        ("say(False, 'cuInit: no device')", IoKind.POSIX, "cuInit: no device"),
        ("time.sleep(60)", IoKind.POSIX, "trying the driver took more than 1 s"),
        ("os.kill(os.getpid(), 11)", IoKind.POSIX, "trying the driver ended with -11"),
        ("sys.exit(3)", IoKind.POSIX, "trying the driver ended with 3"),
        ("say(True, 'x'); time.sleep(60)", IoKind.KVIKIO_COMPAT, "the cufile took more than 1 s"),
        ("say(True, 'x'); say(False, 'refused')", IoKind.KVIKIO_COMPAT, "refused"),
        ("print('noise'); say(True, 'x'); say(True, 'y')", IoKind.GDS, "passed"),
        ("print('{', flush=True)", IoKind.POSIX, "trying the driver ended with 0"),
    ],
)
def test_a_probe_may_hang_or_die(does: str, kind: IoKind, reason: str, machine: Machine) -> None:
    start = time.monotonic()
    chosen = choose("auto", list(preflight(replace(machine, probe=probe_that(does), timeout_s=1))))
    assert chosen.kind is kind
    assert reason in chosen.reason
    assert time.monotonic() - start < 8


def test_a_probe_that_cannot_be_started_is_a_finding(machine: Machine) -> None:
    found = by_name(replace(machine, probe=("/nowhere/python",)))
    assert "could not be tried" in found["driver"].found
    assert not found["cufile"].ok


def test_cufile_is_not_tried_where_it_would_hang(machine: Machine, tmp_path: Path) -> None:
    """Without /proc/modules, nvidia-fs or udev the second step is never asked for."""
    echo = probe_that("[say(True, step) for step in sys.argv[1:]]")
    (tmp_path / "other").write_text("nvidia_fs_else 1\n")
    for change in (
        {"modules": tmp_path / "none"},
        {"modules": tmp_path / "other"},
        {"udev": tmp_path / "none"},
    ):
        found = by_name(replace(machine, probe=echo, **change))  # type: ignore[arg-type]
        assert found["driver"].ok
        assert found["cufile"] == Finding(
            "cufile", ok=False, found="cuFile was not tried: see above"
        )
        assert choose("auto", list(found.values())).kind is IoKind.KVIKIO_COMPAT


def test_posix_is_never_argued_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_choice, "preflight", lambda _machine: pytest.fail("looked"))
    io, choice = open_file_io(NvmeConfig(io="posix"))
    assert isinstance(io, PosixFileIo)
    assert choice.kind is IoKind.POSIX
    io.close()


@pytest.mark.parametrize("kind", ["gds", "kvikio-compat", "pinned"])
def test_the_impossible_is_refused_with_advice(kind: str, machine: Machine) -> None:
    nothing = replace(machine, device_nodes=(Path("/dev/none"),))
    with pytest.raises(ConfigError, match=f"nvme.io = {kind} is not possible: no GPU.*install"):
        open_file_io(NvmeConfig(io=kind), nothing)
    io, choice = open_file_io(NvmeConfig(), nothing)
    assert choice.kind is IoKind.POSIX
    io.close()


def test_the_probe_says_what_is_missing() -> None:
    """The real one, with a driver that is not there."""
    command = [sys.executable, "-P", "-m", "ucm.storage.gpu_probe", "driver", "cufile"]
    code = "import ctypes; ctypes.CDLL = lambda name: (_ for _ in ()).throw(OSError(name))"
    program = f"{code}; import runpy, sys; sys.argv[1:] = ['driver', 'cufile']; "
    program += "runpy.run_module('ucm.storage.gpu_probe', run_name='__main__')"
    result = subprocess.run(
        [command[0], "-P", "-c", program], capture_output=True, text=True, check=True
    )
    (line,) = result.stdout.splitlines()
    assert json.loads(line) == {"ok": False, "found": "no CUDA driver: libcuda.so.1"}
