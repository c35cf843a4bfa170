"""The disk format: golden vectors, and that nothing damaged is believed."""

from __future__ import annotations

import hashlib
import random
import struct

import pytest

from ucm.checksum import checksum
from ucm.errors import ConfigError, CorruptionError, LayoutMismatchError
from ucm.layout import MAX_LAYERS, KvDtype, KvLayout
from ucm.storage.format import (
    BLANK_HEADER,
    HEADER_BYTES,
    SlotHeader,
    Superblock,
    decode_header,
    decode_superblock,
    encode_header,
    encode_superblock,
    is_blank,
)
from ucm.storage.tier import SlotId
from ucm.types import BlockKey, NamespaceId

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
    assert data[:16].hex() == "55434d53555045520100000000100000"
    assert struct.unpack_from("<QQQQ", data, 48) == (64 << 20, 1478656, 45, 0)
    assert struct.unpack_from("<IIIII", data, 80) == (30, 3, 64, 32, 0)
    assert hashlib.sha256(data).hexdigest() == SUPERBLOCK_SHA256
    assert decode_superblock(data, "it") == SUPERBLOCK


def test_golden_header() -> None:
    data = bytes(encoded())
    assert data[:16].hex() == "55434d534c4f54000100000000000000"
    assert data[48:112] == HEADER.key + HEADER.parent
    assert struct.unpack_from("<QQIIIIQQ", data, 112) == (
        (1 << 40) + 5, 41, 30, 49152, 49152, 0, 0, 1474560,
    )  # fmt: skip
    assert struct.unpack_from("<30Q", data, 248) == HEADER.checksums
    assert hashlib.sha256(data).hexdigest() == HEADER_SHA256
    assert decode_header(SUPERBLOCK, HEADER.slot, data) == HEADER


SUPERBLOCK_SHA256 = "e348c3610c51417d5e7291d8f7ae8c94e98c603a379603c7b38a786355c5f7ef"
HEADER_SHA256 = "20dc686279ee6fd8337366e3bb753f3aafc6467d3563c5577a0f2231046ff40f"


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
    struct.pack_into("<I", data, 8, 2)
    struct.pack_into("<Q", data, 4088, checksum(bytes(data[:4088])))
    with pytest.raises(ConfigError, match=r"format 2.* 1: .*empty data folder"):
        decode_superblock(bytes(data), "it")


def test_a_sealed_superblock_that_makes_no_sense_is_damaged() -> None:
    for offset, value in ((80, 0), (96, 9), (56, 1), (64, 1), (48, 5)):
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
