"""Pins and uses of many rows of a block index at once.

Envelope: a load pins and unpins its rows under the manager's lock: 64 rows take 20 us and 10. Few
rows are looped over: numpy's code has left the caches by the time of the next call, and then each
of its operations costs 10 to 20 us (measured in a daemon; a tenth where they are repeated).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from .block_columns import column

FEW_ROWS = 256

HIT_HALF_LIFE_US = 600 * 1_000_000
"""A use counts half after ten minutes: four fifths of the reuse in public chat traces comes sooner
(Wang et al., "KVCache cache in the wild", arXiv 2506.02634)."""

Columns = Sequence["array[int]"]
"""One for each tier."""


def absent_in(slots: array[int], rows: range) -> bool:
    """Whether one of neighbouring rows has no slot.

    The only negative slot is -1, four bytes of ones, and of any four bytes in a row one is the
    topmost of its slot: so they are ones in a row nowhere else.
    """
    return b"\xff\xff\xff\xff" in slots[rows.start : rows.stop].tobytes()


def note_uses(
    last_use_us: array[int], hits: array[float], rows: Sequence[int], now_us: int
) -> None:
    """Record a use of rows that differ from each other."""
    if len(rows) > FEW_ROWS:
        numbers = np.array(rows, np.int32)
        times, counts = column(last_use_us, np.int64), column(hits, np.float32)
        decays = 0.5 ** ((now_us - times[numbers]) / HIT_HALF_LIFE_US)
        counts[numbers] = 1.0 + counts[numbers] * decays
        times[numbers] = now_us
        return
    before_us, decay = now_us, 1.0
    for row in rows:
        if last_use_us[row] != before_us:  # as a rule it is that of the row before
            before_us = last_use_us[row]
            decay = 0.5 ** ((now_us - before_us) / HIT_HALF_LIFE_US)
        hits[row] = 1.0 + hits[row] * decay
        last_use_us[row] = now_us


def add_pins(pins: array[int], rows: Sequence[int]) -> None:
    """Pin rows that differ from each other once more."""
    if len(rows) > FEW_ROWS:
        column(pins)[np.array(rows, np.int32)] += 1
        return
    for row in rows:
        pins[row] += 1


def remove_pins(
    pins: array[int], rows: Sequence[int], slots: Columns, children: Columns
) -> list[int]:
    """Undo `add_pins`.

    Returns:
        Those of `rows` that may now leave a tier or be dropped: without pins, and a leaf of a tier
        or in none.
    """
    if len(rows) > FEW_ROWS:
        return _remove_many_pins(pins, np.array(rows, np.int32), slots, children)
    (fast, slow), (fast_children, slow_children) = slots, children
    free: list[int] = []
    for row in rows:
        left = pins[row] - 1
        assert left >= 0, row
        pins[row] = left
        if left:
            continue
        in_fast, in_slow = fast[row] >= 0, slow[row] >= 0
        is_leaf = (in_fast and not fast_children[row]) or (in_slow and not slow_children[row])
        if is_leaf or not (in_fast or in_slow):
            free.append(row)
    return free


def _remove_many_pins(pins: array[int], rows: Any, slots: Columns, children: Columns) -> list[int]:
    held = column(pins)
    assert (held[rows] > 0).all(), rows
    held[rows] -= 1
    inner, leaf = np.zeros((2, len(rows)), bool)
    for tier_slots, tier_children in zip(slots, children, strict=True):
        has = column(tier_slots)[rows] >= 0
        inner |= has
        leaf |= has & (column(tier_children)[rows] == 0)
    free: list[int] = rows[(held[rows] == 0) & (leaf | ~inner)].tolist()
    return free
