"""The summary area of a slot: what may stand in it, and reading it without the block behind it.

    slot   | header (4096) | summary area | payload
           ^--- one preadv, 40 KiB instead of 760 (SmolLM2-135M, gsa-k4)

A summary is believed only if the header in front of it is the one of the block that was asked for
and `decode_summary` finds it whole, of our kind and of just those slab checksums. So an area needs
no order of writes of its own: whatever a crash leaves in it, or an earlier tenant of the slot, is
as nothing. A summary that does not count never harms its block: nothing is quarantined for it.

Blocks on the caller's thread; the checks run on the I/O threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ucm.kernels.summary_record import area_bytes, decode_summary, summary_bytes

from .codecs import codec_of
from .file_io import IoRequest, aligned_buffer
from .format import HEADER_BYTES, decode_header
from .slots import SlotState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ucm.api import SlabChecksums
    from ucm.types import BlockKey, SummaryKind

    from .format import Superblock
    from .recovery import NamespaceFiles
    from .slots import SlotTable
    from .tier import SlotId

READS_PER_BATCH = 64
"""Summaries of one call that are being read at once: 2.5 MiB of them (SmolLM2-135M, gsa-k4)."""


@dataclass(frozen=True, slots=True)
class StoredSummary:
    """A summary that was read and may be believed."""

    data: bytes
    """Encoded, without padding."""
    checksums: SlabChecksums
    """Of the block that it speaks for, as it lies in the slot."""


def fill_area(
    superblock: Superblock, summary: bytes, checksums: SlabChecksums, area: memoryview
) -> None:
    """Write a block's area: its summary if it is one that `believed` would take, else zeros.

    Args:
        superblock: of the namespace.
        summary: encoded; may be empty, or of another content.
        checksums: of the block as it will be read back.
        area: `summary_bytes` of the superblock.
    """
    fits = len(summary) <= len(area) and believed(superblock, memoryview(summary), checksums)
    end = len(summary) if fits else 0
    area[:end] = summary[:end]
    area[end:] = bytes(len(area) - end)


def believed(superblock: Superblock, area: memoryview, checksums: SlabChecksums) -> bytes:
    """The encoded summary in `area` if it speaks for the block with these checksums; else b""."""
    kind, layout = superblock.summary, superblock.layout
    if kind is None or not len(area) or area_bytes(layout, kind) != superblock.summary_bytes:
        return b""
    taken = bytes(area[: summary_bytes(layout, kind)])
    decoded = decode_summary(layout, taken, checksums)
    return taken if decoded is not None and decoded.kind is kind else b""


class SummaryAreas:
    """The summary areas of one open namespace; a part of `NvmeTier`. Thread-safe."""

    def __init__(self, files: NamespaceFiles, slots: SlotTable, kind: SummaryKind) -> None:
        """Of open files whose superblock has areas."""
        self.kind = kind
        """What the areas hold."""
        self._superblock = files.superblock
        self._segments = files.segments
        self._io = files.io
        self._slots = slots

    @property
    def is_lossy(self) -> bool:
        """Whether a block may lose precision when it is written, and with it what speaks for it."""
        return not codec_of(self._superblock.codec).is_lossless

    def read(self, items: Sequence[tuple[SlotId, BlockKey]]) -> list[StoredSummary | None]:
        """The summaries of blocks, without the blocks; None where none can be believed."""
        found: list[StoredSummary | None] = []
        for start in range(0, len(items), READS_PER_BATCH):
            found += self._read_batch(items[start : start + READS_PER_BATCH])
        return found

    def _read_batch(self, items: Sequence[tuple[SlotId, BlockKey]]) -> list[StoredSummary | None]:
        size = self._superblock.head_bytes
        buffer = aligned_buffer(len(items) * size)
        states = self._slots.states([slot for slot, _ in items])
        found: list[StoredSummary | None] = [None] * len(items)
        requests: list[IoRequest] = []
        for position, ((slot, key), state) in enumerate(zip(items, states, strict=True)):
            place = self._segments.locate(slot) if state is SlotState.USED else None
            if place is None:
                continue
            head = buffer[position * size : (position + 1) * size]
            check = self._check((slot, key), self._slots.generation(slot), head, (found, position))
            requests.append(IoRequest(*place, (head,), check))
        self._io.read_batch(requests)
        return found

    def _check(
        self,
        item: tuple[SlotId, BlockKey],
        generation: int,
        head: memoryview,
        found: tuple[list[StoredSummary | None], int],
    ) -> Callable[[], bool]:
        def check() -> bool:
            header = decode_header(self._superblock, item[0], head[:HEADER_BYTES])
            if header is None or (header.key, header.generation) != (item[1], generation):
                return True  # for a read of the block to find out
            summary = believed(self._superblock, head[HEADER_BYTES:], header.checksums)
            if summary:
                results, position = found
                results[position] = StoredSummary(summary, header.checksums)
            return True

        return check


def filled_areas(files: NamespaceFiles, slots: Sequence[SlotId]) -> list[SlotId]:
    """Those of `slots` whose area can be read and is not all zeros, whatever stands in it."""
    size = files.superblock.summary_bytes
    found: list[SlotId] = []
    for start in range(0, len(slots) if size else 0, READS_PER_BATCH):
        part = slots[start : start + READS_PER_BATCH]
        buffer = aligned_buffer(len(part) * size)
        views = [buffer[i * size : (i + 1) * size] for i in range(len(part))]
        requests = _area_requests(files, part, views)
        codes = files.io.read_batch(list(requests.values()))
        good = [slot for slot, code in zip(requests, codes, strict=True) if code == 0]
        found += [slot for slot in good if any(requests[slot].buffers[0])]
    return found


def blank_areas(files: NamespaceFiles, slots: Sequence[SlotId]) -> None:
    """Write zeros over areas, durably; one that fails keeps what it has."""
    if slots:
        blank = aligned_buffer(files.superblock.summary_bytes)
        blank[:] = bytes(len(blank))
        requests = _area_requests(files, slots, [blank] * len(slots))
        files.io.write_batch(list(requests.values()))
        files.segments.sync({files.segments.segment_of(slot) for slot in slots})


def _area_requests(
    files: NamespaceFiles, slots: Sequence[SlotId], views: Sequence[memoryview]
) -> dict[SlotId, IoRequest]:
    requests = {}
    for slot, view in zip(slots, views, strict=True):
        place = files.segments.locate(slot)
        if place is not None:
            requests[slot] = IoRequest(place[0], place[1] + HEADER_BYTES, (view,))
    return requests


def areas_of(files: NamespaceFiles, slots: SlotTable) -> SummaryAreas | None:
    """What reads the summaries of an open namespace; None when it has no areas, or of other size.

    Another size is that of another version of summaries, which would not be believed.
    """
    superblock = files.superblock
    kind = superblock.summary
    if kind is None or area_bytes(superblock.layout, kind) != superblock.summary_bytes:
        return None
    return SummaryAreas(files, slots, kind)
