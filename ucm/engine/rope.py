"""Rotary position embedding of a step's queries and keys, in the half-split form.

    x = [a | b] (halves of a head)   ->   [a cos - b sin | b cos + a sin]

Frequencies, scalings and sources: `ucm.kernels.rope`.

Shapes: T tokens, H heads, D head size, P positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ucm.kernels.rope import cos_sin

from .config import ModelConfig


class RopeTable:
    """Rows cos and sin of every position up to the context limit, precomputed.

    `cos_PD` holds [cos | cos] and `sin_PD` [-sin | sin], so that a rotation is two products and
    one sum over whole heads: x * cos + swap_halves(x) * sin.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        rope = config.rope
        cos, sin = cos_sin(rope, torch.arange(config.max_context_tokens))
        cos, sin = cos * rope.magnitude, sin * rope.magnitude
        self._half = config.head_dim // 2
        self.cos_PD = torch.cat((cos, cos), dim=-1).to(dtype)
        self.sin_PD = torch.cat((-sin, sin), dim=-1).to(dtype)

    def at(self, positions: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Rows cos and sin of `positions`, each [T, 1, D], ready to broadcast over heads."""
        return self.cos_PD[positions].unsqueeze(1), self.sin_PD[positions].unsqueeze(1)


def rotate_(x_THD: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate each head by its position, in place; `cos` and `sin` are from `RopeTable.at`."""
    half = x_THD.shape[-1] // 2
    swapped = torch.cat((x_THD[..., half:], x_THD[..., :half]), dim=-1)
    x_THD.mul_(cos).addcmul_(swapped, sin)
