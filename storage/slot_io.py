"""Moving slots between memory and segment files: headers, checks, one request a slot.

    one preadv / pwritev    header (4 KiB, ours) | block (the caller's memory, no copy)

Says for each item what happened and changes no book keeping. The checks run on the I/O threads.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from ucm import checksum

from .file_io import IoRequest, aligned_buffer
from .format import BLANK_HEADER, HEADER_BYTES, SlotHeader, decode_header, encode_header
from .segments import NO_SPACE_ERRNOS
from .tier import IoStatus, ReadOutcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ucm.api import SlabChecksums

    from .file_io import FileIo
    from .format import Superblock
    from .segments import Segments
    from .tier import SlotId, SlotRead, SlotWrite

_CORRUPT_ERRNOS = frozenset({errno.EBADMSG, errno.ENODATA})


class SlotIo:
    """Batches of whole slots of one namespace. Thread-safe; blocks until done."""

    def __init__(self, superblock: Superblock, segments: Segments, io: FileIo) -> None:
        self._superblock = superblock
        self._layout = superblock.layout
        self._segments = segments
        self._io = io

    def write(self, items: Sequence[SlotWrite], generations: Sequence[int]) -> list[IoStatus]:
        """Verify and transfer blocks with their headers; not durable yet.

        A retired place is an IO_ERROR, a block that does not match its checksums is CORRUPT.
        """
        headers = aligned_buffer(len(items) * HEADER_BYTES)
        statuses = [IoStatus.IO_ERROR] * len(items)
        requests, positions = [], []
        for position, item in enumerate(items):
            place = self._segments.locate(item.slot)
            if place is None:
                continue
            if len(item.checksums) != self._layout.num_layers:
                statuses[position] = IoStatus.CORRUPT
                continue
            view = _nth_header(headers, position)
            encode_header(self._superblock, _header_of(item, generations[position]), view)
            buffers = (view, item.data.cast("B"))
            requests.append(IoRequest(*place, buffers, self._write_check(item)))
            positions.append(position)
        for position, code in zip(positions, self._io.write_batch(requests), strict=True):
            statuses[position] = status_of_errno(code)
        return statuses

    def read(self, items: Sequence[SlotRead], generations: Sequence[int]) -> list[ReadOutcome]:
        """Transfer blocks into the callers' memory and verify them there."""
        headers = aligned_buffer(max(1, len(items)) * HEADER_BYTES)
        found: list[SlabChecksums] = [()] * len(items)
        outcomes = [ReadOutcome(IoStatus.IO_ERROR)] * len(items)
        requests, positions = [], []
        for position, item in enumerate(items):
            place = self._segments.locate(item.slot)
            if place is None:
                continue
            view = _nth_header(headers, position)
            check = self._read_check(item, generations[position], view, (found, position))
            requests.append(IoRequest(*place, (view, item.into.cast("B")), check))
            positions.append(position)
        for position, code in zip(positions, self._io.read_batch(requests), strict=True):
            status = status_of_errno(code)
            sums = found[position] if status is IoStatus.OK else ()
            outcomes[position] = ReadOutcome(status, sums)
        return outcomes

    def blank(self, slots: Sequence[SlotId]) -> None:
        """Write zeros over the headers; not durable yet. A place that fails keeps its header."""
        blank = aligned_buffer(HEADER_BYTES)
        blank[:] = BLANK_HEADER
        places = [self._segments.locate(slot) for slot in slots]
        self._io.write_batch([IoRequest(*place, (blank,)) for place in places if place is not None])

    def _write_check(self, item: SlotWrite) -> Callable[[], bool]:
        return lambda: checksum.verify(self._layout, item.data, item.checksums)

    def _read_check(
        self,
        item: SlotRead,
        generation: int,
        header_view: memoryview,
        found: tuple[list[SlabChecksums], int],
    ) -> Callable[[], bool]:
        """Compare what was read with what should be there; note its checksums in `found`."""

        def check() -> bool:
            header = decode_header(self._superblock, item.slot, header_view)
            if header is None or (header.key, header.generation) != (item.key, generation):
                return False
            checksums, position = found
            checksums[position] = header.checksums
            return checksum.verify(self._layout, item.into, header.checksums)

        return check


def status_of_errno(code: int) -> IoStatus:
    """What a request's result means for its block."""
    if code == 0:
        return IoStatus.OK
    if code in _CORRUPT_ERRNOS:
        return IoStatus.CORRUPT
    return IoStatus.FULL if code in NO_SPACE_ERRNOS else IoStatus.IO_ERROR


def _header_of(item: SlotWrite, generation: int) -> SlotHeader:
    return SlotHeader(
        key=item.key,
        parent=item.parent,
        slot=item.slot,
        generation=generation,
        checksums=item.checksums,
    )


def _nth_header(headers: memoryview, position: int) -> memoryview:
    return headers[position * HEADER_BYTES : (position + 1) * HEADER_BYTES]
