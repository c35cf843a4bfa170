"""Checksums of slabs: golden values, padding, wrong lengths."""

from __future__ import annotations

import pytest

from ucm.checksum import CACHED_BYTES, block_checksums, checksum, copy_block, verify
from ucm.errors import LayoutMismatchError
from ucm.layout import KvDtype, KvLayout
from ucm.testing.tier_conformance import LAYOUT, make_block


def test_golden_values() -> None:
    assert checksum(b"") == 0x2D06800538D394C2
    assert checksum(b"ucm") == checksum(memoryview(b"ucm"))
    assert checksum(bytes(range(256))) == 0x9408A4433B952D71


def test_every_slab_has_its_own() -> None:
    data = bytearray(make_block(1))
    sums = block_checksums(LAYOUT, memoryview(data))
    assert len(set(sums)) == LAYOUT.num_layers
    for layer in range(LAYOUT.num_layers):
        start = layer * LAYOUT.slab_stride_bytes
        for offset in (start, start + LAYOUT.slab_bytes - 1):
            data[offset] ^= 1
            changed = block_checksums(LAYOUT, memoryview(data))
            assert [a != b for a, b in zip(sums, changed, strict=True)] == [
                other == layer for other in range(LAYOUT.num_layers)
            ]
            assert not verify(LAYOUT, memoryview(data), sums)
            data[offset] ^= 1
    assert verify(LAYOUT, memoryview(data), sums)


def test_padding_does_not_count() -> None:
    data = bytearray(make_block(1))
    sums = block_checksums(LAYOUT, memoryview(data))
    data[LAYOUT.slab_bytes] ^= 1
    assert verify(LAYOUT, memoryview(data), sums)


def test_a_wrong_number_of_checksums_is_no_match() -> None:
    data = make_block(1)
    assert not verify(LAYOUT, data, block_checksums(LAYOUT, data)[:-1])
    assert not verify(LAYOUT, data, ())


def test_a_wrong_length_is_refused() -> None:
    with pytest.raises(LayoutMismatchError, match=str(LAYOUT.block_bytes)):
        block_checksums(LAYOUT, memoryview(bytes(LAYOUT.block_bytes - 1)))


@pytest.mark.parametrize(
    ("num_layers", "tokens"),
    [(1, 1), (3, 24), (5, 4096), (2, 8192), (2, 8200), (3, 20_001)],
    ids=["tiny", "padded", "many a piece", "one a piece", "above a piece", "several pieces"],
)
def test_a_copy_is_whole_and_its_checksums_are_those_of_the_copy(
    num_layers: int, tokens: int
) -> None:
    layout = KvLayout(
        num_layers=num_layers,
        num_kv_heads=1,
        head_dim=8,
        block_tokens=tokens,
        dtype=KvDtype.FLOAT32,
    )
    source = make_block("source", layout)
    into = memoryview(bytearray(layout.block_bytes))
    assert copy_block(layout, source, into) == block_checksums(layout, source)
    assert into == source


def test_the_cases_above_are_below_at_and_above_the_size_of_a_piece() -> None:
    assert CACHED_BYTES == 8192 * 2 * 8 * 4


def test_a_copy_between_blocks_of_other_lengths_is_refused() -> None:
    short = memoryview(bytearray(LAYOUT.block_bytes - 1))
    for source, into in (
        (short, memoryview(bytearray(LAYOUT.block_bytes))),
        (make_block(1), short),
    ):
        with pytest.raises(LayoutMismatchError):
            copy_block(LAYOUT, source, into)
