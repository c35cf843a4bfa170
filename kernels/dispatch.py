"""Which implementation of an operation runs: the cheapest of those that admit the problem.

Costs are functions of the problem's shape with coefficients that were measured, not timings taken
while serving: the same problem gets the same implementation in every process, so that the last
bits of a result do not depend on how busy the machine was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ucm.errors import ConfigError

FnT = TypeVar("FnT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What an implementation may look at to admit or price a call."""

    device: str
    """`cpu` or `cuda`."""
    dtype: torch.dtype
    num_queries: int
    """Query tokens of the sequence."""
    num_keys: int
    """Keys that they attend to."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation(Generic[FnT]):
    """One way to run an operation."""

    operation: str
    name: str
    run: FnT
    admits: Callable[[Problem], bool]
    """Whether the result is right for this problem; says nothing about speed."""
    cost_us: Callable[[Problem], float]
    """Estimated microseconds; only the order of two estimates matters."""


class Dispatcher(Generic[FnT]):
    """Implementations by operation. Filled at import, then only read; thread-safe from there."""

    def __init__(self) -> None:
        self._by_operation: dict[str, list[Implementation[FnT]]] = {}

    def register(self, implementation: Implementation[FnT]) -> None:
        """Add one; its name must be new within the operation."""
        others = self._by_operation.setdefault(implementation.operation, [])
        assert all(other.name != implementation.name for other in others)
        others.append(implementation)

    def admissible(self, operation: str, problem: Problem) -> list[Implementation[FnT]]:
        """All that give the right result, cheapest first."""
        fitting = [i for i in self._by_operation.get(operation, ()) if i.admits(problem)]
        return sorted(fitting, key=lambda i: i.cost_us(problem))

    def select(
        self, operation: str, problem: Problem, override: str | None = None
    ) -> Implementation[FnT]:
        """The cheapest admissible one, or the one named `override`.

        Raises:
            ConfigError: none admits the problem, or not the one asked for.
        """
        fitting = self.admissible(operation, problem)
        if override is not None:
            fitting = [i for i in fitting if i.name == override]
        if not fitting:
            wanted = override or "any"
            raise ConfigError(f"no implementation ({wanted}) of {operation} admits {problem}")
        return fitting[0]
