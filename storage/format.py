"""The disk format: superblock and slot header. All integers little-endian.

namespace folder   ns/<hex of namespace id>/superblock          4096 bytes, replaced atomically
                                            index/              LMDB, see `index.py`
                                            segments/NNNN.seg   preallocated, slots from byte 0

segment    = slot * slots_per_segment, then unused bytes up to segment_bytes; a number without a
             file is a segment that was given back: its slots do not exist until there is one again
slot n     is in segment n // slots_per_segment, at (n % slots_per_segment) * slot_bytes
slot       = header (4096) | summary area (summary_bytes, 0 in version 1) | block (payload)
block      = num_layers slabs on a distance of slab_stride_bytes; see `ucm.layout`

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
           |    100   3988  zero
           |   4088      8  xxh3_64 of bytes 0..4087

header     | offset  bytes  field
           |      0      8  magic "UCMSLOT" and a zero byte
           |      8      4  format version
           |     12      4  codec (0: raw)
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
           |    152      8  payload_bytes: num_slabs * slab_stride_bytes for codec 0
           |    160     88  zero
           |    248   3840  slab checksums: xxh3_64 of each slab, then zeros
           |   4088      8  xxh3_64 of bytes 0..4087

A deleted slot has a header of zeros. A header counts only if every field fits; what lies
behind it counts only if every slab matches its checksum.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ucm.checksum import checksum
from ucm.errors import ConfigError, CorruptionError, LayoutMismatchError
from ucm.layout import ALIGNMENT_BYTES, MAX_LAYERS, KvDtype, KvLayout
from ucm.types import BlockKey, NamespaceId

if TYPE_CHECKING:
    from ucm.api import SlabChecksums

    from .tier import SlotId

FORMAT_VERSION: Final = 1
"""Changes with any change of this page. There is no reading of other versions: it is a cache."""

HEADER_BYTES: Final = ALIGNMENT_BYTES
SUPERBLOCK_BYTES: Final = ALIGNMENT_BYTES
RAW_CODEC: Final = 0
BLANK_HEADER: Final = bytes(HEADER_BYTES)

_SUPER_MAGIC = b"UCMSUPER"
_SLOT_MAGIC = b"UCMSLOT\0"
_CHECKED_BYTES = HEADER_BYTES - 8
_SUPER = struct.Struct("<8sII32sQQQQIIIII")
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

    def __post_init__(self) -> None:
        if self.slots_per_segment < 1:
            raise ConfigError(
                f"nvme.segment_bytes is {self.segment_bytes}, but one block of this namespace "
                f"takes {self.slot_bytes}: raise nvme.segment_bytes"
            )

    @property
    def slot_bytes(self) -> int:
        """Bytes from one slot to the next, a multiple of 4 KiB."""
        return HEADER_BYTES + self.summary_bytes + self.layout.block_bytes

    @property
    def slots_per_segment(self) -> int:
        """Whole slots in one segment."""
        return self.segment_bytes // self.slot_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotHeader:
    """What stands in front of a block."""

    key: BlockKey
    parent: BlockKey
    slot: SlotId
    generation: int
    checksums: SlabChecksums


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
        *axes, dtype = shape
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
        )
    except (LayoutMismatchError, ConfigError, IndexError) as error:
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
        RAW_CODEC,
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
        layout.block_bytes,
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
    magic, version, codec, namespace, key, parent, generation, own_slot, *lengths = (
        _HEADER.unpack_from(data)
    )
    expected = [layout.num_layers, layout.slab_bytes, layout.slab_stride_bytes, 0]
    expected += [superblock.summary_bytes, layout.block_bytes]
    ours = (_SLOT_MAGIC, FORMAT_VERSION, RAW_CODEC, superblock.namespace, slot)
    if (magic, version, codec, namespace, own_slot) != ours or lengths != expected:
        return None
    if not _is_sealed(data):
        return None
    return SlotHeader(
        key=BlockKey(key),
        parent=BlockKey(parent),
        slot=slot,
        generation=generation,
        checksums=struct.unpack_from(f"<{layout.num_layers}Q", data, _CHECKSUMS_OFFSET),
    )


def is_blank(data: memoryview | bytes) -> bool:
    """Whether a header is all zeros: a slot never written, or deleted."""
    return bytes(data) == BLANK_HEADER


def _seal(body: bytes) -> bytes:
    assert len(body) == _CHECKED_BYTES, len(body)
    return body + struct.pack("<Q", checksum(body))


def _is_sealed(data: memoryview | bytes) -> bool:
    (stored,) = struct.unpack_from("<Q", data, _CHECKED_BYTES)
    return bool(stored == checksum(memoryview(data)[:_CHECKED_BYTES]))
