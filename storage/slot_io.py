"""Moving slots between memory and segment files: headers, checks, adjacent slots together.

    request  | head 7 | block 7 | head 8 | block 8 | ...   one preadv / pwritev, by iovecs
    memory     ours     caller's  ours     caller's        no copy

A head is the header and, in a namespace that has one, the summary area.

Slots that lie together in a file become one request, of at most `MERGED_BYTES`, and of no more
than leaves every I/O thread something to do. What happened is said for each block by itself: each
has its own check, and a merged request that fails is done again block by block. Changes no book
keeping. The checks run on the I/O threads.

Envelope: a request costs 30 us of hand-over and system call besides what each page costs, so
merged ones of 4 MiB read at 0.05 CPU-s/GB, 0.01 into 2 MiB pages; the checksum, which has to fetch
what the device just wrote from memory, adds 0.13 at 7.5 GB/s.
"""

from __future__ import annotations

import contextlib
import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ucm import checksum

from .codec import CodecId
from .file_io import IoRequest, aligned_buffer
from .format import BLANK_HEADER, HEADER_BYTES, SlotHeader, decode_header, encode_header
from .segments import NO_SPACE_ERRNOS
from .summary_areas import believed, fill_area
from .tier import IoStatus, ReadOutcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ucm.api import SlabChecksums

    from .file_io import FileHandle, FileIo
    from .format import Superblock
    from .segments import Segments
    from .tier import SlotId, SlotRead, SlotWrite

_CORRUPT_ERRNOS = frozenset({errno.EBADMSG, errno.ENODATA})

MERGED_BYTES = 4 << 20
"""Longest merged request: from here on larger ones save nothing and delay the first block."""

MERGED_SLOTS = 256
"""Two iovecs each: half of the kernel's IOV_MAX."""

REQUESTS_PER_BATCH = 8
"""A batch is not merged into fewer requests than this: the queue depth that fills a device."""

SPARE_BYTES = 1 << 20
"""A piece of memory for heads that is kept for the next batch: 256 of them without summaries..."""

MIN_SPARE_HEADS = 32
"""...and one job's (`BLOCKS_PER_READ`) with them, whatever their size."""

MAX_SPARES = 8
"""Pieces kept; as many batches as are under way at once."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One block of a batch on its way."""

    position: int
    """In the batch."""
    file: FileHandle
    offset: int
    head: memoryview
    data: memoryview
    check: Callable[[], bool]


