"""Probes: a few rows of every chunk, carried through all layers, say how far the rest has drifted.

    drift of a probe    `relative_drift` in the last layer: what it would be now against what is
                        stored, and with that for the rows beside it, which were kept
    drift of a chunk    the median of its probes: chunk heads drift far in every prompt, and are few

What a probe attends to is repaired in part only, so that its drift understates a little, and less
with a larger budget.

A chunk above the limit is named, and whoever called computes it in full. Probes are recomputed
rows like any others: they are written, and they are paid for, before the policy gets the rest.

    residual    sum over chunks of  drift x (attention of the query on its rows that were kept)

in 0 .. the largest drift: what a larger budget makes smaller, and what `BudgetController` aims at.

Shapes: N candidates, S rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .candidates import CandidateRows

MAX_SHARE = 0.25
"""Of the rows that a budget pays for, at most these are probes."""


def choose_probes(
    candidates: CandidateRows, per_chunk: int, affordable: int, seed: int
) -> tuple[Tensor, int]:
    """Draw probes, as many in each chunk, without replacement.

    Args:
        candidates: what to draw from.
        per_chunk: how many a chunk at most.
        affordable: rows that the budget pays for in every layer.
        seed: of the choice.

    Returns:
        [N] bool, and how many they are.
    """
    chosen = torch.zeros(len(candidates), dtype=torch.bool, device=candidates.positions.device)
    per_chunk = min(per_chunk, int(affordable * MAX_SHARE) // max(1, candidates.num_spans))
    if per_chunk < 1:
        return chosen, 0
    generator = torch.Generator().manual_seed(seed)
    for span in sorted(set(candidates.span_of.tolist())):
        rows = (candidates.span_of == span).nonzero()[:, 0]
        order = torch.randperm(len(rows), generator=generator)[:per_chunk]
        chosen[rows[order.to(rows.device)]] = True
    return chosen, int(chosen.sum())


def median_drifts(drift_S: Tensor, span_of_S: Tensor, num_spans: int) -> tuple[float, ...]:
    """The median of the probes of each span; 0.0 for a span without any: it is exact."""
    medians = []
    for span in range(num_spans):
        here = drift_S[span_of_S == span]
        medians.append(float(here.median()) if len(here) else 0.0)
    return tuple(medians)


class KeptAttention:
    """How much of the query's attention falls on rows whose stored KV was kept."""

    def __init__(self, candidates: CandidateRows) -> None:
        self._span_of = candidates.span_of
        self._kept_N = torch.zeros(len(candidates), device=candidates.positions.device)
        self._total = 0.0

    def add(self, mass_N: Tensor | None, repaired_S: Tensor) -> None:
        """Add one layer.

        Args:
            mass_N: attention on each candidate there; None where nobody asked: as if on all alike.
            repaired_S: [S] int64, candidates whose KV of the layer was computed anew.
        """
        mass = torch.ones_like(self._kept_N) if mass_N is None else mass_N
        self._total += float(mass.sum())
        self._kept_N += mass.index_fill(0, repaired_S, 0.0)

    def residual(self, drifts: tuple[float, ...]) -> float:
        """Sum over spans of their drift and their share of kept attention."""
        drift = torch.tensor(drifts, device=self._span_of.device)
        return float((drift[self._span_of] * self._kept_N).sum()) / max(self._total, 1e-20)
