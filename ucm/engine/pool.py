"""The paged KV pool: one tensor of slabs and the allocator that says whose they are.

    tensor   [num_layers, num_blocks, 2 (K post-RoPE, V), num_kv_heads, block_tokens, head_dim]
    a block  num_layers slabs tensor[layer, block_id], each contiguous and in the canonical layout

Invariants: a row of a block is written by its only owner; a block with two owners is written by
none of them, a sharer that has to append takes a private copy of the *filled* rows first. A block
enters the prefix cache only when full, final, and computed here or loaded and verified.

The pool belongs to the engine's thread. One thing crosses threads: the release of a pin, which is
queued and takes effect at the next `drain`.

Envelope: a copy-on-write moves at most one block (1.4 MiB for SmolLM2-135M in fp32, 0.2 ms at
8 GB/s); everything else moves no KV at all.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence

import torch

from ucm.layout import KvDtype, KvLayout

from .allocator import BlockAllocator

TORCH_DTYPES: dict[KvDtype, torch.dtype] = {
    KvDtype.FLOAT32: torch.float32,
    KvDtype.FLOAT16: torch.float16,
    KvDtype.BFLOAT16: torch.bfloat16,
}


class KvPool:
    """KV memory of one engine; see the module for its invariants."""

    def __init__(
        self, layout: KvLayout, num_blocks: int, device: torch.device | str = "cpu"
    ) -> None:
        """Allocate the tensor, zeroed (on Linux memory is used only once it is written).

        Raises:
            InvalidArgumentError: `num_blocks` is below 1.
        """
        self.layout = layout
        self.blocks = BlockAllocator(num_blocks)
        self.tensor = torch.zeros(
            (layout.num_layers, num_blocks, *layout.slab_shape),
            dtype=TORCH_DTYPES[layout.dtype],
            device=device,
        )
        self._released: queue.SimpleQueue[tuple[int, ...]] = queue.SimpleQueue()
        self._pins: list[tuple[int, ...]] = []
        self.num_pinned = 0
        """Blocks that pins hold, as of the last `drain`."""

    def make_writable(self, block_id: int, num_rows: int) -> int:
        """Give the caller, one of the block's owners, a block that it may write.

        Args:
            block_id: the block to append to.
            num_rows: leading token rows that are filled.

        Returns:
            `block_id` itself when the caller is its only owner, else a new block with the same
            first `num_rows` rows in every layer; the caller's share of the old one is released.

        Raises:
            CapacityError: a copy is needed and no block is available.
        """
        if self.blocks.refs(block_id) == 1:
            return block_id
        (copy_id,) = self.blocks.allocate(1, after=block_id)
        rows = self.tensor[:, block_id, :, :, :num_rows]
        self.tensor[:, copy_id, :, :, :num_rows].copy_(rows)
        self.blocks.release([block_id])
        return copy_id

    def clear(self, block_ids: Sequence[int]) -> None:
        """Zero blocks that a failed load may have left with arbitrary bits.

        Attention masks rows that are not filled, but 0 times NaN is NaN.
        """
        if block_ids:
            self.tensor[:, list(block_ids)] = 0

    def pin(self, block_ids: Sequence[int]) -> Callable[[], None]:
        """Keep blocks from being reused until the returned function is called.

        It may be called from any thread; calls after the first do nothing.
        """
        pinned = tuple(block_ids)
        self.blocks.acquire(pinned)
        self._pins.append(pinned)
        self.num_pinned += len(pinned)
        return _Pin(pinned, self._released).release

    def drain(self) -> None:
        """Apply the releases that arrived; does not block."""
        while True:
            try:
                self._unpin(self._released.get_nowait())
            except queue.Empty:
                return

    def wait_release(self, timeout_s: float) -> None:
        """Block until a pin is released, but not longer than `timeout_s`."""
        try:
            self._unpin(self._released.get(timeout=timeout_s))
        except queue.Empty:
            return

    def _unpin(self, pinned: tuple[int, ...]) -> None:
        self._pins.remove(pinned)
        self.num_pinned -= len(pinned)
        self.blocks.release(pinned)

    def reset(self) -> int:
        """Empty the prefix cache; blocks in use stay with their owners.

        Returns:
            Number of blocks that can no longer be found.
        """
        self.drain()
        return self.blocks.forget_all()

    def check_integrity(self, owners: Iterable[Sequence[int]] | None = None) -> list[str]:
        """Every violated invariant, in words; see `BlockAllocator.check_integrity`.

        Args:
            owners: every sequence's block table; pins are added here.
        """
        if owners is None:
            return self.blocks.check_integrity()
        return self.blocks.check_integrity([*owners, *self._pins])


class _Pin:
    """A pin's one release, wherever it comes from."""

    def __init__(
        self, pinned: tuple[int, ...], released: queue.SimpleQueue[tuple[int, ...]]
    ) -> None:
        self._pinned = pinned
        self._released = released
        self._once = threading.Lock()

    def release(self) -> None:
        if self._once.acquire(blocking=False):
            self._released.put(self._pinned)
