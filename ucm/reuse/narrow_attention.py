"""Recomputed rows leave out what the query passes over.

    column, at or before the row              in wide layers    in narrow ones
    exact, fresh, or chosen for layer 0       seen              seen
    of the row's own chunk                    seen              seen
    of another chunk, and not chosen          seen              left out

A layer is *narrow* where the query's last tokens give less than `narrow_share` of their attention
to all that was not chosen together. Most layers look at few columns, and those are what was chosen;
some look at everything a little, the first above all. Fresh rows, the query's among them, see
everything in every layer.

What a recomputed row sees in a narrow layer is two pieces, the first of which it sees entirely:

    | seen columns before its chunk | its chunk, up to itself |

Envelope: `attend_rows` over those pieces, and a copy of the seen columns once a layer.

Shapes: S rows, T columns, U of them seen by all, N candidates, H query heads, G KV heads, D head
size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .candidates import CandidateRows
from .protocols import BlendPlan
from .row_attention import attend_rows

AttendFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Queries [S, H, D] and their positions [S], ascending, to what they attend to, [S, H, D]."""


class NarrowAttention:
    """Which layers of one blend are narrow, and attention in them."""

    def __init__(
        self,
        plan: BlendPlan,
        candidates: CandidateRows,
        is_chosen: Tensor,
        masses: Sequence[Tensor],
        narrow_share: float,
    ) -> None:
        """Begin when the rows of layer 0 are chosen.

        Args:
            plan: what stands where.
            candidates: rows that may be chosen.
            is_chosen: [N] bool.
            masses: `Importance.masses`, which may grow.
            narrow_share: a layer is narrow below it; 0: none is.
        """
        self._masses = masses
        self._is_kept = ~is_chosen
        self._narrow_share = narrow_share
        positions = candidates.positions
        is_seen = torch.ones(plan.stop, dtype=torch.bool, device=positions.device)
        is_seen[positions[self._is_kept]] = False
        self._seen = is_seen.nonzero()[:, 0]
        """[U] int64, ascending: positions."""
        self._chunks = [
            (span.start, span.stop, int((self._seen < span.start).sum()))
            for span in plan.spans
            if not span.is_exact
        ]
        """First position, the one behind the last, and how many seen columns stand before it."""

    def is_narrow(self, layer: int) -> bool:
        """Whether the query passes over what was not chosen; of layers whose masses are known."""
        return float(self._masses[layer][self._is_kept].sum()) < self._narrow_share

    def over(self, kv_2GTD: Tensor) -> AttendFn:
        """How rows attend to a narrow layer, whose KV is this."""
        seen_2GUD = kv_2GTD.index_select(2, self._seen)

        def attend(q_SHD: Tensor, positions: Tensor) -> Tensor:
            out_SHD = torch.empty_like(q_SHD)
            is_fresh = torch.ones_like(positions, dtype=torch.bool)
            where = positions.tolist()
            for start, stop, num_before in self._chunks:
                rows = slice(bisect_left(where, start), bisect_left(where, stop))
                is_fresh[rows] = False
                out_SHD[rows] = attend_rows(
                    q_SHD[rows],
                    kv_2GTD[:, :, start:],
                    positions[rows] - start,
                    seen_2GUD[:, :, :num_before],
                )
            fresh = is_fresh.nonzero()[:, 0]
            out_SHD[fresh] = attend_rows(q_SHD[fresh], kv_2GTD, positions[fresh])
            return out_SHD

        return attend
