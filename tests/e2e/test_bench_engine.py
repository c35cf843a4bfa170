"""`ucm.bench.engine` measured on the tiny model: the shape of its result, not its figures."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import pytest
from rich.console import Console

from ucm.bench.engine import EngineBenchOptions, engine_bench_table, run_engine_bench
from ucm.errors import ConfigError
from ucm.testing.models import write_tiny_model

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_measures_both_engines_beside_the_floor(tmp_path: Path) -> None:
    lines: list[str] = []
    options = EngineBenchOptions(
        model_path=write_tiny_model(tmp_path / "tiny"),
        dtypes=("fp32", "bf16"),
        context_tokens=(64, 100),
        repeats=1,
        decode_tokens=2,
    )
    result = run_engine_bench(options, lines.append)
    assert result["model"] == "tiny"
    assert result["threads"] >= 1
    assert result["ceilings"]["copy_gb_s"] > 0
    assert result["ceilings"]["matmul_gflop_s"].keys() == {"fp32", "bf16"}
    measured = [(row["dtype"], row["context_tokens"]) for row in result["results"]]
    assert measured == [("fp32", 64), ("fp32", 100), ("bf16", 64), ("bf16", 100)]
    for row in result["results"]:
        for phase in (row["prefill"], row["decode"]):
            assert phase["ucm_tokens_s"] > 0
            assert phase["floor_tokens_s"] > phase["ucm_tokens_s"]
            ratio = phase["ucm_tokens_s"] / phase["transformers_tokens_s"]
            assert phase["ratio"] == pytest.approx(ratio, rel=0.02)
    assert "fp32: loading the model" in lines
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(engine_bench_table(result))
    assert "transformers" in console.export_text()


def test_quick_is_smaller() -> None:
    quick = EngineBenchOptions().quick()
    assert quick.context_tokens == (512,)
    assert quick.decode_tokens < EngineBenchOptions().decode_tokens


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ucm-cache\[dev\]'"):
        run_engine_bench(EngineBenchOptions())
