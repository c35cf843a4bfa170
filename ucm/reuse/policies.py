"""Which candidate rows run which layer: the published rules, behind one protocol.

    policy       layer 0            layer 1 ... last            source
    none         nothing            nothing
    full         all                all
    lego         chunk heads        the same                    EPIC, arXiv 2410.15332
    query        looked at most     the same                    ProphetKV, arXiv 2602.02579
    cacheblend   all                values moved most in 1      CacheBlend, arXiv 2405.16444
    progressive  see `progressive`

Invariant: a set holds only rows of the set before it. A row's KV in layer l needs its hidden state
behind layer l - 1, so that a row which left cannot come back.

Every policy here spends the same allowance, counted in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .candidates import Allowance, CandidateRows
from .drift import value_drift
from .importance import Importance


@dataclass(frozen=True, slots=True)
class ProjectedRows:
    """Candidate rows whose keys and values of a layer were just computed; S of them."""

    layer: int
    indexes: Tensor
    """[S] int64 into the candidates, ascending."""
    new: Tensor
    """Keys and values, [2, G, S, D]."""
    old: Tensor
    """What stands at their positions otherwise, keys at the new position."""


class RowPolicy(Protocol):
    """Chooses rows; asked once for each layer, in order."""

    def first(self) -> Tensor:
        """[N] bool: candidates whose KV of layer 0 is computed, and that run it."""

    def keep(self, rows: ProjectedRows) -> Tensor:
        """[S] bool: rows that run this layer, 1 or later, and with that enter the next."""


@dataclass(frozen=True, slots=True)
class ConstantRows:
    """The same rows in every layer."""

    chosen: Tensor
    """[N] bool."""

    def first(self) -> Tensor:
        """See `RowPolicy.first`."""
        return self.chosen

    def keep(self, rows: ProjectedRows) -> Tensor:
        """See `RowPolicy.keep`."""
        return torch.ones_like(rows.indexes, dtype=torch.bool)


def no_rows(candidates: CandidateRows) -> RowPolicy:
    """Plain reuse."""
    return ConstantRows(torch.zeros_like(candidates.positions, dtype=torch.bool))


def all_rows(candidates: CandidateRows) -> RowPolicy:
    """Compute everything: what the others are measured against."""
    return ConstantRows(torch.ones_like(candidates.positions, dtype=torch.bool))


def chunk_heads(candidates: CandidateRows, allowance: Allowance) -> RowPolicy:
    """The first rows of every chunk: LegoLink of EPIC (arXiv 2410.15332).

    A chunk's first tokens are attention sinks only where it was encoded, and drift most.
    """
    return ConstantRows(candidates.heads(allowance.constant_rows))


def looked_at_most(importance: Importance, allowance: Allowance) -> RowPolicy:
    """The rows with most of the query's attention over all layers: ProphetKV (2602.02579)."""
    return ConstantRows(top_rows(importance.behind(0), allowance.constant_rows))


class CacheBlend:
    """Rows whose values moved most in the check layer: CacheBlend (arXiv 2405.16444).

    Layer 0 is computed in full, because the check layer 1 is the first that can drift. The set
    chosen there is kept to the end, as the published code does. Where the allowance does not pay
    for layer 0 and the check, nothing is recomputed.
    """

    def __init__(self, candidates: CandidateRows, allowance: Allowance) -> None:
        self._num_candidates = len(candidates)
        checked = self._num_candidates * (1 + allowance.projection_share)
        self._can_check = checked <= allowance.token_layers
        left = allowance.less(checked).token_layers
        self._num_rows = int(left / max(1, allowance.num_layers - 2) + 1e-9)
        self._device = candidates.positions.device

    def first(self) -> Tensor:
        """See `RowPolicy.first`."""
        shape = (self._num_candidates,)
        return torch.full(shape, self._can_check, dtype=torch.bool, device=self._device)

    def keep(self, rows: ProjectedRows) -> Tensor:
        """See `RowPolicy.keep`."""
        if rows.layer > 1:
            return torch.ones_like(rows.indexes, dtype=torch.bool)
        return top_rows(value_drift(rows.new, rows.old), self._num_rows)


def top_rows(scores: Tensor, num_rows: int) -> Tensor:
    """Mask of the `num_rows` largest of [N] scores; of all where there are fewer."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.topk(max(0, min(num_rows, len(scores)))).indices] = True
    return chosen
