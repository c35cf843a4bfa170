"""`bp-zstd`: the exponents entropy-coded, everything else as it is; exact.

Neighbouring keys and values differ in their mantissas, which are noise, and hardly in their
exponents (2.4 to 2.9 bits of 8 on SmolLM2). So the two are separated (ZipNN, arXiv 2411.05239) and
only the exponents go through zstd, at level 1: on planes of a few KiB its Huffman stage does all
the work, and higher levels are slower and larger. Zstandard: RFC 8878.

    word, rotated left by one:   exponent ... | mantissa | sign       (float16: + 3 mantissa bits)
                                 top byte     | low bytes
    part = low bytes of every element, in order | one zstd frame: top bytes
           K: top bytes [heads, dim, tokens] (a channel's exponents lie together)
           V: top bytes [heads, tokens, dim]

A part that would gain less than 5 % is kept raw. Envelope: a frame of 6 KiB costs 15 us to decode;
the planes cost 1 ns an element.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import zstandard

from ucm.errors import CorruptionError
from ucm.layout import KvDtype

from .codec import KEPT_RAW, CodecId, Part, part_shape, raw_part_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ucm.layout import KvLayout

    from .codec import Encoded, Words

MIN_GAIN = 0.05
"""Share of a part's bytes below which decoding it is not worth the time."""

_PLANNED_SHARE = {KvDtype.BFLOAT16: 3 / 4, KvDtype.FLOAT16: 15 / 16, KvDtype.FLOAT32: 15 / 16}
"""Of the raw size; real KV takes 0.69 in bfloat16, 0.86 in float16 and 0.85 in float32."""

_LEVEL = 1
_threads = threading.local()


@dataclass(frozen=True, slots=True)
class BitPlanes:
    """Exponent plane through zstd level 1."""

    codec_id: ClassVar[CodecId] = CodecId.BP_ZSTD
    name: ClassVar[str] = "bp-zstd"
    is_lossless: ClassVar[bool] = True

    def part_bytes(self, layout: KvLayout, part: Part) -> int:
        """See `Codec.part_bytes`."""
        del part
        return int(raw_part_bytes(layout) * _PLANNED_SHARE[layout.dtype])

    def encode(
        self, layout: KvLayout, part: Part, words: Words, *, is_first: bool = False
    ) -> list[Encoded]:
        """See `Codec.encode`."""
        del is_first
        low, top = _split(words)
        plane = top.swapaxes(2, 3) if part is Part.KEYS else top
        compressor = _compressor(_plane_bytes(layout))
        limit = raw_part_bytes(layout) * (1 - MIN_GAIN)
        encoded: list[Encoded] = []
        for low_row, plane_row in zip(low, plane, strict=True):
            frame = compressor.compress(np.ascontiguousarray(plane_row).data)
            is_worth_it = low_row.nbytes + len(frame) <= limit
            encoded.append((low_row.reshape(-1).data, frame) if is_worth_it else KEPT_RAW)
        return encoded

    def decode(
        self, layout: KvLayout, part: Part, encoded: Sequence[memoryview], out: Words
    ) -> None:
        """See `Codec.decode`."""
        size = _plane_bytes(layout)
        low_bytes = raw_part_bytes(layout) - size
        heads, tokens, dim = part_shape(layout)
        lows, planes = [], []
        for data in encoded:
            if data.nbytes <= low_bytes:
                raise CorruptionError(f"a part of {data.nbytes} bytes has no exponent plane")
            lows.append(data[:low_bytes])
            planes.append(_decompress(data[low_bytes:], size))
        low = np.frombuffer(b"".join(lows), np.uint8).reshape(*out.shape, out.itemsize - 1)
        top = np.frombuffer(b"".join(planes), np.uint8)
        if part is Part.KEYS:
            top = top.reshape(len(out), heads, dim, tokens).swapaxes(2, 3)
        _merge(low, top.reshape(out.shape), out)


def _plane_bytes(layout: KvLayout) -> int:
    return raw_part_bytes(layout) // layout.dtype.itemsize_bytes


def _split(words: Words) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Low bytes [..., itemsize - 1] and top byte [...] of the rotated words."""
    bits = 8 * words.itemsize
    rotated = words << 1
    rotated |= words >> (bits - 1)
    top = (rotated >> (bits - 8)).astype(np.uint8)
    if words.itemsize == 2:
        return rotated.astype(np.uint8)[..., np.newaxis], top
    return rotated.view(np.uint8).reshape(*words.shape, 4)[..., :3].copy(), top


def _merge(low: NDArray[np.uint8], top: NDArray[np.uint8], out: Words) -> None:
    """The inverse of `_split`."""
    bits = 8 * out.itemsize
    rotated = top.astype(out.dtype, order="C")
    rotated <<= bits - 8
    if out.itemsize == 2:
        rotated |= low[..., 0]
    else:
        rotated.view(np.uint8).reshape(*top.shape, 4)[..., :3] = low
    np.right_shift(rotated, 1, out=out)
    rotated <<= bits - 1
    out |= rotated


def _compressor(plane_bytes: int) -> zstandard.ZstdCompressor:
    """This thread's compressor for planes of one size; they are not thread-safe."""
    cached: tuple[int, zstandard.ZstdCompressor] | None = getattr(_threads, "compressor", None)
    if cached is None or cached[0] != plane_bytes:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            _LEVEL,
            source_size=plane_bytes,
            write_content_size=True,
            write_checksum=False,
            write_dict_id=False,
        )
        cached = plane_bytes, zstandard.ZstdCompressor(compression_params=parameters)
        _threads.compressor = cached
    return cached[1]


def _decompressor() -> zstandard.ZstdDecompressor:
    decompressor: zstandard.ZstdDecompressor | None = getattr(_threads, "decompressor", None)
    if decompressor is None:
        decompressor = _threads.decompressor = zstandard.ZstdDecompressor()
    return decompressor


def _decompress(frame: memoryview, plane_bytes: int) -> bytes:
    """One frame that says, and has, exactly `plane_bytes`; refused before anything is allocated."""
    try:
        parameters = zstandard.get_frame_parameters(frame)
        window_limit = max(plane_bytes, 1 << zstandard.WINDOWLOG_MIN)
        if parameters.content_size != plane_bytes or parameters.window_size > window_limit:
            raise CorruptionError(
                f"an exponent plane claims {parameters.content_size} bytes in a window of "
                f"{parameters.window_size}, the layout says {plane_bytes}"
            )
        plane = _decompressor().decompress(
            frame, max_output_size=plane_bytes, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise CorruptionError(f"an exponent plane cannot be decompressed: {error}") from error
    if len(plane) != plane_bytes:
        raise CorruptionError(f"an exponent plane has {len(plane)} bytes, not {plane_bytes}")
    return plane
