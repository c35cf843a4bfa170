"""What blocks are ranked by in the benchmark of sparse attention: the truth, or their summaries.

`oracle` reads every key to find the best blocks: what no selector can beat at the same budget, but
by chance. All others are the product's kinds of summaries, scored by its own `SummaryTable`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ucm.kernels.block_scores import SummaryTable
from ucm.kernels.summarize import summarize
from ucm.kernels.summary_record import Records, layout_dtype
from ucm.layout import KvDtype, KvLayout
from ucm.types import SummaryKind

from .gsa_window import Bools, Context, Floats

ORACLE = "oracle"
SELECTORS = (
    ORACLE,
    "gsa-k4",
    "gsa-2",
    "shadow2",
    "shadow4",
    "mean",
    "box",
    "cuboid",
    "hash128",
    "maxnorm",
)
NOT_SCORED = ("value_scale", "value_mean", "value_radius", "radii", "radius", "errors")
"""Fields of a record that bounds and certificates need, not the ranking."""
KV_ELEMENT_BYTES = 2
"""Dense bytes are counted as of bf16 KV: of fp32 they would be twice as many, which flatters."""


class OracleRanking:
    """Ranks by the true attention mass."""

    def log_mass(self, layer: int, queries: Floats, kv_layer: Tensor, true: Floats) -> Floats:
        """See `Ranking`."""
        del layer, queries, kv_layer
        return true

    def must(self, layer: int) -> Bools:
        """See `Ranking`: nothing is unknown to it."""
        del layer
        return np.zeros(1 << 20, np.bool_)


@dataclass(slots=True)
class _Layer:
    table: SummaryTable
    num_context: int


class SummaryRanking:
    """Ranks by summaries; those of the context are made once, the window's in each pass."""

    def __init__(self, kind: SummaryKind, context: Context) -> None:
        """Summarise the context's full blocks."""
        pool = context.pool
        layers, _, _, groups, tokens, dim = pool.shape
        self.kind = kind
        self.layout = KvLayout(
            num_layers=1,
            num_kv_heads=groups,
            head_dim=dim,
            block_tokens=tokens,
            dtype=KvDtype(str(pool.dtype).removeprefix("torch.")),
        )
        num_full = context.num_tokens // tokens
        self._layers = []
        for layer in range(layers):
            table = SummaryTable(kind, self.layout)
            table.extend(self._records(pool[layer, :num_full]))
            self._layers.append(_Layer(table, num_full))

    def log_mass(self, layer: int, queries: Floats, kv_layer: Tensor, true: Floats) -> Floats:
        """See `Ranking`; blocks that are full in the window get their summary now."""
        ours = self._layers[layer]
        ours.table.truncate(ours.num_context)
        # The last block may be partly filled: then it is nobody's candidate.
        fresh = kv_layer[ours.num_context : true.shape[-1]]
        if len(fresh):
            ours.table.extend(self._records(fresh))
        return ours.table.log_mass(0, queries)

    def must(self, layer: int) -> Bools:
        """See `Ranking`."""
        return self._layers[layer].table.must(0)

    def _records(self, slabs: Tensor) -> Records:
        """[n, 1, G] of the blocks [n, 2, G, B, D] of one layer."""
        return summarize(self.kind, slabs.numpy(), self.layout.dtype)[:, None]


def ranking_of(selector: str, context: Context) -> OracleRanking | SummaryRanking:
    """The ranking that a selector's name stands for."""
    return OracleRanking() if selector == ORACLE else SummaryRanking(SummaryKind(selector), context)


def summary_share(selector: str, context: Context) -> float:
    """Bytes of a summary that ranking reads over those of its block's KV in bf16; 0 of the oracle.

    The oracle's reading of all keys is not counted: it is a yardstick, no method.
    """
    if selector == ORACLE:
        return 0.0
    layout = context.layout
    fields = layout_dtype(layout, SummaryKind(selector)).fields
    assert fields is not None
    read = sum(dtype.itemsize for name, (dtype, *_) in fields.items() if name not in NOT_SCORED)
    return read / (2 * layout.block_tokens * layout.head_dim * KV_ELEMENT_BYTES)
