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

from .xxh3 import (
    AVALANCHE_PRIME,
    BLOCK_BYTES,
    INITIAL,
    LAST_KEY,
    MERGE_KEY,
    MIN_BYTES,
    PRIME32_1,
    PRIME64_1,
    SCRAMBLE_KEY,
    SECRET,
    STRIPE_BYTES,
    SWAPPED,
)

Words = NDArray[np.uint64]

_MASK_64: Final = (1 << 64) - 1
_MASK_32: Final = np.uint64(0xFFFFFFFF)
_SHIFT_32: Final = np.uint64(32)


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
    sums = np.array(INITIAL, np.uint64)
    key = _secret_words(SCRAMBLE_KEY, 1)[0]
    for added in _block_sums(data[: num_blocks * BLOCK_BYTES]):
        sums = sums + added
        sums = (sums ^ (sums >> np.uint64(47)) ^ key) * np.uint64(PRIME32_1)
    tail = data[num_blocks * BLOCK_BYTES :]
    num_stripes = (len(tail) - 1) // STRIPE_BYTES
    whole = _words(tail[: num_stripes * STRIPE_BYTES]).reshape(num_stripes, 8)
    sums = sums + _stripe_sums(whole, _secret_words(0, num_stripes)).sum(axis=0, dtype=np.uint64)
    last = _words(data[-STRIPE_BYTES:]).reshape(1, 8)
    sums = sums + _stripe_sums(last, _secret_words(LAST_KEY, 1))[0]
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
    added: Words = words[..., SWAPPED] + (mixed & _MASK_32) * (mixed >> _SHIFT_32)
    return added


def _words(data: NDArray[np.uint8]) -> Words:
    return np.ascontiguousarray(data).view("<u8")


def _secret_words(offset: int, num_stripes: int) -> Words:
    """[num_stripes, 8]: the keys of stripes; each stripe's begin 8 bytes after the last's."""
    windows = [SECRET[offset + 8 * i : offset + 8 * i + 64] for i in range(num_stripes)]
    return np.frombuffer(b"".join(windows), "<u8").reshape(num_stripes, 8)


def _merged(sums: list[int], length: int) -> int:
    hashed = length * PRIME64_1
    for first in range(0, 8, 2):
        offset = MERGE_KEY + 8 * first
        low, high = (
            int.from_bytes(SECRET[offset + 8 * i : offset + 8 * i + 8], "little") for i in (0, 1)
        )
        product = (sums[first] ^ low) * (sums[first + 1] ^ high)
        hashed += (product & _MASK_64) ^ (product >> 64)
    hashed &= _MASK_64
    hashed ^= hashed >> 37
    hashed = hashed * AVALANCHE_PRIME & _MASK_64
    return hashed ^ (hashed >> 32)
