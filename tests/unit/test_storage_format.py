"""The disk format: golden vectors, and that nothing damaged is believed."""

from __future__ import annotations

import hashlib
import random
import struct
from dataclasses import replace

import pytest

from ucm.checksum import checksum
from ucm.errors import ConfigError, CorruptionError, LayoutMismatchError
from ucm.layout import MAX_LAYERS, KvDtype, KvLayout
from ucm.storage.codec import CodecId
from ucm.storage.codecs import CODEC_NAMES, RAW, codec_named
from ucm.storage.format import (
    BLANK_HEADER,
    HEADER_BYTES,
    SlotHeader,
    Superblock,
    compact_payload_bytes,
    decode_header,
    decode_superblock,
    effective_codec,
    encode_header,
    encode_superblock,
    is_blank,
    new_superblock,
)
from ucm.storage.tier import SlotId
from ucm.types import BlockKey, NamespaceId, SummaryKind

LAYOUT = KvLayout(
    num_layers=30, num_kv_heads=3, head_dim=64, block_tokens=32, dtype=KvDtype.FLOAT32
)
SUPERBLOCK = Superblock(
    namespace=NamespaceId(bytes(range(32))), layout=LAYOUT, segment_bytes=64 << 20
)
HEADER = SlotHeader(
    key=BlockKey(b"k" * 32),
    parent=BlockKey(b"p" * 32),
    slot=SlotId(41),
    generation=(1 << 40) + 5,
    checksums=tuple(1000 + layer for layer in range(30)),
)


def encoded(header: SlotHeader = HEADER, superblock: Superblock = SUPERBLOCK) -> bytearray:
    data = bytearray(HEADER_BYTES)
    encode_header(superblock, header, memoryview(data))
    return data


def test_golden_superblock() -> None:
    data = encode_superblock(SUPERBLOCK)
    assert data[:16].hex() == "55434d53555045520300000000100000"
    assert struct.unpack_from("<QQQQ", data, 48) == (64 << 20, 1478656, 45, 0)
    assert struct.unpack_from("<IIIII", data, 80) == (30, 3, 64, 32, 0)
    assert hashlib.sha256(data).hexdigest() == SUPERBLOCK_SHA256
    assert decode_superblock(data, "it") == SUPERBLOCK


def test_golden_header() -> None:
    data = bytes(encoded())
    assert data[:16].hex() == "55434d534c4f54000300000000000000"
    assert data[48:112] == HEADER.key + HEADER.parent
    assert struct.unpack_from("<QQIIIIQQ", data, 112) == (
        (1 << 40) + 5, 41, 30, 49152, 49152, 0, 0, 1474560,
    )  # fmt: skip
    assert struct.unpack_from("<30Q", data, 248) == HEADER.checksums
    assert hashlib.sha256(data).hexdigest() == HEADER_SHA256
    assert decode_header(SUPERBLOCK, HEADER.slot, data) == HEADER


SUPERBLOCK_SHA256 = "a8a16838b10863c85dbba0a95ed3af00f00fd19fc068c2500fd33f1a524c079d"
HEADER_SHA256 = "b8b8730a25d59e6c1eb0d0e1fd718fa414d2f7d868f74e70ca5a4338141dc1f3"


SUMMARISED = new_superblock(
    SUPERBLOCK.namespace, LAYOUT, RAW, segment_bytes=64 << 20, summary=SummaryKind.GSA_K4
)


def test_golden_superblock_and_header_with_summary_areas() -> None:
    data, header = encode_superblock(SUMMARISED), bytes(encoded(HEADER, SUMMARISED))
    assert struct.unpack_from("<QQQQ", data, 48) == (64 << 20, 1511424, 44, 32768)
    assert struct.unpack_from("<I", data, 104) == (SummaryKind.GSA_K4.number,)
    assert struct.unpack_from("<Q", header, 144) == (32768,)
    assert hashlib.sha256(data).hexdigest() == SUMMARISED_SHA256
    assert hashlib.sha256(header).hexdigest() == SUMMARISED_HEADER_SHA256
    assert decode_superblock(data, "it") == SUMMARISED
    assert decode_header(SUMMARISED, HEADER.slot, header) == HEADER
    assert decode_header(SUPERBLOCK, HEADER.slot, header) is None, "this namespace has no areas"


