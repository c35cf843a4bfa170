"""A block's encoded payload: a directory of its slabs, then every slab's K and V parts.

    payload    = directory | K part, V part of slab 0 | K, V of slab 1 | ...
    directory  | offset      bytes  field
               |      0          8  magic "UCMSLABS"
               |      8          4  codec
               |     12          4  num_slabs, that of the layout
               |     16          8  payload_bytes: directory and all parts, nothing behind them
               |     24    48 * n  entries
               |  24+48n         8  xxh3_64 of everything before
    entry      |      0          8  bytes of the K and V part (4 each), none above raw
               |      8          4  flags: 1 K, 2 V is kept raw
               |     12          4  zero
               |     16         16  xxh3_64 of the encoded K and of the encoded V part
               |     32          8  largest error of K and of V (float32; 0 when lossless)
               |     40          8  root mean square error of K and of V (float32)

The order of a read: directory, its checksum, its lengths against the layout and the buffer, then
each part's checksum, and only then a decoder. So nothing is allocated, and nothing decompressed,
for bytes that are not the ones that were written. What was decoded is checked once more by the
caller: the slot header's slab checksums are those of the *decoded* content, also of a lossy codec,
whose decoding is deterministic. Padding behind a slab is not stored and reads as zeros.

Envelope: one core, see `ucm bench codecs`; temporaries are bounded by `BATCH_VALUES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucm.checksum import block_checksums, checksum
from ucm.errors import CorruptionError

from .codec import BATCH_VALUES, Part, raw_part_bytes, word_type
from .codec_values import to_float
from .codecs import RAW

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from ucm.api import SlabChecksums
    from ucm.layout import KvLayout

    from .codec import Codec, Encoded, Words

_MAGIC = b"UCMSLABS"
_HEAD = np.dtype(
    [("magic", "S8"), ("codec", "<u4"), ("num_slabs", "<u4"), ("payload_bytes", "<u8")]
)
_ENTRY = np.dtype(
    [
        ("part_bytes", "<u4", (2,)),
        ("flags", "<u4"),
        ("zero", "<u4"),
        ("checksums", "<u8", (2,)),
        ("max_error", "<f4", (2,)),
        ("rms_error", "<f4", (2,)),
    ]
)
_CHECKSUM_BYTES = 8
_KNOWN_FLAGS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBlock:
    """What `encode_block` wrote."""

    payload_bytes: int
    checksums: SlabChecksums
    """Of the decoded content, for the slot header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlabRecord:
    """One slab's entry in the directory, for reports."""

    part_bytes: tuple[int, int]
    """Encoded bytes of K and of V."""
    is_raw: tuple[bool, bool]
    """Whether K and V were kept raw."""
    max_error: tuple[float, float]
    rms_error: tuple[float, float]


def directory_bytes(layout: KvLayout) -> int:
    """Length of a directory."""
    return _HEAD.itemsize + layout.num_layers * _ENTRY.itemsize + _CHECKSUM_BYTES


def planned_payload_bytes(layout: KvLayout, codec: Codec) -> int:
    """What a block takes that the codec encodes as planned; see `Codec.part_bytes`."""
    parts = sum(codec.part_bytes(layout, part) for part in Part)
    return directory_bytes(layout) + layout.num_layers * parts


def max_payload_bytes(layout: KvLayout) -> int:
    """What any block takes at most: every part kept raw."""
    return directory_bytes(layout) + layout.num_layers * layout.slab_bytes


