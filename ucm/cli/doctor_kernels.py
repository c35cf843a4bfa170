"""`ucm doctor kernels`: which kernel is chosen for what, and why; and measuring them."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ucm.errors import ConfigError
from ucm.path_errors import path_error

from .console import print_json
from .options import JsonOption

if TYPE_CHECKING:
    from pathlib import Path

    from ucm.kernels.cost_table import MachineIdentity
    from ucm.kernels.dispatch import Candidate, Choice


LEGEND = """\
Two lines a case: operation, device, dtype, sizes: which implementation is taken, and why;
and what a call costs with each, cheapest first. Microseconds; sizes are those of SmolLM2-135M.
T tokens computed, S tokens attended to, H heads, G heads of keys and values, D head size,
out and in features, C channels, N rows or slabs, bytes of a slab.
"""


def kernels_command(
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure this machine and keep what it costs.")
    ] = False,
    budget_s: Annotated[
        float, typer.Option("--budget-s", min=0.1, help="Longest time that measuring may take.")
    ] = 30.0,
    as_json: JsonOption = False,
) -> None:
    """Explain which implementation of each operation is chosen, by what cost.

    UCM_KERNEL_<OPERATION>=NAME takes another one. What --tune measures holds for processes that
    start afterwards, with the same CPU, release of torch and number of threads.
    """
    from ucm.kernels import cost_table, tuning

    machine = cost_table.MachineIdentity.here()
    path = cost_table.table_path(machine)
    num_left = _tune(path, machine, budget_s) if tune else None
    choices = list(tuning.explain_all())
    if as_json:
        print_json(
            {
                "machine": asdict(machine),
                "table": path,
                "is_measured": bool(cost_table.current()),
                "num_cases_left": num_left,
                "choices": [asdict(choice) for choice in choices],
            }
        )
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(LEGEND, markup=False)
    for choice in choices:
        _show(console, choice)
    _say_where(console, path, num_left)


def _tune(path: Path | None, machine: MachineIdentity, budget_s: float) -> int:
    """Measure and keep; the number of cases that there was no time for."""
    from ucm.kernels import cost_table, tuning

    if path is None:
        raise ConfigError(f"{cost_table.VARIABLE} is none: unset it, or name a file")
    tuned = tuning.tune(budget_s)
    try:
        cost_table.save(path, machine, tuned.table)
    except OSError as error:
        advice = f"name another file with {cost_table.VARIABLE}"
        raise path_error(error, f"{path} cannot be written", advice) from error
    cost_table.current.cache_clear()  # this process chose nothing that matters yet
    return tuned.num_left


def _show(console: Console, choice: Choice) -> None:
    """Two lines: what is chosen for what and why; then every candidate, cheapest first."""
    problem = f"{choice.operation:13}  {choice.device} {choice.dtype:8}  {choice.bucket}"
    console.print(f"{problem}: {choice.chosen}, {choice.reason}", markup=False)
    ranked = sorted(choice.candidates, key=lambda each: each.cost_us or math.inf)
    texts = [_candidate_text(candidate) for candidate in ranked]
    console.print(f"{'':15}{', '.join(texts)}", markup=False)


def _candidate_text(candidate: Candidate) -> str:
    if candidate.cost_us is None:
        return f"not {candidate.name} ({candidate.why_not})"
    return f"{candidate.name} {candidate.cost_us:,.1f} us"


def _say_where(console: Console, path: Path | None, num_left: int | None) -> None:
    from ucm.kernels import cost_table

    if path is None:
        text = f"costs are estimated: {cost_table.VARIABLE} is none"
    elif cost_table.current():
        text = f"costs were measured: {path}"
    else:
        text = f"costs are estimated: measure them with `ucm doctor kernels --tune` ({path})"
    console.print(text, markup=False)
    if num_left:
        console.print(f"{num_left} cases were not measured: give more --budget-s", markup=False)
