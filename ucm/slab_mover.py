"""What one step of a layer by layer reader does: bytes into the target, verified there.

    EXTENT    read | head | slab 0 ...     straight into the target where it is page-aligned and
              has no padding, else into scratch and over; then header, key, generation, checksums
    others    copy out of the arena, then checksums

The judge is always the checksum of the target, after the last write to it. A writer asks first
(`WriteGate`): blocks that were given up, or all of them, are not written any more.

Envelope: a read costs some 35 us of this interpreter besides the device, a copied slab 6 us, and
each slab its checksum (30 GB/s).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ucm.storage.file_io import FileHandle, FileIo, IoRequest, aligned_buffer, is_aligned
from ucm.storage.format import HEADER_BYTES, Superblock, decode_header
from ucm.storage.tier import SlotId

from .checksum import checksum
from .types import SourceKind

if TYPE_CHECKING:
    from .api import SlabChecksums
    from .layout import KvLayout
    from .load_plan import LoadPlan, PlannedBlock
    from .load_steps import Step


class SlabTarget(Protocol):
    """Where a load's slabs go: places of an engine's pool, or of a staging buffer."""

    def view(self, layer: int, index: int) -> memoryview:
        """Writable bytes of one slab of the plan's block `index`, `layout.slab_bytes` long.

        Where it is page-aligned and the slab fills whole pages, files are read straight into it.
        Called from the reader's threads.
        """


class WriteGate(Protocol):
    """Who may write to the target, asked before each write."""

    def begin_write(self, block: int) -> bool:
        """Whether the block may be written now; if so, `end_write` must follow."""

    def end_write(self, block: int) -> None:
        """The write is over."""

    def wait_turn(self, block: int, num_bytes: int) -> bool:
        """Wait until the plan's limit lets so many bytes be read; False when nobody wants them."""

    def wait_checksums(self, block: int) -> SlabChecksums | None:
        """Of an EXTENT block, from its header; None when that failed or nobody wants it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one block in a step."""

    block: int
    is_good: bool
    is_suspect: bool = False
    """Not good, and the cache should look at its copy."""
    is_dropped: bool = False
    """Not written, because nobody wants it any more."""


