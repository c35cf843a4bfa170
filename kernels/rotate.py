"""Moving stored keys to other positions: exact as far as rotation goes.

    key at position p    R(p) k          key at p + shift    R(shift) R(p) k

Rotations of one plane add up, so a chunk encoded at one place is put at another by turning every
plane by shift * frequency; all its tokens share the shift. Values carry no position. What the keys
have seen before them is another matter (`ucm.reuse`). The magnitude that YaRN gives keys is in the
stored bytes already, and a rotation keeps it.

Invariant: rotate the bytes that were stored, never a rotated copy: then there is one rounding
however often a chunk moves.

    implementation   how                                       device   dtypes
    torch            two products over whole heads, in fp32    any      floating
    kernel           `cuda/rotate_keys.cu`                     cuda     float32, bfloat16

Envelope: every byte of the keys is read and written once: 256 tokens of SmolLM2-135M in fp32 are
5.9 MB, 1.5 ms at 8 GB/s. Layer by layer, as a blend does it, they stay in the core's cache: 30
times 80 us, of which 10 are the bare copy and 25 the call.

Source: RoFormer (arXiv 2104.09864), equation 34. Shapes: D head size, ... any leading axes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ucm.errors import LayoutMismatchError

from .cuda.driver import CudaDriver
from .cuda.rotate_kernel import RotateKernel, Rows
from .dispatch import Implementation, Operation, TensorProblem, Thunk, always, coarse
from .rope import Rope, RopeStyle, cos_sin

RotateFn: TypeAlias = Callable[[Tensor, Tensor, Tensor, RopeStyle], None]
"""(keys [..., D], out [..., D], table [2, D/2] fp32: cosines, sines; style)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateProblem(TensorProblem):
    """Keys to rotate by one shift."""

    num_rows: int
    head_dim: int
    is_contiguous: bool

    def bucket(self) -> str:
        """See `Problem.bucket`."""
        return f"N{coarse(self.num_rows, 4)} D{self.head_dim}"


def rotate_keys(
    keys: Tensor, rope: Rope, shift: int, *, out: Tensor | None = None, override: str | None = None
) -> Tensor:
    """Keys as they would be `shift` positions further on.

    Args:
        keys: [..., D] post-RoPE, as they were stored, floating point.
        rope: of the model that made them.
        shift: new position less old one; any sign.
        out: where to put them, like `keys`; may be `keys` itself only if those are given up.
        override: name of the implementation to take, for tests.

    Returns:
        `out`, or a new tensor of keys' dtype; rounded once.

    Raises:
        ConfigError: `override` is not possible.
        LayoutMismatchError: the last axis is not the head size, `out` is unlike `keys`, or the keys
            are not floating point.
    """
    if keys.shape[-1] != rope.head_dim or not keys.is_floating_point():
        raise LayoutMismatchError(
            f"keys of {tuple(keys.shape)} {keys.dtype} for heads of {rope.head_dim} dimensions"
        )
    out = torch.empty_like(keys) if out is None else out
    if (out.shape, out.dtype, out.device) != (keys.shape, keys.dtype, keys.device):
        raise LayoutMismatchError(
            f"rotated keys of {tuple(out.shape)} {out.dtype} on {out.device}, the keys are "
            f"{tuple(keys.shape)} {keys.dtype} on {keys.device}"
        )
    if shift == 0:
        return out if out is keys else out.copy_(keys)
    problem = RotateProblem(
        device=keys.device.type,
        dtype=keys.dtype,
        num_rows=keys.numel() // rope.head_dim,
        head_dim=rope.head_dim,
        is_contiguous=keys.is_contiguous() and out.is_contiguous(),
    )
    table = _table(rope, shift).to(keys.device)
    ROTATE.select(problem, override).run(keys, out, table, rope.style)
    return out


def rotate_by_kernel(kernel: RotateKernel, stream: int) -> RotateFn:
    """A `RotateFn` of a driver's kernel, in the order of a stream; blocks until it is done."""

    def run(keys: Tensor, out: Tensor, table: Tensor, style: RopeStyle) -> None:
        rows = Rows(
            source=keys.data_ptr(),
            target=out.data_ptr(),
            table=table.data_ptr(),
            num_rows=keys.numel() // keys.shape[-1],
            head_dim=keys.shape[-1],
        )
        is_bfloat16 = keys.dtype is torch.bfloat16
        is_interleaved = style is RopeStyle.INTERLEAVED
        kernel.run(rows, is_bfloat16=is_bfloat16, is_interleaved=is_interleaved, stream=stream)

    return run


@functools.lru_cache(maxsize=256)
def _table(rope: Rope, shift: int) -> Tensor:
    """[2, D/2] fp32: cosines and sines of the shift's angles, rounded once."""
    return torch.stack(cos_sin(rope, torch.tensor(shift))).to(torch.float32)


def _by_torch(keys: Tensor, out: Tensor, table: Tensor, style: RopeStyle) -> None:
    """Whole heads: k cos + swapped k sin, where the two of a plane have -sine and sine."""
    half = keys.shape[-1] // 2
    wide, (cos, sin) = keys.float(), table
    if style is RopeStyle.HALF_SPLIT:
        swapped = torch.cat((wide[..., half:], wide[..., :half]), dim=-1)
        cos, sin = torch.cat((cos, cos)), torch.cat((-sin, sin))
    else:
        swapped = torch.stack((wide[..., 1::2], wide[..., ::2]), dim=-1).flatten(-2)
        cos, sin = cos.repeat_interleave(2), torch.stack((-sin, sin), dim=-1).flatten()
    if out.dtype is torch.float32:
        torch.mul(wide, cos, out=out).addcmul_(swapped, sin)
    else:
        out.copy_((wide * cos).addcmul_(swapped, sin))


def _by_kernel(keys: Tensor, out: Tensor, table: Tensor, style: RopeStyle) -> None:
    stream: int = torch.cuda.current_stream().cuda_stream
    rotate_by_kernel(_kernel(), stream)(keys, out, table, style)


@functools.cache
def _kernel() -> RotateKernel:
    return RotateKernel(CudaDriver())


def _kernel_refuses(problem: RotateProblem) -> str | None:
    if problem.device != "cuda":
        return "it runs on a GPU only"
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return "it takes float32 and bfloat16 only"
    return None if problem.is_contiguous else "it takes contiguous keys only"


def _torch_cost_us(problem: RotateProblem) -> float:
    return 40 + problem.num_rows * problem.head_dim * 1.5e-3


def _kernel_cost_us(problem: RotateProblem) -> float:
    return 10 + problem.num_rows * problem.head_dim * 1e-5


def _examples() -> list[RotateProblem]:
    return [
        RotateProblem(device="cpu", dtype=dtype, num_rows=num_rows, head_dim=64, is_contiguous=True)
        for dtype in (torch.float32, torch.bfloat16)
        for num_rows in (96, 768)
    ]


def _bench(problem: RotateProblem) -> Callable[[RotateFn], Thunk]:
    keys = torch.randn(problem.num_rows, problem.head_dim).to(problem.dtype)
    out, table = torch.empty_like(keys), torch.randn(2, problem.head_dim // 2)
    return lambda run: lambda: run(keys, out, table, RopeStyle.HALF_SPLIT)


ROTATE: Operation[RotateProblem, RotateFn] = Operation(
    "rotate_keys",
    [
        Implementation(name="torch", run=_by_torch, refuses=always, cost_us=_torch_cost_us),
        Implementation(
            name="kernel", run=_by_kernel, refuses=_kernel_refuses, cost_us=_kernel_cost_us
        ),
    ],
    examples=_examples,
    bench=_bench,
)
