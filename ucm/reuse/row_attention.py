"""Attention of scattered rows over the KV of a request, grouped queries, causal by position.

    rows        ascending positions, gaps between them: those that are recomputed
    group       consecutive rows; its columns end at its last row, so that a group early in the
                prompt does not pay for what stands behind it

Envelope: a row reads the keys and values before it once a group of `GROUP_ROWS`; at 3,000
positions, 3 KV heads x 64, fp32 that is 4.6 MB a group. The products are 4 * H * D FLOPs a row and
column; a group computes, and hides, half of the columns between its first row and its last. A mask
differs from zero only there, and only there it is written: to compare and convert all columns took
a tenth of the products' time.

Shapes: S rows, T columns, H query heads, G KV heads, R = H / G, D head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP_ROWS = 96
"""Rows that share one mask: fewer waste fewer columns, more make larger products."""


def attend_rows(q_SHD: Tensor, kv_2GTD: Tensor, positions: Tensor) -> Tensor:
    """What each row attends to: the columns up to its own position.

    Args:
        q_SHD: queries, rotated, not scaled.
        kv_2GTD: keys and values of positions 0 .. T - 1, the rows' own among them.
        positions: [S] int64, ascending, below T.

    Returns:
        [S, H, D].
    """
    num_rows, heads, dim = q_SHD.shape
    out_SHD = q_SHD.new_empty(num_rows, heads, dim)
    if num_rows == 0:
        return out_SHD
    masks = _Masks(q_SHD, positions)
    # KV heads are the batch and the queries of a group its heads: grouping costs no copy.
    kv_heads = kv_2GTD.shape[1]
    shape = (num_rows, kv_heads, heads // kv_heads, dim)
    q_GRSD, out_GRSD = (each.view(shape).permute(1, 2, 0, 3) for each in (q_SHD, out_SHD))
    for first in range(0, num_rows, GROUP_ROWS):
        rows = slice(first, min(first + GROUP_ROWS, num_rows))
        mask = masks.of(rows)
        k, v = (
            part[:, None, : mask.shape[1]].expand(-1, heads // kv_heads, -1, -1) for part in kv_2GTD
        )
        out = F.scaled_dot_product_attention(q_GRSD[:, :, rows], k, v, attn_mask=mask)
        out_GRSD[:, :, rows].copy_(out)
    return out_SHD


class _Masks:
    """The masks of consecutive groups: one buffer, zero but where the last group wrote."""

    def __init__(self, like: Tensor, positions: Tensor) -> None:
        self._positions = positions
        self._where = positions.tolist()
        count = self._where[-1] + 1
        self._mask_ST = like.new_zeros(min(GROUP_ROWS, len(positions)), count)
        self._written = self._mask_ST[:0]
        # The mask of position p is `count` numbers of this, from count - 1 - p on.
        self._edge = like.new_zeros(2 * count)
        self._edge[count:] = -math.inf

    def of(self, rows: slice) -> Tensor:
        """[len(rows), columns up to the last row]: 0 where a row sees a column, -inf elsewhere."""
        first, stop = self._where[rows.start], self._where[rows.stop - 1] + 1
        self._written.zero_()
        mask = self._mask_ST[: rows.stop - rows.start, :stop]
        self._written = mask[:, first:]
        edges = self._edge[first:].unfold(0, stop - first, 1)
        at = self._mask_ST.shape[1] - 1 - self._positions[rows]
        torch.index_select(edges, 0, at, out=self._written)
        return mask
