"""Reading blocks layer by layer: the same layers of several blocks in one batch.

    request  | head | slab 0 ... slab g-1 |      of block 7      layers 0..g-1, the head in front
             | slab g ... slab 2g-1 |            of block 7      layers g..2g-1

Adjacent layers of a block are adjacent in its slot, so a request takes as many as make it long
enough for the device. Headers, keys, generations and checksums are compared on the I/O threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ucm.checksum import checksum

from .codec import CodecId
from .file_io import IoRequest, aligned_buffer
from .format import HEADER_BYTES, decode_header
from .slot_io import status_of_errno
from .summary_areas import believed
from .tier import IoStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ucm.api import SlabChecksums
    from ucm.layout import KvLayout
    from ucm.types import BlockKey

    from .file_io import FileHandle, FileIo
    from .format import Superblock
    from .segments import Segments
    from .slots import SlotTable
    from .tier import SlotId

REQUEST_BYTES: Final = 256 << 10
"""Shortest request where slabs are smaller: from here on a device reaches most of its speed."""


@dataclass(slots=True, eq=False)
class LayerRead:
    """One block on its way, layers one after another."""

    slot: SlotId
    key: BlockKey
    into: memoryview
    """Writable, `layout.block_bytes` long, page-aligned."""
    checksums: SlabChecksums = ()
    """Of its slabs; known once layer 0 was read."""
    generation: int = 0
    """Of the slot, as the table said when layer 0 was read."""
    summary: bytes = b""
    """As in `ReadOutcome`; known once layer 0 was read."""


def layers_per_request(layout: KvLayout) -> int:
    """How many layers of a block one request takes."""
    return min(layout.num_layers, max(1, -(-REQUEST_BYTES // layout.slab_stride_bytes)))


class LayerIo:
    """Layer by layer reads of one namespace's plain slots. Thread-safe; blocks until done."""

    def __init__(
        self, superblock: Superblock, segments: Segments, slots: SlotTable, io: FileIo
    ) -> None:
        self._superblock = superblock
        self._layout = superblock.layout
        self._segments = segments
        self._slots = slots
        self._io = io

    def read(self, items: Sequence[LayerRead], first_layer: int, stop_layer: int) -> list[IoStatus]:
        """Read and verify layers `first_layer..stop_layer-1` of every item, straight into place.

        The layers of an item are read in order, from 0 on, until one is not OK.
        """
        statuses = [IoStatus.IO_ERROR] * len(items)
        size = self._superblock.head_bytes
        heads = aligned_buffer(len(items) * size) if items and not first_layer else None
        requests: list[IoRequest] = []
        positions: list[int] = []
        for position, item in enumerate(items):
            place = self._segments.locate(item.slot)
            if place is None:
                continue
            head = None
            if heads is not None:
                head = heads[position * size : (position + 1) * size]
                item.generation = self._slots.generation(item.slot)
            positions.append(position)
            requests.append(self._request(item, place, head, range(first_layer, stop_layer)))
        for position, code in zip(positions, self._io.read_batch(requests), strict=True):
            statuses[position] = status_of_errno(code)
        return statuses

    def _request(
        self,
        item: LayerRead,
        place: tuple[FileHandle, int],
        head: memoryview | None,
        layers: range,
    ) -> IoRequest:
        stride = self._layout.slab_stride_bytes
        data = item.into.cast("B")[layers.start * stride : layers.stop * stride]
        file, offset = place
        check = self._check(item, data, head, layers)
        if head is not None:
            return IoRequest(file, offset, (head, data), check)
        skipped = self._superblock.head_bytes + layers.start * stride
        return IoRequest(file, offset + skipped, (data,), check)

    def _check(
        self, item: LayerRead, data: memoryview, head: memoryview | None, layers: range
    ) -> Callable[[], bool]:
        stride, size = self._layout.slab_stride_bytes, self._layout.slab_bytes

        def check() -> bool:
            if head is not None and not self._note_head(item, head):
                return False
            sums = item.checksums[layers.start : layers.stop]
            starts = range(0, len(data), stride)
            return tuple(checksum(data[at : at + size]) for at in starts) == sums

        return check

    def _note_head(self, item: LayerRead, head: memoryview) -> bool:
        header = decode_header(self._superblock, item.slot, head[:HEADER_BYTES])
        if header is None or header.codec is not CodecId.RAW:
            return False
        if (header.key, header.generation) != (item.key, item.generation):
            return False
        item.checksums = header.checksums
        item.summary = believed(self._superblock, head[HEADER_BYTES:], header.checksums)
        return True
