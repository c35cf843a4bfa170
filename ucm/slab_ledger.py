"""Which slabs of a load are in place: counts only, no lock, no I/O. Owned by one lock's holder.

             layer 0  1  2  3 ...
    block 0        x  x  x  .       floor <= wanted blocks < limit
    block 1        x  x  .  x       "leading layers" of block 1: 2
    block 2        x  .  .  .

A block that fails ends what is wanted: in front of it when blocks are read from the first on,
because a chain is usable only up to its first gap; behind it when they are read from the last on,
because the caller computes up to where the loaded end begins.
"""

from __future__ import annotations

import bisect

import numpy as np


class SlabLedger:
    """The slabs of `num_blocks` blocks of `num_layers` layers each."""

    def __init__(self, num_blocks: int, num_layers: int, *, from_back: bool = False) -> None:
        self.num_layers = num_layers
        self.floor = 0
        """Blocks below it are not wanted (any more)."""
        self.limit = num_blocks
        """Nor are this one and those above it."""
        self._from_back = from_back
        self._num_blocks = num_blocks
        self._leading = np.zeros(num_blocks, np.int32)
        self._num_lacking = [num_blocks] * num_layers
        """Of each layer: wanted blocks that have not got so far."""
        self._arrived = np.zeros(num_blocks, np.int32)
        self._ahead: dict[int, dict[int, int]] = {}
        """Of each block: layers that arrived before the ones in front, first -> stop."""

    def is_wanted(self, block: int) -> bool:
        """Whether slabs of the block are still to be written."""
        return self.floor <= block < self.limit

    def arrive(self, block: int, first_layer: int, stop_layer: int) -> None:
        """Slabs `first_layer..stop_layer-1` of a block are in place and verified, each once."""
        self._arrived[block] += stop_layer - first_layer
        before = int(self._leading[block])
        if first_layer != before:
            self._ahead.setdefault(block, {})[first_layer] = stop_layer
            return
        ahead = self._ahead.get(block)
        while ahead and stop_layer in ahead:
            stop_layer = ahead.pop(stop_layer)
        self._leading[block] = stop_layer
        if self.is_wanted(block):
            for layer in range(before, stop_layer):
                self._num_lacking[layer] -= 1

    def fail(self, block: int) -> None:
        """The block will not be complete."""
        if self._from_back:
            self.floor = max(self.floor, block + 1)
        else:
            self.limit = min(self.limit, block)
        self._recount()

    def give_up_below(self, block: int) -> None:
        """The blocks below are not wanted any more."""
        self.floor = max(self.floor, min(block, self.limit))
        self._recount()

    def _recount(self) -> None:
        wanted = self._leading[self.floor : self.limit]
        have = np.bincount(wanted, minlength=self.num_layers + 1)[: self.num_layers]
        self._num_lacking = np.cumsum(have).tolist()

    def num_leading(self, layer: int) -> int:
        """Blocks 0, 1, ... whose slabs of layers 0..layer are all in place."""
        if not self.floor and layer >= 0 and not self._num_lacking[layer]:
            return self.limit
        has = self._leading[: self.limit] > layer
        return self.limit if has.all() else int(has.argmin())

    def num_from_back(self) -> int:
        """Blocks at the end, the last one included, that are complete."""
        if self.limit < self._num_blocks:
            return 0
        wanted = self._leading[self.floor :][::-1]  # what was given up is the caller's
        lacks = (wanted < self.num_layers).nonzero()[0]
        return int(lacks[0]) if len(lacks) else len(wanted)

    def is_settled(self, layer: int) -> bool:
        """Whether no slab of layers 0..layer is still to come."""
        return not self._num_lacking[layer]

    def num_layers_ready(self) -> int:
        """Layers 0, 1, ... of which no slab is still to come."""
        return bisect.bisect_left(self._num_lacking, 1)  # it grows with the layer

    def num_arrived(self) -> int:
        """Slabs that are in place, wanted or not."""
        return int(self._arrived.sum())

    def num_missing(self) -> int:
        """Slabs that are still to come."""
        wanted = self._arrived[self.floor : self.limit]
        return int(len(wanted) * self.num_layers - wanted.sum())
