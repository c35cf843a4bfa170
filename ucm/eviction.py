"""Who goes when a tier is full: the policy seam and LRU.

A policy orders *candidates*; whether a row may go at all is the index's to say (`CandidateView`),
and the policy asks again at the moment it picks. So three rules hold for every policy: never a
pinned or in-flight block, never a parent before its child, never the last copy of a block that
has children anywhere.

Envelope: one heap entry a candidate (a leaf of its tier), 44 bytes; offer O(1) amortised plus
O(log n) for the push, a victim O(log n).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Protocol

ROW_BITS = 32
_ROW_MASK = (1 << ROW_BITS) - 1


class CandidateView(Protocol):
    """What a policy may ask about a row of its tier, at the moment it picks."""

    def may_leave(self, row: int) -> bool:
        """Whether nothing pins the row and nothing below it needs it."""

    def last_use_us(self, row: int) -> int:
        """When the row was last loaded, stored or prefetched."""


class EvictionPolicy(Protocol):
    """Order of eviction in one tier of one namespace. Not thread-safe; its index's owner calls."""

    def offer(self, row: int, last_use_us: int) -> None:
        """The row has become evictable; offering one twice is harmless."""

    def next_victim(self, view: CandidateView) -> int | None:
        """Take the next row to evict; None when no candidate may leave.

        The caller evicts it, or offers it again.
        """


class LruPolicy:
    """Least recently used leaf first.

    A lazy heap: a use does not move the row's entry; an entry that turns out stale when it comes
    to the top is pushed back with the present time, or dropped if the row may not leave now (it is
    offered again when that changes). Each row has at most one entry, so the heap is bounded by
    the tier's rows.
    """

    def __init__(self) -> None:
        self._heap: list[int] = []
        self._queued = bytearray()

    def __len__(self) -> int:
        return len(self._heap)

    def offer(self, row: int, last_use_us: int) -> None:
        """See `EvictionPolicy.offer`."""
        if row >= len(self._queued):
            self._queued.extend(bytes(row + 1 - len(self._queued) + len(self._queued) // 2))
        if not self._queued[row]:
            self._queued[row] = 1
            heapq.heappush(self._heap, last_use_us << ROW_BITS | row)

    def next_victim(self, view: CandidateView) -> int | None:
        """See `EvictionPolicy.next_victim`."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            row = entry & _ROW_MASK
            self._queued[row] = 0
            if not view.may_leave(row):
                continue
            last_use_us = view.last_use_us(row)
            if last_use_us == entry >> ROW_BITS:
                return row
            self.offer(row, last_use_us)
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
