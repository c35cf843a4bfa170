"""Encoded blocks: what goes in comes out or is refused, and the directory says how exact it is."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import zstandard

from ucm.checksum import block_checksums, checksum
from ucm.errors import CorruptionError
from ucm.layout import KvDtype, KvLayout
from ucm.storage.codec import BATCH_VALUES, Codec, Part, raw_part_bytes
from ucm.storage.codec_values import from_float, to_float
from ucm.storage.codecs import BP_ZSTD, CODECS, codec_named
from ucm.storage.encoding import (
    block_words,
    decode_block,
    describe_payload,
    directory_bytes,
    encode_block,
    max_payload_bytes,
    planned_payload_bytes,
)

LAYOUT = KvLayout(
    num_layers=5, num_kv_heads=3, head_dim=64, block_tokens=32, dtype=KvDtype.BFLOAT16
)
UNEVEN = KvLayout(
    num_layers=3, num_kv_heads=1, head_dim=24, block_tokens=20, dtype=KvDtype.BFLOAT16
)
"""Its slabs are padded."""


def block(layout: KvLayout, seed: int = 0) -> memoryview:
    data = memoryview(bytearray(b"\xa5" * layout.block_bytes))
    words = block_words(layout, data)
    values = np.random.default_rng(seed).standard_normal(words.shape).astype(np.float32)
    from_float(values, layout.dtype, words)
    return data


def encode(codec: Codec, layout: KvLayout, data: memoryview, *, is_first: bool = False) -> bytes:
    into = memoryview(bytearray(max_payload_bytes(layout)))
    encoded = encode_block(codec, layout, data, into, is_first=is_first)
    assert encoded is not None
    return bytes(into[: encoded.payload_bytes])


def slabs(layout: KvLayout, data: memoryview) -> list[bytes]:
    return [bytes(data[layout.slab_slice(i)]) for i in range(layout.num_layers)]


@pytest.mark.parametrize("codec", CODECS[1:], ids=lambda c: c.name)
@pytest.mark.parametrize("layout", [LAYOUT, UNEVEN], ids=["even", "padded"])
@pytest.mark.parametrize("is_first", [False, True])
def test_blocks_come_back_as_their_checksums_say(
    codec: Codec, layout: KvLayout, is_first: bool
) -> None:
    data = block(layout)
    before = bytes(data)
    into = memoryview(bytearray(max_payload_bytes(layout)))
    encoded = encode_block(codec, layout, data, into, is_first=is_first)
    assert encoded is not None
    assert bytes(data) == before
    out = memoryview(bytearray(b"\x5a" * layout.block_bytes))
    decode_block(codec, layout, into, out)
    assert block_checksums(layout, out) == encoded.checksums
    assert (slabs(layout, out) == slabs(layout, data)) == codec.is_lossless
    padding = layout.slab_stride_bytes - layout.slab_bytes
    assert bytes(out[layout.slab_bytes : layout.slab_stride_bytes]) == bytes(padding)


def test_many_batches_are_one_block() -> None:
    layout = KvLayout(
        num_layers=9, num_kv_heads=8, head_dim=128, block_tokens=32, dtype=KvDtype.BFLOAT16
    )
    assert raw_part_bytes(layout) // 2 * layout.num_layers > 2 * BATCH_VALUES
    data = block(layout)
    out = memoryview(bytearray(layout.block_bytes))
    decode_block(BP_ZSTD, layout, memoryview(encode(BP_ZSTD, layout, data)), out)
    assert bytes(out) == bytes(data)


@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_the_directory_tells_the_errors(name: str) -> None:
    codec, data = codec_named(name), block(LAYOUT)
    words = block_words(LAYOUT, data)
    words[2, Part.VALUES, 0, 0, 0] = 0x7F80  # an infinity: this part must be kept raw
    payload = memoryview(encode(codec, LAYOUT, data))
    out = memoryview(bytearray(LAYOUT.block_bytes))
    decode_block(codec, LAYOUT, payload, out)
    records = describe_payload(codec, LAYOUT, payload)
    assert [record.is_raw for record in records] == [
        (False, layer == 2) for layer in range(LAYOUT.num_layers)
    ]
    decoded = block_words(LAYOUT, out)
    assert np.array_equal(decoded[2, Part.VALUES], words[2, Part.VALUES])
    for layer, record in enumerate(records):
        for part in Part:
            if record.is_raw[part]:
                assert (record.max_error[part], record.rms_error[part]) == (0, 0)
                assert record.part_bytes[part] == raw_part_bytes(LAYOUT)
                continue
            error = to_float(decoded[layer, part], LAYOUT.dtype) - to_float(
                words[layer, part], LAYOUT.dtype
            )
            assert record.max_error[part] == np.abs(error).max() > 0
            assert record.rms_error[part] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)


def test_lossless_blocks_have_no_error() -> None:
    records = describe_payload(BP_ZSTD, LAYOUT, memoryview(encode(BP_ZSTD, LAYOUT, block(LAYOUT))))
    assert {record.max_error + record.rms_error for record in records} == {(0.0,) * 4}


@pytest.mark.parametrize("codec", CODECS[2:], ids=lambda c: c.name)
def test_fixed_rate_payloads_are_as_long_as_planned(codec: Codec) -> None:
    for layout in (LAYOUT, UNEVEN):
        assert len(encode(codec, layout, block(layout))) == planned_payload_bytes(layout, codec)


@pytest.mark.parametrize("codec", CODECS[1:], ids=lambda c: c.name)
def test_what_does_not_fit_is_not_written(codec: Codec) -> None:
    data = block(LAYOUT)
    size = len(encode(codec, LAYOUT, data))
    into = memoryview(bytearray(size - 1))
    assert encode_block(codec, LAYOUT, data, into, is_first=False) is None
    into = memoryview(bytearray(b"\xff" * (size + 100)))
    assert encode_block(codec, LAYOUT, data, into, is_first=False) is not None
    assert bytes(into[size:]) == bytes(100)


@pytest.mark.parametrize("codec", CODECS[1:], ids=lambda c: c.name)
def test_the_worst_block_fits_the_largest_payload(codec: Codec) -> None:
    data = block(LAYOUT)
    words = block_words(LAYOUT, data)
    words[...] = np.random.default_rng(0).integers(0, 1 << 16, words.shape, np.uint16)
    words[:, :, 0, 0, 0] = 0x7FC0
    payload = encode(codec, LAYOUT, data)
    assert len(payload) == max_payload_bytes(LAYOUT)
    out = memoryview(bytearray(LAYOUT.block_bytes))
    decode_block(codec, LAYOUT, memoryview(payload), out)
    assert bytes(out) == bytes(data)


def reseal(payload: bytearray) -> memoryview:
    """Make every checksum of a changed payload right again: what a liar would do."""
    size = directory_bytes(LAYOUT)
    start = size
    for layer in range(LAYOUT.num_layers):
        entry = 24 + 48 * layer
        for part in Part:
            (length,) = struct.unpack_from("<I", payload, entry + 4 * part)
            sums = checksum(bytes(payload[start : start + length]))
            struct.pack_into("<Q", payload, entry + 16 + 8 * part, sums)
            start += length
    struct.pack_into("<Q", payload, size - 8, checksum(bytes(payload[: size - 8])))
    return memoryview(payload)


def liar(offset: int, form: str, value: int) -> memoryview:
    payload = bytearray(encode(BP_ZSTD, LAYOUT, block(LAYOUT)))
    struct.pack_into(form, payload, offset, value)
    return reseal(payload)


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [
        (0, "<B", 0), (8, "<I", 4), (12, "<I", 4), (16, "<Q", 1 << 40), (16, "<Q", 0),
        (24, "<I", 0xFFFFFFFF), (24, "<I", 0), (28, "<I", 12289), (32, "<I", 4), (36, "<I", 1),
        (32, "<I", 3),
    ],
)  # fmt: skip
def test_lying_fields_with_right_checksums_are_refused(offset: int, form: str, value: int) -> None:
    out = memoryview(bytearray(LAYOUT.block_bytes))
    with pytest.raises(CorruptionError):
        decode_block(BP_ZSTD, LAYOUT, liar(offset, form, value), out)


@pytest.mark.parametrize("size", [0, 10, directory_bytes(LAYOUT) - 1, directory_bytes(LAYOUT), -1])
def test_cut_payloads_are_refused(size: int) -> None:
    payload = memoryview(encode(BP_ZSTD, LAYOUT, block(LAYOUT)))
    out = memoryview(bytearray(LAYOUT.block_bytes))
    with pytest.raises(CorruptionError):
        decode_block(BP_ZSTD, LAYOUT, payload[:size], out)


@pytest.mark.parametrize("claims_size", [True, False])
def test_a_decompression_bomb_is_refused(claims_size: bool) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, write_content_size=claims_size)
    bomb = zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(1 << 28))
    low = raw_part_bytes(LAYOUT) // 2
    assert len(bomb) < 12000 - low + 4096 * 8
    out = np.zeros((1, 3, 32, 64), np.uint16)
    with pytest.raises(CorruptionError, match="claims"):
        BP_ZSTD.decode(LAYOUT, Part.KEYS, [memoryview(bytes(low) + bomb)], out)


def test_another_codecs_payload_is_refused() -> None:
    payload = memoryview(encode(codec_named("int8"), LAYOUT, block(LAYOUT)))
    out = memoryview(bytearray(LAYOUT.block_bytes))
    with pytest.raises(CorruptionError, match="another codec"):
        decode_block(codec_named("int4"), LAYOUT, payload, out)