class SlotIo:
    """Batches of whole slots of one namespace. Thread-safe; blocks until done."""

    def __init__(self, superblock: Superblock, segments: Segments, io: FileIo) -> None:
        self._superblock = superblock
        self._layout = superblock.layout
        self._segments = segments
        self._io = io
        self._head_bytes = superblock.head_bytes
        self._spare_bytes = max(SPARE_BYTES, MIN_SPARE_HEADS * self._head_bytes)
        self._spare_heads: list[memoryview] = []

    def write(self, items: Sequence[SlotWrite], generations: Sequence[int]) -> list[IoStatus]:
        """Verify and transfer blocks with their headers; not durable yet.

        A retired place is an IO_ERROR, a block that does not match its checksums is CORRUPT.
        """
        heads = self._take_heads(len(items))
        statuses = [IoStatus.IO_ERROR] * len(items)
        parts = []
        for position, item in enumerate(items):
            place = self._segments.locate(item.slot)
            if place is None:
                continue
            if len(item.checksums) != self._layout.num_layers:
                statuses[position] = IoStatus.CORRUPT
                continue
            view = self._nth(heads, position)
            check = self._write_check(item, generations[position], view)
            parts.append(Piece(position, *place, view, item.data.cast("B"), check))
        slot_bytes = self._superblock.full_slot_bytes
        for part, code in transfer(parts, self._io.write_batch, slot_bytes):
            statuses[part.position] = status_of_errno(code)
        self._give_heads(heads)
        return statuses

    def read(self, items: Sequence[SlotRead], generations: Sequence[int]) -> list[ReadOutcome]:
        """Transfer blocks into the callers' memory and verify them there."""
        heads = self._take_heads(len(items))
        found: list[tuple[SlabChecksums, bytes]] = [((), b"")] * len(items)
        outcomes = [ReadOutcome(IoStatus.IO_ERROR)] * len(items)
        parts = []
        for position, item in enumerate(items):
            place = self._segments.locate(item.slot)
            if place is None:
                continue
            view = self._nth(heads, position)
            check = self._read_check(item, generations[position], view, (found, position))
            parts.append(Piece(position, *place, view, item.into.cast("B"), check))
        slot_bytes = self._superblock.full_slot_bytes
        for part, code in transfer(parts, self._io.read_batch, slot_bytes):
            status = status_of_errno(code)
            sums, summary = found[part.position] if status is IoStatus.OK else ((), b"")
            outcomes[part.position] = ReadOutcome(status, sums, summary=summary)
        self._give_heads(heads)
        return outcomes

    def _take_heads(self, count: int) -> memoryview:
        """Memory for `count` heads, used before if possible: fresh pages cost 5 us each."""
        with contextlib.suppress(IndexError):
            spare = self._spare_heads.pop()
            if len(spare) >= count * self._head_bytes:
                return spare
        return aligned_buffer(max(count * self._head_bytes, self._spare_bytes))

    def _give_heads(self, heads: memoryview) -> None:
        """Keep memory for the next batch; not after an error, when a thread may still use it."""
        if len(heads) == self._spare_bytes and len(self._spare_heads) < MAX_SPARES:
            self._spare_heads.append(heads)

    def _nth(self, heads: memoryview, position: int) -> memoryview:
        return heads[position * self._head_bytes : (position + 1) * self._head_bytes]

    def blank(self, slots: Sequence[SlotId]) -> None:
        """Write zeros over the headers; not durable yet. A place that fails keeps its header."""
        blank = aligned_buffer(HEADER_BYTES)
        blank[:] = BLANK_HEADER
        places = [self._segments.locate(slot) for slot in slots]
        self._io.write_batch([IoRequest(*place, (blank,)) for place in places if place is not None])

    def _write_check(
        self, item: SlotWrite, generation: int, head: memoryview
    ) -> Callable[[], bool]:
        """Verify what is to be written; make its head, there where others are being written."""

        def check() -> bool:
            if not checksum.verify(self._layout, item.data, item.checksums):
                return False
            header = _header_of(item, generation)
            encode_header(self._superblock, header, head[:HEADER_BYTES])
            if len(head) > HEADER_BYTES:
                fill_area(self._superblock, item.summary, item.checksums, head[HEADER_BYTES:])
            return True

        return check

    def _read_check(
        self,
        item: SlotRead,
        generation: int,
        head: memoryview,
        found: tuple[list[tuple[SlabChecksums, bytes]], int],
    ) -> Callable[[], bool]:
        """Compare what was read with what should be there; note what its head says in `found`."""

        def check() -> bool:
            header = decode_header(self._superblock, item.slot, head[:HEADER_BYTES])
            if header is None or header.codec is not CodecId.RAW:
                return False
            if (header.key, header.generation) != (item.key, generation):
                return False
            if not checksum.verify(self._layout, item.into, header.checksums):
                return False
            noted, position = found
            area = head[HEADER_BYTES:]
            noted[position] = header.checksums, believed(self._superblock, area, header.checksums)
            return True

        return check


def transfer(
    parts: Sequence[Piece],
    batch: Callable[[Sequence[IoRequest]], list[int]],
    slot_bytes: int,
) -> list[tuple[Piece, int]]:
    """Transfer every part, neighbours together; an `errno` for each of them.

    The parts of a merged request that fails are tried again one by one, so that each gets its own
    answer.

    Args:
        parts: of one batch.
        batch: `read_batch` or `write_batch` of a `FileIo`.
        slot_bytes: from one slot to the next.
    """
    runs = adjacent_runs(parts, slot_bytes)
    codes = batch([_request_of(run) for run in runs])
    done = [(run[0], code) for run, code in zip(runs, codes, strict=True) if len(run) == 1]
    again: list[Piece] = []
    for run, code in zip(runs, codes, strict=True):
        if len(run) > 1 and code == 0:
            done += [(part, 0) for part in run]
        elif len(run) > 1:
            again += run
    codes = batch([_request_of([part]) for part in again]) if again else []
    return done + list(zip(again, codes, strict=True))


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


def adjacent_runs(parts: Sequence[Piece], slot_bytes: int) -> list[list[Piece]]:
    """Group parts whose slots lie together in one file, each group in the order of the file.

    Args:
        parts: of one batch; no two have the same place.
        slot_bytes: from one slot to the next.
    """
    fair_share = len(parts) // REQUESTS_PER_BATCH
    limit = max(1, min(fair_share, MERGED_BYTES // slot_bytes, MERGED_SLOTS))
    runs: list[list[Piece]] = []
    for part in sorted(parts, key=lambda part: (part.file, part.offset)):
        last = runs[-1][-1] if runs and len(runs[-1]) < limit else None
        if last is not None and (part.file, part.offset) == (last.file, last.offset + slot_bytes):
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _request_of(run: Sequence[Piece]) -> IoRequest:
    """One request for neighbours; its check fails if that of any of them does."""
    buffers = tuple(buffer for part in run for buffer in (part.head, part.data))
    checks = [part.check for part in run]
    return IoRequest(run[0].file, run[0].offset, buffers, lambda: all(check() for check in checks))
