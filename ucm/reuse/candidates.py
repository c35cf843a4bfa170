"""Which rows a blend may recompute, which it must, and what that may cost.

    | prefix | chunk rows: candidates | fresh | exact chunk | candidates | fresh | query |
             start                                                              stop

Cost, everywhere it is named: token-layers of candidate rows (1 for a row that ran a whole layer,
`projection_share` for one whose keys and values alone were computed) and of everything computed to
choose them, as a share of all candidates' token-layers. Fresh rows and the query's own pass are no
cost of reuse: they are computed whatever is reused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .protocols import BlendPlan


@dataclass(frozen=True, slots=True)
class CandidateRows:
    """Rows of chunks that may have drifted, in ascending order; N of them."""

    positions: Tensor
    """[N] int64."""
    offsets: Tensor
    """[N] int64: how far into its chunk each stands."""
    span_of: Tensor
    """[N] int64: index of its span in the plan."""
    num_spans: int
    """Spans of the plan that hold candidates."""

    @classmethod
    def of(cls, plan: BlendPlan, device: torch.device) -> CandidateRows:
        """The rows of the plan's spans that are not exact."""
        spans = [(i, span) for i, span in enumerate(plan.spans) if not span.is_exact]
        positions = [torch.arange(s.start, s.stop) for _, s in spans]
        offsets = [torch.arange(s.stop - s.start) + s.num_cut for _, s in spans]
        span_of = [torch.full((s.stop - s.start,), i) for i, s in spans]
        nothing = torch.empty(0, dtype=torch.int64)
        return cls(
            positions=torch.cat([nothing, *positions]).to(device),
            offsets=torch.cat([nothing, *offsets]).to(device),
            span_of=torch.cat([nothing, *span_of]).to(device),
            num_spans=len(spans),
        )

    def __len__(self) -> int:
        return len(self.positions)

    def heads(self, num_rows: int) -> Tensor:
        """[N] bool: the first rows of every chunk, as many in each, at most `num_rows` in all."""
        per_chunk = num_rows // max(1, self.num_spans)
        return self.offsets < per_chunk


def fresh_positions(plan: BlendPlan, device: torch.device) -> Tensor:
    """[F] int64: positions of the plan that no span covers."""
    is_fresh = torch.ones(plan.stop - plan.start, dtype=torch.bool)
    for span in plan.spans:
        is_fresh[span.start - plan.start : span.stop - plan.start] = False
    return (is_fresh.nonzero()[:, 0] + plan.start).to(device)


@dataclass(frozen=True, slots=True)
class Allowance:
    """What choosing and recomputing candidate rows may cost."""

    token_layers: float
    num_layers: int
    projection_share: float
    """What computing a row's keys and values costs, of a whole layer of it."""

    def less(self, token_layers: float) -> Allowance:
        """What is left after something was spent."""
        left = max(0.0, self.token_layers - token_layers)
        return Allowance(left, self.num_layers, self.projection_share)

    @property
    def row_cost(self) -> float:
        """Token-layers of one row in every layer; the last needs its keys and values only."""
        return self.num_layers - 1 + self.projection_share

    @property
    def constant_rows(self) -> int:
        """Rows that may run every layer."""
        return int(self.token_layers / self.row_cost + 1e-9)
