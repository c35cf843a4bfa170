"""Where blocks lie in the segment files, for clients that read them there themselves.

    slot   | header (4096) | summary area | slab 0 | slab 1 | ...      see `storage.format`
           ^ SlotPlace.offset

Only blocks that lie there as they are have a place; encoded ones are for the daemon to decode. A
place is true when it is given: who reads later compares the header with key and generation, and
every slab with its checksum. What keeps a place true meanwhile is a lease, above this layer.

A file is passed on as a descriptor of its own, read-only: the daemon's own is writable, and a
descriptor that is passed shares its mode. It is opened through /proc, so that no name is looked up
twice and a file that was unlinked meanwhile is still the one that was meant.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ucm.errors import TierUnavailableError

from .layer_io import LayerIo
from .slots import SlotState
from .tier import IoStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ucm.types import BlockKey

    from .layer_io import LayerRead
    from .recovery import NamespaceFiles
    from .slots import SlotTable
    from .tier import SlotId

    Quarantine = Callable[[SlotId, BlockKey, int], None]


@dataclass(frozen=True, slots=True)
class SlotPlace:
    """Where one block lies as it is."""

    slot: SlotId
    segment: int
    file_id: int
    """Which file of that segment; another number once the segment left and came back."""
    offset: int
    """Of the slot's header, in bytes."""
    generation: int
    summary_bytes: int = 0
    """Between the header and the payload; the same for a whole namespace."""


@dataclass(frozen=True, slots=True)
class SegmentFd:
    """A descriptor of a segment's file, read-only; the caller closes it."""

    fd: int
    file_id: int
    is_direct: bool
    """O_DIRECT is set."""


class ExtentTable:
    """Places of one namespace's blocks; a part of `NvmeTier`. Thread-safe."""

    def __init__(self, files: NamespaceFiles, slots: SlotTable, quarantine: Quarantine) -> None:
        """Of open files; `quarantine` bars a slot that does not hold what it should."""
        self._segments = files.segments
        self._summary_bytes = files.superblock.summary_bytes
        self._slots = slots
        self._quarantine = quarantine
        self._layers = LayerIo(files.superblock, files.segments, slots, files.io)

    def places(self, slots: Sequence[SlotId]) -> list[SlotPlace | None]:
        """For each slot where its block lies; None when it is encoded or cannot be read."""
        states = self._slots.states(slots)
        return [
            self._place(slot) if state is SlotState.USED else None
            for slot, state in zip(slots, states, strict=True)
        ]

    def _place(self, slot: SlotId) -> SlotPlace | None:
        found = self._segments.locate(slot)
        if found is None or not self._segments.holds_plain_blocks(slot):
            return None
        segment = self._segments.segment_of(slot)
        generation = self._slots.generation(slot)
        file_id = self._segments.file_id(segment)
        return SlotPlace(slot, segment, file_id, found[1], generation, self._summary_bytes)

    def read_layers(
        self, items: Sequence[LayerRead], first_layer: int, stop_layer: int
    ) -> list[IoStatus]:
        """Read layers `first_layer..stop_layer-1` of blocks that have places; blocks until done.

        Into place and verified, as `Tier.read` does; what is corrupt is quarantined.
        """
        statuses = self._layers.read(items, first_layer, stop_layer)
        for item, status in zip(items, statuses, strict=True):
            if status is IoStatus.CORRUPT:
                self._quarantine(item.slot, item.key, item.generation)
        return statuses

    def open_segment(self, segment: int) -> SegmentFd:
        """Open a segment's file once more, read-only, with O_DIRECT where the disk takes it.

        Does not wait for a sync of the segment.

        Raises:
            TierUnavailableError: it is out of use, or cannot be opened.
        """
        try:
            with self._segments.duplicate(segment) as found:
                if found is None:
                    raise TierUnavailableError(f"segment {segment:04d} is out of use")
                file, file_id = found
                fd, is_direct = _reopened(file)
        except OSError as error:
            raise TierUnavailableError(
                f"segment {segment:04d} cannot be opened for a client: {error.strerror}"
            ) from error
        return SegmentFd(fd, file_id, is_direct)


def _reopened(fd: int) -> tuple[int, bool]:
    path, flags = f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags), False
