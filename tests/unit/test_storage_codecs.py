"""The codecs by themselves: golden bytes, exactness, error bounds, what they refuse."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ucm.errors import ConfigError, CorruptionError
from ucm.layout import KvDtype, KvLayout
from ucm.storage.codec import KEPT_RAW, Codec, Part, raw_part_bytes, word_type
from ucm.storage.codec_affine import pack_nibbles, unpack_nibbles
from ucm.storage.codec_values import from_float, to_float
from ucm.storage.codecs import CODECS, codec_named, codec_of

if TYPE_CHECKING:
    from ucm.storage.codec import Encoded, Words

BP_ZSTD, INT8, FP8, INT4 = CODECS[1:]
LOSSY = (INT8, FP8, INT4)


def layout_of(dtype: KvDtype, tokens: int = 32, dim: int = 64, heads: int = 2) -> KvLayout:
    return KvLayout(
        num_layers=3, num_kv_heads=heads, head_dim=dim, block_tokens=tokens, dtype=dtype
    )


def draw(layout: KvLayout, seed: int = 0, count: int = 3, scale: float = 1.0) -> Words:
    """KV-like words: channels of different size, some with an offset."""
    rng = np.random.default_rng(seed)
    shape = (count, *layout.slab_shape[1:])
    sizes = rng.lognormal(0, 1, (1, layout.num_kv_heads, 1, layout.head_dim))
    values = (rng.standard_normal(shape) + rng.choice([0, 5], sizes.shape)) * sizes * scale
    words = np.empty(shape, word_type(layout.dtype))
    from_float(values.astype(np.float32), layout.dtype, words)
    return words


def rows_of(encoded: list[Encoded]) -> list[memoryview]:
    return [memoryview(b"".join(bytes(piece) for piece in pieces)) for pieces in encoded]


def recode(codec: Codec, layout: KvLayout, part: Part, words: Words, **options: bool) -> Words:
    encoded = codec.encode(layout, part, words, **options)
    assert KEPT_RAW not in encoded
    out = np.zeros_like(words)
    codec.decode(layout, part, rows_of(encoded), out)
    return out


@pytest.mark.parametrize("dtype", KvDtype)
@pytest.mark.parametrize("part", Part)
@pytest.mark.parametrize("shape", [(32, 64), (16, 128), (48, 80), (33, 50)])
def test_bp_zstd_is_exact(dtype: KvDtype, part: Part, shape: tuple[int, int]) -> None:
    layout = layout_of(dtype, *shape)
    words = draw(layout)
    assert np.array_equal(recode(BP_ZSTD, layout, part, words), words)


@pytest.mark.parametrize("dtype", KvDtype)
def test_bp_zstd_keeps_every_bit_pattern(dtype: KvDtype) -> None:
    """NaNs with payloads, infinities, both zeros and subnormals, repeated so that it pays."""
    layout = layout_of(dtype, tokens=32, dim=64)
    bits = 8 * dtype.itemsize_bytes
    special = [0, 1, 1 << (bits - 1), (1 << (bits - 1)) | 1, (1 << bits) - 1]
    special += [0x7F80, 0x7FC1, 0xFF81, 0x7C00, 0x7C01] if bits == 16 else [0x7F800001, 0xFFC00000]
    words = np.resize(np.array(special, word_type(dtype)), (2, 2, 32, 64))
    assert np.array_equal(recode(BP_ZSTD, layout, Part.KEYS, words), words)


def test_bp_zstd_keeps_noise_raw() -> None:
    layout = layout_of(KvDtype.BFLOAT16)
    words = np.random.default_rng(1).integers(0, 1 << 16, (2, 2, 32, 64), dtype=np.uint16)
    assert BP_ZSTD.encode(layout, Part.KEYS, words) == [KEPT_RAW, KEPT_RAW]


def test_raw_keeps_everything_and_decodes_only_the_right_length() -> None:
    layout = layout_of(KvDtype.BFLOAT16)
    raw, words = codec_named("raw"), draw(layout)
    assert raw.encode(layout, Part.VALUES, words) == [KEPT_RAW] * 3
    out = np.zeros_like(words)
    raw.decode(layout, Part.VALUES, [memoryview(row.tobytes()) for row in words], out)
    assert np.array_equal(out, words)
    with pytest.raises(CorruptionError, match="raw part"):
        raw.decode(layout, Part.VALUES, [memoryview(bytes(7))], out[:1])


@pytest.mark.parametrize("dtype", KvDtype)
@pytest.mark.parametrize("shape", [(32, 64), (48, 80), (33, 50), (8, 12)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 900.0])
@pytest.mark.parametrize("codec", [INT8, INT4], ids=lambda c: c.name)
def test_affine_errors_stay_below_half_a_step(
    codec: Codec, dtype: KvDtype, shape: tuple[int, int], scale: float
) -> None:
    layout = layout_of(dtype, *shape)
    words = draw(layout, scale=scale)
    exact = to_float(words, dtype).astype(np.float64)
    epsilon = {KvDtype.BFLOAT16: 2.0**-8, KvDtype.FLOAT16: 2.0**-11, KvDtype.FLOAT32: 2.0**-20}
    smallest = 2.0**-24 if dtype is KvDtype.FLOAT16 else 0.0
    steps = 255 if codec is INT8 else 15
    for part in Part:
        decoded = to_float(recode(codec, layout, part, words), dtype).astype(np.float64)
        group, axis = (32, 2) if part is Part.KEYS else (32 if codec is INT4 else shape[1], 3)
        for start in range(0, words.shape[axis], group):
            cut = [slice(None)] * 4
            cut[axis] = slice(start, start + group)
            truth, error = exact[tuple(cut)], (decoded - exact)[tuple(cut)]
            spread = np.ptp(truth, axis=axis, keepdims=True)
            # the float16 minimum may lie up to one of its steps below the true one
            slack = 2.0**-10 * np.abs(truth).max(axis=axis, keepdims=True) / steps
            rounding = epsilon[dtype] * np.abs(truth) + smallest
            whole = 2.0**-24 * np.abs(exact).max()
            assert (np.abs(error) <= 0.505 * spread / steps + slack + 2 * rounding + whole).all()


@pytest.mark.parametrize("dtype", KvDtype)
def test_fp8_errors_stay_below_a_sixteenth(dtype: KvDtype) -> None:
    layout = layout_of(dtype)
    words = draw(layout)
    exact = to_float(words, dtype)
    decoded = to_float(recode(FP8, layout, Part.VALUES, words), dtype)
    limits = np.abs(exact) / 16 + np.abs(exact).max(axis=3, keepdims=True) * 2.0**-9 / 448
    assert (np.abs(decoded - exact) <= limits * 1.02).all()


def test_fp8_rounds_like_the_number_format() -> None:
    """Numbers that e4m3 has come back; ties go to the even mantissa. 448 makes the scale 1."""
    layout = layout_of(KvDtype.FLOAT32, tokens=1, dim=8, heads=1)
    values = np.array([448.0, -448.0, 1.125, 17.0, 19.0, 2.0**-9, 0.0, -0.0625], np.float32)
    out = recode(FP8, layout, Part.KEYS, values.view(np.uint32).reshape(1, 1, 1, 8))
    decoded = out.view(np.float32).ravel()
    assert decoded.tolist() == [448.0, -448.0, 1.125, 16.0, 20.0, 2.0**-9, 0.0, -0.0625]


@pytest.mark.parametrize("codec", LOSSY, ids=lambda c: c.name)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**100, -(2.0**100)])
def test_parts_out_of_range_are_kept_raw_and_no_others(codec: Codec, bad: float) -> None:
    layout = layout_of(KvDtype.BFLOAT16)
    words = draw(layout)
    spoilt = words.copy()
    spoilt[1, 1, 3, 5] = np.float32(bad).view(np.uint32) >> np.uint32(16)
    for part in Part:
        clean = rows_of(codec.encode(layout, part, words))
        encoded = codec.encode(layout, part, spoilt)
        assert encoded[1] == KEPT_RAW
        assert [rows_of([encoded[i]]) == [clean[i]] for i in (0, 2)] == [True, True]


@pytest.mark.parametrize("codec", LOSSY, ids=lambda c: c.name)
def test_a_part_of_tiny_numbers_is_kept_raw_and_zeros_are_exact(codec: Codec) -> None:
    layout = layout_of(KvDtype.FLOAT32)
    tiny = np.full((1, 2, 32, 64), 2.0**-70, np.float32).view(np.uint32)
    assert codec.encode(layout, Part.KEYS, tiny) == [KEPT_RAW]
    zeros = np.zeros((1, 2, 32, 64), np.uint32)
    assert np.array_equal(recode(codec, layout, Part.KEYS, zeros), zeros)


@pytest.mark.parametrize("codec", LOSSY, ids=lambda c: c.name)
def test_float16_never_overflows(codec: Codec) -> None:
    layout = layout_of(KvDtype.FLOAT16)
    words = np.full((1, 2, 32, 64), np.float16(65504).view(np.uint16))
    words[0, 0, :, ::2] = np.float16(-65504).view(np.uint16)
    for part in Part:
        decoded = recode(codec, layout, part, words).view(np.float16)
        assert np.isfinite(decoded).all()
        assert (np.abs(decoded.astype(np.float32)) > 60000).all()


def test_int4_keeps_the_sinks_of_a_first_block() -> None:
    layout = layout_of(KvDtype.BFLOAT16)
    words = draw(layout)
    for part in Part:
        decoded = recode(INT4, layout, part, words, is_first=True)
        assert np.array_equal(decoded[:, :, :4], words[:, :, :4])
        assert not np.array_equal(decoded[:, :, 4:8], words[:, :, 4:8])
        (row, *_) = rows_of(INT4.encode(layout, part, words, is_first=True))
        assert row.nbytes > INT4.part_bytes(layout, part)


def test_a_first_block_of_only_sinks_is_kept_raw() -> None:
    layout = layout_of(KvDtype.BFLOAT16, tokens=4)
    assert INT4.encode(layout, Part.KEYS, draw(layout), is_first=True) == [KEPT_RAW] * 3


@pytest.mark.parametrize("codec", LOSSY, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", KvDtype)
@pytest.mark.parametrize("shape", [(32, 64), (48, 80), (33, 51), (1, 1)])
def test_fixed_rate_parts_have_the_planned_length(
    codec: Codec, dtype: KvDtype, shape: tuple[int, int]
) -> None:
    layout = layout_of(dtype, *shape)
    for part in Part:
        encoded = codec.encode(layout, part, draw(layout))
        planned = codec.part_bytes(layout, part)
        if encoded[0] == KEPT_RAW:
            assert shape == (1, 1)
            assert planned == raw_part_bytes(layout)
        else:
            assert {row.nbytes for row in rows_of(encoded)} == {planned}


def test_the_rates_are_those_of_the_table() -> None:
    layout = layout_of(KvDtype.BFLOAT16, heads=3)
    rates = {
        codec.name: 2 * raw_part_bytes(layout) / sum(codec.part_bytes(layout, p) for p in Part)
        for codec in LOSSY
    }
    assert rates == pytest.approx({"int8": 1.828, "fp8": 1.939, "int4": 3.197}, abs=1e-3)


def test_encoding_changes_nothing_and_takes_any_strides() -> None:
    layout = layout_of(KvDtype.BFLOAT16)
    block = np.stack([draw(layout, seed=1), draw(layout, seed=2)], axis=1)
    before = block.copy()
    for codec in CODECS[1:]:
        strided = codec.encode(layout, Part.VALUES, block[:, 1])
        packed = codec.encode(layout, Part.VALUES, np.ascontiguousarray(block[:, 1]))
        assert rows_of(strided) == rows_of(packed)
        out = np.zeros_like(block)
        codec.decode(layout, Part.VALUES, rows_of(strided), out[:, 1])
        assert not out[:, 0].any()
    assert np.array_equal(block, before)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_nibbles_come_back(count: int) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (3, count), dtype=np.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (3, (count + 1) // 2)
    assert np.array_equal(unpack_nibbles(packed, count), codes)


def test_codecs_by_name_and_id() -> None:
    assert [codec_of(codec.codec_id) for codec in CODECS] == list(CODECS)
    assert [codec.codec_id.value for codec in CODECS] == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="bp-zstd"):
        codec_named("zip")


GOLDEN_LAYOUT = KvLayout(
    num_layers=1, num_kv_heads=1, head_dim=6, block_tokens=9, dtype=KvDtype.BFLOAT16
)
GOLDEN = {
    ("int8", Part.KEYS, False): (
        "faff000016536c53c0530d543b546c5480db48f300daf8f300db58f404fc01ff00ff00ff00fe02fb"
        "06f809f40df016e71ae220dc30cc35c63cc055a85aa2609c837987758c70bc42bf3fc13cff00ff00"
        "ff00"
    ),
    ("int8", Part.VALUES, False): (
        "faff0000483f483fb645114cd84f5f52b1547b56455800db80db60e250e818ec90eed0f0a0f258f4"
        "7ba72ce500ff00ff1ad35884a06aca3bff00c63de020ff00d52ce917ff00de23ed12ff00e31df00e"
        "ff00e719f30dff00ea15f50bff00"
    ),
    ("fp8", Part.KEYS, False): (
        "faff00004a384a384a3fee44ae48804b804d934ff7500071f87bfd7efe7dfb78f10065ee74f87bfe"
        "75f779fb7cfe78f97afc7dfe7afa7bfc7dfe7afb7cfc7dfe7bfb7cfd7dfe7bfc7cfd7dfe"
    ),
    ("fp8", Part.VALUES, False): (
        "faff00004a384a384a3fee44ae48804b804d934ff7500071f87bfd7efe7dfb78f10065ee74f87bfe"
        "75f779fb7cfe78f97afc7dfe7afa7bfc7dfe7afb7cfc7dfe7bfb7cfd7dfe7bfc7cfd7dfe"
    ),
    ("int4", Part.KEYS, False): (
        "faff00008763e3631e644d647e64b36480db48f300daf8f300db58f4c04fb05fa05fa06f908f708f"
        "708f71be41be41be42fd02fd03fc03"
    ),
    ("int4", Part.KEYS, True): (
        "faff04001a624f628362b462e3621663e06848f3186af8f3706b58f4906f90af50af53ac53fc03fc"
        "06f9060000a03f10c0404060c0704070c0604040c01040a0bf0000c03f50c0a840f0c020414cc17c"
        "4198c1b441d2c1f2410ac2"
    ),
    ("int4", Part.VALUES, False): (
        "faff0000bc4fbc4f1256525c2b60c562fc64e366896800db80db60e250e818ec90eed0f0a0f258f4"
        "17fa03dd20ef10ff02dc25e819f60ce31fe01cf40de21fe01df30e"
    ),
    ("int4", Part.VALUES, True): (
        "faff04002b60c562fc64e366896818ec90eed0f0a0f258f41df30ee11fe01df20ee11fe01df20e00"
        "00a03f10c0404060c0704070c0604040c01040a0bf0000c03f50c0a840f0c020414cc17c4198c1b4"
        "41d2c1f2410ac2"
    ),
}
"""Encoded bytes; they never change, or what is on a disk could not be read any more."""

GOLDEN_FRAMES = {
    Part.KEYS: "28b52ffd20807d0000287f7f8081820410008d34d730b10d",
    Part.VALUES: "28b52ffd2080bd0000807f7f7f7f8080808081818181828282820100daa47309",
}
"""zstd's own bytes may differ from version to version: these must decode for ever."""


