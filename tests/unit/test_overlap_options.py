"""What `ucm bench overlap` refuses before it measures, and that a result is never lost."""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm import cli
from ucm.bench import overlap, overlap_rig
from ucm.bench.overlap import OverlapOutcome, run_overlap_bench
from ucm.bench.overlap_cells import (
    OverlapBenchOptions,
    cells_of,
    check_cells,
    check_speeds,
    left_out,
)
from ucm.cli.console import ExitCode
from ucm.errors import ConfigError
from ucm.testing.models import write_tiny_model
from ucm.testing.overlap_events import hybrid_timeline, overlap_result
from ucm.types import TierKind

BOTH = (TierKind.NVME, TierKind.MEMORY)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("overlap") / "model")


class Command:
    """Runs `ucm bench overlap ARGUMENTS` in this process."""

    def __init__(
        self, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self._model, self._monkeypatch, self._capsys = model, monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        argv = ["ucm", "bench", "overlap", "--model", self._model, *arguments]
        self._monkeypatch.setattr(sys, "argv", [str(argument) for argument in argv])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *self._capsys.readouterr()


@pytest.fixture
def command(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    return Command(model, monkeypatch, capsys)


def must_not_measure(*_arguments: Any) -> None:
    raise AssertionError("something was measured")


def measured(*_arguments: Any) -> OverlapOutcome:
    return OverlapOutcome(overlap_result(), {"nvme 10 MB/s": [hybrid_timeline()]})


@pytest.mark.parametrize(
    ("option", "path", "advice"),
    [
        ("--store", "missing/store", "create it"),
        ("--store", "file", "is no folder"),
        ("--html", "missing/page.html", "create it"),
        ("--html", ".", "name a file"),
        ("--trace-out", "missing/trace.json", "create it"),
        ("--trace-out", ".", "name a file"),
    ],
)
def test_a_bad_path_is_one_line_before_anything_is_measured(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    path: str,
    advice: str,
) -> None:
    monkeypatch.setattr(overlap, "load_model", must_not_measure)
    (tmp_path / "file").write_text("")
    code, out, err = command(option, tmp_path / path, "--json")
    assert code == ExitCode.WRONG_USE
    assert json.loads(out)["error"] == "ConfigError"
    assert len(err.splitlines()) == 1
    assert advice in err


def test_a_context_beyond_the_model_is_refused_before_measuring(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "OverlapRig", must_not_measure)
    code, out, err = command("--context", 1_000_000, "--json")
    assert code == ExitCode.WRONG_USE
    assert "the model takes: name at most" in json.loads(out)["message"]
    assert "Traceback" not in err


def test_a_pool_without_memory_is_told_in_words(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OverlapBenchOptions(model_path=model, context_tokens=(128,), store=tmp_path)
    for error, said in (
        (MemoryError(), "--context"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "--context"),
    ):
        monkeypatch.setattr(overlap_rig, "Engine", failing(error))
        with pytest.raises(ConfigError, match=said):
            run_overlap_bench(options)
    monkeypatch.setattr(overlap_rig, "Engine", failing(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        run_overlap_bench(options)
    assert not list(tmp_path.iterdir())


def failing(error: BaseException) -> Any:
    def fail(*_arguments: Any) -> None:
        raise error

    return fail


def test_memory_has_no_bandwidth_and_that_is_said(tmp_path: Path) -> None:
    options = OverlapBenchOptions(
        bandwidths_mb_s=(50.0, None, 50.0), tiers=BOTH, hit_ratios=(0.5,), context_tokens=(128,)
    )
    assert [(cell.tier, cell.bandwidth_mb_s) for cell in cells_of(options)] == [
        (TierKind.NVME, 50.0),
        (TierKind.NVME, None),
        (TierKind.MEMORY, None),
    ]
    assert left_out(options) == ["bandwidths that memory does not have: 1; they limit the disk"]
    assert left_out(replace(options, tiers=(TierKind.NVME,))) == []
    check_cells(replace(options, store=tmp_path))


@given(
    speeds=st.lists(st.sampled_from((None, 1.0, 3.0, 10.0, 30.0, 100.0)), min_size=1),
    ratios=st.lists(st.sampled_from((0.5, 0.9, 1.0)), min_size=1),
    contexts=st.lists(st.sampled_from((1024, 2048, 3072, 6144)), min_size=1),
)
def test_every_pair_is_in_a_cell(
    speeds: list[float | None], ratios: list[float], contexts: list[int]
) -> None:
    options = OverlapBenchOptions(
        bandwidths_mb_s=tuple(speeds), hit_ratios=tuple(ratios), context_tokens=tuple(contexts)
    )
    cells = cells_of(options)
    found = [(cell.bandwidth_mb_s, cell.hit_ratio, cell.context_tokens) for cell in cells]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        values = (speeds, ratios, contexts)
        expected = set(itertools.product(values[one], values[other]))
        assert {(cell[one], cell[other]) for cell in found} == expected
    sizes = sorted(len(set(values)) for values in (speeds, ratios, contexts))
    assert len(found) == len(set(found)) == sizes[1] * sizes[2]
    assert set(cells) <= set(cells_of(replace(options, every_cell=True)))


def test_the_matrix_is_a_third_of_all_and_says_so() -> None:
    options = OverlapBenchOptions()
    assert len(cells_of(options)) == 18
    assert len(cells_of(replace(options, every_cell=True))) == 54
    assert left_out(options)[0].startswith("18 of 54 cells:")
    assert left_out(replace(options, every_cell=True)) == []


def test_a_bandwidth_at_which_nothing_can_be_learnt_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even the shortest load that teaches the model would read for longer than any that counts."""
    monkeypatch.setattr(overlap, "_measure", must_not_measure)
    for speed in (1e-4, 1e-9):
        options = OverlapBenchOptions(
            model_path=model, bandwidths_mb_s=(speed, None), context_tokens=(128,), store=tmp_path
        )
        with pytest.raises(ConfigError, match=r"--bandwidth .* at least"):
            run_overlap_bench(options)
    assert not list(tmp_path.iterdir())


def test_the_slowest_bandwidth_that_is_named_is_taken() -> None:
    options = OverlapBenchOptions(bandwidths_mb_s=(0.01, None))
    with pytest.raises(ConfigError, match=r"at least 0\.0984 MB/s"):
        check_speeds(options, 1_474_560)
    for speed in (0.0984, 1.0):
        check_speeds(replace(options, bandwidths_mb_s=(speed, None)), 1_474_560)
    in_memory = replace(options, tiers=(TierKind.MEMORY,))
    check_speeds(in_memory, 1_474_560)  # nothing limits it


def test_a_benchmark_without_a_cell_is_refused_at_once(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "load_model", must_not_measure)
    code, _, err = command("--tier", "memory", "--bandwidth", 50)
    assert code == ExitCode.WRONG_USE
    assert "--bandwidth unlimited" in err


def test_what_was_measured_is_printed_though_a_file_cannot_be_written(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()

    def measure_while_the_folder_goes(*_arguments: Any) -> OverlapOutcome:
        folder.rmdir()
        return measured()

    monkeypatch.setattr(overlap, "run_overlap_bench", measure_while_the_folder_goes)
    trace = tmp_path / "trace.json"
    page = folder / "page.html"
    code, out, err = command("--html", page, "--trace-out", trace, "--json")
    assert code == ExitCode.WRONG_USE
    assert json.loads(out)["model"] == "tiny"
    assert f"cannot write {page}" in err
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_way_that_is_done_quickly_is_measured_three_times() -> None:
    options = OverlapBenchOptions(repeats=2, steady_s=20.0)
    assert options.wants_run([1000.0]), "as often as was asked for, at least"
    assert options.wants_run([9.0, 10.0])
    assert not options.wants_run([11.0, 10.0])
    assert not options.wants_run([1.0] * 3)
    assert not replace(options, steady_s=0.0).wants_run([1.0, 1.0])
    assert replace(options, repeats=5).wants_run([1000.0] * 4)


def test_a_way_whose_runs_are_short_is_measured_more_often() -> None:
    options = OverlapBenchOptions(short_s=2.0)
    assert options.wants_run([0.3] * 6)
    assert not options.wants_run([0.3] * 7)
    assert options.wants_run([0.1] * 8)
    assert not options.wants_run([0.1] * 9)
    assert not options.quick().wants_run([0.1] * 3)


def test_a_way_that_a_ratio_depends_on_is_measured_three_times_however_long_it_takes() -> None:
    options = OverlapBenchOptions()
    assert options.wants_run([1000.0] * 2, is_judged=True)
    assert not options.wants_run([1000.0] * 3, is_judged=True)
    assert not replace(options, steady_s=0.0).wants_run([1000.0], is_judged=True)
