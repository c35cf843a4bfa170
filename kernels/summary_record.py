"""The bytes of a block's geometric summary: what is known of its keys without reading them.

    summary = header, then num_layers * num_kv_heads records, layer-major, without padding
    header  = 56 bytes, little-endian
              | magic "UCSM" 4 | version u16 | kind u8 | dtype u8
              | num_layers u32 | num_kv_heads u32 | head_dim u32 | block_tokens u32
              | record_bytes u32 | reserved u32 (0)
              | content u64   xxh3_64 of the block's slab checksums, each a u64, layer 0 first
              | body u64      xxh3_64 of the records
              | header u64    xxh3_64 of the 48 bytes before
    record  = flags u8, then by kind, in this order (D head_dim, B block_tokens, f16 = IEEE half):
      centroids C: gsa-k4 C=4, gsa-2 C=3, mean C=1, maxnorm C=2
              | counts u8[C] | scales f16[C] | centroids i8[C][D] | radii f16[C]
      gsa-2   then | axis_scales f16[2] | axes i8[2][D] | sigmas f16[2] | lows f16[2]
              | highs f16[2] | rest_radius f16 | rest_sigma f16
      maxnorm then | rest_radius f16
      box, cuboid
              | scale f16 | centre i8[D] | half_scale f16 | half u8[D] | radius f16
      shadow2, shadow4 (b bits)
              | scales f16[D] | zeros f16[D] | codes u8[B][D*b/8] | errors f16[B]
      hash128 | bits u8[B][16] | norms f16[B]
      gsa-k4, gsa-2, shadow2, shadow4 end with
              | value_scale f16 | value_mean i8[D] | value_radius f16

    flags: 1 = must: a key or value of this head is not finite or beyond half precision; the record
    is zeros otherwise and the block has to be read.

Invariants: a summary speaks for exactly one content (`content`); a reader gets all of it or None;
radii, errors and extents hold for the *dequantised* summary, rounded away from it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ucm.checksum import checksum
from ucm.errors import InvalidArgumentError, LayoutMismatchError
from ucm.layout import ALIGNMENT_BYTES, KvDtype, KvLayout, round_up
from ucm.types import SummaryKind

Records: TypeAlias = NDArray[np.void]
"""Structured array of `record_dtype`."""

MAGIC = b"UCSM"
SUMMARY_VERSION = 1
MUST = 1
"""The flag of a record whose keys no summary can speak for."""
HASH_BYTES = 16

_SIGNED = frozenset({"zeros", "lows", "highs"})
"""Numbers of a record that may be below zero; the others are sizes."""

_HEADER = struct.Struct("<4sHBBIIIIIIQQ")
_SUM = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _SUM.size

_DTYPES = {KvDtype.FLOAT32: 1, KvDtype.FLOAT16: 2, KvDtype.BFLOAT16: 3}
NUM_CENTROIDS = {
    SummaryKind.GSA_K4: 4,
    SummaryKind.GSA_2: 3,
    SummaryKind.MEAN: 1,
    SummaryKind.MAXNORM: 2,
}
"""Of the kinds that are sets of centroids."""
SHADOW_BITS = {SummaryKind.SHADOW2: 2, SummaryKind.SHADOW4: 4}
"""Bits a channel of the kinds that keep every key."""
WITH_VALUES = frozenset(
    {SummaryKind.GSA_K4, SummaryKind.GSA_2, SummaryKind.SHADOW2, SummaryKind.SHADOW4}
)
"""Kinds whose records hold the block's mean value and its radius."""


@dataclass(frozen=True, slots=True)
class BlockSummary:
    """A checked summary of one block."""

    kind: SummaryKind
    records: Records
    """[num_layers, num_kv_heads], a view of the bytes it was decoded from."""


@cache
def record_dtype(kind: SummaryKind, head_dim: int, block_tokens: int) -> np.dtype[np.void]:
    """The packed little-endian record of one (slab, KV head).

    Raises:
        LayoutMismatchError: this kind cannot describe such a block.
    """
    if block_tokens > 255 and kind in NUM_CENTROIDS:
        raise LayoutMismatchError(f"{kind} summaries count up to 255 tokens, not {block_tokens}")
    fields: list[Any] = [("flags", "u1")]
    if kind in NUM_CENTROIDS:
        fields += _centroid_fields(kind, head_dim)
    elif kind in SHADOW_BITS:
        fields += _shadow_fields(SHADOW_BITS[kind], head_dim, block_tokens)
    elif kind is SummaryKind.HASH128:
        fields += [("bits", "u1", (block_tokens, HASH_BYTES)), ("norms", "<f2", (block_tokens,))]
    else:
        fields += [("scale", "<f2"), ("centre", "i1", (head_dim,))]
        fields += [("half_scale", "<f2"), ("half", "u1", (head_dim,)), ("radius", "<f2")]
    if kind in WITH_VALUES:
        fields += [("value_scale", "<f2"), ("value_mean", "i1", (head_dim,))]
        fields += [("value_radius", "<f2")]
    return np.dtype(fields)


def _centroid_fields(kind: SummaryKind, head_dim: int) -> list[Any]:
    num = NUM_CENTROIDS[kind]
    fields: list[Any] = [("counts", "u1", (num,)), ("scales", "<f2", (num,))]
    fields += [("centroids", "i1", (num, head_dim)), ("radii", "<f2", (num,))]
    if kind is SummaryKind.GSA_2:
        fields += [("axis_scales", "<f2", (2,)), ("axes", "i1", (2, head_dim))]
        fields += [("sigmas", "<f2", (2,)), ("lows", "<f2", (2,)), ("highs", "<f2", (2,))]
        fields += [("rest_radius", "<f2"), ("rest_sigma", "<f2")]
    elif kind is SummaryKind.MAXNORM:
        fields += [("rest_radius", "<f2")]
    return fields


