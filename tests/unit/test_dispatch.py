from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ucm.errors import ConfigError
from ucm.kernels.dispatch import Dispatcher, Implementation, Problem

PROBLEM = Problem(
    device="cpu",
    dtype=torch.float32,
    num_queries=1,
    num_keys=100,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)


def make(name: str, cost_us: float, *, admits: bool = True) -> Implementation[Callable[[], str]]:
    return Implementation(
        operation="op",
        name=name,
        run=lambda: name,
        admits=lambda _problem: admits,
        cost_us=lambda _problem: cost_us,
    )


@pytest.fixture
def dispatcher() -> Dispatcher[Callable[[], str]]:
    filled: Dispatcher[Callable[[], str]] = Dispatcher()
    for item in (make("slow", 9.0), make("fast", 2.0), make("wrong", 1.0, admits=False)):
        filled.register(item)
    return filled


def test_takes_the_cheapest_that_is_right(dispatcher: Dispatcher[Callable[[], str]]) -> None:
    assert dispatcher.select("op", PROBLEM).run() == "fast"
    assert [i.name for i in dispatcher.admissible("op", PROBLEM)] == ["fast", "slow"]


def test_an_override_wins_over_cost(dispatcher: Dispatcher[Callable[[], str]]) -> None:
    assert dispatcher.select("op", PROBLEM, "slow").name == "slow"


@pytest.mark.parametrize(("operation", "override"), [("op", "wrong"), ("op", "none"), ("x", None)])
def test_nothing_admissible_is_an_error(
    dispatcher: Dispatcher[Callable[[], str]], operation: str, override: str | None
) -> None:
    with pytest.raises(ConfigError):
        dispatcher.select(operation, PROBLEM, override)


def test_a_name_is_registered_once(dispatcher: Dispatcher[Callable[[], str]]) -> None:
    with pytest.raises(AssertionError):
        dispatcher.register(make("fast", 3.0))
