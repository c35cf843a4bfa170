"""`PoolRows`: the KV of one request whose chunks are being blended in, over the paged pool.

    positions   | exact | chunk A          | fresh | chunk B ...  |
    comes from    own     A's original       own     B's original      a layer's first time
                  blocks  blocks, rotated    blocks  blocks, rotated
                  own blocks                                           from then on

Invariants
* Originals are read, never written. Keys are rotated from them, once a layer, never from a copy.
* Only blocks from the span's first position on are written; the request is their only owner.
* A layer's originals are read the first time it is asked for, and not before: they may still be
  on their way into the pool.

Envelope: a layer's first time moves each of its rows three times (in, rotated, out), 1.5 KB a row
and layer for SmolLM2-135M in fp32; later ones once. 3,000 tokens of 30 layers: 0.4 GB, 50 to 80 ms.

Shapes: G KV heads, D head size, N rows, B blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ucm.kernels.rope import Rope
from ucm.kernels.rotate import rotate_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedRows:
    """Rows of an original that stand in a request."""

    start: int
    """First position in the request."""
    stop: int
    first_row: int
    """Row of the original that stands there."""
    block_ids: Sequence[int]
    """The original's pool blocks."""
    shift: int
    """New position less the one that its keys were rotated to."""


class PoolRows:
    """See the module; a `KvRows`. Owned by the engine's thread."""

    def __init__(
        self,
        kv_pool: Tensor,
        block_ids: Sequence[int],
        moved: Sequence[MovedRows],
        rope: Rope,
        stop: int,
    ) -> None:
        """Stand over a request's rows 0..stop - 1.

        Args:
            kv_pool: [num_layers, num_blocks, 2, G, block_tokens, D].
            block_ids: the request's, which cover `stop` positions.
            moved: rows that come from chunks: ascending, disjoint.
            rope: of the model.
            stop: end of the span.
        """
        self._kv_pool = kv_pool
        self._block_ids = tuple(block_ids)
        self._moved = tuple(moved)
        self._rope = rope
        self._stop = stop
        self._is_placed = [False] * kv_pool.shape[0]
        _, _, _, heads, size, head_dim = kv_pool.shape
        self._shape = (2, heads, stop, head_dim)
        self._size = size
        self._read: Tensor | None = None
        self._scratch: Tensor | None = None
        self._blocks = torch.tensor(self._block_ids, dtype=torch.int64, device=kv_pool.device)

    def read(self, layer: int) -> Tensor:
        """See `KvRows.read`."""
        if self._read is None:
            self._read = self._kv_pool.new_empty(self._shape)
        if self._is_placed[layer]:
            gather_rows(self._kv_pool[layer], self._block_ids, range(self._stop), self._read)
        else:
            for rows in self._unmoved():
                out = self._read[:, :, rows.start : rows.stop]
                gather_rows(self._kv_pool[layer], self._block_ids, rows, out)
            self._place(layer, self._read)
        return self._read

    def write(self, layer: int, positions: Tensor, kv_2GSD: Tensor) -> None:
        """See `KvRows.write`."""
        self._ensure_placed(layer)
        blocks, offsets = self._blocks[positions // self._size], positions % self._size
        self._kv_pool[layer][blocks, :, :, offsets] = kv_2GSD.permute(2, 0, 1, 3)

    def finish(self) -> None:
        """Put the rows of layers that nobody read in their place."""
        for layer in range(len(self._is_placed)):
            self._ensure_placed(layer)
        self._read = self._scratch = None

    def _ensure_placed(self, layer: int) -> None:
        if self._is_placed[layer]:
            return
        if self._scratch is None:
            self._scratch = self._kv_pool.new_empty(self._shape)
        self._place(layer, self._scratch)

    def _place(self, layer: int, rows_2GND: Tensor) -> None:
        """Move a layer's rows of chunks to the request's blocks, by way of `rows_2GND`."""
        kv_layer = self._kv_pool[layer]
        for moved in self._moved:
            out = rows_2GND[:, :, moved.start : moved.stop]
            rows = range(moved.first_row, moved.first_row + moved.stop - moved.start)
            gather_rows(kv_layer, moved.block_ids, rows, out)
            rotate_keys(out[0], self._rope, moved.shift, out=out[0])
            scatter_rows(kv_layer, self._block_ids, range(moved.start, moved.stop), out)
        self._is_placed[layer] = True

    def _unmoved(self) -> Iterator[range]:
        """Positions of no chunk."""
        start = 0
        for moved in self._moved:
            yield range(start, moved.start)
            start = moved.stop
        yield range(start, self._stop)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows that one strided copy moves: of a run of whole blocks, or a part of one."""

    block_id: int
    num_blocks: int
    offset: int
    num_rows: int
    """Of each block."""

    def of_pool(self, kv_layer: Tensor) -> Tensor:
        """[B, 2, G, N, D]."""
        blocks = kv_layer[self.block_id : self.block_id + self.num_blocks]
        return blocks[:, :, :, self.offset : self.offset + self.num_rows]

    def of_rows(self, rows_2GND: Tensor, at: int) -> Tensor:
        """The same of rows in one piece."""
        _, heads, _, head_dim = rows_2GND.shape
        rows = rows_2GND[:, :, at : at + self.num_blocks * self.num_rows]
        shape = (2, heads, self.num_blocks, self.num_rows, head_dim)
        return rows.view(shape).permute(2, 0, 1, 3, 4)


def gather_rows(kv_layer: Tensor, block_ids: Sequence[int], rows: range, out_2GND: Tensor) -> None:
    """Copy rows of a chain of blocks into one piece.

    Args:
        kv_layer: [num_blocks, 2, G, block_tokens, D].
        block_ids: the chain; row i is in its block i // block_tokens.
        rows: which.
        out_2GND: [2, G, len(rows), D].
    """
    at = 0
    for piece in _pieces(block_ids, kv_layer.shape[3], rows):
        piece.of_rows(out_2GND, at).copy_(piece.of_pool(kv_layer))
        at += piece.num_blocks * piece.num_rows


def scatter_rows(
    kv_layer: Tensor, block_ids: Sequence[int], rows: range, from_2GND: Tensor
) -> None:
    """Copy rows in one piece into a chain of blocks; the reverse of `gather_rows`."""
    at = 0
    for piece in _pieces(block_ids, kv_layer.shape[3], rows):
        piece.of_pool(kv_layer).copy_(piece.of_rows(from_2GND, at))
        at += piece.num_blocks * piece.num_rows


def copy_rows(kv_pool: Tensor, source: Sequence[int], first: int, target: Sequence[int]) -> None:
    """Fill whole blocks, in all layers, with rows of a chain of other blocks.

    Args:
        kv_pool: [num_layers, num_blocks, 2, G, block_tokens, D].
        source: the chain that is read.
        first: its row that becomes row 0 of `target[0]`.
        target: blocks that are written, none of them in `source`.
    """
    size = kv_pool.shape[4]
    index, offset = divmod(first, size)
    for number, block_id in enumerate(target, index):
        head = kv_pool[:, source[number], :, :, offset:]
        kv_pool[:, block_id, :, :, : size - offset].copy_(head)
        if offset:
            tail = kv_pool[:, source[number + 1], :, :, :offset]
            kv_pool[:, block_id, :, :, size - offset :].copy_(tail)


def _pieces(block_ids: Sequence[int], size: int, rows: range) -> Iterator[_Piece]:
    at = rows.start
    while at < rows.stop:
        index, offset = divmod(at, size)
        num_whole = 0 if offset else (rows.stop - at) // size
        if num_whole == 0:
            num_rows = min(size - offset, rows.stop - at)
            yield _Piece(block_ids[index], 1, offset, num_rows)
            at += num_rows
            continue
        count = 1
        while count < num_whole and block_ids[index + count] == block_ids[index] + count:
            count += 1
        yield _Piece(block_ids[index], count, 0, size)
        at += count * size
