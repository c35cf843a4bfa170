"""The columns of a block index by row, and whether they agree. See `block_index`."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ucm.storage.tier import SlotId

from .types import BlockKey, TierKind

NO_ROW = -1
NO_SLOT = SlotId(-1)

WRITING = 1
"""Flight: queued for, or being written to, NVMe; the memory copy must stay."""
PROMOTING = 2
"""Flight: being read from NVMe into memory; the NVMe copy must stay."""
IN_FLIGHT = WRITING | PROMOTING

FASTEST_FIRST = (TierKind.MEMORY, TierKind.NVME)
POSITION = {tier: position for position, tier in enumerate(FASTEST_FIRST)}
LOST = (4, 8)
"""Flag per tier: the copy was quarantined while children stayed."""
UNQUEUED = 16
"""Flag: only memory has it and no write is on its way, because one was refused or failed."""


def depths_of(parents: Any) -> Any:
    """How many rows are before each in its chain; a parent's row is below its children's.

    Pointer doubling: after k rounds every row has looked 2**k rows up (Wyllie's list ranking).
    """
    has_parent = parents != NO_ROW
    depths = has_parent.astype(np.intc)
    above = parents.copy()
    pending = np.flatnonzero(has_parent)
    while len(pending):
        jump = above[pending]
        depths[pending] += depths[jump]
        above[pending] = above[jump]
        pending = pending[above[pending] != NO_ROW]
    return depths


def run_starts_of(parents: Any) -> Any:
    """For each row the first of the neighbouring rows up to it that each follow the one before."""
    rows = np.arange(len(parents), dtype=np.intc)
    return np.maximum.accumulate(np.where(parents == rows - 1, 0, rows))


def column(values: array[int] | array[float], dtype: type[np.generic] = np.int32) -> Any:
    """A column for numpy, without a copy. While it is held, the column cannot grow."""
    return np.frombuffer(values, dtype)


def walk_up(parents: array[int], row: int, count: int) -> list[int]:
    """The row and up to `count` - 1 of its ancestors, the topmost first."""
    rows: list[int] = []
    while row != NO_ROW and len(rows) < count:
        rows.append(row)
        row = parents[row]
    return rows[::-1]


def follow(
    rows: Mapping[BlockKey, int], parents: array[int], keys: Iterable[BlockKey]
) -> list[int]:
    """Rows of `keys` up to the first that has none or does not follow the one before."""
    found: list[int] = []
    for key in keys:
        row = rows.get(key, NO_ROW)
        if row == NO_ROW or (found and parents[row] != found[-1]):
            break
        found.append(row)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What `find_problems` looks at; the arrays themselves, not copies."""

    rows: Mapping[BlockKey, int]
    keys: Sequence[BlockKey | None]
    parents: array[int]
    slots: tuple[array[int], array[int]]
    children: tuple[array[int], array[int]]
    child_rows: array[int]
    pins: array[int]
    depths: array[int]
    run_starts: array[int]
    flags: bytearray

    def is_resident(self, row: int) -> bool:
        """Whether the row has a copy in any tier."""
        return self.slots[0][row] >= 0 or self.slots[1][row] >= 0


def leading(rows: Sequence[int], end: Collection[int]) -> int:
    """How many of `rows` stand before the first that is in `end`."""
    return next((count for count, row in enumerate(rows) if row in end), len(rows))


def with_descendants(
    every: Collection[int], parents: array[int], child_rows: array[int], rows: Iterable[int]
) -> set[int]:
    """`rows` and all of `every` row that hang on them."""
    found = set(rows)
    while sum(child_rows[row] for row in found) > sum(parents[row] in found for row in found):
        found.update(row for row in every if parents[row] in found)
    return found


def find_problems(columns: Columns, num_copies: Sequence[int], num_unqueued: int) -> list[str]:
    """Every violated invariant, in words. O(n).

    Args:
        columns: of one index.
        num_copies: rows with a copy in each tier, as the index counted them.
        num_unqueued: rows with the flag `UNQUEUED`, as counted.
    """
    problems: list[str] = []
    for key, row in columns.rows.items():
        problems += _row_problems(columns, key, row)
    problems += _child_problems(columns)
    marked = sum(bool(flags & UNQUEUED) for flags in columns.flags)
    if marked != num_unqueued:
        problems.append(f"{marked} rows unqueued, {num_unqueued} counted")
    return problems + _slot_problems(columns, num_copies)


def _row_problems(columns: Columns, key: BlockKey, row: int) -> list[str]:
    problems: list[str] = []
    if columns.keys[row] != key:
        problems.append(f"row {row}: its key differs from the table's")
    parent = columns.parents[row]
    if parent != NO_ROW and columns.keys[parent] is None:
        problems.append(f"row {row}: its parent row {parent} is gone")
    if columns.depths[row] != (0 if parent == NO_ROW else columns.depths[parent] + 1):
        problems.append(f"row {row}: its depth {columns.depths[row]} does not follow its parent's")
    linked = parent != NO_ROW and parent == row - 1
    if columns.run_starts[row] != (columns.run_starts[parent] if linked else row):
        problems.append(f"row {row}: its run does not start at {columns.run_starts[row]}")
    held = columns.pins[row] or columns.flags[row] & IN_FLIGHT or columns.child_rows[row]
    if not columns.is_resident(row) and not held:
        problems.append(f"row {row}: no copy, no lease, no child: it should be gone")
    if columns.pins[row] < 0:
        problems.append(f"row {row}: {columns.pins[row]} pins")
    if columns.slots[1][row] >= 0 and parent != NO_ROW:
        parent_left = columns.slots[1][parent] < 0 and not columns.flags[parent] & LOST[1]
        if parent_left:
            problems.append(f"row {row}: its parent {parent} left nvme before it")
    return problems


def _child_problems(columns: Columns) -> list[str]:
    empty = bytes(4 * len(columns.keys))
    counted, child_rows = (array("i", empty), array("i", empty)), array("i", empty)
    for row in columns.rows.values():
        parent = columns.parents[row]
        if parent != NO_ROW:
            child_rows[parent] += 1
            for position in (0, 1):
                counted[position][parent] += columns.slots[position][row] >= 0
    problems: list[str] = []
    for row in columns.rows.values():
        if child_rows[row] != columns.child_rows[row]:
            problems.append(f"row {row}: {child_rows[row]} child rows, not as counted")
        problems += [
            f"row {row}: {counted[position][row]} children in {tier}, not as counted"
            for position, tier in enumerate(FASTEST_FIRST)
            if counted[position][row] != columns.children[position][row]
        ]
    return problems


def _slot_problems(columns: Columns, num_copies: Sequence[int]) -> list[str]:
    problems: list[str] = []
    for position, tier in enumerate(FASTEST_FIRST):
        used = [columns.slots[position][row] for row in columns.rows.values()]
        used = [slot for slot in used if slot >= 0]
        if len(used) != num_copies[position]:
            problems.append(f"{tier}: {len(used)} copies, {num_copies[position]} counted")
        if len(used) != len(set(used)):
            problems.append(f"{tier}: a slot is used twice")
    return problems
