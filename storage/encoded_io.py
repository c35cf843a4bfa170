"""Moving encoded slots: what `slot_io` does for blocks as they are, with a codec in between.

    write   verify the block -> encode it into scratch, make its header -> one pwritev a run
    read    one preadv a run of slots into scratch -> header, checksums, decode -> verify

Everything but the transfer runs in the requests' checks, so on the I/O threads, several at once. A
block is copied before it is verified and encoded: what is encoded is what was verified, whatever
its owner does meanwhile. A block whose encoding is too long is answered OVERSIZE and nothing of it
is written; full slots go through `SlotIo`, without a codec. So does a block that a lossy codec
encoded before and memory lost the original of: coding it twice would add a second error. A full
slot does not say which of the two is in it, so both count as lossy. A block that only moves keeps
its encoding, whatever the codec.

Envelope: a core encodes some 0.1 GB/s and decodes 0.2 to 0.5 GB/s of blocks (`ucm bench codecs`);
scratch memory is bounded by `WAVE_BYTES` a call, and `MAX_SPARES` of them are kept.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from ucm import checksum
from ucm.errors import CorruptionError
from ucm.types import ROOT_KEY

from .codecs import codec_of
from .encoding import EncodedBlock, decode_block, encode_block
from .file_io import aligned_buffer
from .format import HEADER_BYTES, SlotHeader, decode_header, encode_header
from .slot_io import Piece, SlotIo, status_of_errno, transfer
from .summary_areas import believed, fill_area
from .tier import IoStatus, ReadOutcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .file_io import FileIo
    from .format import Superblock
    from .segments import Segments
    from .tier import SlotId, SlotRead, SlotWrite

log = logging.getLogger(__name__)

WAVE_BYTES = 16 << 20
"""Encoded slots of one call that are in memory at once."""

MAX_SPARES = 4
"""Scratch pieces that are kept for the next call."""


def slot_io_for(superblock: Superblock, segments: Segments, io: FileIo) -> SlotIo | EncodedSlotIo:
    """What moves the slots of this namespace."""
    if superblock.has_compact_slots:
        return EncodedSlotIo(superblock, segments, io)
    return SlotIo(superblock, segments, io)


class EncodedSlotIo:
    """As `SlotIo`, for a namespace with a codec. Thread-safe; blocks until done."""

    def __init__(self, superblock: Superblock, segments: Segments, io: FileIo) -> None:
        self._superblock = superblock
        self._layout = superblock.layout
        self._codec = codec_of(superblock.codec)
        self._segments = segments
        self._io = io
        self._plain = SlotIo(superblock, segments, io)
        self._per_wave = max(1, WAVE_BYTES // superblock.slot_bytes)
        self._spares: list[memoryview] = []

    def write(self, items: Sequence[SlotWrite], generations: Sequence[int]) -> list[IoStatus]:
        """As `SlotIo.write`; OVERSIZE for a block that needs a full slot."""
        statuses = [IoStatus.IO_ERROR] * len(items)
        full, compact = self._by_class([item.slot for item in items])
        plain = self._plain.write([items[i] for i in full], [generations[i] for i in full])
        for position, status in zip(full, plain, strict=True):
            statuses[position] = status
        for wave in self._waves(compact):
            self._write_wave(items, generations, wave, statuses)
        return statuses

    def read(self, items: Sequence[SlotRead], generations: Sequence[int]) -> list[ReadOutcome]:
        """As `SlotIo.read`."""
        outcomes = [ReadOutcome(IoStatus.IO_ERROR)] * len(items)
        full, compact = self._by_class([item.slot for item in items])
        plain = self._plain.read([items[i] for i in full], [generations[i] for i in full])
        is_lossy = not self._codec.is_lossless
        for position, outcome in zip(full, plain, strict=True):
            outcomes[position] = replace(outcome, is_lossy=is_lossy and bool(outcome.checksums))
        for wave in self._waves(compact):
            self._read_wave(items, generations, wave, outcomes)
        return outcomes

    def blank(self, slots: Sequence[SlotId]) -> None:
        """See `SlotIo.blank`."""
        self._plain.blank(slots)

    def _by_class(self, slots: Sequence[SlotId]) -> tuple[list[int], list[int]]:
        """Positions of full and of compact slots."""
        is_full = [self._segments.is_full_slot(slot) for slot in slots]
        full = [position for position, flag in enumerate(is_full) if flag]
        return full, [position for position, flag in enumerate(is_full) if not flag]

    def _waves(self, positions: Sequence[int]) -> list[Sequence[int]]:
        step = self._per_wave
        return [positions[start : start + step] for start in range(0, len(positions), step)]

    def _write_wave(
        self,
        items: Sequence[SlotWrite],
        generations: Sequence[int],
        wave: Sequence[int],
        statuses: list[IoStatus],
    ) -> None:
        oversize: set[int] = set()
        scratch, pieces = self._take(), []
        for number, position in enumerate(wave):
            item = items[position]
            place = self._segments.locate(item.slot)
            if place is None:
                continue
            if len(item.checksums) != self._layout.num_layers:
                statuses[position] = IoStatus.CORRUPT
                continue
            if item.was_lossy and not item.payload and not self._codec.is_lossless:
                statuses[position] = IoStatus.OVERSIZE
                continue
            head, payload = self._nth(scratch, number)
            check = self._write_check(item, generations[position], (head, payload), oversize)
            pieces.append(Piece(position, *place, head, payload, check))
        slot_bytes = self._superblock.slot_bytes
        for piece, code in transfer(pieces, self._io.write_batch, slot_bytes):
            is_oversize = items[piece.position].slot in oversize
            statuses[piece.position] = IoStatus.OVERSIZE if is_oversize else status_of_errno(code)
        self._give(scratch)

    def _read_wave(
        self,
        items: Sequence[SlotRead],
        generations: Sequence[int],
        wave: Sequence[int],
        outcomes: list[ReadOutcome],
    ) -> None:
        found: dict[SlotId, ReadOutcome] = {}
        scratch, pieces = self._take(), []
        for number, position in enumerate(wave):
            item = items[position]
            place = self._segments.locate(item.slot)
            if place is None:
                continue
            head, payload = self._nth(scratch, number)
            check = self._read_check(item, generations[position], (head, payload), found)
            pieces.append(Piece(position, *place, head, payload, check))
        slot_bytes = self._superblock.slot_bytes
        for piece, code in transfer(pieces, self._io.read_batch, slot_bytes):
            status = status_of_errno(code)
            is_good = status is IoStatus.OK
            slot = items[piece.position].slot
            outcomes[piece.position] = found[slot] if is_good else ReadOutcome(status)
        self._give(scratch)

    def _write_check(
        self,
        item: SlotWrite,
        generation: int,
        target: tuple[memoryview, memoryview],
        oversize: set[int],
    ) -> Callable[[], bool]:
        """Verify what is to be written, encode it, make its head."""

        def check() -> bool:
            taken = memoryview(bytes(item.data))
            if not checksum.verify(self._layout, taken, item.checksums):
                return False
            head, payload = target
            if item.payload:
                encoded = self._copied(item, payload)
            else:
                is_first = item.parent == ROOT_KEY
                encoded = encode_block(self._codec, self._layout, taken, payload, is_first=is_first)
            if encoded is None:
                oversize.add(item.slot)
                return False
            described = SlotHeader(
                key=item.key,
                parent=item.parent,
                slot=item.slot,
                generation=generation,
                checksums=encoded.checksums,
                codec=self._superblock.codec,
                encoded_bytes=encoded.payload_bytes,
            )
            encode_header(self._superblock, described, head[:HEADER_BYTES])
            if len(head) > HEADER_BYTES:  # what was lost in the encoding, no summary speaks for
                fill_area(self._superblock, item.summary, encoded.checksums, head[HEADER_BYTES:])
            return True

        return check

    def _copied(self, item: SlotWrite, into: memoryview) -> EncodedBlock | None:
        """Take over an encoding that is still that of the block; None when it is not."""
        if len(item.payload) > len(into):
            return None
        decoded = memoryview(bytearray(self._layout.block_bytes))
        try:
            decode_block(self._codec, self._layout, memoryview(item.payload), decoded)
        except CorruptionError as error:
            log.warning("slot %d: %s", item.slot, error)
            return None
        if not checksum.verify(self._layout, decoded, item.checksums):
            return None
        into[: len(item.payload)] = item.payload
        into[len(item.payload) :] = bytes(len(into) - len(item.payload))
        return EncodedBlock(payload_bytes=len(item.payload), checksums=item.checksums)

    def _read_check(
        self,
        item: SlotRead,
        generation: int,
        source: tuple[memoryview, memoryview],
        found: dict[SlotId, ReadOutcome],
    ) -> Callable[[], bool]:
        """Decode what was read if it is what should be there; note its outcome in `found`."""

        def check() -> bool:
            head, payload = source
            header = decode_header(self._superblock, item.slot, head[:HEADER_BYTES])
            if header is None or header.codec is not self._superblock.codec:
                return False
            if (header.key, header.generation) != (item.key, generation):
                return False
            payload = payload[: header.encoded_bytes]
            try:
                decode_block(self._codec, self._layout, payload, item.into)
            except CorruptionError as error:
                log.warning("slot %d: %s", item.slot, error)
                return False
            if not checksum.verify(self._layout, item.into, header.checksums):
                return False
            kept = bytes(payload) if item.keep_payload else b""
            summary = believed(self._superblock, head[HEADER_BYTES:], header.checksums)
            sums, is_lossy = header.checksums, not self._codec.is_lossless
            found[item.slot] = ReadOutcome(IoStatus.OK, sums, is_lossy, kept, summary)
            return True

        return check

    def _nth(self, scratch: memoryview, number: int) -> tuple[memoryview, memoryview]:
        """Head and payload of the n-th slot of a wave."""
        slot_bytes, head_bytes = self._superblock.slot_bytes, self._superblock.head_bytes
        slot = scratch[number * slot_bytes : (number + 1) * slot_bytes]
        return slot[:head_bytes], slot[head_bytes:]

    def _take(self) -> memoryview:
        """Memory for one wave, used before if possible: fresh pages cost 5 us each."""
        with contextlib.suppress(IndexError):
            return self._spares.pop()
        return aligned_buffer(self._per_wave * self._superblock.slot_bytes)

    def _give(self, scratch: memoryview) -> None:
        """Keep memory for the next wave; not after an error, when a thread may still use it."""
        if len(self._spares) < MAX_SPARES:
            self._spares.append(scratch)
