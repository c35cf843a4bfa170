"""Measuring the costs of kernels on this machine, for `ucm doctor kernels --tune`.

Each case's contenders run in turns, so that what else the machine does hits all alike; their cost
is the least, to which other work only adds. Operations take turns, too, so that a budget that ends
early has measured something of each. A case counts only when it was measured whole; one without a
choice is not measured.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from .attention import ATTENTION
from .block_copy import BLOCK_COPY
from .cost_table import CostKey, CostTable
from .dispatch import Case, Choice, Thunk, dtype_name
from .linear import LINEAR
from .norm import NORM
from .paged_copy import PAGED_COPY
from .rotate import ROTATE
from .slab_sums import SLAB_SUMS

ROUNDS: Final = 7
MIN_ROUND_S: Final = 0.5e-3
"""Shorter calls are repeated within a round: a clock's tick and a wake-up are microseconds."""
MAX_REPEATS: Final = 64

Seconds = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was measured."""

    table: CostTable
    num_left: int
    """Cases that the budget was too short for."""


def all_cases() -> list[tuple[str, Case]]:
    """Typical problems of every operation, by its name; operations take turns."""
    cases = [
        [(operation, case) for case in found]
        for operation, found in (
            (ATTENTION.name, ATTENTION.cases()),
            (BLOCK_COPY.name, BLOCK_COPY.cases()),
            (LINEAR.name, LINEAR.cases()),
            (NORM.name, NORM.cases()),
            (PAGED_COPY.name, PAGED_COPY.cases()),
            (ROTATE.name, ROTATE.cases()),
            (SLAB_SUMS.name, SLAB_SUMS.cases()),
        )
    ]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*cases))
    return [case for case in turns if case is not None]


def explain_all() -> Iterator[Choice]:
    """What is chosen for every typical problem, and why, operation by operation.

    Raises:
        ConfigError: an environment variable asks for what is not possible.
    """
    for _, case in sorted(all_cases(), key=lambda item: item[0]):
        yield case.explain()


def tune(budget_s: float, now_s: Seconds = time.perf_counter) -> Tuned:
    """Measure case after case until the budget is spent; blocks for little longer than that."""
    table: dict[CostKey, Mapping[str, float]] = {}
    stop_s, num_left = now_s() + budget_s, 0
    with torch.inference_mode():
        for name, case in all_cases():
            if sum(not candidate.why_not for candidate in case.explain().candidates) < 2:
                continue
            if now_s() >= stop_s:
                num_left += 1
                continue
            problem = case.problem
            key = CostKey(name, problem.device, dtype_name(problem), problem.bucket())
            table[key] = measure(case.contenders(), now_s)
    return Tuned(table, num_left)


def measure(contenders: Mapping[str, Thunk], now_s: Seconds) -> dict[str, float]:
    """The least microseconds a call of each, in turns."""
    repeats = {name: _warm_up(run, now_s) for name, run in contenders.items()}
    costs_us = dict.fromkeys(contenders, math.inf)
    for _, (name, run) in itertools.product(range(ROUNDS), contenders.items()):
        start_s = now_s()
        for _ in range(repeats[name]):
            run()
        costs_us[name] = min(costs_us[name], (now_s() - start_s) * 1e6 / repeats[name])
    return {name: max(1e-3, cost_us) for name, cost_us in costs_us.items()}


def _warm_up(run: Thunk, now_s: Seconds) -> int:
    """Call it twice; how often a round should."""
    run()
    start_s = now_s()
    run()
    took_s = max(now_s() - start_s, 1e-9)
    return max(1, min(MAX_REPEATS, round(MIN_ROUND_S / took_s)))
