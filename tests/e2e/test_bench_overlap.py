"""`ucm bench overlap` on a tiny model: the shape of its result, and that no way differs."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ucm.bench.overlap import OverlapOutcome, run_overlap_bench
from ucm.bench.overlap_cells import OverlapBenchOptions
from ucm.bench.overlap_report import overlap_bench_table, overlap_page, overlap_trace
from ucm.bench.overlap_rig import VARIANTS
from ucm.cli.bench_overlap import OverlapOptions, bench_options
from ucm.errors import ConfigError
from ucm.testing.models import write_tiny_model
from ucm.types import TierKind

pytestmark = pytest.mark.timeout(180)

CONTEXT = 320
NAMES = {variant.name for variant in VARIANTS}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> OverlapOutcome:
    folder = tmp_path_factory.mktemp("overlap")
    options = OverlapBenchOptions(
        model_path=write_tiny_model(folder / "model"),
        bandwidths_mb_s=(0.5, None),
        hit_ratios=(0.9,),
        context_tokens=(CONTEXT,),
        tiers=(TierKind.NVME, TierKind.MEMORY),
        steady_s=0.0,
        decode_rounds=1,
        decode_tokens=40,
        store=folder,
    )
    return run_overlap_bench(options)


def cells(outcome: OverlapOutcome) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = outcome.result["cells"]
    return found


def test_every_cell_has_every_way(outcome: OverlapOutcome) -> None:
    what = [(c["bandwidth_mb_s"], c["tier"], c["context_tokens"]) for c in cells(outcome)]
    assert what == [(0.5, "nvme", CONTEXT), (None, "nvme", CONTEXT), (None, "memory", CONTEXT)]
    for cell in cells(outcome):
        assert set(cell["ttft_ms"]) == NAMES | {"predicted"}
        assert all(value > 0 for value in cell["ttft_ms"].values())
    assert json.loads(json.dumps(outcome.result)) == outcome.result


def test_no_way_changes_a_token_or_a_byte(outcome: OverlapOutcome) -> None:
    assert all(cell["identical_tokens"] for cell in cells(outcome))
    assert outcome.result["wrong_bytes"] == 0
    for cell in cells(outcome):
        loaded = cell["loaded_blocks"]
        assert loaded["compute_only"] == 0
        for name in ("load_only", "load_then_compute", "overlapped"):
            assert loaded[name] == cell["hit_blocks"] == CONTEXT * 9 // 10 // 32


def test_the_limit_of_the_bandwidth_is_felt(outcome: OverlapOutcome) -> None:
    slow = cells(outcome)[0]
    num_bytes = slow["hit_blocks"] * outcome.result["block_bytes"]
    assert slow["load_ms"] > 1e3 * 0.5 * num_bytes / 0.5e6
    assert slow["ttft_ms"]["overlapped"] > 0.9 * slow["load_ms"]
    assert slow["overlap_efficiency"] is not None


def test_storing_is_measured_beside_not_storing(outcome: OverlapOutcome) -> None:
    store = outcome.result["store"]
    assert store["tpot_on_ms"] > 0
    assert store["ratio"] == outcome.result["store_overhead_ratio"]
    assert store["ratio"] == pytest.approx(store["tpot_on_ms"] / store["tpot_off_ms"] - 1, abs=1e-2)


def test_the_timeline_has_loads_and_computations_of_every_layer(outcome: OverlapOutcome) -> None:
    trace = overlap_trace(outcome.timelines)["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in trace if e["name"] == "process_name"}
    slow = next(pid for pid, name in names.items() if "0.5 MB/s" in name and "overlapped" in name)
    layers = {
        kind: {e["args"]["layer"] for e in trace if (e["pid"], e.get("cat")) == (slow, kind)}
        for kind in ("load", "compute", "stall")
    }
    assert layers["compute"] == {0, 1, 2}
    assert 0 in layers["load"]
    assert layers["stall"] <= {0, 1, 2}


def test_people_get_a_table_and_a_page(outcome: OverlapOutcome) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(overlap_bench_table(outcome.result))
    text = console.export_text()
    assert "0 wrong bytes" in text
    assert f"same tokens in every way: {len(cells(outcome))} of {len(cells(outcome))}" in text
    page = overlap_page(outcome.result, outcome.timelines)
    assert page.count("<svg") == len(VARIANTS)


def test_options_choose_cells(tmp_path: Path) -> None:
    model = str(write_tiny_model(tmp_path / "model"))
    chosen = OverlapOptions(
        model=model, bandwidth=["3", "unlimited"], hit_ratio=[0.5], context=[1024], tier=["memory"]
    )
    found = bench_options(chosen)
    assert found.bandwidths_mb_s == (3.0, None)
    assert (found.hit_ratios, found.context_tokens) == ((0.5,), (1024,))
    assert found.tiers == (TierKind.MEMORY,)
    assert bench_options(OverlapOptions(model=model, quick=True)).context_tokens == (512,)
    for wrong in (
        OverlapOptions(model=model, bandwidth=["fast"]),
        OverlapOptions(model=model, tier=["hbm"]),
    ):
        with pytest.raises(ConfigError):
            bench_options(wrong)


def test_a_terminated_benchmark_leaves_no_store(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    model = write_tiny_model(tmp_path / "model")
    arguments = ["ucm.cli", "bench", "overlap", "--model", model, "--store", store]
    arguments += ["--bandwidth", "0.02", "--hit-ratio", "0.9", "--context", "320"]
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, [*arguments, "--decode-rounds", "0"])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr is not None
        # The first read takes many seconds at this bandwidth: the daemon and its store are there.
        assert any("load_then_compute" in line for line in process.stderr)
        assert list(store.iterdir())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        assert "Traceback" not in process.stderr.read()
    assert not list(store.iterdir())
