"""Checksums of slabs: xxh3_64 with seed 0, one for each layer of a block, padding excluded.

Envelope: 30 slabs of 48 KiB take about 50 us on one core (30 GB/s), of which 10 us are calls; the
disk needs 600 us or more for the same bytes. xxHash by Y. Collet, https://xxhash.com.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xxhash

from .errors import LayoutMismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .layout import KvLayout

    Bytes = NDArray[np.uint8]

CHECKSUM_SEED = 0
"""Part of the disk format and of the wire protocol; never changes within a format version."""

CACHED_BYTES = 512 << 10
"""A piece of a copy and its source stay in a core's second-level cache (1 to 2 MiB)."""


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


def copy_block(layout: KvLayout, source: memoryview, into: memoryview) -> tuple[int, ...]:
    """Copy one block and checksum the copy, piece by piece while it is in the core's cache.

    A copy from memory that was never in a cache runs at 4.7 GB/s here; with the checksum behind it
    in one go 2.9, this way 4.0. The copy is what is checksummed, so nobody who can still write to
    `source` can make a good checksum of bad bytes. Runs without the interpreter lock.

    Args:
        layout: shape of the block.
        source: contiguous bytes, `layout.block_bytes` long.
        into: writable, as long; padding is copied too.

    Returns:
        As `block_checksums(layout, into)`.

    Raises:
        LayoutMismatchError: a buffer has another length.
    """
    check_block_length(layout, source)
    check_block_length(layout, into)
    origin, target = np.frombuffer(source, np.uint8), np.frombuffer(into, np.uint8)
    stride, size = layout.slab_stride_bytes, layout.slab_bytes
    if stride > CACHED_BYTES:
        starts = range(0, layout.block_bytes, stride)
        return tuple(
            _copy_slab(origin[at : at + stride], target[at : at + stride], size) for at in starts
        )
    sums: list[int] = []
    flat = into.cast("B")
    step = CACHED_BYTES // stride * stride
    for first in range(0, layout.block_bytes, step):
        end = min(first + step, layout.block_bytes)
        np.copyto(target[first:end], origin[first:end])
        sums += [checksum(flat[at : at + size]) for at in range(first, end, stride)]
    return tuple(sums)


def _copy_slab(origin: Bytes, target: Bytes, size: int) -> int:
    """Copy a slab that is larger than the cache; the checksum of its first `size` bytes."""
    digest = xxhash.xxh3_64(seed=CHECKSUM_SEED)
    for first in range(0, len(target), CACHED_BYTES):
        piece = slice(first, first + CACHED_BYTES)
        np.copyto(target[piece], origin[piece])
        digest.update(target[first : min(first + CACHED_BYTES, size)].data)
    found: int = digest.intdigest()
    return found


def check_block_length(layout: KvLayout, data: memoryview) -> None:
    """Refuse a buffer that is not one block.

    Raises:
        LayoutMismatchError: `data` is not `layout.block_bytes` long.
    """
    if data.nbytes != layout.block_bytes:
        raise LayoutMismatchError(
            f"a block of this namespace has {layout.block_bytes} bytes, the buffer {data.nbytes}"
        )