def _shadow_fields(bits: int, head_dim: int, block_tokens: int) -> list[Any]:
    if head_dim * bits % 8:
        raise LayoutMismatchError(f"a head of {head_dim} channels does not pack into {bits} bits")
    fields: list[Any] = [("scales", "<f2", (head_dim,)), ("zeros", "<f2", (head_dim,))]
    fields += [("codes", "u1", (block_tokens, head_dim * bits // 8))]
    return [*fields, ("errors", "<f2", (block_tokens,))]


def layout_dtype(layout: KvLayout, kind: SummaryKind) -> np.dtype[np.void]:
    """`record_dtype` of a layout."""
    return record_dtype(kind, layout.head_dim, layout.block_tokens)


def summary_bytes(layout: KvLayout, kind: SummaryKind) -> int:
    """Length of an encoded summary of one block, without padding."""
    records = layout.num_layers * layout.num_kv_heads
    return HEADER_BYTES + records * layout_dtype(layout, kind).itemsize


def area_bytes(layout: KvLayout, kind: SummaryKind) -> int:
    """What a slot sets aside for it: a multiple of 4 KiB."""
    return round_up(summary_bytes(layout, kind), ALIGNMENT_BYTES)


def content_of(slab_checksums: Sequence[int]) -> int:
    """One number for a block's content: xxh3_64 of its slabs' checksums."""
    return checksum(np.asarray(slab_checksums, "<u8").tobytes())


def encode_summary(
    layout: KvLayout, kind: SummaryKind, records: Records, slab_checksums: Sequence[int]
) -> bytes:
    """The bytes of one block's summary, `summary_bytes` long.

    Args:
        layout: the block's shape.
        kind: what the records are.
        records: [num_layers, num_kv_heads] of `record_dtype`.
        slab_checksums: of the block that was summarised.

    Raises:
        InvalidArgumentError: the records are of another shape or kind, or checksums are missing.
    """
    shape = (layout.num_layers, layout.num_kv_heads)
    if records.shape != shape or records.dtype != layout_dtype(layout, kind):
        raise InvalidArgumentError(f"records of shape {records.shape} are no {kind} of {shape}")
    if len(slab_checksums) != layout.num_layers:
        raise InvalidArgumentError(
            f"{len(slab_checksums)} checksums for a block of {layout.num_layers} slabs"
        )
    body = records.tobytes()
    head = _header(layout, kind, content_of(slab_checksums), checksum(body))
    return head + _SUM.pack(checksum(head)) + body


def _header(layout: KvLayout, kind: SummaryKind, content: int, body: int) -> bytes:
    sizes = (layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.block_tokens)
    record = layout_dtype(layout, kind).itemsize
    number = (MAGIC, SUMMARY_VERSION, kind.number, _DTYPES[layout.dtype])
    return _HEADER.pack(*number, *sizes, record, 0, content, body)


def decode_summary(
    layout: KvLayout, data: bytes | memoryview, slab_checksums: Sequence[int]
) -> BlockSummary | None:
    """The summary in `data`, if it is whole and speaks for the block with these checksums.

    Never trusts what it reads: another version, kind, layout or content, damage, a short buffer
    and numbers that no summary can hold are all None. Copies nothing.

    Args:
        layout: shape of the blocks that the caller works with.
        data: at least the summary's bytes; more may follow (the rest of a slot's area).
        slab_checksums: of the block.
    """
    return summary_of(layout, data, content_of(slab_checksums))


def summary_of(layout: KvLayout, data: bytes | memoryview, content: int) -> BlockSummary | None:
    """`decode_summary` for who knows the block by `content_of` its checksums."""
    view = memoryview(data).cast("B")
    kind = SummaryKind.from_number(view[6]) if len(view) >= HEADER_BYTES else None
    if kind is None or not _describable(layout, kind):
        return None
    size = summary_bytes(layout, kind)
    if len(view) < size:
        return None
    body = view[HEADER_BYTES:size]
    head = _header(layout, kind, content, checksum(body))
    if view[:HEADER_BYTES] != head + _SUM.pack(checksum(head)):
        return None
    records = np.frombuffer(body, layout_dtype(layout, kind))
    records = records.reshape(layout.num_layers, layout.num_kv_heads)
    return BlockSummary(kind, records) if _plausible(layout, records) else None


def _describable(layout: KvLayout, kind: SummaryKind) -> bool:
    try:
        layout_dtype(layout, kind)
    except LayoutMismatchError:
        return False
    return True


def _plausible(layout: KvLayout, records: Records) -> bool:
    """Whether the numbers can have come from `summarize`: a checksum does not say who wrote it."""
    if (records["flags"] & ~np.uint8(MUST)).any():
        return False
    names = records.dtype.names or ()
    for name in names:
        column = records[name]
        if column.dtype.kind == "f" and not np.isfinite(column).all():
            return False
        if column.dtype.kind == "f" and name not in _SIGNED and (column < 0).any():
            return False
    if "counts" not in names:
        return True
    return bool((records["counts"].sum(axis=-1, dtype=np.int64) <= layout.block_tokens).all())
