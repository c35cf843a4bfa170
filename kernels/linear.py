"""A linear layer without bias, its weight laid out once for the way it will be read.

Envelope: one row of input reads the whole weight, so decode is bound by how well that read
streams. Milliseconds for all 121 products of SmolLM2-135M with one row, one thread, same run:

    layout                          fp32    bf16
    F.linear on (out, in)           71      87
    transposed where out >= in      56      -
    oneDNN's own blocked layout     85      57

so fp32 is kept (in, out) where the output is at least as wide as the input, and bf16 blocked by
oneDNN where PyTorch has these (private) operators. Many rows cost the same in every layout but for
oneDNN's, which is up to 1.6x slower there (576 x 1536, 512 rows, two threads: 3.0 against 1.8 ms).
So a packed layer keeps the plain weight too: twice the memory in bf16, both phases at their best.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _onednn_operators() -> bool:
    """Whether PyTorch has the operators that its own compiler uses for packed weights."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return bool(available and all(hasattr(torch.ops.mkldnn, name) for name in names))


_ONEDNN = _onednn_operators()

MANY_ROWS = 128
"""From this many rows on a packed layer computes with its plain weight."""


class Linear:
    """x -> x W^T. Keeps the weight in the layout, or the two layouts, that its products read."""

    def __init__(self, weight: Tensor, *, packed: bool | None = None) -> None:
        """Lay out a weight.

        Args:
            weight: [out, in].
            packed: use oneDNN's blocked layout; None decides by dtype and device.
        """
        self.out_features, self.in_features = weight.shape
        if packed is None:
            packed = _ONEDNN and weight.dtype is torch.bfloat16 and weight.device.type == "cpu"
        self.packed = packed
        self._weight = weight
        if packed:
            self._blocked = torch.ops.mkldnn._reorder_linear_weight(weight)  # noqa: SLF001
        elif weight.dtype is torch.float32 and self.out_features >= self.in_features:
            self._weight = weight.t().contiguous().t()

    def __call__(self, x: Tensor) -> Tensor:
        """Product for [T, in]; [T, out]."""
        if self.packed and x.shape[0] < MANY_ROWS:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
                x, self._blocked, None, "none", [], ""
            )
            return out
        return F.linear(x, self._weight)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Sum residual + x W^T for [T, in] and [T, out]; a new tensor."""
        if self.packed:
            return self(x).add_(residual)
        return torch.addmm(residual, x, self._weight.t())
