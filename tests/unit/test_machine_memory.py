"""The machine's memory: within a container's limit, and what is left of it."""

from __future__ import annotations

from pathlib import Path

import pytest

import ucm.machine_memory
from ucm.machine_memory import MachineMemory, machine_memory

GIB = 1 << 30


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control group's folder, on a machine with 64 GiB of which 40 are available."""
    monkeypatch.setattr(ucm.machine_memory, "CGROUP", tmp_path)
    monkeypatch.setattr(ucm.machine_memory, "MEMINFO", tmp_path / "meminfo")
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * GIB // 4096}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    (tmp_path / "meminfo").write_text(
        f"MemTotal:  67108864 kB\nMemAvailable: {40 << 20} kB\nHugePages_Total:       0\n"
    )
    return tmp_path


def test_this_machine_has_some() -> None:
    found = machine_memory()
    assert 0 < found.available_bytes <= found.total_bytes


def test_a_container_without_a_limit_has_the_machines(container: Path) -> None:
    assert machine_memory() == MachineMemory(64 * GIB, 40 * GIB)
    (container / "memory.max").write_text("max\n")
    assert machine_memory() == MachineMemory(64 * GIB, 40 * GIB)


def test_files_in_a_containers_memory_can_be_taken(container: Path) -> None:
    (container / "memory.max").write_text(f"{8 * GIB}\n")
    (container / "memory.current").write_text(f"{7 * GIB}\n")
    assert machine_memory() == MachineMemory(8 * GIB, 1 * GIB)
    (container / "memory.stat").write_text(
        f"anon {GIB}\nfile {6 * GIB}\nshmem {GIB}\nactive_file {GIB}\ninactive_file {4 * GIB}\n"
    )
    assert machine_memory() == MachineMemory(8 * GIB, 6 * GIB)


def test_others_on_the_machine_count_too(container: Path) -> None:
    (container / "memory.max").write_text(f"{48 * GIB}\n")
    (container / "memory.current").write_text("0\n")
    assert machine_memory() == MachineMemory(48 * GIB, 40 * GIB)


def test_a_kernel_that_says_nothing(container: Path) -> None:
    (container / "meminfo").unlink()
    assert machine_memory() == MachineMemory(64 * GIB, 64 * GIB)
