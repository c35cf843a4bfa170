"""Summaries of the pool's sealed blocks: made once a block, shared by all that share the block.

    PoolSummaries       one record a pool block, valid for one life of it
      |  records [n, L, G]
    SummaryTable        of one sequence, in its order, ready to be scored

A pool block lives from its allocation to the next one; `Lives` counts them. A record is
only handed out for the life that it was made in, so a block that was reused, whatever was in it and
however it came to be free, is summarised anew. Nothing has to be told when a block goes.

Envelope: making a record reads the block once (1.4 MiB for SmolLM2-135M in fp32) and is a
clustering of 90 slabs; a record is 37 KiB there, memory is used only as blocks are sealed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ucm.kernels.block_scores import SummaryTable
from ucm.kernels.summarize import summarize
from ucm.kernels.summary_record import Records, record_dtype
from ucm.layout import KvLayout
from ucm.types import SummaryKind

MAX_BLOCKS_AT_ONCE = 16
"""Blocks summarised in one call: bounds the copy of their keys."""

Lives = Callable[[int], int]
"""Which life of a pool block this is: changes when the block is allocated anew."""


class PoolSummaries:
    """Records of one engine's pool; see the module. Of the engine's thread."""

    def __init__(
        self, kind: SummaryKind, layout: KvLayout, num_blocks: int, life_of: Lives
    ) -> None:
        """Room for every block of the pool; used as blocks are sealed.

        Args:
            kind: of the summaries.
            layout: of the pool's blocks.
            num_blocks: in the pool.
            life_of: for a pool block.

        Raises:
            LayoutMismatchError: this kind cannot describe such blocks.
        """
        self.kind = kind
        self.layout = layout
        dtype = record_dtype(kind, layout.head_dim, layout.block_tokens)
        shape = (num_blocks, layout.num_layers, layout.num_kv_heads)
        self._records: Records = np.zeros(shape, dtype)
        self._lives = np.full(num_blocks, -1, np.int64)
        self._life_of = life_of
        self.num_made = 0
        """Blocks that were summarised."""

    def table(self) -> SummaryTable:
        """An empty table of this kind."""
        return SummaryTable(self.kind, self.layout)

    def records(self, block_ids: Sequence[int], kv_pool: Tensor) -> Records:
        """The records of sealed blocks, made where there are none.

        Args:
            block_ids: pool blocks whose every row is final.
            kv_pool: [L, num_blocks, 2, G, B, D].

        Returns:
            [n, L, G], a copy.
        """
        lives = [self._life_of(block_id) for block_id in block_ids]
        missing = [
            (block_id, life)
            for block_id, life in zip(block_ids, lives, strict=True)
            if self._lives[block_id] != life
        ]
        for first in range(0, len(missing), MAX_BLOCKS_AT_ONCE):
            self._make(missing[first : first + MAX_BLOCKS_AT_ONCE], kv_pool)
        found: Records = self._records[list(block_ids)]
        return found

    def _make(self, missing: Sequence[tuple[int, int]], kv_pool: Tensor) -> None:
        block_ids = [block_id for block_id, _ in missing]
        layers, heads = self.layout.num_layers, self.layout.num_kv_heads
        slabs = kv_pool[:, block_ids].transpose(0, 1).reshape(-1, *kv_pool.shape[2:]).cpu()
        bits = slabs.view(torch.uint16) if slabs.dtype is torch.bfloat16 else slabs
        made = summarize(self.kind, bits.numpy(), self.layout.dtype)
        self._records[block_ids] = made.reshape(len(missing), layers, heads)
        self._lives[block_ids] = [life for _, life in missing]
        self.num_made += len(missing)
