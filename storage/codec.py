"""The `Codec` seam: how one part, the keys or the values of one slab, becomes fewer bytes.

    block = num_layers slabs       slab = K part | V part       part = [heads, tokens, dim]

A codec is a frozen dataclass without state, in a file of its own. It works on parts of many slabs
at once, because numpy costs microseconds a call; every part stays decodable by itself. Encoding
cannot fail: a part that a codec cannot represent (non-finite, out of range, not worth it) is
answered with `KEPT_RAW` and the caller stores it as it is. Decoding takes bytes from a disk: it
checks every length against the layout before it allocates, and raises `CorruptionError` only.

What a codec writes for the same input is fixed for ever by golden vectors; its id is in the slot
header and in the superblock (`storage.format`).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from ucm.layout import KvDtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ucm.layout import KvLayout

    Words = NDArray[np.unsignedinteger[Any]]
    """Elements as unsigned integers of their size, little-endian: bit patterns, no arithmetic."""
    Floats = NDArray[np.float32]
    Encoded = tuple[bytes | memoryview, ...]
    """One part's encoded bytes, as pieces that lie one behind the other."""

KEPT_RAW: Final[Encoded] = ()
"""The codec's answer for a part that it cannot, or should not, represent."""

BATCH_VALUES: Final = 1 << 17
"""Elements that callers should pass at once: fewer cost more in calls, more fall out of cache."""


class CodecId(enum.IntEnum):
    """What a slot header says about its payload; numbers are never used again."""

    RAW = 0
    BP_ZSTD = 1
    INT8 = 2
    FP8 = 3
    INT4 = 4


class Part(enum.IntEnum):
    """Which half of a slab; also its index in the slab's first dimension."""

    KEYS = 0
    VALUES = 1


class Codec(Protocol):
    """Encodes and decodes parts. Thread-safe; never blocks on anything but the processor."""

    @property
    def codec_id(self) -> CodecId:
        """Its number on the disk."""

    @property
    def name(self) -> str:
        """Its name in configuration and reports."""

    @property
    def is_lossless(self) -> bool:
        """Whether decoding gives back every bit."""

    def part_bytes(self, layout: KvLayout, part: Part) -> int:
        """Length that a slot plans for one encoded part.

        Exact for the fixed-rate codecs (without sink tokens); for an entropy coder what real KV
        stays below, which a part may exceed up to its raw size.
        """

    def encode(
        self, layout: KvLayout, part: Part, words: Words, *, is_first: bool = False
    ) -> list[Encoded]:
        """Encode one kind of part of several slabs.

        Args:
            layout: of the block.
            part: which kind.
            words: [n, num_kv_heads, block_tokens, head_dim], any strides; not changed.
            is_first: the block begins a sequence, so its first tokens are attention sinks.

        Returns:
            n encodings, `KEPT_RAW` where the part has to be stored as it is.
        """

    def decode(
        self, layout: KvLayout, part: Part, encoded: Sequence[memoryview], out: Words
    ) -> None:
        """The inverse of `encode`, for parts that were not kept raw.

        Args:
            layout: of the block.
            part: which kind.
            encoded: n encodings, each contiguous bytes.
            out: [n, num_kv_heads, block_tokens, head_dim], writable; garbage after an error.

        Raises:
            CorruptionError: a length or a field is impossible; nothing was allocated for it.
        """


def raw_part_bytes(layout: KvLayout) -> int:
    """Bytes of one part as the engine has it."""
    return layout.slab_bytes // 2


def word_type(dtype: KvDtype) -> np.dtype[np.unsignedinteger[Any]]:
    """The little-endian unsigned integer that holds one element."""
    return np.dtype("<u4") if dtype is KvDtype.FLOAT32 else np.dtype("<u2")


def part_shape(layout: KvLayout) -> tuple[int, int, int]:
    """[num_kv_heads, block_tokens, head_dim]."""
    return layout.slab_shape[1:]
