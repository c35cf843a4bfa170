"""A pool of slabs to load into: page-aligned, as an engine's, and one that is not."""

from __future__ import annotations

from ucm.layout import KvLayout
from ucm.storage.file_io import aligned_buffer

GUARD = 0xA5
"""What every byte of a pool is until something is written to it."""


class SlabPool:
    """`SlabTarget`: slabs of `num_blocks` blocks, layer by layer, in one buffer."""

    def __init__(self, layout: KvLayout, num_blocks: int, *, shift_bytes: int = 0) -> None:
        """Fill it with `GUARD`; `shift_bytes` moves every slab off its page."""
        self.layout = layout
        self._num_blocks = num_blocks
        self._shift = shift_bytes
        stride = layout.slab_stride_bytes
        self.memory = aligned_buffer(layout.num_layers * num_blocks * stride + stride)
        self.memory[:] = bytes([GUARD]) * len(self.memory)

    def view(self, layer: int, index: int) -> memoryview:
        """See `SlabTarget.view`."""
        number = layer * self._num_blocks + index
        start = number * self.layout.slab_stride_bytes + self._shift
        return self.memory[start : start + self.layout.slab_bytes]

    def block(self, index: int) -> bytes:
        """All slabs of one block, padding left out."""
        return b"".join(bytes(self.view(layer, index)) for layer in range(self.layout.num_layers))

    def is_untouched(self, layer: int, index: int) -> bool:
        """Whether nothing was written to the slab."""
        return set(bytes(self.view(layer, index))) == {GUARD}


def slabs_of(block: bytes, layout: KvLayout) -> bytes:
    """The slabs of a block as it is stored, padding left out."""
    return b"".join(block[layout.slab_slice(layer)] for layer in range(layout.num_layers))
