"""The shape of stored KV: where each layer of each block lies, in bytes.

    block  = num_layers slabs, layer-major, each on a 4 KiB boundary
    slab   = [2 (K post-RoPE, V), num_kv_heads, block_tokens, head_dim], contiguous, little-endian
    bytes  | slab 0 ........ pad | slab 1 ........ pad | ... |
           0                slab_stride_bytes

The padding behind a slab is not covered by its checksum and carries no meaning.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property

from .errors import LayoutMismatchError

ALIGNMENT_BYTES = 4096
"""Slabs, slots and headers start on this boundary: the largest logical block size in use."""

MAX_LAYERS = 480
"""What one 4 KiB slot header can hold checksums for."""

MAX_BLOCK_BYTES = 256 << 20
"""Refuse a layout whose single block is larger: it would not fit a segment or a staging arena."""


class KvDtype(enum.Enum):
    """Element type of stored keys and values."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def itemsize_bytes(self) -> int:
        """Size of one element."""
        return 4 if self is KvDtype.FLOAT32 else 2


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, kw_only=True)  # no slots: what follows from the fields is worked out once
class KvLayout:
    """Shape and dtype of one block of KV: all layers of one rank and one KV group."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: KvDtype

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "block_tokens"):
            if getattr(self, name) < 1:
                raise LayoutMismatchError(f"layout: {name} is {getattr(self, name)}, must be >= 1")
        if self.num_layers > MAX_LAYERS:
            raise LayoutMismatchError(
                f"layout: {self.num_layers} layers, at most {MAX_LAYERS} fit one slot header; "
                "split the model into ranks or groups"
            )
        if self.block_bytes > MAX_BLOCK_BYTES:
            raise LayoutMismatchError(
                f"layout: a block of {self.block_bytes} bytes is above the limit of "
                f"{MAX_BLOCK_BYTES}; use fewer tokens a block"
            )

    @property
    def slab_shape(self) -> tuple[int, int, int, int]:
        """[2, num_kv_heads, block_tokens, head_dim]."""
        return (2, self.num_kv_heads, self.block_tokens, self.head_dim)

    @cached_property
    def slab_bytes(self) -> int:
        """Bytes of one layer of one block, without padding."""
        return 2 * self.num_kv_heads * self.block_tokens * self.head_dim * self.dtype.itemsize_bytes

    @cached_property
    def slab_stride_bytes(self) -> int:
        """Distance between two slabs of a block: `slab_bytes` rounded up to the alignment."""
        return round_up(self.slab_bytes, ALIGNMENT_BYTES)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one block in an arena or a slot, padding included, header excluded."""
        return self.num_layers * self.slab_stride_bytes

    def slab_slice(self, layer: int) -> slice:
        """Where the bytes of `layer` lie inside a block, padding excluded."""
        if not 0 <= layer < self.num_layers:
            raise LayoutMismatchError(f"layer {layer} is outside 0..{self.num_layers - 1}")
        start = layer * self.slab_stride_bytes
        return slice(start, start + self.slab_bytes)