def encode_block(
    codec: Codec, layout: KvLayout, data: memoryview, into: memoryview, *, is_first: bool
) -> EncodedBlock | None:
    """Encode one block.

    Args:
        codec: any but `raw`, which needs no payload of its own.
        layout: of the block.
        data: `layout.block_bytes` long, contiguous; not changed.
        into: where the payload goes; the rest of it is zeroed.
        is_first: the block begins a sequence.

    Returns:
        None when the payload is longer than `into`.
    """
    words = block_words(layout, data)
    entries = np.zeros(layout.num_layers, _ENTRY)
    parts: list[list[Encoded]] = [[()] * 2 for _ in range(layout.num_layers)]
    lossy = None if codec.is_lossless else bytearray(layout.block_bytes)
    for part, layers in _batches(layout):
        source = words[layers, part]
        encoded = codec.encode(layout, part, source, is_first=is_first)
        for layer, pieces in zip(range(layers.start, layers.stop), encoded, strict=True):
            parts[layer][part] = pieces or (raw_part(words[layer, part]).data,)
            entries[layer]["flags"] |= 0 if pieces else 1 << part
        if lossy is not None:
            target = block_words(layout, memoryview(lossy))[layers, part]
            rows = [b"".join(parts[i][part]) for i in range(layers.start, layers.stop)]
            flags = entries["flags"][layers] >> part & 1
            _decode_rows((codec, layout, part), [memoryview(r) for r in rows], flags, target)
            _note_errors(layout, source, target, entries[layers], part)
    payload_bytes = _write_payload(codec, layout, entries, parts, into)
    if payload_bytes is None:
        return None
    decoded = data if lossy is None else memoryview(lossy)
    return EncodedBlock(payload_bytes=payload_bytes, checksums=block_checksums(layout, decoded))


def decode_block(codec: Codec, layout: KvLayout, payload: memoryview, into: memoryview) -> None:
    """Decode one block.

    Args:
        codec: what the slot header says.
        layout: of the block.
        payload: starts with the directory; may be longer than the block's payload.
        into: `layout.block_bytes` long; garbage after an error.

    Raises:
        CorruptionError: a checksum, a length or a field is wrong.
    """
    entries = _read_directory(codec, layout, payload)
    parts = _checked_parts(layout, payload, entries)
    words = block_words(layout, into)
    for part, layers in _batches(layout):
        rows = [parts[layer][part] for layer in range(layers.start, layers.stop)]
        flags = entries["flags"][layers] >> part & 1
        _decode_rows((codec, layout, part), rows, flags, words[layers, part])
    if layout.slab_bytes < layout.slab_stride_bytes:  # what lay there is not for this reader
        slabs = np.frombuffer(into, np.uint8).reshape(layout.num_layers, -1)
        slabs[:, layout.slab_bytes :] = 0


def describe_payload(codec: Codec, layout: KvLayout, payload: memoryview) -> list[SlabRecord]:
    """What the directory says of every slab.

    Raises:
        CorruptionError: it is damaged.
    """
    return [
        SlabRecord(
            part_bytes=(int(entry["part_bytes"][0]), int(entry["part_bytes"][1])),
            is_raw=(bool(entry["flags"] & 1), bool(entry["flags"] & 2)),
            max_error=(float(entry["max_error"][0]), float(entry["max_error"][1])),
            rms_error=(float(entry["rms_error"][0]), float(entry["rms_error"][1])),
        )
        for entry in _read_directory(codec, layout, payload)
    ]


