"""Checksums of slabs: xxh3_64 with seed 0, one for each layer of a block, padding excluded.

Envelope: 30 slabs of 48 KiB take about 50 us on one core (30 GB/s), of which 10 us are calls; the
disk needs 600 us or more for the same bytes. xxHash by Y. Collet, https://xxhash.com.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

from .errors import LayoutMismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .layout import KvLayout

CHECKSUM_SEED = 0
"""Part of the disk format and of the wire protocol; never changes within a format version."""


def checksum(data: memoryview | bytes) -> int:
    """xxh3_64 of `data` with the product's seed."""
    digest: int = xxhash.xxh3_64_intdigest(data, CHECKSUM_SEED)
    return digest


def block_checksums(layout: KvLayout, data: memoryview) -> tuple[int, ...]:
    """Checksum every slab of one block.

    Args:
        layout: shape of the block.
        data: contiguous bytes, `layout.block_bytes` long.

    Returns:
        `layout.num_layers` numbers below 2**64, layer 0 first.

    Raises:
        LayoutMismatchError: `data` has another length.
    """
    check_block_length(layout, data)
    flat, size = data.cast("B"), layout.slab_bytes
    starts = range(0, layout.block_bytes, layout.slab_stride_bytes)
    return tuple(checksum(flat[start : start + size]) for start in starts)


def verify(layout: KvLayout, data: memoryview, checksums: Sequence[int]) -> bool:
    """Whether every slab of `data` has its checksum; a wrong number of them is a False.

    Raises:
        LayoutMismatchError: `data` is not `layout.block_bytes` long.
    """
    return block_checksums(layout, data) == tuple(checksums)


def check_block_length(layout: KvLayout, data: memoryview) -> None:
    """Refuse a buffer that is not one block.

    Raises:
        LayoutMismatchError: `data` is not `layout.block_bytes` long.
    """
    if data.nbytes != layout.block_bytes:
        raise LayoutMismatchError(
            f"a block of this namespace has {layout.block_bytes} bytes, the buffer {data.nbytes}"
        )
