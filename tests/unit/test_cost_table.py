"""The file of measured costs: whole or not at all, and never trusted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ucm.kernels import cost_table
from ucm.kernels.cost_table import CostKey, MachineIdentity, load, save, table_path

MACHINE = MachineIdentity(cpu="a CPU", cores=2, torch="2.13.0", threads=2)
TABLE = {
    CostKey("attention", "cpu", "float32", "T1 S64"): {"tiled": 4.5, "flash": 1.0},
    CostKey("norm", "cpu", "bfloat16", "T1"): {"chain": 2.0},
}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "table.json"
    save(path, MACHINE, TABLE)
    assert load(path, MACHINE) == TABLE
    save(path, MACHINE, {})
    assert load(path, MACHINE) == {}
    assert list(path.parent.iterdir()) == [path], "nothing temporary is left"


def test_a_file_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    save(path, MACHINE, TABLE)

    def refuse(_fd: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="no space"):
        save(path, MACHINE, {})
    assert load(path, MACHINE) == TABLE
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "change",
    [
        {"cpu": "another"},
        {"cores": 64},
        {"torch": "2.14.0"},
        {"threads": 1},
    ],
)
def test_another_machines_table_is_none(change: dict[str, str | int], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    save(path, MACHINE, TABLE)
    other = MachineIdentity(
        **{"cpu": "a CPU", "cores": 2, "torch": "2.13.0", "threads": 2} | change  # type: ignore[arg-type]
    )
    assert load(path, other) == {}
    assert other.digest() != MACHINE.digest()


def edited(edit: Callable[[dict[str, object]], object]) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        found = json.loads(data)
        edit(found)
        return json.dumps(found).encode()

    return change


ROW = {"operation": "o", "device": "cpu", "dtype": "float32", "bucket": "b"}
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _data: b"",
    "cut": lambda data: data[:-2],
    "not json": lambda _data: b"\x00\xff\xfe",
    "deep": lambda _data: b"[" * 100_000,
    "a list": lambda _data: b"[]",
    "null": lambda _data: b"null",
    "huge": lambda data: b" " * cost_table.MAX_TABLE_BYTES + data,
    "no version": edited(lambda found: found.pop("version")),
    "another version": edited(lambda found: found.update(version=0)),
    "costs of nothing": edited(lambda found: found.update(costs=[{}])),
    "costs are text": edited(lambda found: found.update(costs="none")),
    "a negative cost": edited(lambda f: f.update(costs=[{**ROW, "costs_us": {"a": -1}}])),
    "no number": edited(lambda f: f.update(costs=[{**ROW, "costs_us": {"a": float("nan")}}])),
    "a bucket is a list": edited(
        lambda f: f.update(costs=[{**ROW, "bucket": [], "costs_us": {"a": 1}}])
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_none(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    save(path, MACHINE, TABLE)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert load(path, MACHINE) == {}
    assert load(tmp_path / "missing", MACHINE) == {}
    assert load(tmp_path, MACHINE) == {}, "a folder"


def test_the_file_is_chosen_by_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCM_KERNEL_TABLE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = tmp_path / "ucm" / "kernels" / f"{MACHINE.digest()}.json"
    assert table_path(MACHINE) == expected
    monkeypatch.setenv("UCM_KERNEL_TABLE", "/elsewhere.json")
    assert table_path(MACHINE) == Path("/elsewhere.json")
    monkeypatch.setenv("UCM_KERNEL_TABLE", "none")
    assert table_path(MACHINE) is None


def test_a_process_reads_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, here = tmp_path / "table.json", MachineIdentity.here()
    assert here.cores >= 1
    assert here.cpu
    monkeypatch.setenv("UCM_KERNEL_TABLE", str(path))
    cost_table.current.cache_clear()
    try:
        save(path, here, TABLE)
        assert cost_table.current() == TABLE
        save(path, here, {})
        assert cost_table.current() == TABLE, "choices do not change while a process runs"
    finally:
        cost_table.current.cache_clear()


def test_without_a_table_nobody_waits_for_torch(tmp_path: Path) -> None:
    """It takes seconds, and a client that only copies blocks has no other use for it."""
    script = """if True:
        import sys
        from ucm.copying import BlockCopier
        from ucm.testing.tier_conformance import LAYOUT
        BlockCopier(LAYOUT)
        assert "torch" not in sys.modules
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop(cost_table.VARIABLE, None)
    for changed in (environment, {**environment, cost_table.VARIABLE: cost_table.NO_TABLE}):
        subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=changed)


def test_without_torch_there_is_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cost_table.VARIABLE, str(tmp_path / "table.json"))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cost_table.current.__wrapped__() == {}
