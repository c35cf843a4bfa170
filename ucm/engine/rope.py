"""Rotary position embedding in the half-split form of Hugging Face's Llama.

    x = [a | b] (halves of a head)   ->   [a cos - b sin | b cos + a sin]

Source: RoFormer (arXiv 2104.09864); the llama3 scaling is that of Llama 3.1's release. Angles are
computed in fp32 whatever the model's dtype, as Transformers does.

Shapes: T tokens, H heads, D head size, P positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ucm.errors import ConfigError

from .config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair of dimensions: [head_dim / 2] fp32, scaling applied."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_base**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3_frequencies(frequencies, scaling)
    raise ConfigError(f"RoPE scaling {scaling.kind!r} is not supported; linear and llama3 are")


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    context = scaling.original_context_tokens
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((context / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


class RopeTable:
    """Rows cos and sin of every position up to the context limit, precomputed.

    `cos_PD` holds [cos | cos] and `sin_PD` [-sin | sin], so that a rotation is two products and
    one sum over whole heads: x * cos + swap_halves(x) * sin.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        positions = torch.arange(config.max_context_tokens, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(config))
        cos, sin = angles.cos(), angles.sin()
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
