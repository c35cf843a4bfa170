"""Root-mean-square normalisation, in the form that costs least for its number of rows.

    y = x / sqrt(mean(x^2) + eps) * weight        RMSNorm (arXiv 1910.07467)

    form       how                                                     1 row    512 rows (fp32)
    torch      `rms_norm`: a chain of eight operations on a CPU        28 us    2.2 ms
    chain      five operations, one of them a norm                     36 us    0.6 ms
    mirrored   the fused layer norm of a row beside its mirror image   21 us    -

Measured on one thread with rows of 576, the 36 us in another run, by their ratio. All compute in
fp32, whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Implementation, Operation, TensorProblem, Thunk, always, coarse


@dataclass(frozen=True, slots=True)
class NormWeights:
    """What is kept of a norm."""

    weight: Tensor
    """[C]."""
    mirrored: Tensor
    """[2 C]: the weight twice."""
    eps: float


NormFn: TypeAlias = Callable[[Tensor, NormWeights], Tensor]
"""(x_TC, weights) -> a normalised copy, in x's dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormProblem(TensorProblem):
    """Rows to normalise."""

    rows: int
    width: int

    def bucket(self) -> str:
        """See `Problem.bucket`."""
        return f"T{coarse(self.rows, 8)} C{self.width}"


def _mirrored(x_TC: Tensor, weights: NormWeights) -> Tensor:
    # A row beside its mirror image has mean 0, so that the fused layer norm divides by the root
    # mean square: three operations instead of eight.
    width = x_TC.shape[-1]
    row = torch.cat((x_TC, -x_TC), -1)
    return F.layer_norm(row, (2 * width,), weights.mirrored, None, weights.eps)[:, :width]


def _chain(x_TC: Tensor, weights: NormWeights) -> Tensor:
    # Widened once: products of mixed dtypes take twice as long in PyTorch on a CPU.
    wide_TC = x_TC.float()
    norms = torch.linalg.vector_norm(wide_TC, 2, -1, keepdim=True)
    scale = norms.square_().mul_(1.0 / x_TC.shape[-1]).add_(weights.eps).rsqrt_()
    normalised: Tensor = (wide_TC * scale).to(x_TC.dtype).mul_(weights.weight)
    return normalised


def _torch(x_TC: Tensor, weights: NormWeights) -> Tensor:
    return F.rms_norm(x_TC, weights.weight.shape, weights.weight, weights.eps)


def _cost_us(first_us: float, row_us: float) -> Callable[[NormProblem], float]:
    return lambda problem: first_us + row_us * problem.rows * problem.width / 576


def _examples() -> list[NormProblem]:
    return [
        NormProblem(device="cpu", dtype=dtype, rows=rows, width=576)
        for dtype in (torch.float32, torch.bfloat16)
        for rows in (1, 512)
    ]


def _bench(problem: NormProblem) -> Callable[[NormFn], Thunk]:
    x_TC = torch.randn(problem.rows, problem.width).to(problem.dtype)
    weights = _weights_of(torch.randn(problem.width).to(problem.dtype), 1e-5)
    return lambda run: lambda: run(x_TC, weights)


def _weights_of(weight: Tensor, eps: float) -> NormWeights:
    return NormWeights(weight, torch.cat((weight, weight)), eps)


NORM: Operation[NormProblem, NormFn] = Operation(
    "norm",
    [
        Implementation(name="mirrored", run=_mirrored, refuses=always, cost_us=_cost_us(20, 3.0)),
        Implementation(name="chain", run=_chain, refuses=always, cost_us=_cost_us(35, 1.1)),
        Implementation(name="torch", run=_torch, refuses=always, cost_us=_cost_us(24, 4.2)),
    ],
    examples=_examples,
    bench=_bench,
)


class RmsNorm:
    """Normalises rows; computes in fp32 whatever the dtype."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        """Take the weight, [C], and the constant under the root."""
        self._weights = _weights_of(weight, eps)
        self._one_row, self._many_rows = (
            NORM.select(
                NormProblem(
                    device=weight.device.type, dtype=weight.dtype, rows=rows, width=len(weight)
                )
            ).run
            for rows in (1, 512)
        )

    def __call__(self, x_TC: Tensor) -> Tensor:
        """Normalised copy of [T, C], in its dtype."""
        run = self._one_row if x_TC.shape[0] == 1 else self._many_rows
        return run(x_TC, self._weights)
