"""What the product has to reach in the benchmark of sparse attention, and whether it did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .gsa_probes import DENSE

Result = Mapping[str, Any]
DEFAULT = "gsa-k4"
WIDE, NARROW = "0.3", "0.125"


def targets_of(result: Result) -> list[dict[str, Any]]:
    """Every target with the value that was measured.

    Args:
        result: of the benchmark.

    Returns:
        For each its name, the value, the limit that the value may not pass (`at_most`), or has to
        reach (`at_least`), and whether it is `held`.
    """
    return judged(_targets(result))


def judged(targets: Iterable[tuple[str, float, str, float]]) -> list[dict[str, Any]]:
    """Targets as a result holds them.

    Args:
        targets: name, value, `at_most` or `at_least`, limit.
    """
    return [
        {"name": name, "value": value, kind: limit, "held": _is_held(value, kind, limit)}
        for name, value, kind, limit in targets
    ]


def _is_held(value: float, kind: str, limit: float) -> bool:
    return value <= limit if kind == "at_most" else value >= limit


def _targets(result: Result) -> Iterator[tuple[str, float, str, float]]:
    means = result["geomean"]
    for budget, against_box, against_mean in ((WIDE, 0.60, 0.75), (NARROW, 0.8, 0.8)):
        if budget in result["budgets"]:
            kl = {selector: cells[budget]["kl"] for selector, cells in means.items()}
            yield f"KL {DEFAULT} / box at {budget}", kl[DEFAULT] / kl["box"], "at_most", against_box
            ratio = kl[DEFAULT] / kl["mean"]
            yield f"KL {DEFAULT} / mean at {budget}", ratio, "at_most", against_mean
            yield f"KL shadow4 / oracle at {budget}", kl["shadow4"] / kl["oracle"], "at_most", 1.2
            # The negative control: large keys alone do not say what a block holds.
            yield f"KL maxnorm / mean at {budget}", kl["maxnorm"] / kl["mean"], "at_least", 1.0
    if WIDE in result["budgets"]:
        yield f"|dNLL| of {DEFAULT} at {WIDE}", means[DEFAULT][WIDE]["dnll"], "at_most", 0.03
        ratio = means[DEFAULT][WIDE]["bytes_ratio"]
        yield f"bytes moved by {DEFAULT} at {WIDE}", ratio, "at_most", 0.35
        yield f"choosing in a step, {DEFAULT}", _select_share(result), "at_most", 0.05
    missed = result["passkey"][DENSE] - result["passkey"][DEFAULT]
    yield f"pass-keys that {DEFAULT} misses", missed, "at_most", 1
    if "certified" in result:
        yield "certified: error / bound", result["certified"]["max_error_over_bound"], "at_most", 1
    if "conformal" in result:
        conformal = result["conformal"]
        distance = abs(conformal["violation_rate"] - conformal["delta"])
        yield "conformal: violations off delta", distance, "at_most", 0.01
    if "offload" in result:
        offload = result["offload"]
        gain = offload["gsa_tokens_s"] / offload["dense_tokens_s"]
        yield "offloaded decode: tokens/s over dense", gain, "at_least", 2.5
        yield "offloaded decode: |dNLL|", abs(offload["dnll"]), "at_most", 0.05


def _select_share(result: Result) -> float:
    """Choosing over the whole step, on the document nearest to 4 k tokens."""
    tokens: Mapping[str, int] = result["document_tokens"]
    name = min(tokens, key=lambda each: abs(tokens[each] - 4096))
    cell = result["per_document"][name][DEFAULT][WIDE]
    share: float = cell["select_ms_per_step"] / cell["step_ms"]
    return share
