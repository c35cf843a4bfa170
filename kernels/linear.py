"""A linear layer without bias, its weight laid out once for the way it will be read.

Envelope: one row of input reads the whole weight, so decode is bound by how well that read
streams. Milliseconds for all 121 products of SmolLM2-135M with one row, one thread, same run:

    layout       how                                      fp32    bf16
    plain        F.linear on (out, in)                    71      87
    transposed   kept (in, out), where out >= in          56      -
    blocked      oneDNN's own layout                      85      57

so by estimate fp32 is kept (in, out) where the output is at least as wide as the input, and bf16
blocked by oneDNN where PyTorch has these (private) operators; a machine's own table can say
otherwise. Many rows cost the same in every layout but for oneDNN's, which is up to 1.6x slower
there (576 x 1536, 512 rows, two threads: 3.0 against 1.8 ms). So a blocked layer keeps the plain
weight too: twice the memory, both phases at their best.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Implementation, Operation, TensorProblem, Thunk, always, coarse

Product: TypeAlias = Callable[[Tensor], Tensor]
"""x -> x W^T for [T, in]."""


def _onednn_operators() -> bool:
    """Whether PyTorch has the operators that its own compiler uses for packed weights."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return bool(available and all(hasattr(torch.ops.mkldnn, name) for name in names))


_ONEDNN = _onednn_operators()

MANY_ROWS = 128
"""From this many rows on a blocked layer computes with its plain weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProblem(TensorProblem):
    """A product with one weight."""

    rows: int
    out_features: int
    in_features: int

    def bucket(self) -> str:
        """See `Problem.bucket`: the weight exactly, because models have a handful."""
        return f"T{coarse(self.rows, 8)} out{self.out_features} in{self.in_features}"


def _plain(weight: Tensor) -> Product:
    return functools.partial(F.linear, weight=weight)


def _transposed(weight: Tensor) -> Product:
    return functools.partial(F.linear, weight=weight.t().contiguous().t())


def _blocked(weight: Tensor) -> Product:
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight)  # noqa: SLF001

    def product(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
            x, blocked, None, "none", [], ""
        )
        return out

    return product


def _blocked_refuses(problem: LinearProblem) -> str | None:
    if not _ONEDNN:
        return "this release of torch lacks oneDNN's operators for blocked weights"
    if problem.device != "cpu":
        return "it runs on a CPU only"
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return "it takes float32 and bfloat16 only"
    return None


def _cost_us(fp32_us: float, bf16_us: float) -> Callable[[LinearProblem], float]:
    """From the table above: microseconds a million weights, for one row."""

    def cost_us(problem: LinearProblem) -> float:
        per_mega = fp32_us if problem.dtype is torch.float32 else bf16_us
        return per_mega * problem.out_features * problem.in_features / 1e6

    return cost_us


def _transposed_cost_us(problem: LinearProblem) -> float:
    is_wide = problem.out_features >= problem.in_features
    return _cost_us(420 if is_wide else 600, 700)(problem)


def _examples() -> list[LinearProblem]:
    """One row with every kind of weight of SmolLM2-135M."""
    shapes = ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576))
    return [
        LinearProblem(device="cpu", dtype=dtype, rows=1, out_features=out, in_features=wide)
        for dtype in (torch.float32, torch.bfloat16)
        for out, wide in shapes
    ]


def _bench(problem: LinearProblem) -> Callable[[Callable[[Tensor], Product]], Thunk]:
    """Several weights in turn: decode reads a weight from memory, not from a cache."""
    shape = (problem.out_features, problem.in_features)
    weight_bytes = problem.out_features * problem.in_features * problem.dtype.itemsize
    count = max(1, min(16, (64 << 20) // weight_bytes))
    weights = [torch.randn(shape).to(problem.dtype) for _ in range(count)]
    x = torch.randn(problem.rows, problem.in_features).to(problem.dtype)

    def prepare(layout: Callable[[Tensor], Product]) -> Thunk:
        products = itertools.cycle([layout(weight) for weight in weights])
        return lambda: next(products)(x)

    return prepare


LINEAR: Operation[LinearProblem, Callable[[Tensor], Product]] = Operation(
    "linear",
    [
        Implementation(name="plain", run=_plain, refuses=always, cost_us=_cost_us(530, 650)),
        Implementation(
            name="transposed", run=_transposed, refuses=always, cost_us=_transposed_cost_us
        ),
        Implementation(
            name="blocked", run=_blocked, refuses=_blocked_refuses, cost_us=_cost_us(635, 425)
        ),
    ],
    examples=_examples,
    bench=_bench,
)


class Linear:
    """x -> x W^T. Keeps the weight in the layout, or the two layouts, that its products read."""

    def __init__(self, weight: Tensor, *, layout: str | None = None) -> None:
        """Lay out a weight.

        Args:
            weight: [out, in].
            layout: a name of the table above; None takes the cheapest for a single row.

        Raises:
            ConfigError: the layout does not exist, or not for this dtype and device.
        """
        self.out_features, self.in_features = weight.shape
        problem = LinearProblem(
            device=weight.device.type,
            dtype=weight.dtype,
            rows=1,
            out_features=self.out_features,
            in_features=self.in_features,
        )
        chosen = LINEAR.select(problem, layout)
        self.layout = chosen.name
        self._weight = weight
        if self.layout == "transposed":
            self._weight = weight.t().contiguous().t()
        self._blocked = chosen.run(weight) if self.layout == "blocked" else None

    def __call__(self, x: Tensor) -> Tensor:
        """Product for [T, in]; [T, out]."""
        if self._blocked is not None and x.shape[0] < MANY_ROWS:
            return self._blocked(x)
        return F.linear(x, self._weight)

    def first(self, x: Tensor, num_features: int) -> Tensor:
        """The first `num_features` columns of the product, [T, num_features]."""
        return F.linear(x, self._weight[:num_features])

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Sum residual + x W^T for [T, in] and [T, out]; a new tensor."""
        if self._blocked is not None:
            return self(x).add_(residual)
        return torch.addmm(residual, x, self._weight.t())
