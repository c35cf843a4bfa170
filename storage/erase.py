"""Erasing what deleted blocks left on the disk, beyond taking them out of the index.

    index transaction -> headers blanked, fdatasync   `Tier.delete`: the block is a miss, for good
    every free slot punched, whole, fdatasync         here: its bytes are gone
    likewise each quarantined slot whose header names one of them, or is none

A block that was evicted earlier, written and never committed, or deleted when the power went left
its bytes, and maybe its header, in a slot that is free now, and nobody knows in which. So all free
slots are erased: runs of them are one call each, and where the file system can punch holes nothing
is written. The space is taken back at once, so that the segment stays preallocated. Where it cannot
punch, zeros are written. What the file system or the device keeps of freed sectors is beyond us.

A retired segment cannot be written, so what lies in it cannot be erased: `fsck --repair` replaces
it. Encoded blocks need no more: what stands behind one in its slot is zeros.

One thread at a time: the one that commits writes, as nobody else hands out slots. Blocks.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

import numpy as np

from ucm.errors import TierUnavailableError

from .file_io import IoRequest, aligned_buffer
from .recovery import scan_headers
from .slots import SlotState
from .tier import SlotId

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence

    from ucm.types import BlockKey

    from .file_io import FileHandle
    from .recovery import NamespaceFiles
    from .slots import SlotTable

log = logging.getLogger(__name__)

ZERO_BYTES = 4 << 20
"""One write of zeros, where holes cannot be punched."""


class Eraser:
    """Erases bytes that no record names; a part of `NvmeTier`."""

    def __init__(
        self, files: NamespaceFiles, slots: SlotTable, retire: Callable[[int], None]
    ) -> None:
        """Of open files; `retire` takes a segment whose sync failed out of use."""
        self._files = files
        self._slots = slots
        self._retire = retire

    def erase(self, keys: Container[BlockKey]) -> None:
        """Erase every free slot, and what is quarantined and may be of one of `keys`; durably.

        Raises:
            TierUnavailableError: something could not be erased, or be proven to be; again later.
        """
        held = self._slots.change(
            self._slots.in_state(SlotState.FREE), SlotState.FREE, SlotState.ALLOCATED
        )
        try:
            for segment in erase_slots(self._files, [*held, *self._suspects(keys)]):
                self._retire(segment)
        finally:
            self._slots.change(held, SlotState.ALLOCATED, SlotState.FREE)
        retired = sorted(self._files.segments.retired)
        if retired:
            raise TierUnavailableError(
                f"segment {retired[0]:04d} of namespace {self._files.folder.name[:8]} is out of "
                "use, so what lies in it cannot be erased: stop the daemon and run "
                "`ucm fsck --repair`"
            )

    def _suspects(self, keys: Container[BlockKey]) -> list[SlotId]:
        """Quarantined slots that can be written and hold one of `keys`, or nobody knows what."""
        segments = self._files.segments
        barred = [
            slot
            for slot in self._slots.in_state(SlotState.QUARANTINED)
            if segments.locate(slot) is not None
        ]
        return [
            scanned.slot
            for scanned in scan_headers(self._files, barred)
            if not scanned.is_blank and (scanned.header is None or scanned.header.key in keys)
        ]


def erase_slots(files: NamespaceFiles, slots: Sequence[SlotId]) -> set[int]:
    """Make slots read as zeros, header and all, durably; they are in no record.

    Returns:
        Segments whose sync failed, which are out of use now: nothing is known of those slots.

    Raises:
        TierUnavailableError: some of it could not be erased.
    """
    touched: dict[int, FileHandle] = {}
    try:
        for segment, file, offset, length in _runs(files, slots):
            touched[segment] = file
            _erase(files, file, offset, length)
        for file in touched.values():
            with contextlib.suppress(OSError):  # a full disk: the next write there finds it out
                files.io.preallocate(file, files.superblock.segment_bytes)
    except OSError as error:
        raise TierUnavailableError(
            f"slots of namespace {files.folder.name[:8]} cannot be erased: {error}"
        ) from error
    return files.segments.sync(touched)


def _runs(
    files: NamespaceFiles, slots: Sequence[SlotId]
) -> Iterator[tuple[int, FileHandle, int, int]]:
    """Neighbours in one file: (segment, file, offset, length); none where no place is."""
    segments, superblock = files.segments, files.superblock
    numbers = np.unique(np.fromiter(slots, np.int64))
    if not len(numbers):
        return
    per_segment = superblock.slots_per_segment
    breaks = (np.diff(numbers) != 1) | (np.diff(numbers // per_segment) != 0)
    for run in np.split(numbers, np.flatnonzero(breaks) + 1):
        first = SlotId(int(run[0]))
        place = segments.locate(first)
        if place is None:
            continue
        is_full = segments.is_full_slot(first)
        size = superblock.full_slot_bytes if is_full else superblock.slot_bytes
        yield segments.segment_of(first), place[0], place[1], len(run) * size


def _erase(files: NamespaceFiles, file: FileHandle, offset: int, length: int) -> None:
    try:
        files.io.punch_hole(file, offset, length)
    except OSError as error:
        log.debug("no hole can be punched, zeros are written: %s", error)
        _write_zeros(files, file, offset, length)


def _write_zeros(files: NamespaceFiles, file: FileHandle, offset: int, length: int) -> None:
    zeros = aligned_buffer(min(length, ZERO_BYTES))
    zeros[:] = bytes(len(zeros))
    requests = [
        IoRequest(file, offset + start, (zeros[: min(len(zeros), length - start)],))
        for start in range(0, length, len(zeros))
    ]
    for code in files.io.write_batch(requests):
        if code:
            raise OSError(code, "zeros cannot be written")
