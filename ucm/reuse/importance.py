"""Which chunk rows the query will look at: its last tokens, run over the stale KV.

    for every layer     weights of the last `num_queries` query tokens, all heads, on chunk rows

Stage 1 of ProphetKV (arXiv 2602.02579): a query attends over reused KV much as it would over exact
KV, long before the output is right. It keeps each layer's weights apart, because what matters to
a row that is about to run layer l is how it is looked at in the layers behind l.

Fresh rows, and query tokens before the last few, have no KV yet: their columns are left out.

Shapes: Q query tokens, T positions before the query, N candidates, H query heads, G KV heads,
R = H / G, D head size, C hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .protocols import LayerwiseModel


class Importance:
    """Attention mass on each candidate in each layer, found layer after layer."""

    def __init__(
        self, model: LayerwiseModel, token_ids: Sequence[int], first: int, columns: Tensor
    ) -> None:
        """Begin before layer 0.

        Args:
            model: what is run.
            token_ids: of the last query tokens.
            first: position of the first of them.
            columns: [T] fp32, 0 for positions that have KV and -inf for those without.
        """
        self.num_done = 0
        """Layers whose masses are known."""
        self._model = model
        self._x_QC = model.embed(token_ids)
        device = columns.device
        own = torch.arange(len(token_ids), device=device)
        ahead = torch.zeros(len(own), len(own), device=device)
        ahead.masked_fill_(own > own.unsqueeze(1), -math.inf)
        self._mask = torch.cat((columns.expand(len(own), -1), ahead), 1)
        self._positions = own + first
        self.masses: list[Tensor] = []
        """[N] fp32 for each layer that is known: attention on each candidate."""

    @property
    def num_queries(self) -> int:
        """How many tokens are run."""
        return len(self._positions)

    def run_layer(self, kv_2GTD: Tensor, candidates: Tensor) -> None:
        """Run the next layer; `candidates` are positions, [N] int64."""
        layer = self.num_done
        q_QHD, own_2GQD = self._model.project(layer, self._x_QC, self._positions)
        attended, weights_QT = _attend(q_QHD, kv_2GTD, own_2GQD, self._mask)
        self.masses.append(weights_QT.index_select(0, candidates))
        self.num_done += 1
        if self.num_done < self._model.num_layers:
            self._x_QC = self._model.finish(layer, self._x_QC, attended)

    def behind(self, layer: int) -> Tensor:
        """[N] fp32: mass in the layers behind `layer` that are known; sums to 1 or is all 0."""
        known = self.masses[layer + 1 :]
        if not known:
            return torch.zeros_like(self.masses[-1])
        mass = torch.stack(known).sum(0)
        return mass / mass.sum().clamp_min_(1e-20)


def _attend(
    q_QHD: Tensor, kv_2GTD: Tensor, own_2GQD: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention [Q, H, D], and the mass on each of the T columns, [T] fp32."""
    num_queries, heads, dim = q_QHD.shape
    kv_heads, num_columns = kv_2GTD.shape[1:3]
    q_GRQD = q_QHD.reshape(num_queries, kv_heads, -1, dim).permute(1, 2, 0, 3)
    q_GXD = q_GRQD.reshape(kv_heads, -1, dim)
    scores = [q_GXD @ keys.transpose(1, 2) for keys in (kv_2GTD[0], own_2GQD[0])]
    scores_GRQT = torch.cat(scores, 2).view(kv_heads, -1, num_queries, mask.shape[1])
    weights = (scores_GRQT.float() * dim**-0.5).add_(mask).softmax(-1)
    mass_T = weights[..., :num_columns].sum((0, 1, 2))
    weights_GXT = weights.to(q_QHD.dtype).view(kv_heads, -1, mask.shape[1])
    past_GXT, own_GXT = weights_GXT.split((num_columns, num_queries), 2)
    out_GXD = past_GXT @ kv_2GTD[1] + own_GXT @ own_2GQD[1]
    out_GRQD = out_GXD.view(kv_heads, -1, num_queries, dim)
    return out_GRQD.permute(2, 0, 1, 3).reshape(num_queries, heads, dim), mass_T
