"""xxh3_64 in the order in which a GPU computes it: the reference of the CUDA kernel, in numpy.

    block (1 KiB) = 16 stripes x 8 words         inside: sums only, all at once
    between blocks                                one scramble of the 8 sums, in order

Slow, and not what the store uses: that is the xxhash library (`ucm.checksum`), to which the tests
hold this as they hold the kernel. XXH3 by Y. Collet, https://xxhash.com, doc/xxhash_spec.md.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ucm.errors import InvalidArgumentError

Words = NDArray[np.uint64]

BLOCK_BYTES: Final = 1024
STRIPE_BYTES: Final = 64
MIN_BYTES: Final = 241
"""Shorter inputs take other, serial ways; the CUDA source has them all."""

_MASK_64: Final = (1 << 64) - 1
_MASK_32: Final = np.uint64(0xFFFFFFFF)
_SHIFT_32: Final = np.uint64(32)
_PRIME32_1: Final = 0x9E3779B1
_PRIME64_1: Final = 0x9E3779B185EBCA87
_INITIAL: Final = (
    0xC2B2AE3D, _PRIME64_1, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
    0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, _PRIME32_1,
)  # fmt: skip
_SECRET: Final = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_SWAPPED: Final = [1, 0, 3, 2, 5, 4, 7, 6]
"""A word is added to its neighbour's sum."""


def xxh3_64_in_blocks(data: NDArray[np.uint8]) -> int:
    """xxh3_64, seed 0, of one slab.

    Args:
        data: [n] bytes, contiguous, n > 240.

    Raises:
        InvalidArgumentError: it is shorter.
    """
    if len(data) < MIN_BYTES:
        raise InvalidArgumentError(f"{len(data)} bytes, at least {MIN_BYTES}")
    num_blocks = (len(data) - 1) // BLOCK_BYTES
    sums = np.array(_INITIAL, np.uint64)
    key = _secret_words(len(_SECRET) - STRIPE_BYTES, 1)[0]
    for added in _block_sums(data[: num_blocks * BLOCK_BYTES]):
        sums = sums + added
        sums = (sums ^ (sums >> np.uint64(47)) ^ key) * np.uint64(_PRIME32_1)
    tail = data[num_blocks * BLOCK_BYTES :]
    num_stripes = (len(tail) - 1) // STRIPE_BYTES
    whole = _words(tail[: num_stripes * STRIPE_BYTES]).reshape(num_stripes, 8)
    sums = sums + _stripe_sums(whole, _secret_words(0, num_stripes)).sum(axis=0, dtype=np.uint64)
    last = _words(data[-STRIPE_BYTES:]).reshape(1, 8)
    sums = sums + _stripe_sums(last, _secret_words(len(_SECRET) - STRIPE_BYTES - 7, 1))[0]
    return _merged([int(value) for value in sums], len(data))


def _block_sums(data: NDArray[np.uint8]) -> Words:
    """[num_blocks, 8]: what each block adds to the eight sums; no block waits for another."""
    words = _words(data).reshape(-1, BLOCK_BYTES // STRIPE_BYTES, 8)
    keys = _secret_words(0, BLOCK_BYTES // STRIPE_BYTES)
    sums: Words = _stripe_sums(words, keys).sum(axis=1, dtype=np.uint64)
    return sums


def _stripe_sums(words: Words, keys: Words) -> Words:
    """[..., stripes, 8]: what each stripe adds."""
    mixed = words ^ keys
    added: Words = words[..., _SWAPPED] + (mixed & _MASK_32) * (mixed >> _SHIFT_32)
    return added


def _words(data: NDArray[np.uint8]) -> Words:
    return np.ascontiguousarray(data).view("<u8")


def _secret_words(offset: int, num_stripes: int) -> Words:
    """[num_stripes, 8]: the keys of stripes; each stripe's begin 8 bytes after the last's."""
    windows = [_SECRET[offset + 8 * i : offset + 8 * i + 64] for i in range(num_stripes)]
    return np.frombuffer(b"".join(windows), "<u8").reshape(num_stripes, 8)


def _merged(sums: list[int], length: int) -> int:
    hashed = length * _PRIME64_1
    for first in range(0, 8, 2):
        offset = 11 + 8 * first
        low, high = (
            int.from_bytes(_SECRET[offset + 8 * i : offset + 8 * i + 8], "little") for i in (0, 1)
        )
        product = (sums[first] ^ low) * (sums[first + 1] ^ high)
        hashed += (product & _MASK_64) ^ (product >> 64)
    hashed &= _MASK_64
    hashed ^= hashed >> 37
    hashed = hashed * 0x165667919E3779F9 & _MASK_64
    return hashed ^ (hashed >> 32)
