"""Golden vectors of summaries, and what a decoder must refuse."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest

from ucm.checksum import checksum
from ucm.errors import InvalidArgumentError, LayoutMismatchError
from ucm.kernels.summary_record import (
    HEADER_BYTES,
    Records,
    area_bytes,
    decode_summary,
    encode_summary,
    record_dtype,
    summary_bytes,
)
from ucm.layout import KvDtype, KvLayout
from ucm.types import SummaryKind

LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=8, dtype=KvDtype.BFLOAT16)
SMOLLM2 = KvLayout(
    num_layers=30, num_kv_heads=3, head_dim=64, block_tokens=32, dtype=KvDtype.BFLOAT16
)
CHECKSUMS = [0x0123456789ABCDEF, 0xFEDCBA9876543210]

# SHA-256 of `encode_summary` of `pattern` records. A change here is a new SUMMARY_VERSION.
GOLDEN = {
    SummaryKind.GSA_K4: "0582c8a6226d74a50995757187f15414787031e22e96cbad5b3b635f801fdc85",
    SummaryKind.GSA_2: "fe598f6ff9a05f9ed6709f7ff7cbf51c887fc23573d442651c7de30cf1e52142",
    SummaryKind.SHADOW2: "b7f5c20d66e9d86657550d02b496091d7f76d311440cc95370f3d133166efe93",
    SummaryKind.SHADOW4: "70c6052ae6f8f266a2ddc4bda7777b99d78a9ad964c9be1bd290edf4c99a70db",
    SummaryKind.MEAN: "df54c4ef90b99349c699f4dc96cd276f493452b593353ebdd4014246de0b5793",
    SummaryKind.BOX: "32e17a469c98461c8f18efca9e0722875baf945860c927a0611bf07571e70826",
    SummaryKind.CUBOID: "a408d8b2964603c31b9aca50f273b384a685f6516d1662ed70dc8da77febb45e",
    SummaryKind.HASH128: "f101aee610803bcf02cbc72029dcfdcc5aab8a488be08bf29120069281fe1a35",
    SummaryKind.MAXNORM: "be18e292f8cb120ba86842a61d1dde30a497713280dcb58be2f5f9b8d497d28b",
}


def pattern(kind: SummaryKind, layout: KvLayout = LAYOUT) -> Records:
    """Records full of distinct numbers, each exact in its type."""
    shape = (layout.num_layers, layout.num_kv_heads)
    records = np.zeros(shape, record_dtype(kind, layout.head_dim, layout.block_tokens))
    for index, name in enumerate(records.dtype.names or ()):
        column = records[name]
        numbers = np.arange(column.size).reshape(column.shape) + 7 * index
        if name == "flags":
            column[...] = 0
        elif name == "counts":
            column[...] = 1
        elif column.dtype.kind == "f":
            column[...] = (numbers % 64) / 4
        else:
            column[...] = numbers % 100
    return records


def encoded(kind: SummaryKind) -> bytes:
    return encode_summary(LAYOUT, kind, pattern(kind), CHECKSUMS)


@pytest.mark.parametrize("kind", SummaryKind)
def test_bytes_are_those_of_version_1(kind: SummaryKind) -> None:
    assert hashlib.sha256(encoded(kind)).hexdigest() == GOLDEN[kind]


def test_a_summary_byte_by_byte() -> None:
    layout = KvLayout(
        num_layers=1, num_kv_heads=1, head_dim=2, block_tokens=3, dtype=KvDtype.FLOAT16
    )
    records = np.zeros((1, 1), record_dtype(SummaryKind.MEAN, 2, 3))
    records["counts"], records["scales"] = 3, 0.5
    records["centroids"], records["radii"] = [-127, 4], 1.5
    body = bytes.fromhex("00 03 0038 8104 003e".replace(" ", ""))
    head = struct.pack("<4sHBBIIIIII", b"UCSM", 1, 5, 2, 1, 1, 2, 3, 8, 0)
    head += struct.pack("<QQ", checksum(struct.pack("<Q", 99)), checksum(body))
    whole = head + struct.pack("<Q", checksum(head)) + body
    assert encode_summary(layout, SummaryKind.MEAN, records, [99]) == whole
    found = decode_summary(layout, whole, [99])
    assert found is not None
    assert (found.records == records).all()


@pytest.mark.parametrize("kind", SummaryKind)
def test_numbers_of_kinds_are_for_ever(kind: SummaryKind) -> None:
    order = ["gsa-k4", "gsa-2", "shadow2", "shadow4", "mean", "box", "cuboid", "hash128", "maxnorm"]
    assert order[kind.number - 1] == kind
    assert SummaryKind.from_number(kind.number) is kind


def test_unknown_numbers_name_no_kind() -> None:
    assert SummaryKind.from_number(0) is None
    assert SummaryKind.from_number(10) is None


@pytest.mark.parametrize("kind", SummaryKind)
def test_the_area_holds_the_summary(kind: SummaryKind) -> None:
    assert len(encoded(kind)) == summary_bytes(LAYOUT, kind)
    assert area_bytes(SMOLLM2, kind) % 4096 == 0
    assert 0 <= area_bytes(SMOLLM2, kind) - summary_bytes(SMOLLM2, kind) < 4096


def test_the_default_takes_four_to_five_percent_of_a_block() -> None:
    part = summary_bytes(SMOLLM2, SummaryKind.GSA_K4) / SMOLLM2.block_bytes
    assert 0.035 < part < 0.05


@pytest.mark.parametrize("kind", SummaryKind)
def test_other_content_is_refused(kind: SummaryKind) -> None:
    data = encoded(kind)
    assert decode_summary(LAYOUT, data, CHECKSUMS) is not None
    assert decode_summary(LAYOUT, data, CHECKSUMS[::-1]) is None
    assert decode_summary(LAYOUT, data, [*CHECKSUMS, 0]) is None
    assert decode_summary(LAYOUT, data, []) is None


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 1},
        {"num_kv_heads": 1},
        {"head_dim": 8},
        {"block_tokens": 16},
        {"dtype": KvDtype.FLOAT16},
        {"num_layers": 1, "num_kv_heads": 4},
    ],
)
def test_other_layouts_are_refused(change: dict[str, int]) -> None:
    other = replace(LAYOUT, **change)  # type: ignore[arg-type]
    for kind in SummaryKind:
        assert decode_summary(other, encoded(kind), CHECKSUMS[: other.num_layers]) is None


def resealed(data: bytes, position: int, value: int) -> bytes:
    """With one byte of the header changed and its checksum made good again."""
    head = bytearray(data[: HEADER_BYTES - 8])
    head[position] = value
    return bytes(head) + struct.pack("<Q", checksum(bytes(head))) + data[HEADER_BYTES:]


@pytest.mark.parametrize("position", range(HEADER_BYTES - 8))
def test_each_byte_of_the_header_counts(position: int) -> None:
    data = encoded(SummaryKind.GSA_K4)
    assert decode_summary(LAYOUT, resealed(data, position, data[position]), CHECKSUMS) is not None
    changed = resealed(data, position, data[position] ^ 1)
    assert decode_summary(LAYOUT, changed, CHECKSUMS) is None


@pytest.mark.parametrize("kind", SummaryKind)
def test_short_data_is_refused_and_padding_accepted(kind: SummaryKind) -> None:
    data = encoded(kind)
    for length in (0, 7, HEADER_BYTES - 1, HEADER_BYTES, len(data) - 1):
        assert decode_summary(LAYOUT, data[:length], CHECKSUMS) is None
    assert decode_summary(LAYOUT, data + bytes(4096), CHECKSUMS) is not None
    assert decode_summary(LAYOUT, bytes(len(data)), CHECKSUMS) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flags", 2),
        ("flags", 0x81),
        ("radii", np.nan),
        ("scales", np.inf),
        ("radii", -1),
        ("counts", 255),
    ],
)
def test_records_that_nobody_could_measure_are_refused(name: str, value: float) -> None:
    records = pattern(SummaryKind.GSA_K4)
    records[name][1, 1] = value
    data = encode_summary(LAYOUT, SummaryKind.GSA_K4, records, CHECKSUMS)
    assert decode_summary(LAYOUT, data, CHECKSUMS) is None


def test_records_of_another_shape_are_not_encoded() -> None:
    records = pattern(SummaryKind.MEAN)
    with pytest.raises(InvalidArgumentError, match="no mean"):
        encode_summary(LAYOUT, SummaryKind.MEAN, records[:1], CHECKSUMS)
    with pytest.raises(InvalidArgumentError, match="no box"):
        encode_summary(LAYOUT, SummaryKind.BOX, records, CHECKSUMS)
    with pytest.raises(InvalidArgumentError, match="1 checksums"):
        encode_summary(LAYOUT, SummaryKind.MEAN, records, CHECKSUMS[:1])


def test_blocks_that_a_kind_cannot_describe() -> None:
    with pytest.raises(LayoutMismatchError, match="255"):
        record_dtype(SummaryKind.MEAN, 64, 256)
    with pytest.raises(LayoutMismatchError, match="pack"):
        record_dtype(SummaryKind.SHADOW4, 65, 32)
    large = replace(LAYOUT, block_tokens=256)
    assert decode_summary(large, encoded(SummaryKind.MEAN), CHECKSUMS) is None
