"""Elements between their storage words and float32, vectorised; deterministic on every machine.

Only IEEE operations that round in one way are used, each on its own (never fused), so that what a
decoder produces today has the same bits tomorrow: stored checksums cover decoded content.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ucm.layout import KvDtype

if TYPE_CHECKING:
    from .codec import Floats, Words

_MAX_HALF = np.float32(65504.0)
_HALF_ULP = np.uint32(0x8000)
_BF16_SHIFT = np.uint32(16)


def to_float(words: Words, dtype: KvDtype) -> Floats:
    """The numbers behind `words`: a fresh contiguous array of the same shape, exact."""
    if dtype is KvDtype.BFLOAT16:
        wide = words.astype(np.uint32, order="C")
        np.left_shift(wide, _BF16_SHIFT, out=wide)
        return wide.view(np.float32)
    if dtype is KvDtype.FLOAT16:
        return np.ascontiguousarray(words).view(np.float16).astype(np.float32)
    return words.astype(np.uint32, order="C").view(np.float32)


def from_float(values: Floats, dtype: KvDtype, out: Words) -> None:
    """Round finite `values` (contiguous; used as scratch) to `dtype` and write their words.

    bfloat16 rounds ties away from zero, float16 to even; float16 saturates instead of overflowing.
    """
    if dtype is KvDtype.BFLOAT16:
        bits = values.view(np.uint32)
        np.add(bits, _HALF_ULP, out=bits)
        np.right_shift(bits, _BF16_SHIFT, out=bits)
        np.copyto(out, bits, casting="unsafe")
    elif dtype is KvDtype.FLOAT16:
        np.clip(values, -_MAX_HALF, _MAX_HALF, out=values)
        np.copyto(out, values.astype(np.float16).view(np.uint16))
    else:
        np.copyto(out, values.view(np.uint32))
