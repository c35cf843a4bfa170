"""What is chosen, and why: admission, measured and estimated costs, overrides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from ucm.errors import ConfigError
from ucm.kernels import cost_table
from ucm.kernels.cost_table import CostKey, CostTable
from ucm.kernels.dispatch import CostSource, Implementation, Operation, Problem, Thunk, coarse

Fn = Callable[[], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized(Problem):
    size: int

    def bucket(self) -> str:
        return f"N{coarse(self.size, 2)}"


def make(name: str, cost_us: float, why_not: str | None = None) -> Implementation[Sized, Fn]:
    return Implementation(
        name=name,
        run=lambda: name,
        refuses=lambda problem: why_not if problem.device == "cpu" else "no GPU",
        cost_us=lambda _problem: cost_us,
    )


def bench(_problem: Sized) -> Callable[[Fn], Thunk]:
    return lambda run: run


def problem(size: int = 3, device: str = "cpu") -> Sized:
    return Sized(device=device, dtype=torch.float32, size=size)


@pytest.fixture
def operation() -> Operation[Sized, Fn]:
    implementations = [make("slow", 9.0), make("fast", 2.0), make("wrong", 1.0, "it is wrong")]
    return Operation("op", implementations, examples=lambda: [problem()], bench=bench)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Callable[[CostTable], None]:
    def use(found: CostTable) -> None:
        monkeypatch.setattr(cost_table, "current", lambda: found)

    return use


KEY = CostKey("op", "cpu", "float32", "N4")


def test_takes_the_cheapest_that_is_right(operation: Operation[Sized, Fn]) -> None:
    assert operation.select(problem()).run() == "fast"
    choice = operation.explain(problem())
    assert (choice.chosen, choice.reason) == ("fast", "the cheapest as estimated")
    assert (choice.operation, choice.device, choice.dtype) == ("op", "cpu", "float32")
    slow, fast, wrong = choice.candidates
    assert (slow.cost_us, slow.source, slow.why_not) == (9.0, CostSource.ESTIMATED, "")
    assert (fast.cost_us, wrong.why_not, wrong.cost_us) == (2.0, "it is wrong", None)


def test_what_was_measured_decides_in_its_bucket(
    operation: Operation[Sized, Fn], table: Callable[[CostTable], None]
) -> None:
    table({KEY: {"slow": 1.0, "fast": 5.0}})
    assert [operation.select(problem(size)).name for size in (2, 3, 4, 5)] == [
        *("fast", "slow", "slow", "fast")
    ]
    choice = operation.explain(problem(4))
    assert choice.reason == "the cheapest as measured"
    assert {each.source for each in choice.candidates} == {CostSource.MEASURED, None}
    assert choice.candidates[0].cost_us == 1.0


def test_measured_costs_are_compared_with_measured_ones_only(
    operation: Operation[Sized, Fn], table: Callable[[CostTable], None]
) -> None:
    """Estimates are of another machine."""
    table({KEY: {"slow": 0.1}})
    assert operation.select(problem()).name == "fast"
    assert operation.explain(problem()).candidates[0].source is CostSource.ESTIMATED


def test_noise_decides_nothing(
    operation: Operation[Sized, Fn], table: Callable[[CostTable], None]
) -> None:
    table({KEY: {"slow": 1.0, "fast": 1.09}})
    assert operation.select(problem()).name == "fast"
    assert "as cheap as any" in operation.explain(problem()).reason
    table({KEY: {"slow": 1.0, "fast": 1.11}})
    assert operation.select(problem()).name == "slow"


def test_an_override_wins_over_cost(
    operation: Operation[Sized, Fn], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert operation.select(problem(), "slow").name == "slow"
    assert operation.explain(problem(), "slow").reason == "asked for"
    monkeypatch.setenv("UCM_KERNEL_OP", "slow")
    assert operation.select(problem()).name == "slow"
    assert operation.explain(problem()).reason == "UCM_KERNEL_OP asks for it"
    assert operation.select(problem(), "fast").name == "fast", "an argument is nearer"
    monkeypatch.setenv("UCM_KERNEL_OP", "")
    assert operation.select(problem()).name == "fast"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("wrong", "op by wrong for .*: it is wrong"),
        ("none", "no implementation none: it has slow, fast"),
    ],
)
def test_an_override_that_cannot_be_is_an_error(
    operation: Operation[Sized, Fn], wanted: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=message):
        operation.select(problem(), wanted)
    monkeypatch.setenv("UCM_KERNEL_OP", wanted)
    with pytest.raises(ConfigError, match=message):
        operation.explain(problem())


def test_nothing_admissible_is_an_error(operation: Operation[Sized, Fn]) -> None:
    with pytest.raises(ConfigError, match="no implementation of op admits"):
        operation.select(problem(device="cuda"))


def test_a_name_is_there_once() -> None:
    with pytest.raises(AssertionError):
        Operation("op", [make("a", 1), make("a", 2)], examples=list, bench=bench)


def test_buckets_are_coarse() -> None:
    assert [coarse(size, 4) for size in (0, 1, 2, 4, 5, 16, 17)] == [1, 1, 4, 4, 16, 16, 64]
