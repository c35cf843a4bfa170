"""Whether an index and the slot table of the same namespace say the same. Reads no block data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .index import IndexRecord
from .slots import SlotState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ucm.types import BlockKey

    from .segments import Segments
    from .slots import SlotTable
    from .tier import SlotId


def record_problems(
    records: Sequence[IndexRecord | BlockKey], slots: SlotTable, segments: Segments
) -> list[str]:
    """Every contradiction between records and slots, in words.

    Args:
        records: all of the index, as `BlockIndex.records` gives them.
        slots: the state of every slot; idle, nobody writes or deletes.
        segments: where slots lie; a record in a retired one is not looked at.
    """
    problems: list[str] = []
    taken: set[SlotId] = set()
    for record in records:
        if not isinstance(record, IndexRecord):
            problems.append(f"the record of {record.hex()[:8]} is damaged")
        elif segments.locate(record.slot) is not None:
            problems += _problems_of(record, slots, taken)
    used = slots.count(SlotState.USED)
    if len(taken) != used:
        problems.append(f"{used} slots used, {len(taken)} of them in the index")
    return problems


def _problems_of(record: IndexRecord, slots: SlotTable, taken: set[SlotId]) -> list[str]:
    slot, state = record.slot, slots.state(record.slot)
    if state is SlotState.QUARANTINED:
        return []
    if slot in taken:
        return [f"two records for slot {slot}"]
    taken.add(slot)
    if state is not SlotState.USED:
        return [f"slot {slot} has a record and is {state.name}"]
    if slots.generation(slot) != record.generation:
        return [f"slot {slot} has another generation than its record"]
    return []
