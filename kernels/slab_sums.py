"""Checksums of slabs where they are: in host memory, or in a GPU's.

    implementation   how                                             device
    xxhash           the library, a call a slab                      cpu
    numpy            `slab_checksum`: the kernel's order, by numpy   cpu, from 241 bytes on
    kernel           `cuda/slab_checksum.cu`, on torch's stream      cuda

All are xxh3_64 with seed 0, the store's checksum. Envelope: 30 GB/s a core with the library, the
memory's speed on a GPU (ADR 0006); numpy is there to be compared with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ucm.checksum import checksum
from ucm.errors import InvalidArgumentError

from .cuda.driver import CudaDriver
from .cuda.slab_kernels import SlabKernels
from .dispatch import Implementation, Operation, TensorProblem, Thunk, coarse
from .slab_checksum import xxh3_64_in_blocks
from .xxh3 import MIN_BYTES

SlabSumsFn: TypeAlias = Callable[[Tensor, Sequence[int], int], list[int]]
"""(bytes, offsets, slab_bytes) -> a checksum for each offset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlabSumsProblem(TensorProblem):
    """Slabs to check."""

    num_slabs: int
    slab_bytes: int

    def bucket(self) -> str:
        """See `Problem.bucket`."""
        return f"N{coarse(self.num_slabs, 4)} bytes{coarse(self.slab_bytes, 4)}"


def slab_sums(
    data: Tensor, offsets: Sequence[int], slab_bytes: int, *, override: str | None = None
) -> list[int]:
    """xxh3_64 of `data[offset : offset + slab_bytes]` for each offset; blocks.

    Args:
        data: [n] uint8, contiguous.
        offsets: of each slab; multiples of 16 on a GPU.
        slab_bytes: length of every slab.
        override: name of the implementation to take.

    Raises:
        ConfigError: `override` is not possible.
        InvalidArgumentError: a slab is not inside `data`, or not where a GPU can read it.
    """
    if data.dtype != torch.uint8 or data.dim() != 1 or not data.is_contiguous():
        raise InvalidArgumentError(f"slabs in {tuple(data.shape)} {data.dtype}: give flat bytes")
    if slab_bytes < 0 or any(not 0 <= at <= len(data) - slab_bytes for at in offsets):
        raise InvalidArgumentError(f"a slab of {slab_bytes} bytes is outside {len(data)} bytes")
    problem = SlabSumsProblem(
        device=data.device.type, dtype=data.dtype, num_slabs=len(offsets), slab_bytes=slab_bytes
    )
    return SLAB_SUMS.select(problem, override).run(data, offsets, slab_bytes)


def _by_library(data: Tensor, offsets: Sequence[int], slab_bytes: int) -> list[int]:
    view: memoryview = data.numpy().data
    return [checksum(view[at : at + slab_bytes]) for at in offsets]


def _by_numpy(data: Tensor, offsets: Sequence[int], slab_bytes: int) -> list[int]:
    array = data.numpy()
    return [xxh3_64_in_blocks(array[at : at + slab_bytes]) for at in offsets]


def _by_kernel(data: Tensor, offsets: Sequence[int], slab_bytes: int) -> list[int]:
    stream: int = torch.cuda.current_stream().cuda_stream
    return _kernels().checksums(data.data_ptr(), offsets, slab_bytes, stream=stream)


@functools.cache
def _kernels() -> SlabKernels:
    return SlabKernels(CudaDriver())


def _host_refuses(problem: SlabSumsProblem) -> str | None:
    return None if problem.device == "cpu" else "it runs on a CPU only"


def _numpy_refuses(problem: SlabSumsProblem) -> str | None:
    too_short = f"it takes {MIN_BYTES} bytes and more"
    return _host_refuses(problem) or (too_short if problem.slab_bytes < MIN_BYTES else None)


def _kernel_refuses(problem: SlabSumsProblem) -> str | None:
    return None if problem.device == "cuda" else "it runs on a GPU only"


def _cost_us(slab_us: float, bytes_per_us: float) -> Callable[[SlabSumsProblem], float]:
    def cost_us(problem: SlabSumsProblem) -> float:
        return problem.num_slabs * (slab_us + problem.slab_bytes / bytes_per_us)

    return cost_us


def _examples() -> list[SlabSumsProblem]:
    return [
        SlabSumsProblem(device="cpu", dtype=torch.uint8, num_slabs=4, slab_bytes=size)
        for size in (16 << 10, 64 << 10, 256 << 10)
    ]


def _bench(problem: SlabSumsProblem) -> Callable[[SlabSumsFn], Thunk]:
    size = problem.slab_bytes
    data = torch.randint(0, 256, (problem.num_slabs * size,), dtype=torch.uint8)
    offsets = range(0, len(data), size)
    return lambda run: lambda: run(data, offsets, size)


SLAB_SUMS: Operation[SlabSumsProblem, SlabSumsFn] = Operation(
    "slab_checksum",
    [
        Implementation(
            name="xxhash", run=_by_library, refuses=_host_refuses, cost_us=_cost_us(1, 30_000)
        ),
        Implementation(
            name="numpy", run=_by_numpy, refuses=_numpy_refuses, cost_us=_cost_us(500, 500)
        ),
        Implementation(
            name="kernel", run=_by_kernel, refuses=_kernel_refuses, cost_us=_cost_us(1, 2_000_000)
        ),
    ],
    examples=_examples,
    bench=_bench,
)
