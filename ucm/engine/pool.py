"""The paged KV pool: one tensor of slabs and the allocator that says whose they are.

    tensor   [num_layers, num_blocks, 2 (K post-RoPE, V), num_kv_heads, block_tokens, head_dim]
    a block  num_layers slabs tensor[layer, block_id], each contiguous and in the canonical layout

Invariants: a row of a block is written by its only owner; a block with two owners is written by
none of them, a sharer that has to append takes a private copy of the *filled* rows first. A block
enters the prefix cache only when full, final, and computed here or loaded and verified.

The pool belongs to the engine's thread. One thing crosses threads: the release of a pin, which is
queued and takes effect at the next `drain`. A block that somebody outside may still be writing to
is *held*: nobody owns it but its hold, and it is cleared before it is used again.

On a CPU the memory starts at a page, so that slabs of whole pages can be read into directly
(O_DIRECT wants the destination aligned).

Envelope: a copy-on-write moves at most one block (1.4 MiB for SmolLM2-135M in fp32, 0.2 ms at
8 GB/s); everything else moves no KV at all.
"""

from __future__ import annotations

import math
import mmap
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch

from ucm.errors import InvalidArgumentError
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
        shape = (layout.num_layers, num_blocks, *layout.slab_shape)
        self.tensor = _zeros(shape, TORCH_DTYPES[layout.dtype], torch.device(device))
        self._released: queue.SimpleQueue[_Pin] = queue.SimpleQueue()
        self._pins: list[_Pin] = []
        self._held: Counter[int] = Counter()
        self.num_pinned = 0
        """Blocks that pins hold, as of the last `drain`."""

    def may_make_writable(self, block_id: int) -> bool:
        """Whether `make_writable` has the block that it may need."""
        return self.blocks.refs(block_id) == 1 or self.blocks.num_available > 0

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

    def clear(self, block_ids: Iterable[int]) -> None:
        """Zero blocks that a failed load may have left with arbitrary bits.

        Attention masks rows that are not filled, but 0 times NaN is NaN. Held blocks are left: they
        may still be written to, and are zeroed when they are released.
        """
        free = [block_id for block_id in block_ids if not self.is_held(block_id)]
        if free:
            self.tensor[:, free] = 0

    def pin(self, block_ids: Sequence[int]) -> Callable[[], None]:
        """Keep blocks from being reused until the returned function is called.

        It may be called from any thread; calls after the first do nothing.
        """
        return self._add_pin(_Pin(tuple(block_ids), self._released))

    def hold(self, block_ids: Sequence[int]) -> Callable[[], None]:
        """Like `pin`, for blocks that are still written to; they are zeroed when released.

        Not those that have another owner by then, or can be found: somebody counts on their bytes.
        """
        self._held.update(block_ids)
        return self._add_pin(_Pin(tuple(block_ids), self._released, is_hold=True))

    def holder(self, block_ids: Sequence[int]) -> Callable[[Sequence[int]], Callable[[], None]]:
        """`hold` for one load's blocks; refuses others with InvalidArgumentError."""

        def hold(held: Sequence[int]) -> Callable[[], None]:
            if not set(held) <= set(block_ids):
                raise InvalidArgumentError(f"blocks {list(held)} are not of this load")
            return self.hold(held)

        return hold

    def is_held(self, block_id: int) -> bool:
        """Whether somebody outside may still write to the block."""
        return self._held[block_id] > 0

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

    def _add_pin(self, pin: _Pin) -> Callable[[], None]:
        self.blocks.acquire(pin.block_ids)
        self._pins.append(pin)
        self.num_pinned += len(pin.block_ids)
        return pin.release

    def _unpin(self, pin: _Pin) -> None:
        self._pins.remove(pin)
        self.num_pinned -= len(pin.block_ids)
        if pin.is_hold:
            self._held.subtract(pin.block_ids)
            self.clear(block_id for block_id in pin.block_ids if self._is_leftover(block_id))
        self.blocks.release(pin.block_ids)

    def _is_leftover(self, block_id: int) -> bool:
        """Whether a held block has no other use; what others have was never the loader's."""
        return self.blocks.refs(block_id) == 1 and not self.blocks.is_findable(block_id)

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
        return self.blocks.check_integrity([*owners, *(pin.block_ids for pin in self._pins)])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A zeroed tensor; on a CPU its memory is mapped, so it starts at a page."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class _Pin:
    """A pin's one release, wherever it comes from."""

    def __init__(
        self,
        block_ids: tuple[int, ...],
        released: queue.SimpleQueue[_Pin],
        *,
        is_hold: bool = False,
    ) -> None:
        self.block_ids = block_ids
        self.is_hold = is_hold
        self._released = released
        self._once = threading.Lock()

    def release(self) -> None:
        if self._once.acquire(blocking=False):
            self._released.put(self)
