"""`int8`: 8-bit codes; K a channel over 32 tokens, V a token and head. About 1.82 times smaller.

The layout of an encoded part, and the source, are in `storage.codec_affine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from . import codec_affine
from .codec import CodecId, Part
from .codec_affine import AffineGrid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ucm.layout import KvLayout

    from .codec import Encoded, Words


@dataclass(frozen=True, slots=True)
class Int8:
    """Affine 8-bit codes."""

    codec_id: ClassVar[CodecId] = CodecId.INT8
    name: ClassVar[str] = "int8"
    is_lossless: ClassVar[bool] = False

    def part_bytes(self, layout: KvLayout, part: Part) -> int:
        """See `Codec.part_bytes`."""
        return codec_affine.planned_bytes(layout, part, _grid(layout))

    def encode(
        self, layout: KvLayout, part: Part, words: Words, *, is_first: bool = False
    ) -> list[Encoded]:
        """See `Codec.encode`."""
        del is_first
        return codec_affine.encode(layout, part, _grid(layout), words, 0)

    def decode(
        self, layout: KvLayout, part: Part, encoded: Sequence[memoryview], out: Words
    ) -> None:
        """See `Codec.decode`."""
        codec_affine.decode(layout, part, _grid(layout), encoded, out)


_KEY_GROUP_TOKENS: Final = 32


def _grid(layout: KvLayout) -> AffineGrid:
    """A value's group is the whole head."""
    return AffineGrid(
        bits=8, key_group_tokens=_KEY_GROUP_TOKENS, value_group_channels=layout.head_dim
    )
