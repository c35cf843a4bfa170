"""What the parts of sparse attention are to each other.

    step of a sequence (`DecodeStep`)
      |  BlockSelector.choose(layer, q)  -> Selection     which blocks: summaries, a certificate
      v  ItemAttention(layer, q, kv)     -> out           reads them: from the pool, or beyond it

Logical blocks are numbered 0, 1, ... along the sequence; *pool* blocks are ids in the engine's
pool. Selections are logical: they stay true when a block moves.

Shapes: T query tokens (1 in a decode), H query heads, G KV heads, B block tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

BlockIndexes = npt.NDArray[np.int64]
"""Logical blocks of one sequence, ascending, each once."""


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One sequence's decode step, as far as attention is concerned."""

    sequence_id: str
    position: int
    """Of the token that is computed; its KV and all before it are attended to."""
    num_prompt: int
    """Tokens of the prompt: the sequence has generated `position + 1 - num_prompt`."""
    block_ids: Sequence[int]
    """Pool blocks that cover positions 0..position, in order."""
    block_tokens: int

    @property
    def num_sealed(self) -> int:
        """Leading blocks that were full before this step: those that can have a summary."""
        return self.position // self.block_tokens

    @property
    def num_blocks(self) -> int:
        """Blocks of the sequence, the one that is being filled included."""
        return self.position // self.block_tokens + 1


@dataclass(frozen=True, slots=True)
class Selection:
    """What one layer of one step reads."""

    blocks: BlockIndexes
    """The block that is being filled is always the last one."""
    mass: float
    """Share of the attention mass that they are estimated to hold; 1.0 for all blocks."""
    is_fresh: bool = True
    """Whether it was made for this step's query; stale ones were kept from an earlier step."""
    shares: npt.NDArray[np.float32] | None = None
    """[leading blocks] the share of the mass that each, chosen or not, is estimated to hold; None
    where nobody estimated it."""


class BlockSelector(Protocol):
    """Chooses what a sequence's layers read in one step. Of the engine's thread."""

    def choose(self, layer: int, q_THD: Tensor, /) -> Selection:
        """Blocks for one layer, given its rotated queries [1, H, D]."""


class ItemAttention(Protocol):
    """Computes one item's attention in the place of the dense one: sparse, or beyond the pool."""

    def __call__(self, layer: int, q_THD: Tensor, kv_layer: Tensor, /) -> Tensor:
        """Attend in one layer; called once a layer, in order, when its new KV is in the pool.

        Args:
            layer: number of the layer.
            q_THD: [T, H, D] the item's queries, rotated; may be strided.
            kv_layer: [num_blocks, 2, G, B, D] the pool's layer.

        Returns:
            [T, H, D] in q's dtype.
        """


class QueriesAhead(Protocol):
    """Told about a layer's queries before they are known exactly."""

    def __call__(self, layer: int, q_THD: Tensor, /) -> None:
        """Take the predicted queries of `layer`, before layer `layer - 1` attends.

        The prediction is InfiniGen's (arXiv 2406.19707): the next layer's norm and query weights
        applied to this layer's input, which one layer changes little. The first layer has none.

        Args:
            layer: number of the layer that will ask.
            q_THD: [T, H, D] for the item's tokens, rotated; the callee may keep it.
        """
