"""Measuring kernels within a budget, and `ucm doctor kernels`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ucm import cli
from ucm.checksum import checksum
from ucm.errors import ConfigError, InvalidArgumentError
from ucm.kernels import cost_table, tuning
from ucm.kernels.cost_table import MachineIdentity
from ucm.kernels.slab_sums import slab_sums
from ucm.kernels.tuning import all_cases, measure, tune

MEASURED = {"attention", "block_copy", "linear", "norm", "paged_copy", "slab_checksum"}
OPERATIONS = MEASURED | {"rotate_keys"}
"""Of the last there is one implementation a device: nothing to choose, nothing to measure."""


class Work:
    """A clock, and contenders that take their time on it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.order: list[str] = []

    def takes(self, name: str, *durations_us: float) -> None:
        turn = self.order.count(name)
        self.order.append(name)
        self.now_s += durations_us[min(turn, len(durations_us) - 1)] * 1e-6


def test_the_least_of_several_turns_counts() -> None:
    """Whoever is disturbed once is not judged by it."""
    work = Work()
    found = measure(
        {
            "a": lambda: work.takes("a", 900, 800, 900, 700, 5000),
            "b": lambda: work.takes("b", 600, 600, 9000, 600),
        },
        lambda: work.now_s,
    )
    assert {name: round(cost_us) for name, cost_us in found.items()} == {"a": 700, "b": 600}
    assert "".join(work.order[4:10]) == "ababab", "in turns"


def test_short_calls_are_repeated() -> None:
    work = Work()
    measure({"a": lambda: work.takes("a", 10)}, lambda: work.now_s)
    assert len(work.order) == 2 + tuning.ROUNDS * 50


def test_a_budget_that_is_spent_measures_something_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One case a tick, until the budget is spent."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(tuning, "measure", lambda contenders, _now: dict.fromkeys(contenders, 1.0))
    tuned = tune(8.5, lambda: float(next(ticks)))
    assert {key.operation for key in tuned.table} == MEASURED
    assert len(tuned.table) == 8
    assert tuned.num_left == sum(name in MEASURED for name, _ in all_cases()) - 8
    assert tune(0.0, lambda: 0.0).table == {}


def test_every_contender_runs() -> None:
    """On the inputs that it will be measured with; the largest are as the others."""
    firsts = {(name, case.problem.dtype): case for name, case in reversed(all_cases())}
    assert {name for name, _ in firsts} == OPERATIONS
    with torch.inference_mode():
        for case in firsts.values():
            for run in case.contenders().values():
                run()


@pytest.mark.parametrize("name", [None, "xxhash", "numpy"])
def test_slab_sums_are_the_stores_checksums(name: str | None) -> None:
    data = np.random.default_rng(1).integers(0, 256, 5000, dtype=np.uint8)
    offsets = [0, 7, 4000]
    expected = [checksum(data[at : at + 1000].tobytes()) for at in offsets]
    assert slab_sums(torch.from_numpy(data), offsets, 1000, override=name) == expected


def test_slabs_outside_are_refused() -> None:
    data = torch.zeros(100, dtype=torch.uint8)
    for offsets, size in (([1], 100), ([-1], 10), ([0], -1)):
        with pytest.raises(InvalidArgumentError, match="outside"):
            slab_sums(data, offsets, size)
    with pytest.raises(InvalidArgumentError, match="flat bytes"):
        slab_sums(data.view(10, 10), [0], 10)
    with pytest.raises(ConfigError, match="it runs on a GPU only"):
        slab_sums(data, [0], 10, override="kernel")
    with pytest.raises(ConfigError, match="it takes 241 bytes"):
        slab_sums(data, [0], 10, override="numpy")


# ---------------------------------------------------------------- the command


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("UCM_KERNEL_TABLE", str(tmp_path / "table.json"))
    cost_table.current.cache_clear()
    yield tmp_path / "table.json"
    cost_table.current.cache_clear()


def run_ucm(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["ucm", "doctor", "kernels", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    output = capsys.readouterr()
    return int(caught.value.code or 0), output.out + output.err


def test_the_command_explains_each_choice(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = run_ucm(["--json"], monkeypatch, capsys)
    found = json.loads(output)
    assert code == 0
    assert found["table"] == str(path)
    assert (found["is_measured"], found["num_cases_left"]) == (False, None)
    assert {choice["operation"] for choice in found["choices"]} == OPERATIONS
    for choice in found["choices"]:
        by_name = {each["name"]: each for each in choice["candidates"]}
        assert by_name[choice["chosen"]]["cost_us"] > 0
        assert choice["reason"]
        for each in by_name.values():
            assert (each["cost_us"] is None) == bool(each["why_not"])
            assert each["source"] == (None if each["why_not"] else "estimated")
    _, text = run_ucm([], monkeypatch, capsys)
    assert "not kernel (it runs on a GPU only)" in text
    assert "measure them with `ucm doctor kernels --tune`" in text
    legend, rest = text.split("\n\n", 1)
    for case in (line for line in rest.splitlines() if ": " in line and line[0].isalpha()):
        sizes = case.partition(": ")[0].split()[3:]
        named = [re.match("[A-Za-z]+", size) for size in sizes]
        assert all(name and name[0] in legend.split() for name in named), case


def test_the_command_measures(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        tuning,
        "measure",
        lambda contenders, _now: {name: float(n + 1) for n, name in enumerate(contenders)},
    )
    some = list({name: (name, case) for name, case in reversed(all_cases())}.values())
    monkeypatch.setattr(tuning, "all_cases", lambda: some)  # all take seconds to make
    code, output = run_ucm(["--tune", "--json"], monkeypatch, capsys)
    found = json.loads(output)
    assert code == 0
    assert (found["is_measured"], found["num_cases_left"]) == (True, 0)
    assert {key.operation for key in cost_table.load(path, MachineIdentity.here())} == MEASURED
    attention = found["choices"][0]
    assert attention["chosen"] == attention["candidates"][0]["name"] == "tiled"
    assert attention["reason"] == "the cheapest as measured"
    _, text = run_ucm([], monkeypatch, capsys)
    assert f"costs were measured: {path}" in text


def test_the_command_says_what_cannot_be(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UCM_KERNEL_NORM", "striped")
    code, output = run_ucm([], monkeypatch, capsys)
    assert code == 2
    assert "norm has no implementation striped: it has mirrored, chain, torch" in output
    monkeypatch.delenv("UCM_KERNEL_NORM")
    path.mkdir()
    monkeypatch.setattr(tuning, "measure", lambda contenders, _now: dict.fromkeys(contenders, 1.0))
    code, output = run_ucm(["--tune", "--budget-s", "0.1"], monkeypatch, capsys)
    assert code == 2
    assert "cannot be written" in output
    monkeypatch.setenv("UCM_KERNEL_TABLE", "none")
    code, output = run_ucm(["--tune"], monkeypatch, capsys)
    assert code == 2
    assert "unset it" in output
