"""`ucm bench storage` on very little: the shape of its result, and what it leaves behind."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ucm.bench.storage import run_storage_bench
from ucm.bench.storage_lmcache import start_lmcache
from ucm.bench.storage_measure import MIB_LAYOUT, Plan, StorageBenchOptions
from ucm.bench.storage_payload import Audit, BlockBuffer
from ucm.bench.storage_report import storage_bench_report
from ucm.config import MIB

pytestmark = pytest.mark.timeout(180)

ONCE = Plan(repeats=1, budget_s=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    options = StorageBenchOptions(
        path=folder,
        allow_tmpfs=True,
        size_bytes=4 * MIB,
        slabs=("64KiB", "256KiB"),
        dram_blocks=8,
        peer_bytes=4 * MIB,
        lookup_keys=(100, 1000),
        index_blocks=5000,
        index_openings=1,
        clients=(1, 3),
        memory_chains=2,
        disk_chains=30,
        client_processes=2,
        cell_s=0.2,
        ceiling_candidates=1,
        thorough_scouting=False,
        whole_store_once=True,
        dram=ONCE,
        nvme=ONCE,
        lookup=Plan(repeats=5, budget_s=1),
        peers=ONCE,
    )
    return run_storage_bench(options)


def test_every_byte_was_compared_and_right(result: dict[str, Any]) -> None:
    assert result["wrong_bytes"] == 0
    assert result["checked_bytes"] > 50 * MIB


def test_figures_stand_beside_their_ceilings(result: dict[str, Any]) -> None:
    dram = result["dram"]
    assert dram["load_ratio"] == pytest.approx(dram["load_gb_s"] / dram["memcpy_gb_s"], rel=0.05)
    assert dram["zero_copy_gb_s"] > 0
    assert dram["memcpy_private_gb_s"] > 0
    assert dram["memcpy_blocks_gb_s"] > 0
    assert 1 <= dram["arena_runs"] <= dram["blocks"]
    assert dram["copy_gb_s"] > dram["load_gb_s"], "the lease takes time"
    assert min(dram["load_cpu_s_per_gb"], dram["memcpy_cpu_s_per_gb"]) > 0
    assert dram["copy_threads"] >= 1
    assert result["nvme"].keys() == {"64KiB", "256KiB"}
    for row in result["nvme"].values():
        for op, side in (("load", "read"), ("store", "write")):
            ceiling = row[f"ceiling_{side}_gb_s"]
            assert ceiling == max(
                rate for name, rate in row["ceilings_gb_s"].items() if name.startswith(side)
            )
            expected = row[f"{op}_gb_s"] / ceiling
            assert row[f"{op}_ratio"] == pytest.approx(expected, rel=0.05)
            assert row[f"end_to_end_{op}_gb_s"] > 0
        assert row["cpu_s_per_gb"] > 0
        assert 0 <= row["huge_pages_mib"] <= row["blocks"] * row["block_bytes"] // MIB


def test_names_clients_and_peers_are_there(result: dict[str, Any]) -> None:
    assert result["lookup"].keys() == {"100", "1000"}
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in result["lookup"].values())
    index = result["index"]
    assert index["blocks"] == 5000
    assert index["open_s"] > 0
    assert index["private_mib"] > 10
    assert result["concurrent"].keys() == result["concurrent_nvme"].keys() == {"1", "3"}
    for row in (*result["concurrent"].values(), *result["concurrent_nvme"].values()):
        assert row["n"] > 0
        assert row["with_stores"]["n"] > 0
    expected = {"ucm", "files", "files_fsync", "lmdb"}
    expected |= {"redis"} if shutil.which("redis-server") else set()
    assert result["peers"].keys() == expected
    assert all(p["load_gb_s"] > 0 and p["store_gb_s"] > 0 for p in result["peers"].values())


def test_it_says_where_it_ran(result: dict[str, Any]) -> None:
    manifest = json.loads(json.dumps(result))["manifest"]
    assert manifest["cores"] >= 1
    assert manifest["filesystem"]["kind"]
    assert manifest["ceiling_tool"].startswith("fio") == (shutil.which("fio") is not None)
    assert manifest["versions"].keys() >= {"ucm", "python", "lmdb"}


def test_it_prints_tables(result: dict[str, Any]) -> None:
    console = Console(record=True, width=140, file=io.StringIO())
    console.print(storage_bench_report(result))
    text = console.export_text()
    assert "files_fsync" in text
    assert "0 wrong bytes" in text


def test_lmcache_speaks_from_its_own_environment(tmp_path: Path) -> None:
    """A stand-in for the interpreter answers as the script does; two others cannot."""
    payload, audit = BlockBuffer(MIB_LAYOUT, 2), Audit()
    lines: list[str] = []
    fake = tmp_path / "python"
    answer = {"event": "done", "rates": {"lmcache_cpu load": 1.5}, "wrong_bytes": 3}
    fake.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        "settings = json.loads(sys.argv[2])\n"
        "size = len(open(settings['source'], 'rb').read())\n"
        "print(json.dumps({'event': 'ready', 'version': 'fake'}), flush=True)\n"
        "for line in sys.stdin:\n"
        f"    print(json.dumps({{**{answer!r}, 'checked_bytes': size}}), flush=True)\n"
    )
    fake.chmod(0o700)
    peer = start_lmcache(fake, tmp_path / "a", payload, audit, lines.append)
    assert peer is not None
    assert peer.round() == {"lmcache_cpu load": 1.5}
    peer.close()
    assert (audit.wrong_bytes, audit.checked_bytes) == (3, payload.nbytes)
    assert start_lmcache(Path(sys.executable), tmp_path / "b", payload, audit, lines.append) is None
    assert start_lmcache(tmp_path / "none", tmp_path / "c", payload, audit, lines.append) is None
    assert lines[0] == "LMCache fake"
    assert [line.partition(":")[0] for line in lines[1:]] == ["LMCache left out"] * 2


def test_nothing_is_left_behind(result: dict[str, Any], folder: Path) -> None:
    assert result
    assert list(folder.iterdir()) == []


def ucm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ucm.cli", "bench", "storage", "--json", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_memory_is_refused_unless_asked_for(tmp_path: Path) -> None:
    refused = Path("/dev/shm/ucm-bench-refused")
    done = ucm("--path", str(refused))
    assert done.returncode == 2
    assert not refused.exists()
    assert "--allow-tmpfs" in json.loads(done.stdout)["message"]
    done = ucm("--path", str(tmp_path), "--size", "large")
    assert done.returncode == 2
    assert "512MiB" in json.loads(done.stdout)["message"]
