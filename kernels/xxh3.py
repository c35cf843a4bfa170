"""Numbers of xxh3_64 for inputs above 240 bytes, seed 0, that those who compute it in parts share.

    sum[8]       8 sums of 64 bits, from `INITIAL`
    stripe       64 bytes as 8 words: word ^ key; its low times its high half is added to its sum,
                 the word itself to its neighbour's
    block        16 stripes, then a scramble of the sums
    last stripe  the last 64 bytes, which may have been in a stripe before

XXH3 by Y. Collet, https://xxhash.com, doc/xxhash_spec.md.
"""

from __future__ import annotations

from typing import Final

BLOCK_BYTES: Final = 1024
STRIPE_BYTES: Final = 64
MIN_BYTES: Final = 241
"""Shorter inputs take other, serial ways; the CUDA source has them all."""

PRIME32_1: Final = 0x9E3779B1
PRIME64_1: Final = 0x9E3779B185EBCA87
AVALANCHE_PRIME: Final = 0x165667919E3779F9
INITIAL: Final = (
    0xC2B2AE3D, PRIME64_1, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
    0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, PRIME32_1,
)  # fmt: skip
SECRET: Final = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
"""A stripe's key begins 8 bytes behind that of the stripe before it."""
SCRAMBLE_KEY: Final = len(SECRET) - STRIPE_BYTES
LAST_KEY: Final = SCRAMBLE_KEY - 7
MERGE_KEY: Final = 11
SWAPPED: Final = [1, 0, 3, 2, 5, 4, 7, 6]
"""A word is added to its neighbour's sum."""
