"""`ucm bench rag` on a tiny model: the shape of its result, and what it refuses."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ucm.bench.rag import RagBenchOptions, run_rag_bench
from ucm.bench.rag_plot import save_plot
from ucm.bench.rag_prompts import CONT, RAG, Prompt, Shape
from ucm.bench.rag_report import rag_bench_report
from ucm.bench.rag_ttft import TtftRig
from ucm.cli.bench_rag import RagOptions, run_rag
from ucm.engine.loading import load_model
from ucm.errors import ConfigError
from ucm.reuse.options import BlendOptions
from ucm.testing.models import require_real_model, write_tiny_model

pytestmark = pytest.mark.timeout(180)

CELL = {"kl", "top1", "dnll", "cost", "ttft_ms", "gold_logp"}
POLICIES = ["none", "cacheblend", "lego", "query", "progressive", "full"]
BUDGETS = ["0.05", "0.1", "0.18", "0.3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("rag") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "one.txt").write_text("The quick token and the block cache.\n" * 60)
    rows = (f"row {n} is {n * n} and not {n**3}" for n in range(400))
    (folder / "two.md").write_text("\n".join(rows))
    (folder / "short.txt").write_text("Too short.\n")
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    return folder


@pytest.fixture(scope="module")
def result(model: Path, folder: Path) -> dict[str, Any]:
    options = RagBenchOptions(model_path=model, documents=folder).quick()
    shapes = (Shape(CONT, 3, 128), Shape(RAG, 4, 100))
    prompts = replace(options.prompts, shapes=shapes)
    return run_rag_bench(replace(options, prompts=prompts))


def test_the_result_has_the_documented_shape(result: dict[str, Any]) -> None:
    assert [prompt["kind"] for prompt in result["prompts"]] == ["cont", "rag"]
    for prompt in result["prompts"]:
        assert set(prompt) == {"name", "kind", "policies", "full"}
        assert set(prompt["full"]) == {"ttft_ms", "gold_logp"}
        assert list(prompt["policies"]) == POLICIES
        for cells in prompt["policies"].values():
            assert list(cells) == BUDGETS
            for cell in cells.values():
                assert set(cell) == CELL
                assert all(math.isfinite(value) for value in cell.values())
                assert cell["ttft_ms"] > 0
    assert list(result["geomean_kl"]) == POLICIES
    assert all(list(kl) == BUDGETS for kl in result["geomean_kl"].values())
    assert set(result["ttft_ratio"]) == {"1k", "3k"}
    assert result["ttft_ratio"]["1k"] > 0
    assert result["ttft_ratio"]["3k"] is None
    assert json.loads(json.dumps(result)) == result


def test_the_numbers_are_plausible(result: dict[str, Any]) -> None:
    for prompt in result["prompts"]:
        policies = prompt["policies"]
        assert policies["full"]["0.05"]["kl"] < 1e-5
        assert policies["none"]["0.05"]["kl"] > 1e-4
        assert policies["none"]["0.3"] == policies["none"]["0.05"]
        for policy in POLICIES[1:-1]:
            for budget, cell in policies[policy].items():
                assert cell["cost"] <= float(budget) + 0.02
        detail = result["details"]["prompts"][prompt["name"]]
        chunk_blocks = detail["num_chunks"] * (detail["chunk_tokens"] // 32)
        block_bytes = 3 * 2 * 2 * 32 * 16 * 4
        assert detail["loaded_bytes"] == chunk_blocks * block_bytes


def test_what_was_left_out_is_said(result: dict[str, Any]) -> None:
    said = [line for line in result["warnings"] if "not in the cache" not in line]  # a busy machine
    assert len(said) == 1
    assert "image.png: a binary file" in said[0]


def test_people_get_tables_a_verdict_and_a_plot(result: dict[str, Any], tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(rag_bench_report(result))
    text = console.export_text()
    assert all(line == line.rstrip() or len(line) <= 80 for line in text.splitlines())
    assert "Mean over prompts, budget 0.18" in text
    verdicts = [line for line in text.splitlines() if line.rstrip().endswith(("held", "MISSED"))]
    assert len(verdicts) == len(result["targets"])
    assert "warning: left out:" in text
    save_plot(result, tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text()
    assert all(policy in drawn for policy in POLICIES[:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RagOptions(documents=Path("no-such-folder")), "no such folder"),
        (RagOptions(plot=Path("out.gif")), r"name it \.png, \.svg, \.pdf"),
        (RagOptions(model="no-such-model"), "no-such-model"),
    ],
)
def test_what_cannot_be_is_refused_at_once(options: RagOptions, message: str, model: Path) -> None:
    if options.model == RagOptions().model:
        options = replace(options, model=str(model))
    with pytest.raises(ConfigError, match=message):
        run_rag(options)


def test_a_folder_with_too_little_text_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.\n")
    command = [sys.executable, "-m", "ucm.cli", "bench", "rag", "--quick", "--json"]
    command += ["--model", str(model), "--documents", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "the texts are too short" in json.loads(done.stdout)["message"]
    assert "Traceback" not in done.stderr


def test_long_chunks_come_from_the_cache(model: Path) -> None:
    """Computing two of them at once takes more room than a few blocks."""
    loaded = load_model(model, "fp32")
    dice = torch.Generator().manual_seed(1)
    drawn = [torch.randint(3, 200, (448,), generator=dice).tolist() for _ in range(3)]
    tokens = tuple(drawn[0][:9])
    prompt = Prompt(
        name="long",
        kind=CONT,
        sink=tokens,
        prefix=(*tokens, 5),
        chunks=tuple(map(tuple, drawn)),
        window=tokens,
        questions=(),
        passage=(),
    )
    with TtftRig(loaded, prompt) as rig:
        served = rig.reused(BlendOptions())
    assert not served.complaint
    assert served.loaded_bytes == 3 * 14 * 3 * 2 * 2 * 32 * 16 * 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_quick_run_on_the_real_model() -> None:
    options = RagBenchOptions(model_path=require_real_model()).quick()
    result = run_rag_bench(options)
    assert [prompt["kind"] for prompt in result["prompts"]] == ["rag"]
    assert not result["warnings"]
    kl = result["geomean_kl"]
    assert kl["full"]["0.18"] < 1e-6
    assert kl["progressive"]["0.3"] < kl["cacheblend"]["0.3"]
