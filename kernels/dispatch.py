"""Which implementation of an operation runs: the cheapest of those that admit the problem.

    cost        from                                                    when
    measured    this machine's table (`cost_table`, `ucm doctor kernels --tune`)   all that are
                                                          admitted were measured for the bucket
    estimated   a function of the shape, with coefficients measured elsewhere      otherwise

Nothing is timed while serving, and the table is read once, at the first choice: the same problem
gets the same implementation as long as a process lives, so that the last bits of a result do not
depend on how busy the machine was.

`UCM_KERNEL_<OPERATION>=name` (for tests and for the curious) takes an implementation whatever it
costs; one that does not exist, or does not admit a problem, is an error and not ignored.
"""

from __future__ import annotations

import enum
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ucm.errors import ConfigError

from . import cost_table

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What an implementation may look at to admit or price a call; each operation has its own."""

    device: str
    """`cpu` or `cuda`."""
    dtype: torch.dtype | np.dtype[Any]

    def bucket(self) -> str:
        """The sizes, coarsely: problems of one bucket share their measured costs."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorProblem(Problem):
    """Of an operation on tensors; others know numpy only."""

    dtype: torch.dtype


ProblemT = TypeVar("ProblemT", bound=Problem)
FnT = TypeVar("FnT")
Thunk = Callable[[], object]


TIE = 1.1
"""Measured costs nearer than this are noise: then the estimate decides."""


