"""`SummaryChooser`: what a long sequence's decode steps read, chosen by its summaries.

Summaries are made when blocks are full, before they may leave the pool, and stay in memory: 4 to 5
% of the KV. So every block but the one that is being filled can be chosen, or left out, without
reading it.

Shapes: L layers, G KV heads, H query heads, B block tokens, D head size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ucm.kernels.block_scores import SummaryTable
from ucm.kernels.summarize import summarize

from .offload import Wanted
from .options import SparseOptions
from .protocols import DecodeStep
from .selector import SequenceSelector, Settings

if TYPE_CHECKING:
    from .decoding import SparseStats


class SummaryChooser:
    """A `Chooser` of one sequence. Owned by the engine's thread."""

    def __init__(
        self,
        table: SummaryTable,
        options: SparseOptions,
        settings: Callable[[], Settings | None],
        stats: SparseStats,
    ) -> None:
        """Choose among blocks that are sealed from now on.

        Args:
            table: an empty one.
            options: which blocks are always read.
            settings: how the present pass selects; None when it reads everything.
            stats: the engine's.
        """
        self._stats = stats
        self._table = table
        self._options = options
        self._settings = settings
        self._selector = SequenceSelector(table, options)

    def choose(self, layer: int, q_THD: Tensor, position: int, /) -> Wanted | None:
        """See `Chooser.choose`."""
        started_s = time.perf_counter()
        step = self._begin(layer, position)
        if step is None:
            return None
        selection = self._selector.choose(layer, q_THD)
        self._stats.count(selection, step.num_blocks, self._table.layout.slab_bytes)
        self._stats.select_s += time.perf_counter() - started_s
        return Wanted(selection.blocks, selection.shares)

    def predict(self, layer: int, q_THD: Tensor, position: int, /) -> Wanted | None:
        """See `Chooser.predict`."""
        started_s = time.perf_counter()
        if self._begin(layer, position) is None:
            return None
        selection = self._selector.predict(layer, q_THD)
        self._stats.select_s += time.perf_counter() - started_s
        return Wanted(selection.blocks, selection.shares)

    def seal(self, slabs: Tensor, /) -> None:
        """See `Chooser.seal`."""
        started_s, layout = time.perf_counter(), self._table.layout
        count = slabs.shape[1]
        flat = slabs.transpose(0, 1).reshape(-1, *slabs.shape[2:]).cpu()
        bits = flat.view(torch.uint16) if flat.dtype is torch.bfloat16 else flat
        made = summarize(self._table.kind, bits.numpy(), layout.dtype)
        self._table.extend(made.reshape(count, layout.num_layers, layout.num_kv_heads))
        self._stats.summarised_blocks += count
        self._stats.seal_s += time.perf_counter() - started_s

    def truncate(self, num_blocks: int, /) -> None:
        """See `Chooser.truncate`."""
        if num_blocks < len(self._table):
            self._table.truncate(num_blocks)
            self._selector = SequenceSelector(self._table, self._options)

    def _begin(self, layer: int, position: int) -> DecodeStep | None:
        """Prepare the selector; None where everything is read."""
        settings = self._settings()
        is_short = position + 1 < self._options.min_context_tokens
        if settings is None or is_short or layer < self._options.dense_layers:
            return None
        step = self._step(position)
        self._selector.begin(step, settings)
        return step

    def _step(self, position: int) -> DecodeStep:
        # All blocks have their summary, as if the sequence had been decoding all its life.
        tokens = self._table.layout.block_tokens
        return DecodeStep("", position, 0, (), tokens)
