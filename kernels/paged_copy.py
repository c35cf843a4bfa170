"""Slabs between contiguous staging memory and a paged pool, on the CPU or by the CUDA kernels.

    staging   [n, slab_stride] bytes, as they are read from disk; the padding is not touched
    pool      [num_blocks, 2, num_kv_heads, block_tokens, head_dim] of one layer

    implementation   how                                          device
    index            one indexed copy                             any
    each             a copy a block                               cpu
    kernel           `cuda/paged_copy.cu`, on torch's stream      cuda

Envelope: every byte is read and written once: 64 slabs of 48 KiB (3 MiB) take 0.6 ms at 10 GB/s.
torch indexes bytes one at a time on a CPU (0.5 GB/s), so a call a block pays from 8 KiB on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ucm.errors import LayoutMismatchError

from .cuda.driver import CudaDriver
from .cuda.slab_kernels import PagedSlabs, SlabKernels, check_block_ids
from .dispatch import Implementation, Operation, TensorProblem, Thunk, always, coarse

PagedCopyFn: TypeAlias = Callable[[Tensor, Tensor, Sequence[int], bool], None]
"""(staging, blocks [num_blocks, slab_bytes] uint8, block ids, is_gather)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedCopyProblem(TensorProblem):
    """Slabs to gather or to scatter."""

    num_slabs: int
    slab_bytes: int

    def bucket(self) -> str:
        """See `Problem.bucket`."""
        return f"N{coarse(self.num_slabs, 4)} bytes{coarse(self.slab_bytes, 4)}"


def scatter_slabs(
    staging: Tensor, pool: Tensor, block_ids: Sequence[int], *, override: str | None = None
) -> None:
    """pool[block_ids[i]] = staging[i].

    Args:
        staging: [n, slab_stride] uint8; the first bytes of each row are the slab.
        pool: [num_blocks, 2, num_kv_heads, block_tokens, head_dim], any dtype, contiguous.
        block_ids: [n], unique.
        override: name of the implementation to take.

    Raises:
        ConfigError: `override` is not possible.
        LayoutMismatchError: a row is shorter than a block, or the shapes or devices do not fit.
        InvalidArgumentError: an id is outside the pool, or there twice.
    """
    blocks = _block_bytes(staging, pool, block_ids)
    _select(blocks, len(block_ids), override)(staging, blocks, block_ids, False)


def gather_slabs(
    pool: Tensor, block_ids: Sequence[int], staging: Tensor, *, override: str | None = None
) -> None:
    """staging[i] = pool[block_ids[i]]. As `scatter_slabs`."""
    blocks = _block_bytes(staging, pool, block_ids)
    _select(blocks, len(block_ids), override)(staging, blocks, block_ids, True)


def copy_by_kernel(
    kernels: SlabKernels, stream: int
) -> Callable[[Tensor, Tensor, Sequence[int], bool], None]:
    """A `PagedCopyFn` of a driver's kernels, in the order of a stream; blocks until it is done."""

    def run(staging: Tensor, blocks: Tensor, block_ids: Sequence[int], is_gather: bool) -> None:
        slabs = PagedSlabs(
            staging=staging.data_ptr(),
            pool=blocks.data_ptr(),
            slab_bytes=blocks.shape[1],
            slab_stride_bytes=staging.stride(0),
            num_pool_blocks=len(blocks),
        )
        (kernels.gather if is_gather else kernels.scatter)(slabs, block_ids, stream=stream)

    return run


def _select(blocks: Tensor, num_slabs: int, override: str | None) -> PagedCopyFn:
    problem = PagedCopyProblem(
        device=blocks.device.type,
        dtype=torch.uint8,
        num_slabs=num_slabs,
        slab_bytes=blocks.shape[1],
    )
    return PAGED_COPY.select(problem, override).run


def _by_index(staging: Tensor, blocks: Tensor, block_ids: Sequence[int], is_gather: bool) -> None:
    if is_gather:
        staging[:, : blocks.shape[1]] = blocks[list(block_ids)]
    else:
        blocks[list(block_ids)] = staging[:, : blocks.shape[1]]


def _by_each(staging: Tensor, blocks: Tensor, block_ids: Sequence[int], is_gather: bool) -> None:
    slabs = staging[:, : blocks.shape[1]]
    for row, block in enumerate(block_ids):
        if is_gather:
            slabs[row].copy_(blocks[block])
        else:
            blocks[block].copy_(slabs[row])


def _by_kernel(staging: Tensor, blocks: Tensor, block_ids: Sequence[int], is_gather: bool) -> None:
    stream: int = torch.cuda.current_stream().cuda_stream
    copy_by_kernel(_kernels(), stream)(staging, blocks, block_ids, is_gather)


@functools.cache
def _kernels() -> SlabKernels:
    return SlabKernels(CudaDriver())


def _host_refuses(problem: PagedCopyProblem) -> str | None:
    return None if problem.device == "cpu" else "it runs on a CPU only"


def _kernel_refuses(problem: PagedCopyProblem) -> str | None:
    if problem.device != "cuda":
        return "it runs on a GPU only"
    return "a slab is not a multiple of 16 bytes" if problem.slab_bytes % 16 else None


def _cost_us(slab_us: float, bytes_per_us: float) -> Callable[[PagedCopyProblem], float]:
    def cost_us(problem: PagedCopyProblem) -> float:
        return 10 + problem.num_slabs * (slab_us + problem.slab_bytes / bytes_per_us)

    return cost_us


def _examples() -> list[PagedCopyProblem]:
    return [
        PagedCopyProblem(device="cpu", dtype=torch.uint8, num_slabs=count, slab_bytes=size)
        for count in (4, 64)
        for size in (16 << 10, 64 << 10, 256 << 10)
    ]


def _bench(problem: PagedCopyProblem) -> Callable[[PagedCopyFn], Thunk]:
    blocks = torch.zeros(2 * problem.num_slabs, problem.slab_bytes, dtype=torch.uint8)
    staging = torch.ones(problem.num_slabs, problem.slab_bytes, dtype=torch.uint8)
    block_ids = torch.randperm(2 * problem.num_slabs)[: problem.num_slabs].tolist()
    return lambda run: lambda: run(staging, blocks, block_ids, False)


PAGED_COPY: Operation[PagedCopyProblem, PagedCopyFn] = Operation(
    "paged_copy",
    [
        Implementation(name="index", run=_by_index, refuses=always, cost_us=_cost_us(0, 500)),
        Implementation(
            name="each", run=_by_each, refuses=_host_refuses, cost_us=_cost_us(8, 8_000)
        ),
        Implementation(
            name="kernel", run=_by_kernel, refuses=_kernel_refuses, cost_us=_cost_us(0, 500_000)
        ),
    ],
    examples=_examples,
    bench=_bench,
)


def _block_bytes(staging: Tensor, pool: Tensor, block_ids: Sequence[int]) -> Tensor:
    """The pool as [num_blocks, slab_bytes], after every check."""
    if not pool.is_contiguous() or pool.device != staging.device:
        raise LayoutMismatchError("the pool must be contiguous, both on one device")
    check_block_ids(block_ids, len(pool))
    blocks = pool.view(len(pool), -1).view(torch.uint8)
    fits = staging.dim() == 2 and staging.shape[1] >= blocks.shape[1] and staging.stride(1) == 1
    if not fits or staging.dtype != torch.uint8 or len(staging) != len(block_ids):
        raise LayoutMismatchError(
            f"staging {tuple(staging.shape)} {staging.dtype} for {len(block_ids)} blocks of "
            f"{blocks.shape[1]} bytes"
        )
    return blocks
