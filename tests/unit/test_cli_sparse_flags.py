"""What `ucm generate` says of sparse attention: its help, and the line behind the answer."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from ucm.cli.generate import GenerateOptions, command
from ucm.cli.sparse_flags import sparse_line, sparse_options
from ucm.errors import ConfigError
from ucm.sparse.decoding import SparseStats
from ucm.sparse.mode_policy import SparseMode
from ucm.sparse.options import SparseOptions
from ucm.types import SummaryKind

LATENCY = SparseStats(mode=SparseMode.LATENCY)


@pytest.mark.parametrize(
    ("stats", "words"),
    [
        (LATENCY, "nothing to leave out"),
        (replace(LATENCY, dense_steps=1, dense_by_budget=1), "all 1 step read everything (the bud"),
        (replace(LATENCY, dense_steps=5, dense_by_context=5), "(the context is below --sparse-min"),
        (
            replace(LATENCY, mode=SparseMode.EXACT, dense_steps=5, dense_by_mode=5),
            "all 5 steps read everything (mode exact)",
        ),
        (replace(LATENCY, sparse_steps=2), "2 steps read 100%"),
        (replace(LATENCY, sparse_steps=1, bytes_read=1, bytes_dense=4), "1 step read 25%"),
    ],
)
def test_the_line_gives_the_reason(stats: SparseStats, words: str) -> None:
    assert words in sparse_line(stats)


@pytest.mark.parametrize(("count", "words"), [(1, "; 1 mode switch"), (2, "; 2 mode switches")])
def test_one_is_not_many(count: int, words: str) -> None:
    assert sparse_line(replace(LATENCY, sparse_steps=1, mode_switches=count)).endswith(words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "--sparse-resident-blocks does nothing without --sparse"),
        ({"sparse": "latency"}, "resident_blocks is 3"),
    ],
)
def test_too_few_resident_blocks_are_refused(flags: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sparse_options(GenerateOptions(sparse_resident_blocks=3, **flags))  # type: ignore[arg-type]


def test_help_names_kinds_and_defaults() -> None:
    shown = CliRunner().invoke(command, ["--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    lines = dict(re.findall(r"--(sparse[a-z-]*) (.*)", shown))
    options = SparseOptions()
    assert all(re.search(rf"\b{kind}\b", lines["sparse-summary"]) for kind in SummaryKind)
    assert f"Default: {options.kind}." in lines["sparse-summary"]
    for name, one, other in (
        ("sparse-budget", options.budget.ratio, options.concurrency_budget.ratio),
        ("sparse-stride", options.stride, options.concurrency_stride),
    ):
        assert f"Default: {one}, in the mode concurrency {other}." in lines[name]
    assert f"Default: {options.dense_layers}." in lines["sparse-dense-layers"]
    assert f"Default: {options.min_context_tokens}." in lines["sparse-min-context"]
    assert options.resident_blocks is None
    assert "Default: the pool holds all." in lines["sparse-resident-blocks"]
    assert "prompts are dense" in lines["sparse"]
    assert "1/16 to 1/2" in lines["sparse-eps"]
    assert (options.budget.min_ratio, options.budget.max_ratio) == (1 / 16, 1 / 2)
