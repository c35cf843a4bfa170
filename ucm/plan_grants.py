"""What the manager answers to `begin_load`: names, numbers and places, never bytes or descriptors.

In columns, like `ucm.grants`. The READY blocks are the first ones; each has a source and a tier.
`offsets` are of those in the arena (MEMORY, PROMOTING), `checksums` of MEMORY ones, `places` of
EXTENT ones, each in the order of the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ucm.storage.extents import SlotPlace

from .api import SlabChecksums
from .load_plan import Extent, PlannedBlock, SegmentFile
from .progress import ProgressPlace
from .types import BlockKey, LeaseId, LoadStatus, SourceKind, TierKind


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanGrants:
    """A load lease whose blocks are still where they are."""

    lease_id: LeaseId
    statuses: tuple[LoadStatus, ...]
    """One for every key asked for, in order."""
    sources: tuple[SourceKind, ...]
    """One for every READY block."""
    tiers: tuple[TierKind, ...]
    """Where each READY block was found."""
    offsets: tuple[int, ...]
    """In the namespace's arena, in bytes: of MEMORY and PROMOTING blocks."""
    checksums: bytes
    """Of MEMORY blocks, packed as they travel: see `ucm.wire.checksums_from_wire`."""
    places: tuple[SlotPlace, ...]
    """Of EXTENT blocks."""
    timeout_s: float
    progress: ProgressPlace | None = None
    """Of the PROMOTING blocks; None when there are none."""


@dataclass(frozen=True, slots=True)
class PlanMemory:
    """What a client makes a plan's blocks of."""

    view: Callable[[int], memoryview]
    """The read-only bytes of the block at an offset of the arena."""
    checksums: Sequence[SlabChecksums]
    """Of MEMORY blocks."""
    file: Callable[[SlotPlace], SegmentFile | None]
    """The file that a place is in; None when it cannot be had."""


def planned_blocks(
    keys: Sequence[BlockKey], grants: PlanGrants, memory: PlanMemory
) -> tuple[PlannedBlock, ...]:
    """The plan's blocks for a client; a block whose file cannot be had ends it, as a MISS.

    Raises:
        ValueError: the columns do not fit each other.
    """
    assembler = _Assembler(grants, memory)
    blocks: list[PlannedBlock] = []
    try:
        for key, source, tier in zip(keys, grants.sources, grants.tiers, strict=False):
            block = assembler.next_block(key, source, tier)
            if block is None:
                break
            blocks.append(block)
    except StopIteration as error:
        raise ValueError("a load plan lacks places of its blocks") from error
    for key, status in zip(keys[len(blocks) :], grants.statuses[len(blocks) :], strict=True):
        is_lost = status is LoadStatus.READY
        blocks.append(PlannedBlock(key, LoadStatus.MISS if is_lost else status))
    return tuple(blocks)


class _Assembler:
    """Takes from the columns what each block needs, in order."""

    def __init__(self, grants: PlanGrants, memory: PlanMemory) -> None:
        self._offsets, self._places = iter(grants.offsets), iter(grants.places)
        self._checksums = iter(memory.checksums)
        self._memory = memory

    def next_block(self, key: BlockKey, source: SourceKind, tier: TierKind) -> PlannedBlock | None:
        ready = LoadStatus.READY
        if source is SourceKind.EXTENT:
            place = next(self._places)
            file = self._memory.file(place)
            if file is None:
                return None
            extent = Extent(file, place.slot, place.offset, place.generation, place.summary_bytes)
            return PlannedBlock(key, ready, source, tier, extent=extent)
        data = self._memory.view(next(self._offsets))
        checksums = next(self._checksums) if source is SourceKind.MEMORY else ()
        return PlannedBlock(key, ready, source, tier, data, checksums)