def golden_words(layout: KvLayout) -> Words:
    """Numbers that need no generator: k * (k - 11) / 8 with alternating signs."""
    values = [(-1) ** k * k * (k - 11) / 8 for k in range(54)]
    words = np.empty((1, 1, 9, 6), np.uint16)
    from_float(np.array(values, np.float32).reshape(1, 1, 9, 6), layout.dtype, words)
    return words


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_golden_fixed_rate_parts(case: tuple[str, Part, bool]) -> None:
    name, part, is_first = case
    words = golden_words(GOLDEN_LAYOUT)
    (row,) = rows_of(codec_named(name).encode(GOLDEN_LAYOUT, part, words, is_first=is_first))
    assert bytes(row).hex() == GOLDEN[case]


@pytest.mark.parametrize("part", Part)
def test_golden_exponent_planes(part: Part) -> None:
    """Exponents that differ by group of four channels; low bytes are mantissa and sign."""
    layout = KvLayout(
        num_layers=1, num_kv_heads=1, head_dim=16, block_tokens=8, dtype=KvDtype.BFLOAT16
    )
    n = np.arange(128, dtype=np.uint16)
    mantissa, sign = n % 97, n % 2
    words = 0x3F80 + mantissa + (n % 16 // 4 << 7) + (sign << 15)
    low = bytes((2 * (mantissa & 127) + sign).astype(np.uint8))
    encoded = memoryview(low + bytes.fromhex(GOLDEN_FRAMES[part]))
    out = np.zeros((1, 1, 8, 16), np.uint16)
    BP_ZSTD.decode(layout, part, [encoded], out)
    assert np.array_equal(out.ravel(), words)
    (pieces,) = BP_ZSTD.encode(layout, part, words.astype(np.uint16).reshape(out.shape))
    assert bytes(pieces[0]) == low
