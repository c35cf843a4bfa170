"""State and generation of every slot of one tier, in columns: 9 bytes a slot, no objects.

    FREE --allocate--> ALLOCATED --written--> USED --deleted--> FREE
                          |  ^                  |
                          v  | free             v
                        FREE            QUARANTINED (until `fsck --repair`)

    FREE --withdrawn--> ABSENT --restored--> FREE       while its segment leaves, and has left

Every change is a compare-and-set under one short lock, so that of two threads that want the same
slot one wins and the other is told.
"""

from __future__ import annotations

import enum
import threading
from typing import TYPE_CHECKING

import numpy as np

from .tier import SlotId

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

SEARCH_WINDOW_SLOTS = 1 << 16
"""Slots looked at in one step of the search for free ones: 64 KiB, a few microseconds."""


class SlotState(enum.IntEnum):
    """What a slot is used for."""

    FREE = 0
    ALLOCATED = 1
    """Handed out; its bytes mean nothing yet."""
    USED = 2
    """Holds a block that can be read."""
    QUARANTINED = 3
    """Its bytes or its device failed; not read and not handed out."""
    ABSENT = 4
    """Its segment leaves or has left the disk; not handed out until there is one again."""
    NO_PLACE = 5
    """A number behind the last slot of a segment with larger slots: it stands for nothing."""


_STATES = tuple(SlotState)


