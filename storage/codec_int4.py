"""`int4`: 4-bit codes, K a channel over 32 tokens, V a token over 32 channels. 3.2 times smaller.

The first four tokens of a sequence are attention sinks: every later token looks at them, so they
are kept as they are (KVQuant, arXiv 2401.18079; StreamingLLM, arXiv 2309.17453). The layout of an
encoded part, and the source of the grouping, are in `storage.codec_affine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from ucm.errors import CorruptionError

from . import codec_affine
from .codec import KEPT_RAW, CodecId, Part
from .codec_affine import AffineGrid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ucm.layout import KvLayout

    from .codec import Encoded, Words

SINK_TOKENS: Final = 4
_GRID: Final = AffineGrid(bits=4, key_group_tokens=32, value_group_channels=32)


@dataclass(frozen=True, slots=True)
class Int4:
    """Affine 4-bit codes, sinks exact."""

    codec_id: ClassVar[CodecId] = CodecId.INT4
    name: ClassVar[str] = "int4"
    is_lossless: ClassVar[bool] = False

    def part_bytes(self, layout: KvLayout, part: Part) -> int:
        """See `Codec.part_bytes`. The first block of a sequence is longer by its sinks."""
        return codec_affine.planned_bytes(layout, part, _GRID)

    def encode(
        self, layout: KvLayout, part: Part, words: Words, *, is_first: bool = False
    ) -> list[Encoded]:
        """See `Codec.encode`. A first block of no more than the sinks is kept raw."""
        if is_first and layout.block_tokens <= SINK_TOKENS:
            return [KEPT_RAW] * len(words)
        return codec_affine.encode(layout, part, _GRID, words, SINK_TOKENS if is_first else 0)

    def decode(
        self, layout: KvLayout, part: Part, encoded: Sequence[memoryview], out: Words
    ) -> None:
        """See `Codec.decode`."""
        if any(bytes(data[2:4]) not in _SINK_FIELDS for data in encoded):
            raise CorruptionError("an int4 part has an impossible number of sink tokens")
        codec_affine.decode(layout, part, _GRID, encoded, out)


_SINK_FIELDS: Final = frozenset(count.to_bytes(2, "little") for count in (0, SINK_TOKENS))
