"""Attention of scattered rows over the KV of a request, grouped queries, causal by position.

    rows        ascending positions, gaps between them: those that are recomputed
    group       consecutive rows; its columns end at its last row, so that a group early in the
                prompt does not pay for what stands behind it

Envelope: a row reads the keys and values before it once a group of `GROUP_ROWS`; at 3,000
positions, 3 KV heads x 64, fp32 that is 4.6 MB a group. The products are 4 * H * D FLOPs a row and
column, 37 % of which a group's mask throws away at worst where rows are spread evenly.

Shapes: S rows, T columns, H query heads, G KV heads, R = H / G, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP_ROWS = 64
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
    groups = [slice(i, i + GROUP_ROWS) for i in range(0, len(positions), GROUP_ROWS)]
    parts = [_attend_group(q_SHD[rows], kv_2GTD, positions[rows]) for rows in groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_group(q_SHD: Tensor, kv_2GTD: Tensor, positions: Tensor) -> Tensor:
    num_rows, heads, dim = q_SHD.shape
    kv_heads = kv_2GTD.shape[1]
    repeat, num_columns = heads // kv_heads, int(positions[-1]) + 1
    # KV heads are the batch and the queries of a group its heads: grouping costs no copy.
    q_GRSD = q_SHD.reshape(num_rows, kv_heads, repeat, dim).permute(1, 2, 0, 3)
    shape = (kv_heads, repeat, num_columns, dim)
    k, v = (part[:, None, :num_columns].expand(shape) for part in kv_2GTD)
    columns = torch.arange(num_columns, device=positions.device)
    is_seen = columns <= positions.unsqueeze(1)
    out_GRSD = F.scaled_dot_product_attention(q_GRSD, k, v, attn_mask=is_seen)
    return out_GRSD.permute(2, 0, 1, 3).reshape(num_rows, heads, dim)
