"""The blocks of a load lease, in columns: who copies all of them looks at no single one.

A lease is waited for, by somebody whose caches hold none of this code: an object with a view and
a tuple of checksums for each of 64 blocks is 0.4 ms there. Who wants one block gets it made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from .api import LoadedBlock
from .block_rows import BlockRows
from .types import BlockKey, LoadStatus, TierKind


class LeasedBlocks(Sequence[LoadedBlock]):
    """One entry for every key asked for, in order; those that are READY come first."""

    __slots__ = ("checksums", "keys", "ready", "statuses", "tiers")

    def __init__(
        self,
        keys: Sequence[BlockKey],
        statuses: tuple[LoadStatus, ...],
        tiers: tuple[TierKind, ...],
        ready: BlockRows,
        checksums: NDArray[np.uint64],
    ) -> None:
        """Join the columns.

        Args:
            keys: those asked for.
            statuses: one for every key.
            tiers: where each READY block was found.
            ready: the bytes of the READY blocks, read-only.
            checksums: [blocks, slabs] of the READY blocks.

        Raises:
            ValueError: the columns do not fit together.
        """
        count = len(ready)
        if statuses.count(LoadStatus.READY) != count or LoadStatus.READY in statuses[count:]:
            raise ValueError("the READY blocks are not the first ones")
        if len(statuses) != len(keys) or not len(tiers) == len(checksums) == count:
            raise ValueError("the lists do not match the keys asked for")
        self.keys = tuple(keys)
        self.statuses = statuses
        self.tiers = tiers
        self.ready = ready
        self.checksums = checksums

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> LoadedBlock: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[LoadedBlock, ...]: ...

    def __getitem__(self, index: int | slice) -> LoadedBlock | tuple[LoadedBlock, ...]:
        if isinstance(index, slice):
            return tuple([self[number] for number in range(*index.indices(len(self)))])
        number = range(len(self))[index]
        if number >= len(self.ready):
            return LoadedBlock(self.keys[number], self.statuses[number])
        sums = tuple(self.checksums[number].tolist())
        data = self.ready[number]
        return LoadedBlock(self.keys[number], self.statuses[number], self.tiers[number], data, sums)
