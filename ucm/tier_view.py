"""What an eviction policy may ask about the rows of its tier: `RowView` over a block index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .block_columns import FASTEST_FIRST

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .block_index import BlockIndex
    from .types import BlockKey


class TierView:
    """One tier of an index, as an eviction policy sees it."""

    def __init__(self, index: BlockIndex, position: int) -> None:
        self._index = index
        self._tier = FASTEST_FIRST[position]

    def may_leave(self, row: int) -> bool:
        """See `CandidateView.may_leave`."""
        return self._index.may_leave(row, self._tier)

    def last_use_us(self, row: int) -> int:
        """See `CandidateView.last_use_us`."""
        return self._index.last_use_us(row)

    def key(self, row: int) -> BlockKey:
        """See `RowView.key`."""
        return self._index.key(row)

    def has_copy(self, row: int) -> bool:
        """See `RowView.has_copy`."""
        return self._index.has(row, self._tier)

    def parent(self, row: int) -> int:
        """See `RowView.parent`."""
        return self._index.parent(row)

    def depth(self, row: int) -> int:
        """See `RowView.depth`."""
        return self._index.depth(row)

    def depths(self, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """See `RowView.depths`."""
        depths: NDArray[np.int32] = self._index.depths(rows)
        return depths
