"""`ucm doctor`: each check met and not met, what matters, and that nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import os
import resource
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ucm import cli, doctor
from ucm.config import Config, MemoryConfig, NvmeConfig, ServiceConfig, SummariesConfig
from ucm.doctor import Check, CheckStatus, Diagnosis, diagnose
from ucm.errors import CapacityError
from ucm.machine_memory import MachineMemory
from ucm.storage.io_choice import GDS_NEEDS, Finding, IoChoice, IoKind, Machine

NO_GPU = Machine(device_nodes=(Path("/dev/none"),))


def diagnosis(config: Config, *, gpu: bool = False) -> Diagnosis:
    if not gpu:
        return diagnose(config, NO_GPU)
    return diagnose(config)


def config_of(tmp_path: Path, **changes: object) -> Config:
    nvme = NvmeConfig(path=tmp_path / "not" / "yet", capacity_bytes=1 << 20, segment_bytes=1 << 20)
    memory = MemoryConfig(capacity_bytes=1 << 20)
    return Config(nvme=replace(nvme, **changes), memory=memory)  # type: ignore[arg-type]


def check_of(found: Diagnosis, name: str) -> Check:
    (check,) = [check for check in found.checks if check.name == name]
    return check


def test_a_machine_without_a_gpu_will_do(tmp_path: Path) -> None:
    found = diagnosis(config_of(tmp_path))
    assert found.ok
    assert found.io is not None
    assert found.io.kind is IoKind.POSIX
    assert check_of(found, "gpu").status is CheckStatus.NOTE
    about_gpus = {"cupy", *GDS_NEEDS} - {"gpu"}
    assert about_gpus.isdisjoint(check.name for check in found.checks), "one line says it all"
    assert "not/yet" in check_of(found, "data folder").found
    assert list(tmp_path.iterdir()) == [], "it looks and leaves nothing"
    for check in found.checks:
        assert check.found
        assert check.why
        is_told = check.advice or "see above" in check.found
        assert check.status is CheckStatus.OK or is_told, check


def test_what_is_asked_for_and_impossible_matters(tmp_path: Path) -> None:
    found = diagnosis(config_of(tmp_path, io="gds"))
    assert not found.ok
    assert found.io is None
    assert check_of(found, "nvme.io").status is CheckStatus.FAILED
    assert diagnosis(config_of(tmp_path, io="posix")).ok


def test_memory_only_needs_no_disk(tmp_path: Path) -> None:
    found = diagnosis(config_of(tmp_path, path=None))
    assert found.ok
    assert found.io is None
    assert {"O_DIRECT", "disk space"}.isdisjoint(check.name for check in found.checks)


def test_a_folder_that_cannot_be_written_matters(tmp_path: Path) -> None:
    found = diagnosis(config_of(tmp_path, path=Path("/proc/ucm")))
    check = check_of(found, "data folder")
    assert not found.ok
    assert check.status is CheckStatus.FAILED
    assert "(proc)" in check.found


def test_a_folder_in_another_users_home_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", refuse)
        (check,) = doctor._check_folder(config_of(tmp_path).nvme)
    assert check.status is CheckStatus.FAILED
    assert "Permission denied" in check.found


def test_a_file_system_without_direct_io_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.fcntl

    def refuse(file: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "injected")
        return real(file, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    found = diagnosis(config_of(tmp_path))
    assert found.ok
    assert check_of(found, "O_DIRECT").status is CheckStatus.NOTE


def test_room_for_one_segment_matters(tmp_path: Path) -> None:
    huge = 1 << 60
    check = check_of(diagnosis(config_of(tmp_path, capacity_bytes=huge)), "disk space")
    assert check.status is CheckStatus.NOTE
    found = diagnosis(config_of(tmp_path, capacity_bytes=huge, segment_bytes=huge))
    assert check_of(found, "disk space").status is CheckStatus.FAILED


def test_limits_are_compared_with_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {resource.RLIMIT_NOFILE: 256, resource.RLIMIT_MEMLOCK: 65536}
    endless = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, endless), endless))
    found = diagnosis(config_of(tmp_path))
    assert check_of(found, "open files").status is CheckStatus.FAILED
    assert "LimitNOFILE" in check_of(found, "open files").advice
    assert check_of(found, "locked memory").status is CheckStatus.OK, "POSIX pins nothing"
    limits[resource.RLIMIT_NOFILE] = resource.RLIM_INFINITY
    found = diagnosis(config_of(tmp_path))
    assert check_of(found, "open files").status is CheckStatus.OK

    every = [Finding(name, ok=True, found=name) for name in GDS_NEEDS]
    monkeypatch.setattr(doctor, "preflight", lambda _machine: iter(every))
    found = diagnosis(config_of(tmp_path), gpu=True)
    assert found.io == IoChoice(IoKind.GDS, "every check of GPUDirect Storage passed")
    assert check_of(found, "locked memory").status is CheckStatus.NOTE
    assert all(check_of(found, name).status is CheckStatus.OK for name in GDS_NEEDS)
    assert check_of(found, "cupy")


def test_memory_that_may_be_taken_is_compared_with_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gib = 1 << 30
    config = replace(
        config_of(tmp_path),
        memory=MemoryConfig(capacity_bytes=4 * gib),
        summaries=SummariesConfig(capacity_bytes=gib // 2, table_bytes=gib // 2),
        service=ServiceConfig(staging_bytes=gib),
    )

    def found_with(total_gib: int, available_gib: int) -> Check:
        memory = MachineMemory(total_gib * gib, available_gib * gib)
        monkeypatch.setattr(doctor, "machine_memory", lambda: memory)
        return check_of(diagnosis(config), "memory")

    assert found_with(6, 6).status is CheckStatus.OK
    tight = found_with(6, 5)
    assert tight.status is CheckStatus.NOTE
    assert "free memory" in tight.advice
    small = found_with(5, 5)
    assert small.status is CheckStatus.FAILED
    assert small.found == (
        "5120 MiB, 5120 MiB available; over all namespaces the store takes up to 4096 MiB for "
        "blocks and 1024 MiB for summaries, each session up to 1024 MiB"
    )
    assert small.advice == (
        "lower memory.capacity_bytes, service.staging_bytes, or, if namespaces have summaries, "
        "summaries.capacity_bytes and summaries.table_bytes"
    )


@pytest.mark.parametrize(
    ("kind", "needed", "remedy"),
    [
        (resource.RLIMIT_FSIZE, 2 << 30, "LimitFSIZE=infinity"),
        (resource.RLIMIT_AS, (2 << 30) + (512 << 20) + (5 << 30), "LimitAS=infinity"),
    ],
)
def test_arenas_and_segments_keep_to_the_limits_of_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int, needed: int, remedy: str
) -> None:
    endless = resource.RLIM_INFINITY
    limits: dict[int, int] = {}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, endless), endless))
    config = replace(config_of(tmp_path), memory=MemoryConfig(capacity_bytes=2 << 30))
    for limit, status in (
        (endless, CheckStatus.OK),
        (needed, CheckStatus.OK),
        (needed - 1, CheckStatus.FAILED),
    ):
        limits[kind] = limit
        check = doctor._check_sizes(config)
        assert check.status is status
    assert f"{needed} may be needed" in check.found
    assert remedy in check.advice


def test_namespaces_share_memory_and_each_maps_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = resource.RLIM_INFINITY
    limits = {resource.RLIMIT_AS: 1, resource.RLIMIT_NOFILE: 1}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, endless), endless))
    config = config_of(tmp_path)
    assert config.nvme.path is not None
    one_bytes = config.memory.capacity_bytes + config.summaries.capacity_bytes
    one_bytes += config.nvme.index_map_bytes
    once_bytes = config.service.staging_bytes + config.collections.map_bytes
    sizes, files, memory = [], [], []
    for name in range(3):
        sizes.append(doctor._check_sizes(config).found)
        files.append(int(doctor._check_open_files(config).advice.split()[2].rstrip(",")))
        memory.append(doctor._check_memory(config).found.partition("over all")[2])
        (config.nvme.path / "ns" / bytes([name] * 32).hex()).mkdir(parents=True)
    assert f", {one_bytes + once_bytes} may be needed for 1 namespace" in sizes[0]
    assert sizes[1] == sizes[0]
    assert f", {2 * one_bytes + once_bytes} may be needed for 2 namespaces" in sizes[2]
    assert files[2] - files[0] == 2 * doctor.FDS_PER_NAMESPACE
    assert memory[0] == memory[2], "one budget"


def test_few_and_many_threads_are_noted(tmp_path: Path) -> None:
    for threads, status in ((1, CheckStatus.NOTE), (8, CheckStatus.OK), (500, CheckStatus.NOTE)):
        found = diagnosis(config_of(tmp_path, io_threads=threads))
        assert check_of(found, "I/O threads").status is status


def test_a_kernel_without_seals_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise CapacityError("injected")

    monkeypatch.setattr(doctor, "Arena", refuse)
    found = diagnosis(config_of(tmp_path))
    assert check_of(found, "memfd sealing") == Check(
        "memfd sealing",
        CheckStatus.FAILED,
        "injected",
        "clients map the arena and cannot write or shrink it",
        "use Linux 5.1 or later",
    )


def test_huge_pages_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "HUGE_PAGES", tmp_path)
    config = config_of(tmp_path)

    def found_when(code: int) -> Check:
        monkeypatch.setattr(doctor, "huge_page_errno", lambda: code)
        return check_of(diagnosis(config), "huge pages")

    assert found_when(0).status is CheckStatus.OK
    old_kernel = found_when(errno.EINVAL)
    assert old_kernel.status is CheckStatus.NOTE
    assert os.strerror(errno.EINVAL) in old_kernel.found
    assert "6.1" in old_kernel.advice
    assert "memory" in found_when(errno.ENOMEM).advice
    (tmp_path / "shmem_enabled").write_text("always within_size advise never [deny] force")
    assert found_when(errno.EINVAL).advice == f"echo never > {tmp_path / 'shmem_enabled'}"


def test_missing_packages_and_old_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    found = diagnosis(config_of(tmp_path))
    assert check_of(found, "torch").status is CheckStatus.NOTE
    assert check_of(found, "python").status is CheckStatus.FAILED


@pytest.mark.parametrize(("io", "code"), [("auto", 0), ("gds", 1)])
def test_the_command(
    io: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "Machine", lambda: NO_GPU)
    command = ["ucm", "doctor", "--store", str(tmp_path / "store"), "--set", f"nvme.io={io}"]
    command += ["--set", "nvme.capacity_bytes=1MiB", "--set", "nvme.segment_bytes=1MiB"]
    outputs = []
    for arguments in ([*command, "--json"], command):
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert (caught.value.code or 0) == code
        outputs.append(capsys.readouterr().out)
    found = json.loads(outputs[0])
    assert found["ok"] is (code == 0)
    assert found["io"] == ("posix" if code == 0 else None)
    assert {check["status"] for check in found["checks"]} <= {"ok", "note", "failed"}
    assert f"{len(found['checks'])} checks, {code} failed" in outputs[1]
    assert ("FAILED  nvme.io" in outputs[1]) is (code == 1)