SUMMARISED_SHA256 = "586a4417f2bd9aa6eb144cd81ee6d4647119b73c9fa46d0645de54b14f8f6259"
SUMMARISED_HEADER_SHA256 = "12cd5208eb8b3bff98f22fc4e614ca436ac92eeaa1bcd6c5ec04b43880c07442"


def test_every_flipped_bit_is_noticed() -> None:
    header, superblock = encoded(), bytearray(encode_superblock(SUPERBLOCK))
    chance = random.Random(1)
    for position in [*range(256), *chance.sample(range(256, 4096), 200), *range(4088, 4096)]:
        bit = 1 << chance.randrange(8)
        header[position] ^= bit
        assert decode_header(SUPERBLOCK, HEADER.slot, memoryview(header)) is None
        header[position] ^= bit
        superblock[position] ^= bit
        with pytest.raises(CorruptionError, match="fsck"):
            decode_superblock(bytes(superblock), "it")
        superblock[position] ^= bit


def test_a_header_of_another_place_or_namespace_is_not_ours() -> None:
    assert decode_header(SUPERBLOCK, SlotId(40), bytes(encoded())) is None
    other = Superblock(
        namespace=NamespaceId(bytes(32)), layout=LAYOUT, segment_bytes=SUPERBLOCK.segment_bytes
    )
    assert decode_header(other, HEADER.slot, bytes(encoded())) is None


def test_blank_and_garbage_headers_are_none() -> None:
    assert decode_header(SUPERBLOCK, SlotId(0), BLANK_HEADER) is None
    assert is_blank(BLANK_HEADER)
    assert not is_blank(bytes(encoded()))
    chance = random.Random(2)
    for _ in range(200):
        assert decode_header(SUPERBLOCK, SlotId(0), chance.randbytes(HEADER_BYTES)) is None


def test_another_version_says_what_to_do() -> None:
    data = bytearray(encode_superblock(SUPERBLOCK))
    struct.pack_into("<I", data, 8, 1)
    struct.pack_into("<Q", data, 4088, checksum(bytes(data[:4088])))
    with pytest.raises(ConfigError, match=r"format 1.* 3: .*empty data folder"):
        decode_superblock(bytes(data), "it")


def test_a_sealed_superblock_that_makes_no_sense_is_damaged() -> None:
    for offset, value in (
        (80, 0),
        (96, 9),
        (56, 1),
        (64, 1),
        (48, 5),
        (100, 1),
        (100, 9),
        (72, 1),
        (104, 99),
    ):
        data = bytearray(encode_superblock(SUPERBLOCK))
        struct.pack_into("<I", data, offset, value)
        struct.pack_into("<Q", data, 4088, checksum(bytes(data[:4088])))
        with pytest.raises(CorruptionError):
            decode_superblock(bytes(data), "it")


@pytest.mark.parametrize("size", [0, 1, 4095, 4097])
def test_a_superblock_of_another_size_is_damaged(size: int) -> None:
    data = (encode_superblock(SUPERBLOCK) + b"x")[:size]
    with pytest.raises(CorruptionError):
        decode_superblock(data, "it")


def test_the_largest_layout_fits_a_header() -> None:
    layout = KvLayout(
        num_layers=MAX_LAYERS, num_kv_heads=1, head_dim=8, block_tokens=8, dtype=KvDtype.BFLOAT16
    )
    superblock = Superblock(namespace=SUPERBLOCK.namespace, layout=layout, segment_bytes=64 << 20)
    sums = tuple((1 << 64) - 1 - layer for layer in range(MAX_LAYERS))
    header = SlotHeader(
        key=HEADER.key, parent=HEADER.parent, slot=SlotId(0), generation=1, checksums=sums
    )
    assert decode_header(superblock, SlotId(0), bytes(encoded(header, superblock))) == header


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"raise nvme\.segment_bytes"):
        Superblock(namespace=SUPERBLOCK.namespace, layout=LAYOUT, segment_bytes=1 << 20)
    short = SlotHeader(
        key=HEADER.key, parent=HEADER.parent, slot=SlotId(0), generation=1, checksums=(1,)
    )
    with pytest.raises(LayoutMismatchError):
        encoded(short)