def block_words(layout: KvLayout, data: memoryview) -> Words:
    """A block as storage words: [num_layers, 2, num_kv_heads, block_tokens, head_dim], no copy."""
    dtype = word_type(layout.dtype)
    flat = np.frombuffer(data, dtype).reshape(layout.num_layers, -1)
    return flat[:, : layout.slab_bytes // dtype.itemsize].reshape(-1, *layout.slab_shape)


def raw_part(words: Words) -> NDArray[np.uint8]:
    """One part's bytes as they are."""
    return np.ascontiguousarray(words).reshape(-1).view(np.uint8)


def _batches(layout: KvLayout) -> Iterator[tuple[Part, slice]]:
    """Runs of layers that are encoded or decoded together."""
    values = raw_part_bytes(layout) // layout.dtype.itemsize_bytes
    step = max(1, BATCH_VALUES // values)
    for start in range(0, layout.num_layers, step):
        for part in Part:
            yield part, slice(start, min(start + step, layout.num_layers))


def _decode_rows(
    how: tuple[Codec, KvLayout, Part],
    rows: Sequence[memoryview],
    flags: NDArray[np.integer[Any]],
    out: Words,
) -> None:
    """Decode a batch in which some parts may be kept raw."""
    codec, layout, part = how
    if not flags.any():
        codec.decode(layout, part, rows, out)
        return
    for index, row in enumerate(rows):
        chosen = RAW if flags[index] else codec
        chosen.decode(layout, part, [row], out[index : index + 1])


def _note_errors(
    layout: KvLayout, source: Words, target: Words, entries: NDArray[np.void], part: Part
) -> None:
    """Largest and root mean square error of each part; raw parts have none."""
    raw = (entries["flags"] >> part & 1).astype(bool)
    if raw.all():
        return
    with np.errstate(invalid="ignore", over="ignore"):
        error = to_float(target, layout.dtype)
        error -= to_float(source, layout.dtype)
        error = error.reshape(len(error), -1)
        error[raw] = 0.0
    rms = np.sqrt(np.einsum("ij,ij->i", error, error, dtype=np.float64) / error.shape[1])
    entries["rms_error"][:, part] = rms
    entries["max_error"][:, part] = np.maximum(error.max(axis=1), -error.min(axis=1))


def _write_payload(
    codec: Codec,
    layout: KvLayout,
    entries: NDArray[np.void],
    parts: Sequence[Sequence[Encoded]],
    into: memoryview,
) -> int | None:
    """Lay directory and parts into `into`; the payload's length, None when it does not fit."""
    pieces = [
        (i, part, piece) for i, slab in enumerate(parts) for part in Part for piece in slab[part]
    ]
    start = directory_bytes(layout)
    end = start + sum(len(piece) for _, _, piece in pieces)
    if end > into.nbytes:
        return None
    flat = into.cast("B")
    cursor = start
    for layer, part, piece in pieces:
        flat[cursor : cursor + len(piece)] = piece
        entries[layer]["part_bytes"][part] += len(piece)
        cursor += len(piece)
    flat[end:] = bytes(flat.nbytes - end)
    _seal_parts(flat, start, entries)
    head = np.array([(_MAGIC, codec.codec_id, layout.num_layers, end)], _HEAD)
    body = head.tobytes() + entries.tobytes()
    flat[: len(body)] = body
    flat[len(body) : start] = checksum(body).to_bytes(_CHECKSUM_BYTES, "little")
    return end


def _seal_parts(flat: memoryview, start: int, entries: NDArray[np.void]) -> None:
    for entry in entries:
        for part in Part:
            end = start + int(entry["part_bytes"][part])
            entry["checksums"][part] = checksum(flat[start:end])
            start = end


def _read_directory(codec: Codec, layout: KvLayout, payload: memoryview) -> NDArray[np.void]:
    """The entries of a directory that fits the layout and the payload."""
    size = directory_bytes(layout)
    if payload.nbytes < size:
        raise CorruptionError(f"a payload of {payload.nbytes} bytes has no slab directory")
    body = payload[: size - _CHECKSUM_BYTES]
    stored = int.from_bytes(payload[size - _CHECKSUM_BYTES : size], "little")
    if checksum(body) != stored:
        raise CorruptionError("the slab directory does not match its checksum")
    head = np.frombuffer(body[: _HEAD.itemsize], _HEAD)[0]
    entries = np.frombuffer(body[_HEAD.itemsize :], _ENTRY)
    expected = (_MAGIC, codec.codec_id, layout.num_layers)
    if (head["magic"], head["codec"], head["num_slabs"]) != expected:
        raise CorruptionError("the slab directory is another codec's or layout's")
    lengths = entries["part_bytes"]
    total = size + int(lengths.sum(dtype=np.uint64))
    if lengths.max() > raw_part_bytes(layout) or total != head["payload_bytes"]:
        raise CorruptionError("the slab directory has impossible lengths")
    if total > payload.nbytes or (entries["flags"] > _KNOWN_FLAGS).any() or entries["zero"].any():
        raise CorruptionError("the slab directory has impossible fields")
    return entries


def _checked_parts(
    layout: KvLayout, payload: memoryview, entries: NDArray[np.void]
) -> list[tuple[memoryview, memoryview]]:
    """Each slab's encoded K and V, once they match their checksums."""
    parts = []
    start = directory_bytes(layout)
    table = zip(entries["part_bytes"].tolist(), entries["checksums"].tolist(), strict=True)
    for layer, ((k_bytes, v_bytes), (k_sum, v_sum)) in enumerate(table):
        middle, end = start + k_bytes, start + k_bytes + v_bytes
        keys, values = payload[start:middle], payload[middle:end]
        if checksum(keys) != k_sum or checksum(values) != v_sum:
            raise CorruptionError(f"the encoded slab {layer} does not match its checksum")
        parts.append((keys, values))
        start = end
    return parts
