"""Who goes when a tier is full: the policy seam, LRU, and the watermarks.

A policy orders *candidates*; whether a row may go at all is the index's to say (`CandidateView`),
and the policy asks again at the moment it picks. So three rules hold for every policy: never a
pinned or in-flight block, never a parent before its child, never the last copy of a block that
has children anywhere. `eviction_gdsf` and `eviction_s3fifo` are the other policies; `make_policy`
in `eviction_policies` knows them by name.

Envelope: one heap entry a candidate (a leaf of its tier), 44 bytes; offer O(1) amortised plus
O(log n) for the push, a victim O(log n).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .types import BlockKey

if TYPE_CHECKING:
    from collections.abc import Sequence

ROW_BITS = 32
ROW_MASK = (1 << ROW_BITS) - 1


class CandidateView(Protocol):
    """What a policy may ask about a row of its tier, at the moment it picks."""

    def may_leave(self, row: int) -> bool:
        """Whether nothing pins the row and nothing below it needs it."""

    def last_use_us(self, row: int) -> int:
        """When the row was last loaded, stored or prefetched."""


class RowView(CandidateView, Protocol):
    """What a policy may ask about a row of its tier at any time."""

    def key(self, row: int) -> BlockKey:
        """The block's key."""

    def has_copy(self, row: int) -> bool:
        """Whether the row has a copy in this tier."""

    def parent(self, row: int) -> int:
        """Row of the block before it, or -1."""

    def depth(self, row: int) -> int:
        """Blocks before it in its chain."""

    def hits(self, row: int) -> float:
        """Uses so far, the store included, each halved with every half-life that has passed.

        As of the last use; 0 for a block that was found on disk at the start and never used.
        """


class EvictionPolicy(Protocol):
    """Order of eviction in one tier of one namespace. Not thread-safe; its index's owner calls.

    The index reports what happens to rows of the tier (`placed`, `touched`, `removed`) and offers
    those that may go; a policy keeps what it needs of that in columns indexed by row.
    """

    def placed(self, row: int, view: RowView) -> None:
        """A copy has arrived in the tier."""

    def filled(self, count: int, view: RowView) -> None:
        """Copies of rows 0 to `count` - 1 were found in the tier, which was empty, at the start."""

    def touched(self, row: int) -> None:
        """A row of the tier was used; `last_use_us` and `hits` know of it already."""

    def touched_all(self, rows: Sequence[int]) -> None:
        """As `touched` for rows that differ from each other."""

    def removed(self, row: int, view: RowView) -> None:
        """A copy has left the tier, evicted or lost."""

    def offer(self, row: int, view: RowView) -> None:
        """The row has become evictable; offering one twice is harmless."""

    def next_victim(self, view: RowView) -> int | None:
        """Take the next row to evict; None when no candidate may leave.

        The caller evicts it, or offers it again.
        """


class CandidateHeap:
    """Rows in the order of a rank, each at most once.

    Lazy: a row's entry is not moved when its rank changes; the policy compares when the entry
    comes to the top. Bounded by the tier's rows.
    """

    def __init__(self) -> None:
        self._heap: list[int] = []
        self._queued = bytearray()

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, row: int, rank: int) -> None:
        """Add a row with a rank of 0 or more, unless it is there already."""
        if row >= len(self._queued):
            self._queued.extend(bytes(row + 1 - len(self._queued) + len(self._queued) // 2))
        if not self._queued[row]:
            self._queued[row] = 1
            heapq.heappush(self._heap, rank << ROW_BITS | row)

    def pop(self) -> tuple[int, int]:
        """Take the row of least rank, the lower row first.

        Returns:
            The row, and the rank that it was pushed with.

        Raises:
            IndexError: there is none.
        """
        entry = heapq.heappop(self._heap)
        row = entry & ROW_MASK
        self._queued[row] = 0
        return row, entry >> ROW_BITS


class LruPolicy:
    """Least recently used leaf first.

    A use does not move the row's entry: one that turns out stale when it comes to the top is
    pushed back with the present time, or dropped if the row may not leave now (it is offered again
    when that changes).
    """

    def __init__(self) -> None:
        self._heap = CandidateHeap()

    def __len__(self) -> int:
        return len(self._heap)

    def placed(self, row: int, view: RowView) -> None:
        """Nothing to note: the index keeps the time of use."""

    def filled(self, count: int, view: RowView) -> None:
        """Nothing to note."""

    def touched(self, row: int) -> None:
        """Nothing to note: the index keeps the time of use."""

    def touched_all(self, rows: Sequence[int]) -> None:
        """As `touched`."""

    def removed(self, row: int, view: RowView) -> None:
        """Nothing to note: the entry is dropped when it comes up."""

    def offer(self, row: int, view: CandidateView) -> None:
        """See `EvictionPolicy.offer`."""
        self._heap.push(row, view.last_use_us(row))

    def next_victim(self, view: CandidateView) -> int | None:
        """See `EvictionPolicy.next_victim`."""
        while len(self._heap):
            row, rank = self._heap.pop()
            if not view.may_leave(row):
                continue
            last_use_us = view.last_use_us(row)
            if last_use_us == rank:
                return row
            self._heap.push(row, last_use_us)
        return None


@dataclass(frozen=True, slots=True)
class Watermarks:
    """When eviction starts and how far it goes, as shares of a tier's slots."""

    high: float
    low: float

    def excess_slots(self, *, used: int, total: int, needed: int) -> int:
        """How many slots to vacate so that `needed` more fit.

        If they would pass the high watermark, eviction goes on until they stay below the low one,
        so that it runs in batches.

        Args:
            used: slots in use now.
            total: slots that exist.
            needed: slots about to be allocated.
        """
        if used + needed <= total * self.high:
            return 0
        return max(0, used - max(0, int(total * self.low) - needed))
