"""The plot of the benchmark of reuse: quality against what is recomputed, a line a policy."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ucm.plurals import counted

from .gsa_plot import MARKERS, open_figure, save_figure
from .rag_targets import PROGRESSIVE

NO_BUDGET = ("none", "full")


def save_plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw KL to full prefill against total cost, means over prompts.

    Args:
        result: of the benchmark.
        path: whose suffix says the format; overwritten.

    Raises:
        OSError: it cannot be written.
    """
    figure, axes = open_figure(
        f"{result['model']}: mean of {counted(len(result['prompts']), 'prompt')}; lower left is "
        "better",
        "recomputed token-layers, % of the chunks', all probes included",
        "KL to full prefill, nats a token",
    )
    for index, (policy, kl) in enumerate(result["geomean_kl"].items()):
        if policy not in NO_BUDGET:
            costs = [100 * _mean_cost(result, policy, budget) for budget in kl]
            width = 2.5 if policy == PROGRESSIVE else 1.0
            axes.plot(costs, list(kl.values()), MARKERS[index] + "-", linewidth=width, label=policy)
    nothing = next(iter(result["geomean_kl"]["none"].values()))
    axes.axhline(nothing, linestyle="--", color="gray", linewidth=1.0, label="none")
    axes.legend(fontsize="small")
    save_figure(figure, path)


def _mean_cost(result: Mapping[str, Any], policy: str, budget: str) -> float:
    return statistics.fmean(
        prompt["policies"][policy][budget]["cost"] for prompt in result["prompts"]
    )
