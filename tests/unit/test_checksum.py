"""Checksums of slabs: golden values, padding, wrong lengths."""

from __future__ import annotations

import pytest

from ucm.checksum import block_checksums, checksum, verify
from ucm.errors import LayoutMismatchError
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
