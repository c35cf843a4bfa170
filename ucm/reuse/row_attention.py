"""Attention of scattered rows over the KV of a request, grouped queries, causal by position.

    rows   ascending positions, gaps between them: those that are recomputed

    columns         up to where `upper` begins     from there on
    lower half      the same again, in halves      hidden
    upper half      all of them, without a mask    the same again, in halves

What is left of the diagonal when halves are small (`MASKED_PAIRS`) is done with a mask. The parts
of a row are merged by their log-sum-exp. Queries of a KV head are rows of one product.

Sources: FlashAttention-2 (arXiv 2307.08691); Flash-Decoding (merging by the log-sum-exp).

Envelope: 4 * H * D FLOPs a row and column that it sees. A mask costs what it hides, and a third of
the kernel's rate besides; a merge reads and writes a row's output, as much as 20 columns cost.

Shapes: S rows, T columns, H query heads, G KV heads, R = H / G, D head size, X = S * R.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ucm.kernels.attention import attend_folded

MASKED_PAIRS = 32_768
"""Rows times columns that are done with a mask: fewer would save less than another call costs."""
MASKED_ROWS = 32
"""So few rows are not halved, however far apart they stand."""


def attend_rows(
    q_SHD: Tensor, kv_2GTD: Tensor, positions: Tensor, before_2GUD: Tensor | None = None
) -> Tensor:
    """What each row attends to: the columns up to its own position.

    Args:
        q_SHD: queries, rotated, not scaled.
        kv_2GTD: keys and values of positions 0 .. T - 1, the rows' own among them.
        positions: [S] int64, ascending, below T.
        before_2GUD: U more columns, any number, all of which every row sees.

    Returns:
        [S, H, D].
    """
    if len(q_SHD) == 0:
        return q_SHD.new_empty(q_SHD.shape)
    attention = _RowAttention(q_SHD, kv_2GTD, positions)
    attention.run(0, len(q_SHD), 0)
    if before_2GUD is not None and before_2GUD.shape[2]:
        attention.add(0, len(q_SHD), before_2GUD)
    return attention.result()


class _RowAttention:
    """One call's rows and what is known of their attention."""

    def __init__(self, q_SHD: Tensor, kv_2GTD: Tensor, positions: Tensor) -> None:
        num_rows, heads, dim = q_SHD.shape
        kv_heads = kv_2GTD.shape[1]
        self._repeat = heads // kv_heads
        self._kv_2GTD = kv_2GTD
        self._dtype = q_SHD.dtype
        self._where = positions.tolist()
        self._positions_S1 = positions.unsqueeze(1)
        self._columns = torch.arange(self._where[-1] + 1, device=positions.device)
        q_SGRD = q_SHD.view(num_rows, kv_heads, self._repeat, dim)
        q_XGD = q_SGRD.transpose(1, 2).reshape(-1, kv_heads, dim)
        # Parts are merged in fp32, whatever they are computed in.
        wide = torch.promote_types(q_SHD.dtype, torch.float32)
        self._q_GXD = q_XGD.transpose(0, 1)
        self._out_GXD = torch.empty_like(q_XGD, dtype=wide).transpose(0, 1)
        self._lse_GX = self._out_GXD.new_empty(len(q_XGD), kv_heads).t()

    def run(self, first: int, stop: int, begin: int) -> None:
        """Rows `first` to `stop` - 1, none of which stands before column `begin`, from there on."""
        end = self._where[stop - 1] + 1
        num_rows = stop - first
        if num_rows <= MASKED_ROWS or num_rows * (end - begin) <= MASKED_PAIRS:
            self._begin(first, stop, begin, end)
            return
        middle = (first + stop) // 2
        seen = self._where[middle]
        self.run(first, middle, begin)
        self.run(middle, stop, seen)
        self.add(middle, stop, self._kv_2GTD[:, :, begin:seen])

    def add(self, first: int, stop: int, kv_2GUD: Tensor) -> None:
        """Columns that each of these rows sees, merged with what is known."""
        x = slice(first * self._repeat, stop * self._repeat)
        part, part_lse = attend_folded(self._q_GXD[:, x], kv_2GUD)
        out, lse = self._out_GXD[:, x], self._lse_GX[:, x]
        out.lerp_(part.to(out.dtype), torch.sigmoid(part_lse - lse).unsqueeze(-1))
        torch.logaddexp(lse, part_lse, out=lse)

    def result(self) -> Tensor:
        """[S, H, D]: what is known; after `run`."""
        out_XGD = self._out_GXD.transpose(0, 1)
        out_SRGD = out_XGD.view(-1, self._repeat, *out_XGD.shape[1:])
        return out_SRGD.transpose(1, 2).flatten(1, 2).to(self._dtype)

    def _begin(self, first: int, stop: int, begin: int, end: int) -> None:
        """A piece of the diagonal: all that is known of these rows so far."""
        x = slice(first * self._repeat, stop * self._repeat)
        is_hidden = self._columns[begin:end] > self._positions_S1[first:stop]
        mask_ST = self._q_GXD.new_zeros(is_hidden.shape).masked_fill_(is_hidden, -math.inf)
        mask = mask_ST.unsqueeze(1).expand(-1, self._repeat, -1).flatten(0, 1)
        kv = self._kv_2GTD[:, :, begin:end]
        self._out_GXD[:, x], self._lse_GX[:, x] = attend_folded(self._q_GXD[:, x], kv, mask)
