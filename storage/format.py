"""The disk format: superblock and slot header. All integers little-endian.

namespace folder   ns/<hex of namespace id>/superblock          4096 bytes, replaced atomically
                                            index/              LMDB, see `index.py`
                                            segments/NNNN.seg   preallocated, slots from byte 0
                                            segments/NNNN.compact.seg   the same, smaller slots

segment    = slots, then unused bytes up to segment_bytes; a number without a file is a segment
             that was given back: its slots do not exist until there is one again
slot n     is in segment n // slots_per_segment, as number i = n % slots_per_segment of it:
           | compact segment: at i * slot_bytes
           | full segment: at i * (4096 + summary_bytes + block bytes); no slot where that does
           |               not fit any more, so its numbers have gaps at the end
           with codec 0 there are only full segments, and slot_bytes is a full slot's
slot       = header (4096) | summary area (summary_bytes, may be 0) | payload
area       | a summary of the payload, of the superblock's kind (`ucm.kernels.summary_record`), and
           | zeros behind it; or only zeros
payload    | full slot: the block as it is, num_layers slabs on a distance of slab_stride_bytes
           |            (`ucm.layout`); always codec 0
           | compact slot: the encoded block, see `ucm.storage.encoding`; the superblock's codec

superblock | offset  bytes  field
           |      0      8  magic "UCMSUPER"
           |      8      4  format version
           |     12      4  bytes of the superblock (4096)
           |     16     32  namespace id
           |     48      8  segment_bytes
           |     56      8  slot_bytes
           |     64      8  slots_per_segment
           |     72      8  summary_bytes
           |     80     20  layout: num_layers, num_kv_heads, head_dim, block_tokens (4 each),
           |                dtype (4: 0 float32, 1 float16, 2 bfloat16)
           |    100      4  codec of compact slots (0 raw, 1 bp-zstd, 2 int8, 3 fp8, 4 int4)
           |    104      4  summary kind (`SummaryKind.number`), 0 without an area
           |    108   3980  zero
           |   4088      8  xxh3_64 of bytes 0..4087

header     | offset  bytes  field
           |      0      8  magic "UCMSLOT" and a zero byte
           |      8      4  format version
           |     12      4  codec
           |     16     32  namespace id
           |     48     32  key
           |     80     32  parent key
           |    112      8  generation: grows with every write in the namespace
           |    120      8  slot number: a header in another place was misdirected
           |    128      4  num_slabs (1 to 480)
           |    132      4  slab_bytes, padding excluded
           |    136      4  slab_stride_bytes
           |    140      4  zero
           |    144      8  summary_bytes
           |    152      8  payload_bytes: num_slabs * slab_stride_bytes for codec 0, otherwise
           |                what the encoded block takes
           |    160     88  zero
           |    248   3840  slab checksums: xxh3_64 of each decoded slab, then zeros
           |   4088      8  xxh3_64 of bytes 0..4087

A deleted slot has a header of zeros. A header counts only if every field fits; what lies
behind it counts only if every slab matches its checksum. A summary counts only if it is whole by
its own checksum and names the slab checksums of the header in front of it: one that is torn, stale
or foreign is as none, and costs nobody the block.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ucm.checksum import checksum
from ucm.errors import ConfigError, CorruptionError, LayoutMismatchError
from ucm.kernels.summary_record import area_bytes
from ucm.layout import ALIGNMENT_BYTES, MAX_LAYERS, KvDtype, KvLayout, round_up
from ucm.types import BlockKey, NamespaceId, SummaryKind

from .codec import CodecId
from .codecs import BP_ZSTD, RAW
from .encoding import planned_payload_bytes

if TYPE_CHECKING:
    from ucm.api import SlabChecksums

    from .codec import Codec
    from .tier import SlotId

FORMAT_VERSION: Final = 3
"""Changes with any change of this page. There is no reading of other versions: it is a cache."""

HEADER_BYTES: Final = ALIGNMENT_BYTES
SUPERBLOCK_BYTES: Final = ALIGNMENT_BYTES
BLANK_HEADER: Final = bytes(HEADER_BYTES)

_SUPER_MAGIC = b"UCMSUPER"
_SLOT_MAGIC = b"UCMSLOT\0"
_CHECKED_BYTES = HEADER_BYTES - 8
_SUPER = struct.Struct("<8sII32sQQQQIIIIIII")
_HEADER = struct.Struct("<8sII32s32s32sQQIIIIQQ")
_CHECKSUMS_OFFSET = 248
_DTYPES = (KvDtype.FLOAT32, KvDtype.FLOAT16, KvDtype.BFLOAT16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """What a namespace's files look like; fixed for its life."""

    namespace: NamespaceId
    layout: KvLayout
    segment_bytes: int
    summary_bytes: int = 0
    """Length of the area in front of each payload, a multiple of 4 KiB; 0 when there is none."""
    summary: SummaryKind | None = None
    """What the areas hold; None when there are none."""
    codec: CodecId = CodecId.RAW
    """Of compact slots; RAW when there are none."""
    compact_bytes: int = 0
    """Room for the payload of a compact slot, a multiple of 4 KiB; 0 with codec RAW."""

    def __post_init__(self) -> None:
        if self.full_slots_per_segment < 1:
            raise ConfigError(
                f"nvme.segment_bytes is {self.segment_bytes}, but one block of this namespace "
                f"takes {self.full_slot_bytes}: raise nvme.segment_bytes"
            )
        if self.has_compact_slots == (self.compact_bytes == 0):
            raise ConfigError(f"codec {self.codec.name} with slots for {self.compact_bytes} bytes")
        if self.summary_bytes < 0 or self.summary_bytes % ALIGNMENT_BYTES:
            raise ConfigError(f"a summary area cannot have {self.summary_bytes} bytes")
        if self.compact_bytes % ALIGNMENT_BYTES or self.compact_bytes >= self.layout.block_bytes:
            raise ConfigError(f"a compact slot cannot have a payload of {self.compact_bytes} bytes")

    @property
    def has_compact_slots(self) -> bool:
        """Whether blocks are encoded."""
        return self.codec is not CodecId.RAW

    @property
    def head_bytes(self) -> int:
        """What lies in front of a payload: the header and the summary area."""
        return HEADER_BYTES + self.summary_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes from one slot to the next where nothing is said, a multiple of 4 KiB."""
        return self.head_bytes + (self.compact_bytes or self.layout.block_bytes)

    @property
    def full_slot_bytes(self) -> int:
        """Bytes from one slot to the next in a full segment."""
        return self.head_bytes + self.layout.block_bytes

    @property
    def slots_per_segment(self) -> int:
        """Slot numbers of one segment."""
        return self.segment_bytes // self.slot_bytes

    @property
    def full_slots_per_segment(self) -> int:
        """Slots in a full segment; the other numbers of it stand for nothing."""
        return self.segment_bytes // self.full_slot_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotHeader:
    """What stands in front of a block."""

    key: BlockKey
    parent: BlockKey
    slot: SlotId
    generation: int
    checksums: SlabChecksums
    """Of the decoded slabs."""
    codec: CodecId = CodecId.RAW
    encoded_bytes: int = 0
    """Length of an encoded payload; 0 with codec RAW."""


def compact_payload_bytes(layout: KvLayout, codec: Codec) -> int:
    """Room that a compact slot has for a payload; 0 when the codec would not save a page."""
    size = round_up(planned_payload_bytes(layout, codec), ALIGNMENT_BYTES)
    return size if codec.codec_id is not CodecId.RAW and size < layout.block_bytes else 0


def effective_codec(configured: Codec, layout: KvLayout, *, accepts_lossy: bool) -> Codec:
    """What a new namespace uses: lossless unless it accepts a loss, raw where nothing is gained."""
    codec = configured if configured.is_lossless or accepts_lossy else BP_ZSTD
    return codec if compact_payload_bytes(layout, codec) else RAW


def new_superblock(
    namespace: NamespaceId,
    layout: KvLayout,
    codec: Codec,
    *,
    segment_bytes: int,
    summary: SummaryKind | None = None,
) -> Superblock:
    """The superblock of a namespace that is about to be made, with areas for summaries or without.

    Raises:
        ConfigError: a block does not fit a segment.
    """
    return Superblock(
        namespace=namespace,
        layout=layout,
        segment_bytes=segment_bytes,
        summary_bytes=area_bytes(layout, summary) if summary else 0,
        summary=summary,
        codec=codec.codec_id,
        compact_bytes=compact_payload_bytes(layout, codec),
    )


def encode_superblock(superblock: Superblock) -> bytes:
    """The 4096 bytes of `superblock`."""
    layout = superblock.layout
    fixed = _SUPER.pack(
        _SUPER_MAGIC,
        FORMAT_VERSION,
        SUPERBLOCK_BYTES,
        superblock.namespace,
        superblock.segment_bytes,
        superblock.slot_bytes,
        superblock.slots_per_segment,
        superblock.summary_bytes,
        layout.num_layers,
        layout.num_kv_heads,
        layout.head_dim,
        layout.block_tokens,
        _DTYPES.index(layout.dtype),
        superblock.codec,
        superblock.summary.number if superblock.summary else 0,
    )
    return _seal(fixed.ljust(_CHECKED_BYTES, b"\0"))


def decode_superblock(data: bytes, name: str) -> Superblock:
    """Read a superblock; `name` is what messages call it.

    Raises:
        ConfigError: it is whole, but of another format version.
        CorruptionError: it is damaged.
    """
    if len(data) != SUPERBLOCK_BYTES or data[:8] != _SUPER_MAGIC or not _is_sealed(data):
        raise CorruptionError(f"{name} is damaged: run `ucm fsck --repair` on the data folder")
    _, version, _, namespace, segment_bytes, slot_bytes, slots, summary_bytes, *shape = (
        _SUPER.unpack_from(data)
    )
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{name} has disk format {version}, this program reads and writes {FORMAT_VERSION}: "
            "use the program that wrote it, or an empty data folder (the old one is a cache; "
            "deleting it loses no work but time)"
        )
    try:
        *axes, dtype, codec_number, summary_number = shape
        codec = CodecId(codec_number)
        compact_bytes = slot_bytes - HEADER_BYTES - summary_bytes
        layout = KvLayout(
            num_layers=axes[0],
            num_kv_heads=axes[1],
            head_dim=axes[2],
            block_tokens=axes[3],
            dtype=_DTYPES[dtype],
        )
        superblock = Superblock(
            namespace=NamespaceId(namespace),
            layout=layout,
            segment_bytes=segment_bytes,
            summary_bytes=summary_bytes,
            summary=_summary_kind(summary_number),
            codec=codec,
            compact_bytes=0 if codec is CodecId.RAW else max(0, compact_bytes),
        )
    except (LayoutMismatchError, ConfigError, IndexError, ValueError) as error:
        raise CorruptionError(f"{name} describes an impossible layout: {error}") from error
    if (superblock.slot_bytes, superblock.slots_per_segment) != (slot_bytes, slots):
        raise CorruptionError(f"{name} contradicts itself: run `ucm fsck --repair`")
    return superblock


def encode_header(superblock: Superblock, header: SlotHeader, into: memoryview) -> None:
    """Write the 4096 bytes of `header` into `into`.

    Raises:
        LayoutMismatchError: the number of checksums is not that of the layout.
    """
    layout = superblock.layout
    if len(header.checksums) != layout.num_layers:
        raise LayoutMismatchError(
            f"{len(header.checksums)} checksums for a block of {layout.num_layers} slabs"
        )
    fixed = _HEADER.pack(
        _SLOT_MAGIC,
        FORMAT_VERSION,
        header.codec,
        superblock.namespace,
        header.key,
        header.parent,
        header.generation,
        header.slot,
        layout.num_layers,
        layout.slab_bytes,
        layout.slab_stride_bytes,
        0,
        superblock.summary_bytes,
        header.encoded_bytes or layout.block_bytes,
    )
    sums = struct.pack(f"<{layout.num_layers}Q", *header.checksums)
    body = fixed.ljust(_CHECKSUMS_OFFSET, b"\0") + sums.ljust(MAX_LAYERS * 8, b"\0")
    into[:] = _seal(body)


def decode_header(
    superblock: Superblock, slot: SlotId, data: memoryview | bytes
) -> SlotHeader | None:
    """The header of `slot`, or None when it is blank, damaged, or somebody else's.

    Args:
        superblock: the namespace's; the header must repeat its id and layout.
        slot: where `data` was read; the header must say the same.
        data: 4096 bytes.
    """
    layout = superblock.layout
    fields = _HEADER.unpack_from(data)
    magic, version, codec, namespace, key, parent, generation, own_slot, *lengths = fields
    payload_bytes = lengths.pop()
    expected = [layout.num_layers, layout.slab_bytes, layout.slab_stride_bytes, 0]
    ours = (_SLOT_MAGIC, FORMAT_VERSION, superblock.namespace, slot)
    if (magic, version, namespace, own_slot) != ours:
        return None
    if lengths != [*expected, superblock.summary_bytes] or not _is_sealed(data):
        return None
    is_raw = codec == CodecId.RAW and payload_bytes == layout.block_bytes
    is_encoded = codec == superblock.codec and 0 < payload_bytes <= superblock.compact_bytes
    if not is_raw and not is_encoded:
        return None
    return SlotHeader(
        key=BlockKey(key),
        parent=BlockKey(parent),
        slot=slot,
        generation=generation,
        checksums=struct.unpack_from(f"<{layout.num_layers}Q", data, _CHECKSUMS_OFFSET),
        codec=CodecId(codec),
        encoded_bytes=payload_bytes if is_encoded else 0,
    )


def _summary_kind(number: int) -> SummaryKind | None:
    kind = SummaryKind.from_number(number)
    if number and kind is None:
        raise ValueError(f"no summaries have the number {number}")
    return kind


def is_blank(data: memoryview | bytes) -> bool:
    """Whether a header is all zeros: a slot never written, or deleted."""
    return bytes(data) == BLANK_HEADER


def _seal(body: bytes) -> bytes:
    assert len(body) == _CHECKED_BYTES, len(body)
    return body + struct.pack("<Q", checksum(body))


def _is_sealed(data: memoryview | bytes) -> bool:
    (stored,) = struct.unpack_from("<Q", data, _CHECKED_BYTES)
    return bool(stored == checksum(memoryview(data)[:_CHECKED_BYTES]))
