"""`raw`: the bytes as the engine has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ucm.errors import CorruptionError

from .codec import KEPT_RAW, CodecId, Part, part_shape, raw_part_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ucm.layout import KvLayout

    from .codec import Encoded, Words


@dataclass(frozen=True, slots=True)
class Raw:
    """Keeps every part as it is."""

    codec_id: ClassVar[CodecId] = CodecId.RAW
    name: ClassVar[str] = "raw"
    is_lossless: ClassVar[bool] = True

    def part_bytes(self, layout: KvLayout, part: Part) -> int:
        """See `Codec.part_bytes`."""
        del part
        return raw_part_bytes(layout)

    def encode(
        self, layout: KvLayout, part: Part, words: Words, *, is_first: bool = False
    ) -> list[Encoded]:
        """See `Codec.encode`."""
        del layout, part, is_first
        return [KEPT_RAW] * len(words)

    def decode(
        self, layout: KvLayout, part: Part, encoded: Sequence[memoryview], out: Words
    ) -> None:
        """See `Codec.decode`. Also how the caller decodes parts that another codec kept raw."""
        del part
        for row, data in zip(out, encoded, strict=True):
            if data.nbytes != raw_part_bytes(layout):
                raise CorruptionError(
                    f"a raw part has {data.nbytes} bytes, the layout says {raw_part_bytes(layout)}"
                )
            np.copyto(row, np.frombuffer(data, out.dtype).reshape(part_shape(layout)))