class SlabMover:
    """Runs steps of one plan. Thread-safe; each thread brings its own `Scratch`."""

    def __init__(
        self, plan: LoadPlan, layout: KvLayout, target: SlabTarget, io: FileIo, gate: WriteGate
    ) -> None:
        self._blocks = plan.blocks
        self._progress = plan.progress
        self._layout = layout
        self._target = target
        self._io = io
        self._gate = gate
        self._superblock = _plain_superblock(plan, layout)
        self._ranks = _ranks(plan.blocks)
        self.checksums: dict[int, SlabChecksums] = {}
        """Of EXTENT blocks, once their header was read and is right."""

    def move(self, step: Step, scratch: Scratch, *, in_scratch: bool) -> list[Outcome]:
        """Do one step; blocks on the disk.

        Args:
            step: what.
            scratch: of this thread.
            in_scratch: read into scratch even where the target could be read into directly, so
                that the block can be given up in the middle of the read.
        """
        if step.source is SourceKind.EXTENT:
            return [self._read(step, scratch, in_scratch=in_scratch)]
        return [self._copy(step, block) for block in range(step.first_block, step.stop_block)]

    def _copy(self, step: Step, index: int) -> Outcome:
        block, rank = self._blocks[index], self._ranks.get(index, -1)
        progress = self._progress
        sums = block.checksums
        if step.source is SourceKind.PROMOTING:
            if progress is None or rank >= progress.num_usable():
                return Outcome(index, is_good=False)
            sums = progress.checksums(rank)
        if block.data is None or len(sums) != self._layout.num_layers:
            return Outcome(index, is_good=False)
        data = block.data
        slabs = range(step.first_layer, step.stop_layer)
        pieces = [data[self._layout.slab_slice(layer)] for layer in slabs]
        return self._land(index, step, pieces, sums)

    def _land(
        self, index: int, step: Step, pieces: Sequence[memoryview], sums: SlabChecksums
    ) -> Outcome:
        """Copy slabs to the target and verify them there."""
        if not self._gate.begin_write(index):
            return Outcome(index, is_good=False, is_dropped=True)
        try:
            for layer, piece in enumerate(pieces, step.first_layer):
                view = self._target.view(layer, index)
                np.copyto(np.frombuffer(view, np.uint8), np.frombuffer(piece, np.uint8))
                if checksum(view) != sums[layer]:
                    return Outcome(index, is_good=False, is_suspect=True)
        finally:
            self._gate.end_write(index)
        return Outcome(index, is_good=True)

    def _read(self, step: Step, scratch: Scratch, *, in_scratch: bool) -> Outcome:
        """Read one block's layers, with the header in front when they begin with layer 0."""
        index, layers = step.first_block, range(step.first_layer, step.stop_layer)
        stride = self._layout.slab_stride_bytes
        if not self._gate.wait_turn(index, len(layers) * stride):
            return Outcome(index, is_good=False, is_dropped=True)
        if not in_scratch:
            views = [self._target.view(layer, index) for layer in layers]
            if all(view.nbytes == stride and is_aligned(view) for view in views):
                return self._read_direct(step, views, scratch)
        data = scratch.payload(len(layers) * stride)
        error = self._transfer(step, [data], scratch)
        if error is not None:
            return error
        sums = self._gate.wait_checksums(index)
        if sums is None:
            return Outcome(index, is_good=False, is_dropped=True)
        size = self._layout.slab_bytes
        pieces = [data[start : start + size] for start in range(0, len(layers) * stride, stride)]
        return self._land(index, step, pieces, sums)

    def _read_direct(self, step: Step, views: Sequence[memoryview], scratch: Scratch) -> Outcome:
        index = step.first_block
        if not self._gate.begin_write(index):
            return Outcome(index, is_good=False, is_dropped=True)
        try:
            error = self._transfer(step, views, scratch)
        finally:
            self._gate.end_write(index)
        if error is not None:
            return error
        sums = self._gate.wait_checksums(index)
        if sums is None:
            return Outcome(index, is_good=False, is_dropped=True)
        expected = sums[step.first_layer : step.stop_layer]
        is_good = all(checksum(view) == own for view, own in zip(views, expected, strict=True))
        return Outcome(index, is_good=is_good, is_suspect=not is_good)

    def _transfer(
        self, step: Step, buffers: Sequence[memoryview], scratch: Scratch
    ) -> Outcome | None:
        """Read into `buffers`, and the header if it is due; None when all went well."""
        index = step.first_block
        block = self._blocks[index]
        extent = block.extent
        assert extent is not None, "an EXTENT block has one"
        offset = extent.offset
        if step.first_layer == 0:
            buffers = [scratch.head(self._superblock.head_bytes), *buffers]
        else:
            offset = extent.payload_offset + step.first_layer * self._layout.slab_stride_bytes
        request = IoRequest(FileHandle(extent.fd), offset, tuple(buffers))
        if self._io.read_batch([request])[0]:
            return Outcome(index, is_good=False, is_suspect=True)
        if step.first_layer == 0 and not self._note_header(index, block, buffers[0]):
            return Outcome(index, is_good=False, is_suspect=True)
        return None

    def _note_header(self, index: int, block: PlannedBlock, data: memoryview) -> bool:
        """Whether the header is that of the block; its checksums count from now on."""
        extent = block.extent
        assert extent is not None, "an EXTENT block has one"
        header = decode_header(self._superblock, SlotId(extent.slot), data[:HEADER_BYTES])
        if header is None or (header.key, header.generation) != (block.key, extent.generation):
            return False
        self.checksums[index] = header.checksums
        return True


class Scratch:
    """One thread's memory for headers and for what cannot be read into the target."""

    def __init__(self) -> None:
        self._head = aligned_buffer(HEADER_BYTES)
        self._payload: memoryview | None = None

    def head(self, num_bytes: int) -> memoryview:
        """A header and its summary area, on a page boundary; the same memory every time."""
        if len(self._head) < num_bytes:
            self._head = aligned_buffer(num_bytes)
        return self._head[:num_bytes]

    def payload(self, num_bytes: int) -> memoryview:
        """`num_bytes` on a page boundary; the same memory every time."""
        if self._payload is None or len(self._payload) < num_bytes:
            self._payload = aligned_buffer(num_bytes)
        return self._payload[:num_bytes]


def _plain_superblock(plan: LoadPlan, layout: KvLayout) -> Superblock:
    """What the header of a block that lies as it is must agree with."""
    return Superblock(
        namespace=plan.namespace,
        layout=layout,
        segment_bytes=HEADER_BYTES + plan.summary_bytes + layout.block_bytes,
        summary_bytes=plan.summary_bytes,
    )


def _ranks(blocks: Sequence[PlannedBlock]) -> dict[int, int]:
    """The number that each PROMOTING block has in the plan's progress."""
    promoting = [i for i, block in enumerate(blocks) if block.source is SourceKind.PROMOTING]
    return {index: rank for rank, index in enumerate(promoting)}