class CostSource(enum.StrEnum):
    """Where a cost comes from."""

    MEASURED = "measured"
    ESTIMATED = "estimated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation(Generic[ProblemT, FnT]):
    """One way to run an operation."""

    name: str
    run: FnT
    refuses: Callable[[ProblemT], str | None]
    """Why the result would not be right for a problem; None when it would. Nothing about speed."""
    cost_us: Callable[[ProblemT], float]
    """Estimated microseconds; only the order of two estimates matters."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An implementation and one problem."""

    name: str
    why_not: str
    """Empty when it is admitted."""
    cost_us: float | None
    """None when it is not."""
    source: CostSource | None


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for a problem, from what, and why."""

    operation: str
    device: str
    dtype: str
    bucket: str
    candidates: tuple[Candidate, ...]
    chosen: str
    reason: str


@dataclass(frozen=True, slots=True)
class Case:
    """A typical problem of an operation: to be explained and measured."""

    problem: Problem
    explain: Callable[[], Choice]
    contenders: Callable[[], dict[str, Thunk]]
    """Makes inputs; for each admitted implementation what runs it on them once."""


class Operation(Generic[ProblemT, FnT]):
    """An operation and its implementations. Thread-safe; nothing changes after it is made."""

    def __init__(
        self,
        name: str,
        implementations: Sequence[Implementation[ProblemT, FnT]],
        *,
        examples: Callable[[], Sequence[ProblemT]],
        bench: Callable[[ProblemT], Callable[[FnT], Thunk]],
    ) -> None:
        """Define an operation.

        Args:
            name: lower case; `UCM_KERNEL_<NAME>` is its variable.
            implementations: with different names.
            examples: typical problems, one a bucket.
            bench: for a problem makes inputs; gives for a function what runs it on them once.
        """
        self.name = name
        self._by_name = {each.name: each for each in implementations}
        assert len(self._by_name) == len(implementations), "a name is there twice"
        self._variable = f"UCM_KERNEL_{name.upper()}"
        self._examples = examples
        self._bench = bench

    @property
    def names(self) -> tuple[str, ...]:
        """All implementations."""
        return tuple(self._by_name)

    def select(
        self, problem: ProblemT, override: str | None = None
    ) -> Implementation[ProblemT, FnT]:
        """The cheapest that admits the problem, or the one that is asked for.

        Args:
            problem: device, dtype and sizes.
            override: name of the implementation to take; before `UCM_KERNEL_<OPERATION>`.

        Raises:
            ConfigError: none admits the problem, or not the one asked for, or it does not exist.
        """
        return self._decide(problem, override)[0]

    def explain(self, problem: ProblemT, override: str | None = None) -> Choice:
        """What `select` does with a problem, and why.

        Raises:
            ConfigError: as `select`.
        """
        chosen, reason = self._decide(problem, override)
        refusals = {each.name: each.refuses(problem) for each in self._by_name.values()}
        admitted = [each for each in self._by_name.values() if refusals[each.name] is None]
        measured = self._measured(problem, admitted)
        source = CostSource.ESTIMATED if measured is None else CostSource.MEASURED
        candidates = []
        for each in self._by_name.values():
            why_not = refusals[each.name]
            if why_not is not None:
                candidates.append(Candidate(each.name, why_not, None, None))
                continue
            cost_us = each.cost_us(problem) if measured is None else measured[each.name]
            candidates.append(Candidate(each.name, "", cost_us, source))
        return Choice(
            operation=self.name,
            device=problem.device,
            dtype=dtype_name(problem),
            bucket=problem.bucket(),
            candidates=tuple(candidates),
            chosen=chosen.name,
            reason=reason,
        )

    def cases(self) -> Iterator[Case]:
        """Typical problems."""
        for problem in self._examples():
            yield Case(
                problem,
                functools.partial(self.explain, problem),
                functools.partial(self._contenders, problem),
            )

    def _contenders(self, problem: ProblemT) -> dict[str, Thunk]:
        prepare = self._bench(problem)
        admitted = [each for each in self._by_name.values() if each.refuses(problem) is None]
        return {each.name: prepare(each.run) for each in admitted}

    def _decide(
        self, problem: ProblemT, override: str | None
    ) -> tuple[Implementation[ProblemT, FnT], str]:
        """What runs, and why."""
        if override:
            return self._named(override, problem), "asked for"
        if wanted := os.environ.get(self._variable):
            try:
                return self._named(wanted, problem), f"{self._variable} asks for it"
            except ConfigError as error:
                raise ConfigError(f"{self._variable}={wanted}: {error}; unset it") from error
        admitted = [each for each in self._by_name.values() if each.refuses(problem) is None]
        if not admitted:
            raise ConfigError(f"no implementation of {self.name} admits {problem}")
        if len(admitted) == 1:
            return admitted[0], "the only one"
        likely = min(admitted, key=lambda each: each.cost_us(problem))
        measured = self._measured(problem, admitted)
        if measured is None:
            return likely, "the cheapest as estimated"
        best = min(admitted, key=lambda each: measured[each.name])
        if likely is not best and measured[likely.name] <= TIE * measured[best.name]:
            return likely, "the cheapest as estimated, and measured as cheap as any"
        return best, "the cheapest as measured"

    def _named(self, name: str, problem: ProblemT) -> Implementation[ProblemT, FnT]:
        found = self._by_name.get(name)
        if found is None:
            known = ", ".join(self._by_name)
            raise ConfigError(f"{self.name} has no implementation {name}: it has {known}")
        why_not = found.refuses(problem)
        if why_not is not None:
            kind = f"{problem.device}, {dtype_name(problem)}, {problem.bucket() or 'any size'}"
            raise ConfigError(f"{self.name} by {name} for {kind}: {why_not}")
        return found

    def _measured(
        self, problem: ProblemT, admitted: Sequence[Implementation[ProblemT, FnT]]
    ) -> Mapping[str, float] | None:
        """Measured costs, when all that are compared have one: estimates are of other machines."""
        table = cost_table.current()
        if not table:
            return None
        key = cost_table.CostKey(self.name, problem.device, dtype_name(problem), problem.bucket())
        costs = table.get(key, {})
        return costs if all(each.name in costs for each in admitted) else None


def always(_problem: Problem) -> str | None:
    """Refuse nothing: for an implementation that is right everywhere."""
    return None


def dtype_name(problem: Problem) -> str:
    """`float32`."""
    return str(problem.dtype).removeprefix("torch.")


def coarse(size: int, factor: int) -> int:
    """The smallest power of `factor` that is not below `size`: a bucket's upper end."""
    bound = 1
    while bound < size:
        bound *= factor
    return bound
