"""`fp8`: e4m3 numbers with one scale a token and head. 1.93 times smaller.

At the same size `int8` is ten times as precise on KV; this one is for engines that hold fp8.

    encoded part | int16 unit exponent u | uint16 zero | float16 scale of [heads, tokens]
                 | e4m3 of [heads, tokens, dim]
    value        = e4m3 * (scale * 2**u), in float32, then rounded to the dtype

e4m3: "FP8 Formats for Deep Learning", arXiv 2209.05433: sign, 4 bits exponent with bias 7, 3 bits
mantissa, largest 448, no infinity; the two NaN codes are never written and read as 0. The unit
exponent is that of `storage.codec_affine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from ucm.errors import CorruptionError

from .codec import KEPT_RAW, CodecId, Part, part_shape, raw_part_bytes
from .codec_affine import HEADER_BYTES, MAX_EXPONENT, UNIT_BITS, fold, in_range, unit_exponents
from .codec_values import from_float, to_float

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ucm.layout import KvLayout

    from .codec import Encoded, Floats, Words

MAX_E4M3: Final = 448.0
_NAN_CODE: Final = 0x7F
_LARGEST_FINITE_HALF: Final = np.uint32(0x7F7F)


def _e4m3_values() -> Floats:
    """The number behind each of the 256 codes; 0 for the two NaNs."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    magnitude = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    magnitude[codes & _NAN_CODE == _NAN_CODE] = 0
    return np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)


def _nearest_codes() -> NDArray[np.uint8]:
    """The e4m3 code for each upper half of a float32, ties to even; magnitudes above 448 saturate.

    The half's last bit must be sticky (set if any lower bit was), which makes the rounding exact.
    """
    halves = np.minimum(np.arange(1 << 15, dtype=np.uint32), _LARGEST_FINITE_HALF)
    magnitudes = (halves << np.uint32(16)).view(np.float32).astype(np.float64)
    magnitudes = np.minimum(magnitudes, MAX_E4M3)
    exponent = np.where(magnitudes < 2.0**-6, -6, np.frexp(magnitudes)[1] - 1)
    steps = np.rint(np.ldexp(magnitudes, 3 - exponent)).astype(np.int64)
    positive = ((exponent + 6) * 8 + steps).astype(np.uint8)
    return np.concatenate([positive, positive | np.uint8(0x80)])


_VALUES: Final = _e4m3_values()
_CODES: Final = _nearest_codes()


@dataclass(frozen=True, slots=True)
class Fp8:
    """e4m3 with a scale a token and head."""

    codec_id: ClassVar[CodecId] = CodecId.FP8
    name: ClassVar[str] = "fp8"
    is_lossless: ClassVar[bool] = False

    def part_bytes(self, layout: KvLayout, part: Part) -> int:
        """See `Codec.part_bytes`."""
        del part
        return min(_encoded_bytes(layout), raw_part_bytes(layout))

    def encode(
        self, layout: KvLayout, part: Part, words: Words, *, is_first: bool = False
    ) -> list[Encoded]:
        """See `Codec.encode`."""
        del part, is_first
        if _encoded_bytes(layout) >= raw_part_bytes(layout):
            return [KEPT_RAW] * len(words)
        values = to_float(words, layout.dtype)
        largest = fold(np.maximum, np.abs(values), 3)
        good = in_range(largest.reshape(len(words), -1).max(axis=1))
        if not good.all():
            values[~good] = 0.0
            largest[~good] = 0.0
        exponents = unit_exponents(largest.reshape(len(words), -1).max(axis=1))
        wide = exponents.reshape(-1, 1, 1, 1)
        exact = np.ldexp(largest, -wide) / np.float32(MAX_E4M3)
        scales = exact.astype(np.float16)
        scales = np.where(scales < exact, np.nextafter(scales, np.float16(np.inf)), scales)
        real = np.ldexp(scales.astype(np.float32), wide)
        values *= np.divide(1, real, out=np.zeros_like(real), where=real != 0)
        rows = np.zeros((len(words), _encoded_bytes(layout)), np.uint8)
        split = HEADER_BYTES + scales[0].nbytes
        rows[:, :2] = exponents.astype("<i2")[:, np.newaxis].view(np.uint8)
        rows[:, HEADER_BYTES:split] = scales.astype("<f2").reshape(len(rows), -1).view(np.uint8)
        rows[:, split:] = _round(values).reshape(len(rows), -1)
        return [
            (row.data,) if is_good else KEPT_RAW for row, is_good in zip(rows, good, strict=True)
        ]

    def decode(
        self, layout: KvLayout, part: Part, encoded: Sequence[memoryview], out: Words
    ) -> None:
        """See `Codec.decode`."""
        del part
        expected = _encoded_bytes(layout)
        for data in encoded:
            if data.nbytes != expected or bytes(data[2:HEADER_BYTES]) != b"\0\0":
                raise CorruptionError(f"an fp8 part has {data.nbytes} bytes, not {expected}")
            if abs(int.from_bytes(data[:2], "little", signed=True) + UNIT_BITS) > MAX_EXPONENT + 1:
                raise CorruptionError("an fp8 part has an impossible unit exponent")
        rows = np.stack([np.frombuffer(data, np.uint8) for data in encoded])
        exponents = rows[:, :2].copy().view("<i2")[:, 0].astype(np.int32)
        heads, tokens, dim = part_shape(layout)
        split = HEADER_BYTES + 2 * heads * tokens
        scales = rows[:, HEADER_BYTES:split].copy().view("<f2").astype(np.float32)
        if not np.isfinite(scales).all():
            raise CorruptionError("an fp8 part has a scale that is not a number")
        values = _VALUES.take(rows[:, split:], mode="clip")
        values = values.reshape(len(rows), heads, tokens, dim)
        wide = exponents.reshape(-1, 1, 1, 1)
        values *= np.ldexp(scales.reshape(len(rows), heads, tokens, 1), wide)
        from_float(values, layout.dtype, out)


def _encoded_bytes(layout: KvLayout) -> int:
    heads, tokens, dim = part_shape(layout)
    return HEADER_BYTES + heads * tokens * (2 + dim)


def _round(values: Floats) -> NDArray[np.uint8]:
    bits = values.view(np.uint32)
    sticky = (bits & np.uint32(0xFFFF)) != 0
    halves = (bits >> np.uint32(16)) | sticky
    codes: NDArray[np.uint8] = _CODES.take(halves.astype(np.uint16), mode="wrap")
    return codes
