"""Slabs between contiguous staging memory and a paged pool: the reference of the CUDA kernels.

staging   [n, slab_stride] bytes, as they are read from disk; the padding is not touched
pool      [num_blocks, 2, num_kv_heads, block_tokens, head_dim] of one layer
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ucm.errors import LayoutMismatchError

from .cuda.slab_kernels import check_block_ids


def scatter_slabs(staging: Tensor, pool: Tensor, block_ids: Sequence[int]) -> None:
    """pool[block_ids[i]] = staging[i], on the CPU.

    Args:
        staging: [n, slab_stride] uint8; the first bytes of each row are the slab.
        pool: [num_blocks, 2, num_kv_heads, block_tokens, head_dim], any dtype, contiguous.
        block_ids: [n], unique.

    Raises:
        LayoutMismatchError: a row is shorter than a block, or the shapes do not fit.
        InvalidArgumentError: an id is outside the pool, or there twice.
    """
    blocks = _block_bytes(staging, pool, block_ids)
    blocks[list(block_ids)] = staging[:, : blocks.shape[1]]


def gather_slabs(pool: Tensor, block_ids: Sequence[int], staging: Tensor) -> None:
    """staging[i] = pool[block_ids[i]], on the CPU. As `scatter_slabs`."""
    blocks = _block_bytes(staging, pool, block_ids)
    staging[:, : blocks.shape[1]] = blocks[list(block_ids)]


def _block_bytes(staging: Tensor, pool: Tensor, block_ids: Sequence[int]) -> Tensor:
    """The pool as [num_blocks, slab_bytes], after every check."""
    if not pool.is_contiguous() or pool.device.type != "cpu" or staging.device.type != "cpu":
        raise LayoutMismatchError("the pool must be contiguous, both in host memory")
    check_block_ids(block_ids, len(pool))
    blocks = pool.view(len(pool), -1).view(torch.uint8)
    fits = staging.dim() == 2 and staging.shape[1] >= blocks.shape[1]
    if not fits or staging.dtype != torch.uint8 or len(staging) != len(block_ids):
        raise LayoutMismatchError(
            f"staging {tuple(staging.shape)} {staging.dtype} for {len(block_ids)} blocks of "
            f"{blocks.shape[1]} bytes"
        )
    return blocks
