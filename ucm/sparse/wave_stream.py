"""Slabs that pass through a small ring of buffers, in waves, each used once and forgotten.

    expected  | layer 0: b b b b | b b b | layer 1: b b b b | ...       in the order of use
    buffers     ^ used now         ^ arriving  ^ arriving               `num_buffers` waves

So a context of any length is attended to with the memory of a few waves, and the source is never
idle while a pass computes.

Invariants: a buffer is read into again only after the wave before it was used; what was expected
for a layer is used in that layer, or dropped.

Envelope: one read a wave; the bytes are what is not in the pool.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .resident_set import Indexes
from .slab_source import SlabRead, SlabShelf


@dataclass(frozen=True, slots=True)
class _Wave:
    layer: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class _Arriving:
    wave: _Wave
    read: SlabRead
    slabs: Tensor


class WaveStream:
    """See the module. Owned by the engine's thread."""

    def __init__(self, shelf: SlabShelf, scratch: Tensor) -> None:
        """Nothing is expected.

        Args:
            shelf: where the slabs lie.
            scratch: [num_buffers, wave_blocks, 2, num_kv_heads, block_tokens, head_dim].
        """
        self._shelf = shelf
        self._wave_blocks = scratch.shape[1]
        self._free = deque(scratch)
        self._expected: deque[_Wave] = deque()
        self._arriving: deque[_Arriving] = deque()
        self.num_slabs = 0
        """Slabs that were used, over its life."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is expected."""
        return not self._expected and not self._arriving

    def expect(self, layer: int, blocks: Indexes) -> None:
        """Read these blocks' slabs for `layer`, behind all that is expected already."""
        size = self._wave_blocks
        for first in range(0, len(blocks), size):
            self._expected.append(_Wave(layer, blocks[first : first + size].tolist()))
        self._pump()

    def waves(self, layer: int) -> Iterator[Tensor]:
        """The slabs of `layer`, [n, 2, num_kv_heads, block_tokens, head_dim] at a time.

        Each is good until the next is asked for.

        Raises:
            SlabLostError: a slab cannot be had.
        """
        while self._arriving and self._arriving[0].wave.layer == layer:
            arriving = self._arriving[0]
            count = len(arriving.wave.blocks)
            arriving.read.wait(count)
            yield arriving.slabs[:count]
            self._arriving.popleft()
            self._free.append(arriving.slabs)
            self.num_slabs += count
            self._pump()

    def reset(self) -> None:
        """Expect nothing any more; returns when no buffer is written to."""
        self._expected.clear()
        for arriving in self._arriving:
            arriving.read.cancel()
            self._free.append(arriving.slabs)
        self._arriving.clear()

    def _pump(self) -> None:
        while self._free and self._expected:
            wave, slabs = self._expected[0], self._free[0]
            read = self._shelf.read(wave.layer, wave.blocks, list(slabs[: len(wave.blocks)]))
            # Only now: a read that is refused costs neither the wave nor the buffer.
            self._expected.popleft()
            self._free.popleft()
            self._arriving.append(_Arriving(wave, read, slabs))
