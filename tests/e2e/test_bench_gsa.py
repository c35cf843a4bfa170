"""`ucm bench gsa` on a tiny model: the shape of its result, and what it refuses."""

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

from ucm.bench.gsa import GsaBenchOptions, _documents, _measure, geomean, quality, run_gsa_bench
from ucm.bench.gsa_documents import own_document
from ucm.bench.gsa_plot import check_plot, save_plot
from ucm.bench.gsa_rankings import SELECTORS, ranking_of
from ucm.bench.gsa_report import gsa_bench_report
from ucm.bench.gsa_steps import sparse_options
from ucm.bench.gsa_targets import targets_of
from ucm.bench.gsa_window import ContextBuilder, run_window
from ucm.cli.bench_gsa import GsaOptions, bench_options
from ucm.engine.loading import load_model
from ucm.errors import ConfigError
from ucm.kernels.block_scores import Budget
from ucm.sparse.options import SparseOptions
from ucm.testing.models import require_real_model, write_tiny_model

pytestmark = pytest.mark.timeout(180)

CELL = {"kl", "top1", "dnll", "mass", "recall", "bytes_ratio", "select_ms_per_step", "step_ms"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("gsa") / "model")


@pytest.fixture(scope="module")
def result(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    paths = [tmp_path_factory.mktemp("gsa") / name for name in ("one.txt", "two.md")]
    paths[0].write_text("The quick token and the block cache. " * 60)
    paths[1].write_text("\n".join(f"row {n} is {n * n} and not {n**3}" for n in range(200)))
    options = GsaBenchOptions(model_path=model, documents=tuple(paths)).quick()
    return run_gsa_bench(options)


def test_the_result_has_the_documented_shape(result: dict[str, Any]) -> None:
    assert result["documents"] == ["one.txt", "two.md"]
    assert result["budgets"] == ["0.3", "0.125"]
    tables = [*result["per_document"].values(), result["geomean"]]
    assert list(result["per_document"]) == result["documents"]
    for table in tables:
        assert list(table) == list(SELECTORS)
        for budgets in table.values():
            assert list(budgets) == result["budgets"]
            for cell in budgets.values():
                assert set(cell) == CELL
                assert all(math.isfinite(value) for value in cell.values())
    assert set(result["passkey"]) == {*SELECTORS, "dense"}
    assert set(result["certified"]) == {"eps", "max_error_over_bound", "blocks_read_ratio"}
    assert set(result["conformal"]) == {"delta", "violation_rate", "blocks_read_ratio"}
    assert set(result["offload"]) == {
        "bandwidth_mb_s",
        "context_tokens",
        "dense_tokens_s",
        "gsa_tokens_s",
        "dnll",
    }
    assert json.loads(json.dumps(result)) == result


def test_the_numbers_are_plausible(result: dict[str, Any]) -> None:
    for table in result["per_document"].values():
        for selector, budgets in table.items():
            wide, narrow = budgets["0.3"], budgets["0.125"]
            assert 0 < narrow["bytes_ratio"] < wide["bytes_ratio"] < 1
            assert narrow["mass"] < wide["mass"] <= 1
            assert 0 < wide["select_ms_per_step"] < wide["step_ms"]
            # The oracle's choice of a layer need not be the best for the last layer's output.
            assert wide["mass"] <= table["oracle"]["0.3"]["mass"] + 1e-6
            assert (wide["recall"] == 1.0) == (selector == "oracle")


def test_a_kept_choice_is_what_is_measured(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("The quick token and the block cache. " * 60)
    options = GsaBenchOptions(model_path=model, documents=(path,), stride=8).quick()
    loaded = load_model(model)
    (document,) = _documents(loaded, options)
    cells = [
        _measure(loaded, document, replace(options, stride=stride), lambda _line: None)
        for stride in (None, 8)
    ]
    one, kept = (rows.cells["gsa-k4"]["0.3"] for rows in cells)
    assert kept["kl"] != one["kl"]
    assert kept["mass"] < one["mass"]


def test_steps_are_timed_with_the_stride_that_was_asked_for() -> None:
    budget = Budget(ratio=0.3)
    assert sparse_options("gsa-k4", budget, 64, None).stride == SparseOptions().stride
    assert sparse_options("gsa-k4", budget, 64, 8).stride == 8


def test_people_get_tables_a_verdict_and_a_plot(result: dict[str, Any], tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(gsa_bench_report(result))
    text = console.export_text()
    assert all(line == line.rstrip() or len(line) <= 80 for line in text.splitlines())
    assert "two.md, 12.5% of the blocks" in text
    assert sum(line.rstrip().endswith(("held", "MISSED")) for line in text.splitlines()) == len(
        result["targets"]
    )
    save_plot(result, tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text()
    assert all(selector in drawn for selector in SELECTORS)
    save_plot(result, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="svg"):
        check_plot(tmp_path / "p.txt")


def test_targets_compare_what_they_name(result: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(result))
    for selector, kl in (("gsa-k4", 0.6), ("box", 1.0), ("mean", 0.5), ("maxnorm", 0.4)):
        changed["geomean"][selector]["0.3"]["kl"] = kl
    found = {target["name"]: target for target in targets_of(changed)}
    assert found["KL gsa-k4 / box at 0.3"]["value"] == 0.6
    assert found["KL gsa-k4 / box at 0.3"]["held"]
    assert found["KL gsa-k4 / mean at 0.3"]["value"] == pytest.approx(1.2)
    assert not found["KL gsa-k4 / mean at 0.3"]["held"]
    assert not found["KL maxnorm / mean at 0.3"]["held"]


def test_means_over_documents() -> None:
    cells = [{"kl": 0.1, "dnll": -0.02}, {"kl": 0.4, "dnll": 0.04}]
    tables = {str(index): {"mean": {"0.3": cell}} for index, cell in enumerate(cells)}
    found = geomean(tables)["mean"]["0.3"]
    assert found["kl"] == pytest.approx(0.2)
    assert found["dnll"] == pytest.approx(0.03)


def test_quality_of_known_distributions() -> None:
    dense = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    sparse = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    found = quality(dense, sparse, torch.tensor([1, 0]))
    assert found["kl"] == pytest.approx(0.5 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3)))
    assert found["dnll"] == pytest.approx(-0.5 * math.log(1.5))
    assert quality(dense, dense, torch.tensor([0, 0])) == {"kl": 0.0, "top1": 1.0, "dnll": 0.0}


@pytest.mark.real_model
def test_large_keys_alone_say_less_than_the_mean_and_centroids_more() -> None:
    loaded = load_model(require_real_model())
    tokens = own_document("prose", loaded.tokenizer, 768).token_ids
    context = ContextBuilder.of(loaded.model, len(tokens)).fill(tokens[:-49])
    window, targets = tokens[-49:-1], torch.tensor(tokens[-48:])
    dense = torch.log_softmax(run_window(context, window).logits, -1)

    def kl(selector: str) -> float:
        ranking = ranking_of(selector, context)
        found = run_window(context, window, ranking, Budget(ratio=0.3))
        return float(quality(dense, torch.log_softmax(found.logits, -1), targets)["kl"])

    maxnorm, mean, centroids = map(kl, ("maxnorm", "mean", "gsa-k4"))
    assert maxnorm > 1.1 * mean
    assert mean > 1.1 * centroids > 0


def test_options_of_the_command_line(model: Path, tmp_path: Path) -> None:
    found = bench_options(GsaOptions(model=str(model), document=[tmp_path / "a"], tokens=1024))
    assert (found.documents, found.max_tokens) == ((tmp_path / "a",), 1024)
    quick = bench_options(GsaOptions(model=str(model), quick=True))
    assert quick.own_documents == ("prose",)
    assert quick.budgets == (0.3, 0.125)
    assert quick.stride is None
    assert bench_options(GsaOptions(model=str(model), stride=4, quick=True)).stride == 4
    assert len(bench_options(GsaOptions(model=str(model))).own_documents) == 5


def test_what_is_no_document_is_refused_at_once(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.bin"
    path.write_bytes(bytes(range(256)))
    command = [sys.executable, "-m", "ucm.cli", "bench", "gsa", "--json", "--model", str(model)]
    done = subprocess.run(
        [*command, "--document", str(path)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "binary" in json.loads(done.stdout)["message"]
    done = subprocess.run(
        [*command, "--plot", str(tmp_path / "p.txt")],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "--plot" in json.loads(done.stdout)["message"]