COMPACT = Superblock(
    namespace=SUPERBLOCK.namespace,
    layout=LAYOUT,
    segment_bytes=64 << 20,
    codec=CodecId.INT8,
    compact_bytes=compact_payload_bytes(LAYOUT, codec_named("int8")),
)
ENCODED_HEADER = replace(HEADER, codec=CodecId.INT8, encoded_bytes=404000)


def test_golden_compact_superblock() -> None:
    data = encode_superblock(COMPACT)
    assert struct.unpack_from("<QQQQ", data, 48) == (64 << 20, 409600, 163, 0)
    assert struct.unpack_from("<I", data, 100) == (CodecId.INT8,)
    assert hashlib.sha256(data).hexdigest() == COMPACT_SHA256
    assert decode_superblock(data, "it") == COMPACT


def test_golden_encoded_header() -> None:
    data = bytes(encoded(ENCODED_HEADER, COMPACT))
    assert struct.unpack_from("<I", data, 12) == (CodecId.INT8,)
    assert struct.unpack_from("<Q", data, 152) == (404000,)
    assert decode_header(COMPACT, HEADER.slot, data) == ENCODED_HEADER
    assert decode_header(SUPERBLOCK, HEADER.slot, data) is None, "this namespace has no codec"


COMPACT_SHA256 = "150dc3ee659b25cd5783fec011f99b012af482c8dcb6b7d811c9a61d5cd971df"


def test_headers_of_another_codec_or_length_are_not_ours() -> None:
    for change in (
        {"codec": CodecId.INT4},
        {"encoded_bytes": COMPACT.compact_bytes + 1},
        {"encoded_bytes": 0},
    ):
        header = replace(ENCODED_HEADER, **change)
        assert decode_header(COMPACT, HEADER.slot, bytes(encoded(header, COMPACT))) is None
    full = bytes(encoded(HEADER, COMPACT))
    assert decode_header(COMPACT, HEADER.slot, full) == HEADER, "a full slot's"


def test_slots_are_as_small_as_the_codec_allows() -> None:
    small = KvLayout(
        num_layers=30, num_kv_heads=3, head_dim=64, block_tokens=32, dtype=KvDtype.BFLOAT16
    )
    sizes = {name: compact_payload_bytes(small, codec_named(name)) for name in CODEC_NAMES}
    assert sizes == {"raw": 0, "bp-zstd": 557056, "int8": 405504, "fp8": 385024, "int4": 233472}


def test_who_accepts_no_loss_gets_a_lossless_codec() -> None:
    def chosen(name: str, *, accepts_lossy: bool, layout: KvLayout = LAYOUT) -> str:
        return effective_codec(codec_named(name), layout, accepts_lossy=accepts_lossy).name

    assert [chosen(name, accepts_lossy=True) for name in CODEC_NAMES] == list(CODEC_NAMES)
    assert [chosen(name, accepts_lossy=False) for name in CODEC_NAMES] == [
        "raw", "bp-zstd", "bp-zstd", "bp-zstd", "bp-zstd",
    ]  # fmt: skip
    page = KvLayout(num_layers=4, num_kv_heads=1, head_dim=2, block_tokens=1, dtype=KvDtype.FLOAT16)
    assert chosen("int8", accepts_lossy=True, layout=page) == "int8", "four pages become one"
    one = replace(page, num_layers=1)
    assert chosen("int8", accepts_lossy=True, layout=one) == "raw", "a page cannot get smaller"
