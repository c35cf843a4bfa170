"""S3-FIFO over leaves: what is used once leaves by a small queue and does not disturb the rest.

    small   a tenth of the tier: new blocks. Used twice or more when it comes up: to main, else out
    main    the rest. Used when it comes up: once more through, with one use less, else out
    ghost   keys that left by small, as many as the tier has blocks: back again, they go to main

Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. Adapted to a tree: a
queue's order is that of arrival, but only leaves can leave, so a block that has children keeps
its place in the order until it has none; and a block that goes to main takes its ancestors along,
because they were used whenever it was and would otherwise count as small for ever.

Envelope: 10 bytes a row, 44 a leaf, and 8 of ghost for each block of the tier's capacity; a victim
is O(log n), after at most three rounds of each candidate.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from .eviction import CandidateHeap, RowView
from .ghost import GhostSet

if TYPE_CHECKING:
    from collections.abc import Sequence

_SMALL, _MAIN = 0, 1
_SMALL_SHARE = 0.1
_MAX_USES = 3
_USES_FOR_MAIN = 2
_MAX_GHOSTS = 4 << 20
"""More blocks than the index of one namespace takes; 32 MiB."""
_STAMP_MASK = (1 << 32) - 1


class S3FifoPolicy:
    """Small, main and ghost; see the module."""

    def __init__(self, capacity: int) -> None:
        """Start with an empty tier.

        Args:
            capacity: blocks that the tier can hold, which sets the size of the ghost table.
        """
        self._queues = (CandidateHeap(), CandidateHeap())
        self._sizes = [0, 0]
        self._arrivals = array("q")
        self._queue_of = bytearray()
        self._uses = bytearray()
        self._next_arrival = 0
        self._ghosts = GhostSet(min(capacity, _MAX_GHOSTS))
        self._num_ghosts_added = 0

    def __len__(self) -> int:
        return len(self._queues[_SMALL]) + len(self._queues[_MAIN])

    def placed(self, row: int, view: RowView) -> None:
        """See `EvictionPolicy.placed`."""
        missing = row + 1 - len(self._uses)
        if missing > 0:
            missing += len(self._uses) // 2
            self._arrivals.frombytes(bytes(8 * missing))
            self._queue_of.extend(bytes(missing))
            self._uses.extend(bytes(missing))
        queue = _MAIN if self._was_ghost(row, view) else _SMALL
        self._queue_of[row] = queue
        self._sizes[queue] += 1
        self._uses[row] = 0
        self._arrive(row)

    def filled(self, count: int, view: RowView) -> None:
        """See `EvictionPolicy.filled`."""
        for row in range(count):
            self.placed(row, view)

    def touched(self, row: int) -> None:
        """See `EvictionPolicy.touched`."""
        self._uses[row] = min(_MAX_USES, self._uses[row] + 1)

    def touched_all(self, rows: Sequence[int]) -> None:
        """See `EvictionPolicy.touched_all`."""
        for row in rows:
            self.touched(row)

    def removed(self, row: int, view: RowView) -> None:
        """See `EvictionPolicy.removed`."""
        queue = self._queue_of[row]
        self._sizes[queue] -= 1
        if queue == _SMALL:
            self._num_ghosts_added += 1
            self._ghosts.add(view.key(row), self._num_ghosts_added & _STAMP_MASK)

    def offer(self, row: int, view: RowView) -> None:  # noqa: ARG002  the protocol's signature
        """See `EvictionPolicy.offer`."""
        self._queues[self._queue_of[row]].push(row, self._arrivals[row])

    def next_victim(self, view: RowView) -> int | None:
        """See `EvictionPolicy.next_victim`."""
        while len(self):
            queue = self._queue_to_evict()
            row, arrival = self._queues[queue].pop()
            if not view.may_leave(row):
                continue
            if self._queue_of[row] != queue or self._arrivals[row] != arrival:
                self.offer(row, view)  # it moved meanwhile
            elif queue == _SMALL and self._uses[row] >= _USES_FOR_MAIN:
                self._promote(row, view)
                self.offer(row, view)
            elif queue == _MAIN and self._uses[row]:
                self._uses[row] -= 1
                self._arrive(row)
                self.offer(row, view)
            else:
                return row
        return None

    def _queue_to_evict(self) -> int:
        small, main = self._queues
        full = self._sizes[_SMALL] >= _SMALL_SHARE * sum(self._sizes)
        return _SMALL if len(small) and (full or not len(main)) else _MAIN

    def _promote(self, row: int, view: RowView) -> None:
        """Move a row and its ancestors to main; ancestors keep their uses."""
        self._uses[row] = 0
        while row >= 0 and view.has_copy(row) and self._queue_of[row] == _SMALL:
            self._queue_of[row] = _MAIN
            self._sizes[_SMALL] -= 1
            self._sizes[_MAIN] += 1
            self._arrive(row)
            row = view.parent(row)

    def _arrive(self, row: int) -> None:
        self._arrivals[row] = self._next_arrival
        self._next_arrival += 1

    def _was_ghost(self, row: int, view: RowView) -> bool:
        stamp = self._ghosts.take(view.key(row))
        if stamp is None:
            return False
        age = (self._num_ghosts_added - stamp) & _STAMP_MASK
        return age <= sum(self._sizes)
