"""Progressive recompute: sets that begin wide and shrink to what drifts and is looked at.

    layer     0    1    2    ...          L-2   L-1
    rows      ###########################
              ########################
              ###################   n_l ~ (1 - l/(L-1))^decay, and earlier for rows below theta

A row that leaves at layer l has the KV of layers 0 .. l+1 repaired and keeps the stored KV behind
that. Stated as an allocation: row j pays its depth and gains the sum over those layers of
(how far it drifted) x (how much the query looks at it). What it will gain is unknown when the set
of layer 0 is chosen, and known ever better with every layer that it runs.

    S_0    the first rows of every chunk, and those that the query looks at most over all layers
           (`importance`); half as many again as the schedule says, since one layer tells much of
           a row; no pass over all rows, which a budget of .05 could hardly pay for
    S_l    of S_l-1, the rows of largest  sqrt(drift_l) x (importance behind l): the root, because
           the drift of an early layer is a noisy sign of that of a late one
    theta  a row that drifted less leaves at once; what it would have cost goes to later layers

Importance of the layers *behind* l counts, not of l itself: row j's new KV of layer l is written
already when the decision falls, and what is bought is layer l + 1 and on.

At a low budget no chunk heads are taken: there is no row to spare for what nobody may look at.

Sources: ProphetKV (arXiv 2602.02579) for importance over stale KV, CacheBlend (2405.16444) for
drift and for filtering gradually, EPIC (2410.15332) for chunk heads.
"""

from __future__ import annotations

from torch import Tensor

from .candidates import Allowance, CandidateRows
from .drift import relative_drift
from .importance import Importance
from .options import BlendOptions
from .policies import ProjectedRows, top_rows

HEAD_ROWS = 8
"""First rows of a chunk that begin in the set: they were its attention sinks and drift most."""
HEAD_SHARE = 0.15
"""Of the first set, at most this much are heads."""
WIDTH = 1.5
"""The first set, in units of what the schedule says."""
DRIFT_POWER = 0.5
"""Of the drift in a row's score."""
LOW_BUDGET = 0.08
"""Below this budget no heads are taken."""
FLOOR = 0.01
"""Importance that every row has, as a share of the mean: drift alone decides between two rows that
the last query tokens do not look at."""


class Progressive:
    """The default `RowPolicy`; see the module."""

    def __init__(
        self,
        candidates: CandidateRows,
        importance: Importance,
        allowance: Allowance,
        options: BlendOptions,
    ) -> None:
        self._candidates = candidates
        self._importance = importance
        self._theta = options.theta
        self._left = allowance.token_layers
        last = allowance.num_layers - 1
        self._is_low = options.budget < LOW_BUDGET
        self._weights = [(1 - layer / last) ** options.decay for layer in range(last)]
        # Layer 0's set pays for its keys and values there too; those of a later layer are paid
        # for by the layer before it.
        self._first_cost = 1 + allowance.projection_share

    def first(self) -> Tensor:
        """See `RowPolicy.first`."""
        share = self._weights[0] / sum(self._weights)
        paid = int(self._left * share / (1 + (self._first_cost - 1) * share))
        num_rows = min(int(WIDTH * paid), int(self._left / self._first_cost))
        chosen = top_rows(self._importance.behind(0) + self._heads(num_rows), num_rows)
        self._left -= self._first_cost * int(chosen.sum())
        return chosen

    def _heads(self, num_rows: int) -> Tensor:
        """[N] fp32: more than any importance for the chunk heads that begin in the set, else 0."""
        candidates = self._candidates
        most = 0 if self._is_low else int(num_rows * HEAD_SHARE)
        is_head = candidates.heads(min(most, HEAD_ROWS * candidates.num_spans))
        return is_head.float() * 2

    def keep(self, rows: ProjectedRows) -> Tensor:
        """See `RowPolicy.keep`."""
        weights = self._weights[rows.layer :]
        num_rows = int(self._left * weights[0] / sum(weights) + 1e-6)
        drift = relative_drift(rows.new, rows.old)
        behind = self._importance.behind(rows.layer)
        score = drift**DRIFT_POWER * (behind[rows.indexes] + FLOOR / len(behind))
        is_moved = drift >= self._theta
        chosen = top_rows(score.where(is_moved, -1.0), min(num_rows, int(is_moved.sum())))
        self._left -= int(chosen.sum())
        return chosen
