"""Whether the index, the slot table and the segment files of a namespace agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ucm.errors import UcmError

from .index import BlockIndex, IndexRecord
from .slots import SlotState, SlotTable

if TYPE_CHECKING:
    from .segments import Segments
    from .tier import SlotId


def find_problems(index: BlockIndex, slots: SlotTable, segments: Segments) -> list[str]:
    """Every disagreement, in words. O(blocks); nothing may be under way."""
    problems = slots.check_integrity()
    if len(slots) != segments.num_slots:
        problems.append(f"{len(slots)} slots known, {segments.num_slots} in files")
    try:
        records = list(index.records())
    except UcmError as error:
        return [*problems, str(error)]
    taken: set[SlotId] = set()
    for record in records:
        if not isinstance(record, IndexRecord):
            problems.append(f"the record of {record.hex()[:8]} is damaged")
        elif segments.locate(record.slot) is not None:
            problems += _record_problems(record, slots, taken)
        elif segments.segment_of(record.slot) in segments.left:
            problems.append(f"slot {record.slot} has a record, but its segment has left")
    if len(taken) != slots.count(SlotState.USED):
        used = slots.count(SlotState.USED)
        problems.append(f"{used} slots used, {len(taken)} of them in the index")
    return problems


def _record_problems(record: IndexRecord, slots: SlotTable, taken: set[SlotId]) -> list[str]:
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
