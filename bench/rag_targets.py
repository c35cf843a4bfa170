"""What reuse at any position has to reach in its benchmark, and whether it did."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .gsa_targets import judged

Result = Mapping[str, Any]
PROGRESSIVE, BASELINE, NAIVE = "progressive", "cacheblend", "none"
AT = "0.18"
"""The budget that quality is promised at."""
TTFT_LIMITS = {"1k": 0.4, "3k": 0.3}


def targets_of(result: Result) -> list[dict[str, Any]]:
    """Every target with the value that was measured; see `gsa_targets.judged`.

    Args:
        result: of the benchmark.
    """
    return judged(_targets(result))


def _targets(result: Result) -> Iterator[tuple[str, float, str, float]]:
    means = {budget: kl_ratio(result["geomean_kl"], budget) for budget in result["budgets"]}
    if AT in means:
        yield f"KL {PROGRESSIVE} / {BASELINE} at {AT}, mean", means[AT], "at_most", 0.6
    for budget, ratio in means.items():
        if budget != AT:
            yield f"KL {PROGRESSIVE} / {BASELINE} at {budget}, mean", ratio, "at_most", 1.0
    for budget in means:
        name, ratio = worst_prompt(result, budget)
        yield f"KL {PROGRESSIVE} / {BASELINE} at {budget}, worst: {name}", ratio, "at_most", 1.3
    if AT in means:
        yield from _quality(result)
    for length, limit in TTFT_LIMITS.items():
        ratio = result["ttft_ratio"][length]
        if ratio is not None:
            yield f"TTFT at {length}, {PROGRESSIVE} {AT} / full prefill", ratio, "at_most", limit


def _quality(result: Result) -> Iterator[tuple[str, float, str, float]]:
    cells = [prompt["policies"][PROGRESSIVE][AT] for prompt in result["prompts"]]
    top1 = statistics.fmean(cell["top1"] for cell in cells)
    yield f"top-1 of {PROGRESSIVE} at {AT}, mean over prompts", top1, "at_least", 0.90
    dnll = statistics.fmean(abs(cell["dnll"]) for cell in cells)
    yield f"|dNLL| of {PROGRESSIVE} at {AT}, mean over prompts", dnll, "at_most", 0.07
    lost = gold_loss(result, PROGRESSIVE, AT)
    yield f"gold answers lost by {PROGRESSIVE} at {AT}, nats a token", lost, "at_most", 0.15


def kl_ratio(kl: Mapping[str, Mapping[str, float]], budget: str) -> float:
    """KL of `progressive` over that of `cacheblend`; 1 where both are nothing.

    Args:
        kl: policy, budget, KL.
        budget: where.
    """
    ours, theirs = kl[PROGRESSIVE][budget], kl[BASELINE][budget]
    if theirs > 0:
        return ours / theirs
    return 1.0 if ours == 0 else float("inf")


def worst_prompt(result: Result, budget: str) -> tuple[str, float]:
    """The prompt whose `kl_ratio` is highest, and that ratio."""
    ratios = [(kl_ratio(_kl_of(prompt), budget), prompt["name"]) for prompt in result["prompts"]]
    ratio, name = max(ratios)
    return name, ratio


def _kl_of(prompt: Result) -> dict[str, dict[str, float]]:
    return {
        policy: {budget: cell["kl"] for budget, cell in cells.items()}
        for policy, cells in prompt["policies"].items()
    }


def gold_loss(result: Result, policy: str, budget: str) -> float:
    """Log-probability of the gold answers that full prefill has more, mean over prompts.

    Returns:
        Nats a token; below 0 where the policy answers better.
    """
    return statistics.fmean(
        prompt["full"]["gold_logp"] - prompt["policies"][policy][budget]["gold_logp"]
        for prompt in result["prompts"]
    )


def gold_error(losses: Sequence[Sequence[float]]) -> float | None:
    """How well `gold_loss` is known: its standard error, taking questions for independent.

    A prompt's mean weighs as much as another's, however many questions it has.

    Args:
        losses: for each prompt those of its questions, nats a token.

    Returns:
        Nats a token; None for a single question, which tells nothing of it.
    """
    num_questions = sum(map(len, losses))
    if num_questions < 2:
        return None
    mean = statistics.fmean(statistics.fmean(each) for each in losses)
    variance = sum(sum((loss - mean) ** 2 for loss in each) / len(each) ** 2 for each in losses)
    return math.sqrt(variance * num_questions / (num_questions - 1)) / len(losses)
