"""The `Tier` seam: one namespace's blocks in one place.

A tier is mechanism only. It stores and finds bytes by *slot*, a dense number that it hands out;
which block is where, who may go and what moves is decided above it. All methods are thread-safe
and block until done; callers run them in bounded pools. Results are a status for every item.

    allocate -> write -> read ... -> delete          a block's life
    allocate -> free                                  it never arrived

A slot handed out by `allocate` belongs to the caller until `free` or `delete`. `delete` is as
durable as `write`: after it returned, no reopening brings the block back.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType, Protocol

from ucm.api import SlabChecksums
from ucm.layout import KvLayout
from ucm.types import BlockKey, TierKind

if TYPE_CHECKING:
    from .erase import Eraser
    from .extents import ExtentTable
    from .shrink import Shrinker
    from .summary_areas import SummaryAreas

SlotId = NewType("SlotId", int)
"""Index of a slot in one namespace's tier, 0-based and dense."""


class IoStatus(enum.StrEnum):
    """What became of one item of a batch."""

    OK = "ok"
    CORRUPT = "corrupt"
    """A checksum or a header does not match; the slot is quarantined until `fsck --repair`."""
    IO_ERROR = "io_error"
    """The device failed; the bytes are unknown."""
    FULL = "full"
    """The disk or the index has no room."""
    OVERSIZE = "oversize"
    """Encoded it does not fit its slot: write it again to one that `allocate(full=True)` gave."""


@dataclass(frozen=True, slots=True)
class TierEntry:
    """One block found in a tier at opening."""

    key: BlockKey
    parent: BlockKey
    slot: SlotId


@dataclass(frozen=True, slots=True)
class SlotWrite:
    """One block to write."""

    slot: SlotId
    key: BlockKey
    parent: BlockKey
    data: memoryview
    """`layout.block_bytes` long."""
    checksums: SlabChecksums
    was_lossy: bool = False
    """It came back from a lossy codec, which must not be applied to it a second time."""
    payload: bytes = b""
    """What `ReadOutcome.payload` said of the same block: it is written as it was, if it fits."""
    summary: bytes = b""
    """The block's encoded summary, for a tier that keeps them (`Tier.summaries`); b"" is none."""


@dataclass(frozen=True, slots=True)
class SlotRead:
    """One block to read."""

    slot: SlotId
    key: BlockKey
    into: memoryview
    """Writable, `layout.block_bytes` long."""
    keep_payload: bool = False
    """Also answer how it was encoded, so that it can be moved without a second loss."""


@dataclass(frozen=True, slots=True)
class ReadOutcome:
    """Status of a read, with the stored checksums when it is OK."""

    status: IoStatus
    checksums: SlabChecksums = ()
    is_lossy: bool = False
    """The bytes may be what a lossy codec made of those that were written."""
    payload: bytes = b""
    """The block as it was encoded, if that was asked for and it was."""
    summary: bytes = b""
    """The block's encoded summary, if it lay there whole and speaks for this content."""


@dataclass(frozen=True, slots=True)
class TierUsage:
    """Room in one namespace's tier."""

    used_slots: int
    free_slots: int
    """Slots that `allocate` can hand out without anything being evicted."""
    quarantined_slots: int
    slot_bytes: int
    """Bytes that one slot occupies, header included."""
    disk_is_full: bool = False
    """The disk refused room that the capacity allows; `free_slots` counts without it."""
    held_bytes: int = 0
    """Disk space of its files."""
    codec: str = "raw"
    """Of what is written to it."""

    @property
    def total_slots(self) -> int:
        """Used and free together; quarantined ones are neither."""
        return self.used_slots + self.free_slots


class Tier(Protocol):
    """One namespace's slots in one tier."""

    @property
    def kind(self) -> TierKind:
        """Which tier this is."""

    @property
    def layout(self) -> KvLayout:
        """Shape of every block in it."""

    def entries(self) -> Iterable[TierEntry]:
        """The blocks found at opening, a parent before its children, oldest first.

        A large tier may answer an `EntryTable`, which has them in columns.

        Orphans (whose parent is not in the tier) were removed at opening.
        """

    def allocate(self, count: int, *, full: bool = False) -> list[SlotId]:
        """Hand out up to `count` free slots; fewer when there are not as many.

        Args:
            count: how many.
            full: slots for blocks whose write was answered OVERSIZE; all are where none is.
        """

    def free(self, slots: Sequence[SlotId]) -> None:
        """Take back slots that were never successfully written."""

    def write(self, items: Sequence[SlotWrite]) -> list[IoStatus]:
        """Store blocks in allocated slots; durable, where the tier is, once it returns.

        Verifies each block against its checksums on the bytes that were taken, not on the
        caller's. An item that is not OK is invisible and its slot is the caller's to `free`.
        """

    def read(self, items: Sequence[SlotRead]) -> list[ReadOutcome]:
        """Fetch blocks; OK only if key and every slab checksum match what `into` now holds."""

    def delete(self, items: Sequence[tuple[SlotId, BlockKey]]) -> None:
        """Forget blocks durably, then free their slots.

        Raises:
            TierUnavailableError: the removal could not be made durable; nothing was freed.
        """

    def usage(self) -> TierUsage:
        """How full it is."""

    @property
    def shrinker(self) -> Shrinker | None:
        """What gives disk space back; None where there is none to give."""

    @property
    def eraser(self) -> Eraser | None:
        """What leaves no byte of deleted blocks; None where `delete` does."""

    @property
    def extents(self) -> ExtentTable | None:
        """Where blocks lie in files, for whoever reads them there; None where no files are."""

    @property
    def summaries(self) -> SummaryAreas | None:
        """What reads summaries without their blocks; None where there is no room for any."""

    def check_integrity(self) -> list[str]:
        """Every violated invariant, in words; empty when sound. Cheap: reads no block data."""

    def close(self) -> None:
        """Flush, mark a clean end, release everything. Idempotent."""
