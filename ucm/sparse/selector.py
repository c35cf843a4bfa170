"""`SequenceSelector`: which blocks one sequence's layers read, step after step.

    logical blocks  | sink | scored by their summaries  | recent | no summary yet | filling |
    read            always   as the budget allows        always   always           always
                    0                                         num_scored          num_blocks - 1

One selection a layer, shared by all heads. A selection is refreshed every `stride` positions, where
position + layer is a multiple of the stride: each step refreshes its share of the layers, so that
no step is slower than others. In between it is kept, and what was sealed since is added to it.

Invariant: a selection depends on nothing but the sequence's own tokens, queries and summaries, and
on how many tokens it has generated: not on the batch, nor on when a summary was made. So what a
sequence produces does not depend on what else runs.

Envelope: a fresh selection is about 30 numpy calls a layer and a read of 0.4 MB, for 128 blocks of
SmolLM2: 110 us with all in the caches, several times that where a layer's weights have just gone
through them. A kept one is one comparison; the stride divides the cost of a step.

Source: one shared selection a layer costs almost nothing (see docs), staleness: RetrievalAttention
and KVStar use 8; sink and window: StreamingLLM (arXiv 2309.17453).

Shapes: H query heads, D head size, n blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ucm.kernels.block_scores import Budget, SummaryTable, choose_blocks

from .options import SparseOptions
from .protocols import BlockIndexes, DecodeStep, Selection

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a step selects: what the mode makes of the options."""

    budget: Budget
    stride: int


@dataclass(slots=True)
class _Kept:
    """A layer's last fresh selection."""

    blocks: BlockIndexes
    position: int
    """Of the token whose queries it was made for."""
    num_blocks: int
    """Blocks of the sequence then."""
    mass: float
    shares: Floats
    """[blocks that were scored]"""
    stale: Selection | None = None
    """What later steps read, and ..."""
    num_stale_blocks: int = 0
    """... for how many blocks of the sequence that holds."""


@dataclass(slots=True)
class _Step:
    """What the layers of one step share."""

    position: int
    num_blocks: int
    num_scored: int
    settings: Settings
    must: npt.NDArray[np.bool_]
    """[num_scored] sink and recent window."""
    behind: BlockIndexes
    """num_scored .. num_blocks - 1."""


class SequenceSelector:
    """A `BlockSelector` over one sequence's summaries; see the module."""

    def __init__(self, table: SummaryTable, options: SparseOptions) -> None:
        """Select from the blocks of `table`, which others extend as blocks are sealed."""
        self.table = table
        self._options = options
        self._kept: list[_Kept | None] = [None] * table.layout.num_layers
        self._step: _Step | None = None
        self.num_fresh = 0
        """Selections that were made."""
        self.num_stale = 0
        """Selections that were kept from an earlier step."""

    def begin(self, step: DecodeStep, settings: Settings) -> None:
        """Prepare the selections of one step.

        Args:
            step: the sequence now; `table` covers `num_scored(step)` blocks at least.
            settings: what the mode asks for.
        """
        options, num_scored = self._options, self.num_scored(step)
        must = np.zeros(num_scored, np.bool_)
        must[: options.sink_blocks] = True
        must[max(0, step.num_sealed - options.recent_blocks) :] = True
        self._step = _Step(
            position=step.position,
            num_blocks=step.num_blocks,
            num_scored=num_scored,
            settings=settings,
            must=must,
            behind=np.arange(num_scored, step.num_blocks, dtype=np.int64),
        )

    def num_scored(self, step: DecodeStep) -> int:
        """Leading blocks that a step chooses among: it reads all others."""
        num_generated = step.position + 1 - step.num_prompt
        return min(step.num_sealed, self._options.catch_up_blocks * num_generated)

    def choose(self, layer: int, q_THD: Tensor, /) -> Selection:
        """See `BlockSelector.choose`; between `begin`s, each layer once."""
        known = self._known(layer)
        if known is not None:
            self.num_stale += not known.is_fresh
            return known
        kept = self._kept[layer] = self._fresh(layer, q_THD)
        self.num_fresh += 1
        return Selection(kept.blocks, kept.mass, shares=kept.shares)

    def predict(self, layer: int, q_THD: Tensor, /) -> Selection:
        """What `choose` would answer to these queries; changes nothing."""
        known = self._known(layer)
        if known is not None:
            return known
        made = self._fresh(layer, q_THD)
        return Selection(made.blocks, made.mass, shares=made.shares)

    def _known(self, layer: int) -> Selection | None:
        """What a layer reads whatever its queries are; None when that depends on them."""
        step, kept = self._step, self._kept[layer]
        assert step is not None, "begin comes first"
        if layer < self._options.dense_layers:
            return Selection(np.arange(step.num_blocks, dtype=np.int64), 1.0)
        stride = step.settings.stride
        if kept is None or (kept.position + layer) // stride != (step.position + layer) // stride:
            return None
        if kept.stale is None or kept.num_stale_blocks != step.num_blocks:
            sealed_since = np.arange(kept.num_blocks, step.num_blocks, dtype=np.int64)
            blocks = np.concatenate((kept.blocks, sealed_since))
            kept.stale = Selection(blocks, kept.mass, is_fresh=False, shares=kept.shares)
            kept.num_stale_blocks = step.num_blocks
        return kept.stale

    def _fresh(self, layer: int, q_THD: Tensor) -> _Kept:
        step = self._step
        assert step is not None
        num = step.num_scored
        must = step.must | self.table.must(layer)[:num] if self.table.has_must else step.must
        tokens = self.table.layout.block_tokens
        shares = self.table.shares(layer, as_floats(q_THD), num)
        choice = choose_blocks(shares, step.settings.budget, must, tokens)
        blocks = np.concatenate((choice.blocks, step.behind))
        return _Kept(blocks, step.position, step.num_blocks, choice.mass, shares)


def as_floats(q_THD: Tensor) -> Floats:
    """A query as numpy sees it; a view where it is fp32 on a CPU."""
    if q_THD.dtype is not torch.float32 or q_THD.device.type != "cpu":
        q_THD = q_THD.float().cpu()
    floats: Floats = q_THD.numpy()
    return floats
