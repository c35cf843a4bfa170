"""Rotary position embedding: frequencies of every scaling in use, in fp64.

    kind      frequencies                                            source
    (none)    base^(-2j/D)                                           RoFormer, arXiv 2104.09864
    linear    all divided by `factor`                                arXiv 2306.15595
    ntk       of the base * factor^(D/(D-2))                         NTK-aware, see 2309.00071
    dynamic   as none, up to the context the model was trained on    Transformers; see 2309.00071
    llama3    long wavelengths stretched, short ones kept            Llama 3.1's release
    yarn      the same by a ramp over the dimensions; keys and       YaRN, arXiv 2309.00071
              queries are also scaled by `attention_factor`

A head's D dimensions are D/2 planes. Which two dimensions make plane j is the *style*: j and
j + D/2 (half-split, Hugging Face's Llama) or 2j and 2j + 1 (interleaved, the paper's).

Angles are computed in fp64 and only their cosine and sine are rounded, once. At position 8,192 fp32
would be wrong by 2e-4 radians, and a key that is rotated on (`ucm.kernels.rotate`) would differ by
that from one that was computed at its new place.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ucm.errors import ConfigError

SCALINGS = ("linear", "ntk", "dynamic", "llama3", "yarn")
"""What `RopeScaling.kind` may be."""


class RopeStyle(enum.StrEnum):
    """Which two dimensions of a head make a plane."""

    HALF_SPLIT = "half_split"
    INTERLEAVED = "interleaved"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How positions beyond the trained context are mapped; see the module."""

    kind: str
    """One of `SCALINGS`."""
    factor: float
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_context / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_context / high_freq_factor stay as they are."""
    original_context_tokens: int = 8192
    """llama3, yarn: the context the model was trained on."""
    attention_factor: float | None = None
    """yarn: what cosine and sine are multiplied by; 0.1 ln(factor) + 1 when None."""
    beta_fast: float = 32.0
    """yarn: planes that turn more often than this within the trained context stay as they are."""
    beta_slow: float = 1.0
    """yarn: planes that turn less often than this are divided by `factor`."""
    truncate: bool = True
    """yarn: whether the ramp begins and ends at whole planes."""

    def __post_init__(self) -> None:
        if self.kind not in SCALINGS:
            raise ConfigError(
                f"RoPE scaling {self.kind!r} is not supported; {', '.join(SCALINGS)} are"
            )
        if not 0.0 < self.factor < math.inf:
            raise ConfigError(f"RoPE scaling {self.kind}: factor is {self.factor}, must be above 0")

    @property
    def magnitude(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        return (
            yarn_magnitude(self.factor) if self.attention_factor is None else self.attention_factor
        )

    def describe(self) -> str:
        """Kind and parameters written out, for a namespace's fingerprint."""
        if self.kind == "llama3":
            return (
                f"llama3(factor={self.factor!r},low={self.low_freq_factor!r},"
                f"high={self.high_freq_factor!r},original={self.original_context_tokens})"
            )
        if self.kind == "yarn":
            return (
                f"yarn(factor={self.factor!r},original={self.original_context_tokens},"
                f"magnitude={self.magnitude!r},fast={self.beta_fast!r},slow={self.beta_slow!r},"
                f"truncate={self.truncate})"
            )
        return f"{self.kind}(factor={self.factor!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """The rotation of one model's keys and queries."""

    head_dim: int
    base: float
    scaling: RopeScaling | None = None
    style: RopeStyle = RopeStyle.HALF_SPLIT

    def __post_init__(self) -> None:
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"RoPE needs an even head size, not {self.head_dim}")
        if not 0.0 < self.base < math.inf:
            raise ConfigError(f"rope_base is {self.base}: no such model can be computed")

    @property
    def magnitude(self) -> float:
        """What every rotated key and query is multiplied by."""
        return self.scaling.magnitude if self.scaling else 1.0


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature: 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def inverse_frequencies(rope: Rope) -> Tensor:
    """Angle per position of each plane: [head_dim / 2] fp64, scaling applied."""
    scaling = rope.scaling
    if scaling is None or scaling.kind == "dynamic":
        return _plain_frequencies(rope.base, rope.head_dim)
    if scaling.kind == "ntk":
        stretch = scaling.factor ** (rope.head_dim / (rope.head_dim - 2))
        return _plain_frequencies(rope.base * stretch, rope.head_dim)
    plain = _plain_frequencies(rope.base, rope.head_dim)
    if scaling.kind == "linear":
        return plain / scaling.factor
    kept = _llama3_kept(plain, scaling) if scaling.kind == "llama3" else _yarn_kept(rope, scaling)
    return (1 - kept) * plain / scaling.factor + kept * plain


def cos_sin(rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, magnitude left out: [..., head_dim / 2] fp64."""
    angles = positions.to(torch.float64).unsqueeze(-1) * inverse_frequencies(rope)
    return angles.cos(), angles.sin()


def _plain_frequencies(base: float, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return torch.pow(torch.tensor(base, dtype=torch.float64), -exponents)


def _llama3_kept(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Share of each plane that is not stretched: 1 for short wavelengths, 0 for long ones."""
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_context_tokens / wavelengths - low) / (high - low)
    return smooth.clamp(0.0, 1.0)


def _yarn_kept(rope: Rope, scaling: RopeScaling) -> Tensor:
    """As `_llama3_kept`: a ramp over the planes between two numbers of turns."""
    low, high = (
        _plane_of(rope, scaling, turns) for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, rope.head_dim - 1.0)
    width = high - low if high != low else 0.001
    planes = torch.arange(rope.head_dim // 2, dtype=torch.float64)
    return 1.0 - ((planes - low) / width).clamp(0.0, 1.0)


def _plane_of(rope: Rope, scaling: RopeScaling, num_turns: float) -> float:
    """The plane that turns `num_turns` times within the trained context; not a whole number."""
    wavelength = scaling.original_context_tokens / (num_turns * 2 * math.pi)
    return rope.head_dim * math.log(wavelength) / (2 * math.log(rope.base))
