"""Where one namespace's blocks are: a radix tree over block chains, in columns.

    rows     key -> row; a row is a small integer, columns are indexed by it and rows are reused
    parent   row of the block before, or NO_ROW for the first of a chain
    slots    one column a tier: the slot, or NO_SLOT
    children one column a tier (child rows with a copy in that tier) and one in total (child rows)
    depth, last use: what eviction policies ask for; they keep columns of their own besides

Invariants, checked by `check_integrity`:
* a row has a copy in some tier, or is pinned, in flight, or has child rows: a *ghost* otherwise;
* every parent row outlives its child rows;
* a copy leaves a tier by eviction (`evict`) only when no child has a copy in that tier, and a last
  copy only when it has no child rows. A quarantined copy (`lose`) may go at any time; its
  descendants are then unusable until somebody stores the block again, which revives the row.

Envelope: 20 us to look up a chain of 1,000 that was stored in one go; a block in both tiers costs
under 300 bytes of host memory (dictionary 50, key 88, row number 32, columns 50, eviction heaps
for leaves only; 1 M measured).
Pure: never locks, logs, sleeps or reads a clock; one thread at a time (the manager's lock).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np

from ucm.storage.entry_table import EntryTable
from ucm.storage.tier import SlotId, TierEntry

from .block_columns import (
    FASTEST_FIRST,
    IN_FLIGHT,
    LOST,
    NO_ROW,
    NO_SLOT,
    POSITION,
    UNQUEUED,
    WRITING,
    Columns,
    column,
    depths_of,
    find_problems,
    follow,
    leading,
    run_starts_of,
    walk_up,
    with_descendants,
)
from .eviction import EvictionPolicy, LruPolicy
from .hashing import CheckedKeys, check_keys
from .row_uses import absent_in, add_pins, note_uses, remove_pins
from .tier_view import TierView
from .types import KEY_BYTES, ROOT_KEY, BlockKey, TierKind


class BlockIndex:
    """The blocks of one namespace. See the module for rows, ghosts and rules."""

    def __init__(self, policies: tuple[EvictionPolicy, EvictionPolicy] | None = None) -> None:
        """Create an empty index.

        Args:
            policies: eviction order of memory and of NVMe; LRU for both when None.
        """
        self._policies = policies or (LruPolicy(), LruPolicy())
        self._views = (TierView(self, 0), TierView(self, 1))
        self._rows: dict[BlockKey, int] = {}
        self._keys: list[BlockKey | None] = []
        self._packed_keys = bytearray()
        """The same keys, back to back, so that a chain is compared in one go."""
        self._parents = array("i")
        self._slots = (array("i"), array("i"))
        self._children = (array("i"), array("i"))
        self._child_rows = array("i")
        self._pins = array("i")
        self._last_use_us = array("q")
        self._depths = array("i")
        self._run_starts = array("i")
        """First of the neighbouring rows up to a row that each follow the one before."""
        self._flags = bytearray()
        self._free_rows = array("i")
        self._hidden: set[int] = set()
        self._num_copies = [0, 0]
        self._num_unqueued = 0
        self._pending = [NO_ROW, NO_ROW]

    # ---------------------------------------------------------------- asking

    def __len__(self) -> int:
        return len(self._rows)

    def num_copies(self, tier: TierKind) -> int:
        """Blocks that have a copy in `tier`."""
        return self._num_copies[POSITION[tier]]

    def find(self, key: BlockKey) -> int:
        """Row of `key`, ghosts included; NO_ROW if there is none."""
        return self._rows.get(key, NO_ROW)

    def key(self, row: int) -> BlockKey:
        """Key of a row."""
        key = self._keys[row]
        assert key is not None, row
        return key

    def parent(self, row: int) -> int:
        """Parent's row; NO_ROW for the first block of a chain."""
        return self._parents[row]

    def parent_key(self, row: int) -> BlockKey:
        """Parent's key; ROOT_KEY for the first block of a chain."""
        parent = self._parents[row]
        return ROOT_KEY if parent == NO_ROW else self.key(parent)

    def slot(self, row: int, tier: TierKind) -> SlotId:
        """Slot of the row's copy in `tier`, or NO_SLOT."""
        return SlotId(self._slots[POSITION[tier]][row])

    def has(self, row: int, tier: TierKind) -> bool:
        """Whether the row has a copy in `tier`."""
        return self._slots[POSITION[tier]][row] >= 0

    def resident(self, row: int) -> bool:
        """Whether the row has a copy in any tier."""
        return self._slots[0][row] >= 0 or self._slots[1][row] >= 0

    def fastest(self, row: int) -> TierKind:
        """Fastest tier with a copy of a resident row."""
        return TierKind.MEMORY if self._slots[0][row] >= 0 else TierKind.NVME

    def pins(self, row: int) -> int:
        """Number of leases that hold the row."""
        return self._pins[row]

    def in_flight(self, row: int, flight: int = IN_FLIGHT) -> bool:
        """Whether a transfer of kind `flight` (WRITING, PROMOTING; any of both) holds the row."""
        return bool(self._flags[row] & flight)

    def last_use_us(self, row: int) -> int:
        """When the row was last touched."""
        return self._last_use_us[row]

    def depth(self, row: int) -> int:
        """Blocks before it in its chain."""
        return self._depths[row]

    def depths(self, rows: Any) -> Any:
        """Blocks before each of `rows`, [n] int32, in its chain."""
        return column(self._depths)[rows]

    def unqueued(self) -> list[int]:
        """Rows marked by `mark_unqueued`. O(rows) if there is one, else at once."""
        if not self._num_unqueued:
            return []
        return [row for row, flags in enumerate(self._flags) if flags & UNQUEUED]

    def is_unqueued(self, row: int) -> bool:
        """Whether `mark_unqueued` marked the row and nothing changed since."""
        return bool(self._flags[row] & UNQUEUED)

    def usable(self, row: int) -> bool:
        """Whether the row and all its ancestors are in some tier. O(depth)."""
        while row != NO_ROW:
            if not self.resident(row) or row in self._hidden:
                return False
            row = self._parents[row]
        return True

    def usable_prefix(self, keys: Sequence[BlockKey]) -> list[int]:
        """Rows of the longest prefix of the chain `keys` that is usable.

        `keys` may start in the middle of a chain; its ancestors are then checked too.
        """
        return list(self.prefix(keys)[0])

    def prefix(self, keys: Sequence[BlockKey]) -> tuple[Sequence[int], tuple[TierKind, ...]]:
        """`usable_prefix`, and `fastest` of each row; O(log) look-ups of keys."""
        rows = self._linked_rows(check_keys(keys))
        if self._hidden:
            rows = rows[: leading(rows, self._hidden)]
        if not rows or not self.usable(self._parents[rows[0]]):
            return (), ()
        where: Any = slice(rows[0], rows[-1] + 1)
        if not isinstance(rows, range):
            where = np.array(rows, np.int32)
        elif not absent_in(self._slots[0], rows):  # the usual case
            return rows, (TierKind.MEMORY,) * len(rows)
        slower = column(self._slots[0])[where] < 0
        absent = slower & (column(self._slots[1])[where] < 0)
        count = int(absent.argmax()) if absent.any() else len(rows)
        return rows[:count], tuple(map(FASTEST_FIRST.__getitem__, slower[:count].tolist()))

    def _linked_rows(self, keys: CheckedKeys) -> Sequence[int]:
        """Rows, ghosts included, of the longest prefix of `keys` in which each follows the last.

        Where a row is, its ancestors' rows are: bisection finds the last key that has one. The
        others are likely the rows before it, as a chain is stored in one go, else they are walked
        up to. Keys that form no chain are gone through one by one.
        """
        low, high = -1, len(keys)
        middle = high - 1  # all are there, as a rule
        while high - low > 1:
            low, high = (middle, high) if keys[middle] in self._rows else (low, middle)
            middle = (low + high) // 2
        if low < 0:
            return ()
        last = self._rows[keys[low]]
        first, end = last - low, last + 1
        rows: Sequence[int] = range(first, end)
        if self._run_starts[last] <= first:
            stored: bytes | bytearray = self._packed_keys[first * KEY_BYTES : end * KEY_BYTES]
        else:
            rows = walk_up(self._parents, last, low + 1)
            numbers = np.array(rows, np.int32)
            stored = np.frombuffer(self._packed_keys, f"V{KEY_BYTES}")[numbers].tobytes()
        if stored == keys[: low + 1].packed:
            return rows
        return follow(self._rows, self._parents, keys)

    def with_descendants(self, rows: Iterable[int]) -> list[int]:
        """`rows` and all that hang on them, children first. O(all rows) if others than these do."""
        found = with_descendants(self._rows.values(), self._parents, self._child_rows, rows)
        return sorted(found, key=self._depths.__getitem__, reverse=True)

    def hide(self, row: int, *, is_hidden: bool = True) -> None:
        """Let nobody find the row, nor what follows it, until it is shown again or dropped."""
        (self._hidden.add if is_hidden else self._hidden.discard)(row)

    def lacking(self, rows: Sequence[int], tier: TierKind) -> list[int]:
        """Those of `rows` that have no copy in `tier`, in order."""
        slots = self._slots[POSITION[tier]]
        return [row for row in rows if slots[row] < 0]

    def slots(self, rows: Sequence[int], tier: TierKind) -> list[SlotId]:
        """`slot` of each row."""
        return cast("list[SlotId]", list(map(self._slots[POSITION[tier]].__getitem__, rows)))

    def may_leave(self, row: int, tier: TierKind) -> bool:
        """Whether eviction may take the row's copy out of `tier` now."""
        return self._may_leave(row, POSITION[tier])

    def _may_leave(self, row: int, position: int) -> bool:
        if self._slots[position][row] < 0 or self._pins[row] or self._flags[row] & IN_FLIGHT:
            return False
        if self._children[position][row]:
            return False
        return self._slots[1 - position][row] >= 0 or not self._child_rows[row]

    # -------------------------------------------------------------- changing

    def add_row(self, key: BlockKey, parent: int) -> int:
        """Create a row without copies for a key that has none.

        The caller places, pins or flies it before anything else is called.
        """
        assert key not in self._rows
        if self._free_rows:
            row = self._free_rows.pop()
            self._keys[row] = key
            self._packed_keys[row * KEY_BYTES : (row + 1) * KEY_BYTES] = key
            self._parents[row] = parent
            self._flags[row] = 0
            self._last_use_us[row] = 0
        else:
            row = self._append_row(key, parent)
        self._depths[row] = 0 if parent == NO_ROW else self._depths[parent] + 1
        linked = parent != NO_ROW and parent == row - 1
        self._run_starts[row] = self._run_starts[parent] if linked else row
        self._rows[key] = row
        if parent != NO_ROW:
            self._child_rows[parent] += 1
        return row

    def _append_row(self, key: BlockKey, parent: int) -> int:
        self._keys.append(key)
        self._packed_keys += key
        self._parents.append(parent)
        for slots in self._slots:
            slots.append(NO_SLOT)
        for counters in (*self._children, self._child_rows, self._pins, self._depths):
            counters.append(0)
        self._run_starts.append(0)
        self._last_use_us.append(0)
        self._flags.append(0)
        return len(self._keys) - 1

    def place(self, row: int, tier: TierKind, slot: SlotId) -> None:
        """Record that the row has a copy in `slot` of `tier`, where it had none."""
        position = POSITION[tier]
        assert self._slots[position][row] < 0, row
        self._slots[position][row] = slot
        self._flags[row] &= ~LOST[position]
        self._num_copies[position] += 1
        if tier is TierKind.NVME:
            self.unmark_unqueued(row)
        parent = self._parents[row]
        if parent != NO_ROW:
            self._children[position][parent] += 1
        self._policies[position].placed(row, self._views[position])
        self._settle(row)

    def move(self, row: int, tier: TierKind, slot: SlotId) -> None:
        """The row's copy in `tier` lies in `slot` now; to the policy, it has neither left nor come.

        The caller keeps the row in flight meanwhile, and frees the slot of before.
        """
        assert self.has(row, tier), row
        self._slots[POSITION[tier]][row] = slot

    def evict(self, row: int, tier: TierKind) -> SlotId:
        """Forget the copy in `tier` that `may_leave`; the slot is the caller's to free."""
        assert self.may_leave(row, tier), row
        return self._displace(row, POSITION[tier])

    def lose(self, row: int, tier: TierKind) -> SlotId:
        """Forget a copy that turned out bad, whoever holds it. Its slot is returned."""
        position = POSITION[tier]
        if self._child_rows[row]:
            self._flags[row] |= LOST[position]
        return self._displace(row, position)

    def _displace(self, row: int, position: int) -> SlotId:
        slot = self._slots[position][row]
        assert slot >= 0, row
        self._slots[position][row] = NO_SLOT
        self._num_copies[position] -= 1
        self._policies[position].removed(row, self._views[position])
        self.unmark_unqueued(row)
        parent = self._parents[row]
        if parent != NO_ROW:
            self._children[position][parent] -= 1
        self._settle(row)
        if parent != NO_ROW and self._keys[row] is not None:
            self._settle(parent)
        return SlotId(slot)

    def pin(self, row: int) -> None:
        """Keep the row and its copies in place."""
        self._pins[row] += 1

    def unpin(self, row: int) -> None:
        """Undo one `pin`."""
        assert self._pins[row] > 0, row
        self._pins[row] -= 1
        self._settle(row)

    def pin_all(self, rows: Sequence[int], now_us: int) -> None:
        """`pin` and `touch` rows that differ from each other."""
        add_pins(self._pins, rows)
        note_uses(self._last_use_us, rows, now_us)
        for policy, slots in zip(self._policies, self._slots, strict=True):
            policy.touched_all([row for row in rows if slots[row] >= 0], now_us)

    def unpin_all(self, rows: Sequence[int]) -> None:
        """`unpin` rows that differ from each other."""
        for row in remove_pins(self._pins, rows, self._slots, self._children):
            if self._keys[row] is not None:  # not dropped along with a child of its
                self._settle(row)

    def begin_flight(self, row: int, flight: int) -> None:
        """Mark the row as moved by a transfer of kind `flight` (WRITING or PROMOTING)."""
        assert not self._flags[row] & flight, row
        self._flags[row] |= flight
        if flight & WRITING:
            self.unmark_unqueued(row)

    def end_flight(self, row: int, flight: int) -> None:
        """Undo `begin_flight`."""
        assert self._flags[row] & flight, row
        self._flags[row] &= ~flight
        self._settle(row)

    def mark_unqueued(self, row: int) -> None:
        """Remember that the write of a block that only memory has was refused or failed.

        Nothing for a row that is on NVMe or not in memory. A new write, the loss of the copy or
        `unmark_unqueued` ends it.
        """
        if self.has(row, TierKind.MEMORY) and not self.has(row, TierKind.NVME):
            self._num_unqueued += not self.is_unqueued(row)
            self._flags[row] |= UNQUEUED

    def unmark_unqueued(self, row: int) -> None:
        """Undo `mark_unqueued`."""
        self._num_unqueued -= self.is_unqueued(row)
        self._flags[row] &= ~UNQUEUED

    def touch(self, row: int, now_us: int) -> None:
        """Record a use (a store, a load or a prefetch). The clock never goes back."""
        self._last_use_us[row] = now_us
        in_memory, in_nvme = self._slots
        if in_memory[row] >= 0:
            self._policies[0].touched(row, now_us)
        if in_nvme[row] >= 0:
            self._policies[1].touched(row, now_us)

    def next_victim(self, tier: TierKind) -> int:
        """Row whose copy should leave `tier` next, or NO_ROW. The caller evicts it."""
        position = POSITION[tier]
        self._offer_pending(position)
        row = self._policies[position].next_victim(self._views[position])
        return NO_ROW if row is None else row

    def load(self, entries: Iterable[TierEntry], tier: TierKind) -> None:
        """Fill an index from what a tier holds: parents first, in their order of last use."""
        if isinstance(entries, EntryTable) and not self._keys:
            self._load_table(entries, POSITION[tier])
            return
        for entry in entries:
            parent = NO_ROW if entry.parent == ROOT_KEY else self._rows.get(entry.parent, NO_ROW)
            known = entry.key in self._rows
            if known or (parent == NO_ROW and entry.parent != ROOT_KEY):
                continue
            self.place(self.add_row(entry.key, parent), tier, entry.slot)

    def _load_table(self, table: EntryTable, position: int) -> None:
        """As `load` into an empty index: the rows are the table's, all columns filled at once."""
        count = len(table)
        has_parent = table.parents != NO_ROW
        children = np.bincount(table.parents[has_parent], minlength=count).astype(np.intc)
        keys = table.key_list()
        self._keys = list(keys)
        self._packed_keys += table.keys.tobytes()
        self._rows = dict(zip(keys, range(count), strict=True))
        zeros, none = bytes(4 * count), np.full(count, NO_SLOT, np.intc).tobytes()
        self._parents.frombytes(table.parents.astype(np.intc).tobytes())
        self._slots[position].frombytes(table.slots.astype(np.intc).tobytes())
        self._slots[1 - position].frombytes(none)
        self._children[position].frombytes(children.tobytes())
        self._children[1 - position].frombytes(zeros)
        self._child_rows.frombytes(children.tobytes())
        self._pins.frombytes(zeros)
        self._last_use_us.frombytes(bytes(8 * count))
        self._depths.frombytes(depths_of(table.parents).tobytes())
        self._run_starts.frombytes(run_starts_of(table.parents).tobytes())
        self._flags.extend(bytes(count))
        self._num_copies[position] = count
        self._policies[position].filled(count, self._views[position])
        for row in np.flatnonzero(children == 0).tolist():
            self._offer(row)

    def _settle(self, row: int) -> None:
        """After a change: offer the row for eviction, or drop it and settle its parent."""
        while row != NO_ROW:
            if self.resident(row):
                self._offer(row)
                return
            if self._pins[row] or self._flags[row] & IN_FLIGHT or self._child_rows[row]:
                return
            row = self._drop_row(row)

    def _offer(self, row: int) -> None:
        for position in (0, 1):
            if self._may_leave(row, position):
                self._offer_pending(position)
                self._pending[position] = row

    def _offer_pending(self, position: int) -> None:
        """Hand the last candidate to the policy, if it still is one.

        One offer is held back, because while a chain is placed each of its blocks is a leaf for a
        moment: so only real leaves cost a heap entry.
        """
        row = self._pending[position]
        self._pending[position] = NO_ROW
        if row != NO_ROW and self._may_leave(row, position):
            self._policies[position].offer(row, self._views[position])

    def _drop_row(self, row: int) -> int:
        del self._rows[self.key(row)]
        self._hidden.discard(row)
        self._keys[row] = None
        self._free_rows.append(row)
        parent = self._parents[row]
        if parent != NO_ROW:
            self._child_rows[parent] -= 1
        return parent

    # -------------------------------------------------------------- checking

    def check_integrity(self) -> list[str]:
        """Every violated invariant, in words. O(n): for tests, `fsck` and idle times."""
        columns = Columns(
            rows=self._rows,
            keys=self._keys,
            parents=self._parents,
            slots=self._slots,
            children=self._children,
            child_rows=self._child_rows,
            pins=self._pins,
            depths=self._depths,
            run_starts=self._run_starts,
            flags=self._flags,
        )
        return find_problems(columns, self._num_copies, self._num_unqueued)
