"""Damaged and invented payloads: refused cleanly, whatever they claim, in bounded memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ucm.checksum import block_checksums, checksum
from ucm.errors import CorruptionError
from ucm.layout import KvDtype, KvLayout
from ucm.storage.codec import Codec, Part
from ucm.storage.codec_values import from_float
from ucm.storage.codecs import CODECS
from ucm.storage.encoding import (
    block_words,
    decode_block,
    directory_bytes,
    encode_block,
    max_payload_bytes,
)

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=16, block_tokens=8, dtype=KvDtype.BFLOAT16)
ENCODED = {}
for _codec in CODECS[1:]:
    _data = memoryview(bytearray(LAYOUT.block_bytes))
    _words = block_words(LAYOUT, _data)
    _values = np.random.default_rng(0).standard_normal(_words.shape).astype(np.float32)
    from_float(_values, LAYOUT.dtype, _words)
    _into = memoryview(bytearray(max_payload_bytes(LAYOUT)))
    _encoded = encode_block(_codec, LAYOUT, _data, _into, is_first=True)
    assert _encoded is not None
    ENCODED[_codec.name] = bytes(_into[: _encoded.payload_bytes]), _encoded.checksums

codecs = st.sampled_from(CODECS[1:])
edits = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6)


def mutated(payload: bytes, changes: list[tuple[int, int]], begin: int = 0) -> bytearray:
    data = bytearray(payload)
    for position, value in changes:
        data[begin + position % (len(data) - begin)] = value
    return data


def decode_part(codec: Codec, part: Part, data: bytes) -> None:
    """Decode one part without the checksums in front of it; only a clean refusal may come."""
    out = np.zeros((1, *LAYOUT.slab_shape[1:]), np.uint16)
    tracemalloc.start()
    try:
        codec.decode(LAYOUT, part, [memoryview(data)], out)
    except CorruptionError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 << 10, f"{peak} bytes for a part of 256"


@given(codecs, edits)
def test_mutated_payloads_are_refused_or_right(
    codec: Codec, changes: list[tuple[int, int]]
) -> None:
    payload, checksums = ENCODED[codec.name]
    out = memoryview(bytearray(LAYOUT.block_bytes))
    try:
        decode_block(codec, LAYOUT, memoryview(mutated(payload, changes)), out)
    except CorruptionError:
        return
    assert block_checksums(LAYOUT, out) == checksums


@given(codecs, edits)
def test_directories_that_lie_with_right_checksums_never_crash(
    codec: Codec, changes: list[tuple[int, int]]
) -> None:
    payload, _ = ENCODED[codec.name]
    size = directory_bytes(LAYOUT) - 8
    data = mutated(payload[:size], changes)
    data += checksum(bytes(data)).to_bytes(8, "little") + payload[size + 8 :]
    out = memoryview(bytearray(LAYOUT.block_bytes))
    tracemalloc.start()
    try:
        decode_block(codec, LAYOUT, memoryview(data), out)
    except CorruptionError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 128 << 10, f"{peak} bytes for a payload of {len(payload)}"


@given(codecs, st.sampled_from(Part), edits, st.integers(0, 4))
@settings(max_examples=300)
def test_mutated_parts_never_crash_a_decoder(
    codec: Codec, part: Part, changes: list[tuple[int, int]], cut: int
) -> None:
    words = block_words(LAYOUT, memoryview(bytearray(LAYOUT.block_bytes)))[:1, part].copy()
    words[...] = np.arange(128, dtype=np.uint16).reshape(words.shape) + 0x3F80
    (pieces,) = codec.encode(LAYOUT, part, words)
    row = b"".join(bytes(piece) for piece in pieces)
    data = mutated(row, changes)
    decode_part(codec, part, bytes(data[: len(data) - cut]))


@given(codecs, st.sampled_from(Part), st.binary(max_size=400))
def test_invented_parts_never_crash_a_decoder(codec: Codec, part: Part, data: bytes) -> None:
    decode_part(codec, part, data)


@given(st.binary(max_size=300))
def test_invented_frames_never_crash_the_decompressor(tail: bytes) -> None:
    magic = bytes.fromhex("28b52ffd")
    decode_part(CODECS[1], Part.KEYS, bytes(128) + magic + tail)


@pytest.mark.parametrize("dtype", KvDtype)
@given(data=st.data())
@settings(max_examples=40)
def test_any_block_comes_back(dtype: KvDtype, data: st.DataObject) -> None:
    """Any bit pattern of any dtype: exact through the lossless codec, verified through all."""
    layout = KvLayout(num_layers=2, num_kv_heads=1, head_dim=6, block_tokens=5, dtype=dtype)
    raw = data.draw(st.binary(min_size=layout.slab_bytes, max_size=layout.slab_bytes))
    codec = data.draw(codecs)
    block = memoryview(bytearray(layout.block_bytes))
    block[layout.slab_slice(1)] = raw
    into = memoryview(bytearray(max_payload_bytes(layout)))
    encoded = encode_block(codec, layout, block, into, is_first=data.draw(st.booleans()))
    assert encoded is not None
    out = memoryview(bytearray(layout.block_bytes))
    decode_block(codec, layout, into, out)
    assert block_checksums(layout, out) == encoded.checksums
    assert not codec.is_lossless or bytes(out) == bytes(block)
