"""Which segment of a namespace leaves the disk, and how.

    choose -> withdraw -> (the blocks in it move or are evicted) -> finish
                                                                 -> give_up: nothing has changed

The emptiest segment goes, the last of equals. Its free slots are withdrawn first, so that nothing
new lands in it. Blocks are moved by writing them elsewhere under the same key: the index record
changes in one transaction, then the old header is blanked, durably. So when the last slot is free
no record and no header is left, and the file is punched and deleted. A crash at any point leaves a
segment with fewer blocks, an empty one, or none; it is counted by its files when it is next opened.

One thread at a time: the one that commits writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .index import IndexRecord
from .slots import SlotState
from .tier import SlotId, TierEntry

if TYPE_CHECKING:
    from .budget import TenantBudget
    from .index import BlockIndex
    from .segments import Segments
    from .slots import SlotTable


class Shrinker:
    """Takes segments off the disk; a part of `NvmeTier`."""

    def __init__(
        self, segments: Segments, slots: SlotTable, index: BlockIndex, budget: TenantBudget
    ) -> None:
        self._segments = segments
        self._slots = slots
        self._index = index
        self._budget = budget

    @property
    def num_segments(self) -> int:
        """Segments on the disk that are in use."""
        segments = self._segments
        return segments.num_segments - len(segments.left | segments.retired)

    @property
    def num_free_slots(self) -> int:
        """Slots on the disk that `allocate` hands out without growing."""
        return self._slots.count(SlotState.FREE)

    def num_free_for(self, segment: int) -> int:
        """As `num_free_slots`, of those that take whatever is in the segment."""
        return self._slots.count_free(full=self._has_full_slots(segment))

    def _has_full_slots(self, segment: int) -> bool:
        return self._segments.is_full_slot(self._slot_ids(segment)[0])

    @property
    def is_over(self) -> bool:
        """Whether the tenant holds too much."""
        return self._budget.excess_bytes > 0

    def could_take_from(self, donor: str) -> bool:
        """Whether this tenant could have a segment that `donor`'s gives."""
        return self._budget.whole.could_take(
            self._budget.tenant, donor, self._segments.segment_bytes
        )

    def has_excess(self) -> bool:
        """Whether a segment has to go: above the quota or the capacity. May delete idle ones."""
        while self._budget.excess_bytes > 0:
            if not self._budget.whole.drop_idle_for(self._budget.tenant):
                return True
        return False

    def choose(self) -> int:
        """The segment that is emptied with the least work; -1 when only one is left.

        First counts what would have to be evicted, then what has to move.
        """
        out_of_use = self._segments.left | self._segments.retired
        candidates = [
            number for number in range(self._segments.num_segments) if number not in out_of_use
        ]
        if len(candidates) < 2:
            return -1
        return min(candidates, key=self._work_of)

    def _work_of(self, segment: int) -> tuple[int, int, int]:
        used = self._num_used(segment)
        free_within = self._slots.count_in(self._segments.slots_of(segment), SlotState.FREE)
        free_elsewhere = self.num_free_for(segment) - free_within
        return max(0, used - free_elsewhere), used, -segment

    def _num_used(self, segment: int) -> int:
        return self._slots.count_in(self._segments.slots_of(segment), SlotState.USED)

    def withdraw(self, segment: int) -> None:
        """Hand out no slot of it any more. To be repeated after slots of it became free."""
        self._slots.change(self._slot_ids(segment), SlotState.FREE, SlotState.ABSENT)

    def give_up(self, segment: int) -> None:
        """Undo `withdraw`."""
        self._slots.change(self._slot_ids(segment), SlotState.ABSENT, SlotState.FREE)

    def blocks_in(self, segment: int) -> list[TierEntry]:
        """The blocks that are in it. Reads the whole index: milliseconds for ten thousand blocks.

        Raises:
            TierUnavailableError: the index cannot be read.
        """
        slots = self._segments.slots_of(segment)
        return [
            TierEntry(record.key, record.parent, record.slot)
            for record in self._index.records()
            if isinstance(record, IndexRecord) and record.slot in slots
        ]

    def finish(self, segment: int) -> bool:
        """Delete the file if nothing is in it any more; else give up."""
        self.withdraw(segment)
        slots = self._segments.slots_of(segment)
        gone = sum(
            self._slots.count_in(slots, state)
            for state in (SlotState.ABSENT, SlotState.QUARANTINED, SlotState.NO_PLACE)
        )
        if gone == len(slots) and self._segments.remove(segment):
            return True
        self.give_up(segment)
        return False

    def _slot_ids(self, segment: int) -> list[SlotId]:
        return [SlotId(slot) for slot in self._segments.slots_of(segment)]
