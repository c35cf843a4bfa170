"""Which chunk rows the query will look at: its last tokens, run over the stale KV.

    for every layer     weights of the last `num_queries` query tokens, all heads, on chunk rows

Stage 1 of ProphetKV (arXiv 2602.02579): a query attends over reused KV much as it would over exact
KV, long before the output is right. It keeps each layer's weights apart, because what matters to
a row that is about to run layer l is how it is looked at in the layers behind l.

Fresh rows, and query tokens before the last few, have no KV yet: their columns are left out. Those
in front of the first chunk are the exception: all that they attend to is exact, so they go along,
and are final. A few rows cost little more than the pass over the weights that is made anyway.

Shapes: F rows in front, Q query tokens, S = F + Q, T positions before the query, N candidates,
H query heads, G KV heads, R = H / G, D head size, C hidden size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .protocols import BlendPlan, LayerwiseModel
from .row_attention import attend_rows


class Importance:
    """Attention mass on each candidate in each layer, found layer after layer."""

    def __init__(
        self,
        model: LayerwiseModel,
        plan: BlendPlan,
        num_queries: int,
        front: Tensor,
        absent: Tensor,
    ) -> None:
        """Begin before layer 0.

        Args:
            model: what is run.
            plan: the request.
            num_queries: how many of its last tokens are run.
            front: [F] int64, positions without KV before the first chunk.
            absent: [A] int64, other positions before the query that have no KV.
        """
        self.num_done = 0
        """Layers whose masses are known."""
        self.front = front
        self._model = model
        first = len(plan.token_ids) - num_queries
        queries = torch.arange(first, len(plan.token_ids), device=front.device)
        self._positions = torch.cat((front, queries))
        self._x_SC = model.embed([plan.token_ids[i] for i in self._positions.tolist()])
        self._mask = _mask(queries, plan.stop, absent)
        self.masses: list[Tensor] = []
        """[N] fp32 for each layer that is known: the share of the queries' attention that each
        candidate gets."""

    @property
    def num_queries(self) -> int:
        """How many query tokens are run."""
        return len(self._positions) - len(self.front)

    def run_layer(self, kv_2GTD: Tensor, candidates: Tensor) -> Tensor:
        """Run the next layer.

        Args:
            kv_2GTD: its KV; the rows in front are put into it.
            candidates: [N] int64, positions.

        Returns:
            The final keys and values of the rows in front, [2, G, F, D].
        """
        layer, num_front = self.num_done, len(self.front)
        q_SHD, new_2GSD = self._model.project(layer, self._x_SC, self._positions)
        front_2GFD, own_2GQD = new_2GSD[:, :, :num_front], new_2GSD[:, :, num_front:]
        kv_2GTD.index_copy_(2, self.front, front_2GFD)
        attended, mass_T = _attend(q_SHD[num_front:], kv_2GTD, own_2GQD, self._mask)
        self.masses.append(mass_T.index_select(0, candidates))
        self.num_done += 1
        if self.num_done < self._model.num_layers:
            if num_front:
                first = attend_rows(q_SHD[:num_front], kv_2GTD, self.front)
                attended = torch.cat((first, attended))
            self._x_SC = self._model.finish(layer, self._x_SC, attended)
        return front_2GFD

    def behind(self, layer: int) -> Tensor:
        """[N] fp32: mass in the layers behind `layer` that are known; sums to 1 or is all 0."""
        known = self.masses[layer + 1 :]
        if not known:
            return torch.zeros_like(self.masses[-1])
        mass = torch.stack(known).sum(0)
        return mass / mass.sum().clamp_min_(1e-20)


def _mask(queries: Tensor, num_columns: int, absent: Tensor) -> Tensor:
    """[Q, T + Q] fp32, 0 for what a query token sees and -inf for the rest."""
    columns = torch.cat((torch.arange(num_columns, device=queries.device), queries))
    is_hidden = columns > queries.unsqueeze(1)
    is_hidden[:, absent] = True
    return torch.zeros(is_hidden.shape, device=queries.device).masked_fill_(is_hidden, -math.inf)


def _attend(
    q_QHD: Tensor, kv_2GTD: Tensor, own_2GQD: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention [Q, H, D], and each of the T columns' share of it, [T] fp32."""
    num_queries, heads, dim = q_QHD.shape
    kv_heads, num_columns = kv_2GTD.shape[1:3]
    num_all = num_columns + num_queries
    q_GRQD = q_QHD.reshape(num_queries, kv_heads, -1, dim).permute(1, 2, 0, 3)
    q_GXD = q_GRQD.reshape(kv_heads, -1, dim)
    # Megabytes at some thousand columns, so what can be done in place is.
    scores_GXT = q_GXD.new_empty(kv_heads, q_GXD.shape[1], num_all)
    past_GXT, own_GXT = scores_GXT.split_with_sizes([num_columns, num_queries], 2)
    torch.bmm(q_GXD, kv_2GTD[0].transpose(1, 2), out=past_GXT)
    torch.bmm(q_GXD, own_2GQD[0].transpose(1, 2), out=own_GXT)
    wide_GXT = scores_GXT.float()
    wide_GRQT = wide_GXT.view(kv_heads, -1, num_queries, num_all)
    torch.add(mask, wide_GRQT, alpha=dim**-0.5, out=wide_GRQT)
    torch.softmax(wide_GXT, -1, out=wide_GXT)
    mass_T = wide_GRQT[:, :, :, :num_columns].sum((0, 1, 2))
    past_GXT, own_GXT = wide_GXT.to(q_QHD.dtype).split_with_sizes([num_columns, num_queries], 2)
    out_GXD = past_GXT @ kv_2GTD[1] + own_GXT @ own_2GQD[1]
    out_GRQD = out_GXD.view(kv_heads, -1, num_queries, dim)
    mass_T /= heads * num_queries
    return out_GRQD.permute(2, 0, 1, 3).reshape(num_queries, heads, dim), mass_T