class SlotTable:
    """The slots of one tier. Thread-safe; no method blocks on anything but the lock."""

    def __init__(self, num_slots: int) -> None:
        self._lock = threading.Lock()
        self._states = np.zeros(num_slots, np.uint8)
        self._generations = np.zeros(num_slots, np.uint64)
        self._full = np.zeros(num_slots, np.bool_)
        """Slots of the second class, for what does not fit the others."""
        self._counts = [num_slots] + [0] * (len(SlotState) - 1)
        self._search_from = [0, 0]
        """Where the search for a free slot of either class begins."""

    def __len__(self) -> int:
        return len(self._states)

    def __repr__(self) -> str:
        counts = ", ".join(f"{state.name.lower()}={self._counts[state]}" for state in SlotState)
        return f"SlotTable({counts})"

    def count(self, state: SlotState) -> int:
        """How many slots are in `state`."""
        return self._counts[state]

    def grow(
        self, num_slots: int, state: SlotState = SlotState.FREE, *, full: bool = False
    ) -> None:
        """Append `num_slots` slots in `state`, of the second class if `full`."""
        with self._lock:
            self._search_from = [min(each, len(self._states)) for each in self._search_from]
            self._full = np.concatenate([self._full, np.full(num_slots, full)])
            new_states = np.full(num_slots, state, np.uint8)
            self._states = np.concatenate([self._states, new_states])
            self._generations = np.concatenate([self._generations, np.zeros(num_slots, np.uint64)])
            self._counts[state] += num_slots

    def has_free(self, *, full: bool = False) -> bool:
        """Whether `allocate` would find one; looks at all of them."""
        with self._lock:
            return bool(((self._states == SlotState.FREE) & (self._full == full)).any())

    def count_free(self, *, full: bool = False) -> int:
        """How many slots of a class `allocate` would find; looks at all of them."""
        with self._lock:
            return int(((self._states == SlotState.FREE) & (self._full == full)).sum())

    def allocate(self, count: int, *, full: bool = False) -> list[SlotId]:
        """Take up to `count` free slots of a class, the lowest first, so that runs are adjacent."""
        with self._lock:
            found: list[int] = []
            while len(found) < count and self._search_from[full] < len(self._states):
                start = self._search_from[full]
                end = start + SEARCH_WINDOW_SLOTS
                window = self._states[start:end]
                fits = (window == SlotState.FREE) & (self._full[start:end] == full)
                free = np.flatnonzero(fits)[: count - len(found)]
                found.extend((free + start).tolist())
                self._search_from[full] = start + len(window)
                self._states[found] = SlotState.ALLOCATED
            if len(found) == count and found:
                self._search_from[full] = found[-1] + 1
            self._move_counts(SlotState.FREE, SlotState.ALLOCATED, len(found))
            return [SlotId(slot) for slot in found]

    def change(self, slots: Iterable[SlotId], expected: SlotState, new: SlotState) -> list[SlotId]:
        """Move slots from one state to another.

        Returns:
            Those that were in `expected`; the others, unknown numbers included, stay untouched.
        """
        wanted = np.fromiter(slots, np.int64)
        with self._lock:
            known = wanted[(wanted >= 0) & (wanted < len(self._states))]
            moved = known[self._states[known] == expected]
            self._states[moved] = new
            found: list[SlotId] = list(dict.fromkeys(moved.tolist()))
            self._move_counts(expected, new, len(found))
            if new is SlotState.FREE and found:
                self._search_from = [min(each, int(moved.min())) for each in self._search_from]
            return found

    def fill(self, slots: NDArray[np.int64], generations: NDArray[np.uint64]) -> None:
        """Make free slots, each named once, USED with these generations: what an opening found."""
        with self._lock:
            assert (self._states[slots] == SlotState.FREE).all(), "a slot is used twice"
            self._states[slots] = SlotState.USED
            self._generations[slots] = generations
            self._move_counts(SlotState.FREE, SlotState.USED, len(slots))

    def quarantine(self, slots: Sequence[SlotId]) -> None:
        """Take slots out of use, whatever state they are in."""
        for state in (SlotState.FREE, SlotState.ALLOCATED, SlotState.USED):
            self.change(slots, state, SlotState.QUARANTINED)

    def count_in(self, slots: range, state: SlotState) -> int:
        """How many of a run of slots are in `state`."""
        with self._lock:
            return int(np.count_nonzero(self._states[slots.start : slots.stop] == state))

    def in_state(self, state: SlotState) -> list[SlotId]:
        """Every slot that is in `state`, ascending; looks at all of them."""
        with self._lock:
            return list(map(SlotId, np.flatnonzero(self._states == state).tolist()))

    def state(self, slot: SlotId) -> SlotState:
        """The slot's state; QUARANTINED for a number that does not exist."""
        with self._lock:
            if not 0 <= slot < len(self._states):
                return SlotState.QUARANTINED
            return SlotState(int(self._states[slot]))

    def states(self, slots: Iterable[SlotId]) -> list[SlotState]:
        """The state of each slot, as `state` says it, all of one moment."""
        wanted = np.fromiter(slots, np.int64)
        with self._lock:
            known = (wanted >= 0) & (wanted < len(self._states))
            found = np.full(len(wanted), SlotState.QUARANTINED, np.uint8)
            found[known] = self._states[wanted[known]]
        return [_STATES[value] for value in found.tolist()]

    def generation(self, slot: SlotId) -> int:
        """The number that the slot's last rewrite got; 0 before the first."""
        return int(self._generations[slot])

    def generations(self, slots: Sequence[SlotId]) -> list[int]:
        """As `generation`, for several slots."""
        found: list[int] = self._generations[np.fromiter(slots, np.int64)].tolist()
        return found

    def set_generation(self, slot: SlotId, generation: int) -> None:
        """As `set_generations`, for one slot."""
        self.set_generations([slot], [generation])

    def set_generations(self, slots: Sequence[SlotId], generations: Sequence[int]) -> None:
        """Record rewrites of slots, each named once; the numbers must grow.

        Raises:
            AssertionError: one does not, which would let an old reader mistake new bytes for old.
        """
        where = np.fromiter(slots, np.int64)
        values = np.fromiter(generations, np.uint64)
        assert (values > self._generations[where]).all(), (slots, generations)
        self._generations[where] = values

    def check_integrity(self) -> list[str]:
        """Whether the counters match the column."""
        with self._lock:
            counted = np.bincount(self._states, minlength=len(SlotState)).tolist()
            if counted != self._counts:
                return [f"slot counters say {self._counts}, the table {counted}"]
            for full, start in enumerate(self._search_from):
                fits = (self._states[:start] == SlotState.FREE) & (self._full[:start] == full)
                if fits.any():
                    return [f"free slot {int(fits.argmax())} is behind the search"]
            return []

    def _move_counts(self, source: SlotState, target: SlotState, count: int) -> None:
        self._counts[source] -= count
        self._counts[target] += count
