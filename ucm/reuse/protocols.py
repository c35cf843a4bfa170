"""What blending is to the model it runs and to the place that holds the KV.

    blend -> LayerwiseModel   embed, then project and finish of every layer: computes
          -> KvRows           read and write of every layer: where the KV comes from and goes to

Shapes: S rows that are recomputed, T positions of the request so far, H query heads, G KV heads,
D head size, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


class LayerwiseModel(Protocol):
    """A decoder that is run a layer at a time; `ucm.engine.model.LlamaModel` is one."""

    @property
    def num_layers(self) -> int:
        """How many layers there are."""

    @property
    def projection_share(self) -> float:
        """Weights behind a layer's queries, keys and values, of all weights of the layer."""

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """The first hidden states, [S, C]."""

    def project(self, layer: int, x_TC: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's queries [S, H, D], and its keys (rotated) and values [2, G, S, D]."""

    def finish(self, layer: int, x_TC: Tensor, attended_THD: Tensor) -> Tensor:
        """The hidden states behind a layer, given what its attention gave; [S, C]."""

    def logits(self, x_TC: Tensor) -> Tensor:
        """[S, vocab_size] fp32 of hidden states behind the last layer."""


class KvRows(Protocol):
    """The KV of one request's positions, a layer at a time."""

    def read(self, layer: int) -> Tensor:
        """The KV of positions 0..stop - 1, [2, G, stop, D] contiguous, K post-RoPE.

        Exact rows as they are, rows of chunks moved to their new positions from the original bytes
        or as `write` left them; what nobody has computed yet is arbitrary. The caller may write
        into it; it is good until the next `read`.
        """

    def write(self, layer: int, positions: Tensor, kv_2GSD: Tensor) -> None:
        """Make these rows of a layer final.

        Args:
            layer: its number.
            positions: [S] int64, ascending.
            kv_2GSD: their keys (post-RoPE) and values.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSpan:
    """Rows of one chunk that stand in the request: whole blocks, but for a cut in front."""

    start: int
    """First position."""
    stop: int
    is_exact: bool = False
    """Whether the chunk stands where it was encoded, behind the same tokens: nothing to repair."""
    num_cut: int = 0
    """Rows of the chunk that stand before `start` and are exact already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendPlan:
    """What is to be blended: positions `start` to `stop` - 1 of a request.

    Positions before `start` are exact. Those in no span are computed in every layer.
    """

    token_ids: Sequence[int]
    """All of the request, its query included."""
    spans: tuple[ChunkSpan, ...]
    """Ascending, disjoint, within `start` to `query_start`."""
    start: int
    stop: int
    query_start: int
    """Behind the last chunk, at most `stop`: from here on the tokens say which rows matter. Those
    before `stop` are computed with the rows that are repaired, exactly as behind them."""

    @property
    def has_last(self) -> bool:
        """Whether the request's last token is computed too: `BlendOutcome.last` is asked for."""
        return self.stop == len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendStep:
    """Where a blend has come to."""

    next_layer: int
    """The layer whose rows it reads next."""
    token_layers: float
    """What it computed since the step before; fresh rows and probes included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendOutcome:
    """What a blend did."""

    cost: float
    """Recomputed token-layers of chunk rows, all probes included, of all chunk token-layers."""
    rows_per_layer: tuple[int, ...]
    """Chunk rows that ran each layer."""
    num_fresh: int
    """Rows computed in every layer, because no chunk holds them."""
    drift: tuple[float, ...] = ()
    """For each span the median relative drift of its probes; empty when none were sent."""
    drifted: tuple[int, ...] = ()
    """Indexes of spans above the limit of the quality guard: to be computed in full."""
    residual: float | None = None
    """Drift that was left, weighed by the query's attention; None when no probes were sent."""
    last: Tensor | None = field(default=None, compare=False)
    """[1, C]: the request's last token behind the last layer, where the plan includes it."""
