"""Sound bounds of what unread blocks can add to an attention output, in float64 with rounding.

The formulas are in `certificates.py`; here is their arithmetic. Each quantity is either exact up to
a rounding error that `ReadPart.weight_error` bounds, or rounded outwards where it arises.

Shapes: Q queries, H query heads, G KV heads, X = Q * H / G rows of a KV head, N blocks, B, D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating]
F64: TypeAlias = NDArray[np.float64]

_ULP = 2.0**-53
_F32_ROUNDING = 2.0**-23
"""Twice the relative error of rounding to float32."""
_UNDERFLOWN = 1e-290
"""Above the sum of all weights that vanish in float64."""
_F32_FLUSHED = 2.0**-140
"""Above what rounding to a subnormal float32 moves a vector of up to 2**18 components."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockBeliefs:
    """What is known of N candidate blocks without reading them."""

    logits: Floats
    """[Q, H, N, B] estimates of q.k / sqrt(D)."""
    slack: Floats
    """Broadcasts to `logits`: how far from the truth each may be, this estimate's own rounding
    included. Not finite: nothing is known, so the block is read first."""
    mean_values: Floats
    """[N, G, D] v_bar, any vector near the block's values."""
    value_radii: Floats
    """[N, G] or, tighter, [N, G, B]: at least |v_i - v_bar|."""


class ReadPart:
    """Softmax over what was read, in float64, with a running peak; and how exact it is."""

    def __init__(self, q_GXD: F64) -> None:
        self._q = q_GXD
        self._q_norm = np.linalg.norm(q_GXD, axis=-1)
        self.peak = np.full(q_GXD.shape[:2], -np.inf)
        self.total = np.zeros(q_GXD.shape[:2])
        self.weighted = np.zeros(q_GXD.shape)
        self.value_norm = np.zeros((len(q_GXD), 1))
        """[G, 1]: the largest norm of a value."""
        self._logit_norm = np.zeros(q_GXD.shape[:2])
        """[G, X]: the largest |q| |k|, which bounds a logit and scales its rounding."""
        self._num_tokens = 0
        self.is_finite = True

    def add(self, k_GSD: Floats, v_GSD: Floats, hidden_GXS: NDArray[np.bool_] | None) -> None:
        """Read more tokens."""
        if not k_GSD.shape[1]:
            return
        k, v = k_GSD.astype(np.float64), v_GSD.astype(np.float64)
        self.is_finite &= bool(np.isfinite(k).all() and np.isfinite(v).all())
        logits = self._q @ k.transpose(0, 2, 1)
        if hidden_GXS is not None:
            logits = np.where(hidden_GXS, -np.inf, logits)
        peak = np.maximum(self.peak, logits.max(-1))
        base = np.where(np.isfinite(peak), peak, 0.0)
        weights = np.exp(logits - base[..., None])
        shrink = np.exp(self.peak - base)
        self.total = self.total * shrink + weights.sum(-1)
        self.weighted = self.weighted * shrink[..., None] + weights @ v
        self.peak = peak
        self._num_tokens += k.shape[1]
        self.value_norm = np.maximum(self.value_norm, _largest_norm(v))
        self._logit_norm = np.maximum(self._logit_norm, self._q_norm * _largest_norm(k))

    def weight_error(self, base_GX: F64) -> F64:
        """Bound of the relative rounding error of a weight or a sum of weights, [G, X].

        A product of D terms, two exponentials of differences (a rescaling chain included), a sum
        over all tokens: each within a few units in the last place of its largest operand.
        """
        scale = self._logit_norm + np.abs(base_GX)
        units = (self._q.shape[-1] + 16) * scale + 4 * self._num_tokens + 1024
        error: F64 = np.expm1(8 * _ULP * units)
        return error


@dataclass(frozen=True, slots=True)
class UnreadBlocks:
    """Logarithms of the bounds of each unread block; per token they are not needed again."""

    log_low: F64
    """[G, X, N] log of Z_low, rounded down."""
    log_high: F64
    """[G, X, N] log of Z_high, rounded up."""
    log_spread: F64
    """[G, X, N] log of the sum of w_high nu, rounded up."""
    mean_values: F64
    """[G, N, D]"""
    radii: F64
    """[G, N]: at least each |v - v_bar|."""
    is_unknown: NDArray[np.bool_]
    """[N]: no finite interval, radius or mean value."""

    @property
    def num_blocks(self) -> int:
        """N."""
        return len(self.is_unknown)

    @classmethod
    def build(cls, beliefs: BlockBeliefs, num_groups: int) -> UnreadBlocks:
        """Sum the tokens' intervals up, rounded outwards."""
        logits = split_rows(beliefs.logits.astype(np.float64), num_groups)
        slack_QHNB = np.broadcast_to(beliefs.slack, beliefs.logits.shape)
        slack = split_rows(slack_QHNB.astype(np.float64), num_groups)
        means = beliefs.mean_values.astype(np.float64).transpose(1, 0, 2)
        radii = beliefs.value_radii.astype(np.float64)
        radii_GNB = (radii if radii.ndim == 3 else radii[..., None]).transpose(1, 0, 2)
        is_known = _is_finite(logits, (0, 1, 3)) & _is_finite(slack, (0, 1, 3))
        is_known &= _is_finite(means, (0, 2)) & _is_finite(radii_GNB, (0, 2))
        # Only what is known is computed with: a NaN must not reach a sum.
        logits = np.where(is_known[:, None], logits, 0.0)
        slack = np.where(is_known[:, None], np.maximum(slack, 0.0), 0.0)
        radii_GNB = np.where(is_known[:, None], radii_GNB, 0.0)
        reach = np.abs(logits).max(-1) + slack.max(-1)
        outward = 8 * _ULP * (4 * reach + logits.shape[-1] + 4096)
        log_high, log_spread = _log_sums(logits + slack, radii_GNB)
        return cls(
            log_low=_log_sums(logits - slack, radii_GNB)[0] - outward,
            log_high=log_high + outward,
            log_spread=log_spread + outward,
            mean_values=np.where(is_known[:, None], means, 0.0),
            radii=radii_GNB.max(-1),
            is_unknown=~is_known,
        )

    def take(self, left: NDArray[np.int64]) -> UnreadBlocks:
        """The blocks that are still unread."""
        return UnreadBlocks(
            log_low=self.log_low[..., left],
            log_high=self.log_high[..., left],
            log_spread=self.log_spread[..., left],
            mean_values=self.mean_values[:, left],
            radii=self.radii[:, left],
            is_unknown=self.is_unknown[left],
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """The best output there is now, its bound, and what each unread block adds to the bound."""

    out: F64
    """[G, X, D], rounded to float32."""
    norm: F64
    """[G, X]"""
    error: F64
    """[G, X] bound."""
    tail: F64
    """[G, X] bound."""
    error_parts: F64
    """[G, X, N]: error = sum / scale + rounding."""
    mass_parts: F64
    """[G, X, N] Z_high."""
    scale: F64
    """[G, X] lower bound of Z."""
    rounding: F64
    """[G, X]"""


def best_estimate(part: ReadPart, unread: UnreadBlocks) -> Estimate:
    """Drop and compensated, the one with the smaller bound in each row."""
    base = _common_base(part.peak, unread)
    rescale = np.exp(part.peak - base)
    read = (part.total * rescale, part.weighted * rescale[..., None])
    low = np.exp(unread.log_low - base[..., None])
    high = np.exp(unread.log_high - base[..., None])
    spread = np.exp(unread.log_spread - base[..., None])
    middle = np.where(np.isfinite(high), (low + high) / 2, low)
    # What underflowed is not nothing.
    tail = high.sum(-1) / (read[0] + high.sum(-1)) + _UNDERFLOWN
    drop = _Bound.of(read, (low, high, spread), np.zeros_like(middle), unread.mean_values)
    # o - o_S = tau (mu_R - o_S): better than the sum where little was read.
    farthest = (drop.distances + unread.radii[:, None]).max(-1, initial=0.0)
    drop_error = np.fmin(drop.error, tail * farthest)
    keep = _Bound.of(read, (low, high, spread), middle, unread.mean_values)
    better = keep.error < drop_error
    out = np.where(better[..., None], keep.out, drop.out)
    norm = np.linalg.norm(out, axis=-1)
    value_norm = np.maximum(part.value_norm, _largest_norm(unread.mean_values))
    weight_error = part.weight_error(base)
    rounding = 4 * weight_error * (value_norm + norm) + _F32_ROUNDING * norm + _F32_FLUSHED
    # Beyond this the linear account of the rounding would not hold.
    is_sound = part.is_finite & (weight_error < 1e-3)
    inflate = np.where(is_sound, 1 + 8 * weight_error, np.inf)
    error = _or_inf((np.fmin(drop_error, keep.error) + rounding) * inflate)
    return Estimate(
        out=out,
        norm=norm,
        error=np.where(is_sound, error, np.inf),
        tail=np.fmin(_or_inf(tail * inflate), 1.0) if unread.num_blocks else np.zeros_like(tail),
        error_parts=_or_inf(np.where(better[..., None], keep.parts, drop.parts)),
        mass_parts=_or_inf(high),
        scale=read[0] + low.sum(-1),
        rounding=rounding,
    )


@dataclass(frozen=True, slots=True)
class _Bound:
    """One way to estimate the output, with its bound in exact arithmetic."""

    out: F64
    """[G, X, D]"""
    error: F64
    """[G, X]"""
    parts: F64
    """[G, X, N]: error = sum / (Z_S + sum Z_low)."""
    distances: F64
    """[G, X, N]: at least |v_bar - out|."""

    @classmethod
    def of(
        cls,
        read: tuple[F64, F64],
        masses: tuple[F64, F64, F64],
        assumed: F64,
        mean_values_GND: F64,
    ) -> _Bound:
        """The output if block b had the mass `assumed` and its mean value."""
        total, weighted = read
        low, high, spread = masses
        mass = total + assumed.sum(-1)
        out = (weighted + assumed @ mean_values_GND) / mass[..., None]
        # Where there is no mass at all any output will do: its bound is infinite.
        out = np.where(np.isfinite(out), out, 0.0)
        distances = _distances(out, mean_values_GND)
        parts = spread + np.maximum(high - assumed, assumed - low) * distances
        return cls(out, _or_inf(parts.sum(-1) / (total + low.sum(-1))), parts, distances)


def _common_base(peak_GX: F64, unread: UnreadBlocks) -> F64:
    """What logits are taken relative to: the largest that must not underflow."""
    if not unread.num_blocks:
        return np.where(np.isfinite(peak_GX), peak_GX, 0.0)
    lows, highs = unread.log_low.max(-1), unread.log_high.max(-1)
    # Wide bounds may overflow, which is a bound too, but they must not make all else vanish.
    base = np.maximum(peak_GX, np.maximum(lows, np.where(np.isfinite(peak_GX), lows, highs)))
    return np.where(np.isfinite(base), base, 0.0)


def _log_sums(logits_GXNB: F64, radii_GNB: F64) -> tuple[F64, F64]:
    """Logarithms of sum_i exp(logit) and of sum_i exp(logit) nu_i, [G, X, N]."""
    peak = logits_GXNB.max(-1)
    weights = np.exp(logits_GXNB - peak[..., None])
    spread = (weights * radii_GNB[:, None]).sum(-1)
    return peak + np.log(weights.sum(-1)), peak + np.log(spread)


def _distances(out_GXD: F64, means_GND: F64) -> F64:
    """At least |mean - out|, [G, X, N]: as a product, with what its cancellation may lose."""
    squares = (out_GXD**2).sum(-1)[..., None] + (means_GND**2).sum(-1)[:, None]
    lost = 8 * _ULP * (out_GXD.shape[-1] + 8) * squares
    product = out_GXD @ means_GND.transpose(0, 2, 1)
    distances: F64 = np.sqrt(np.maximum(squares - 2 * product, 0.0) + lost)
    return distances


def _largest_norm(vectors_GSD: F64) -> F64:
    """[G, 1] largest norm of each group's vectors, 0 without any."""
    norms: F64 = np.linalg.norm(vectors_GSD, axis=-1).max(-1, initial=0.0)
    return norms[:, None]


def _is_finite(values: F64, axes: tuple[int, ...]) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(values).all(axes), dtype=np.bool_)


def _or_inf(values: F64) -> F64:
    """An undefined bound (infinity times or over nothing) bounds nothing."""
    return np.where(np.isnan(values), np.inf, values)


def split_rows(rows_QH: F64, num_groups: int) -> F64:
    """[Q, H, ...] to [G, Q * H / G, ...]."""
    queries, heads = rows_QH.shape[:2]
    rest = rows_QH.shape[2:]
    grouped = rows_QH.reshape(queries, num_groups, heads // num_groups, *rest)
    return np.moveaxis(grouped, 1, 0).reshape(num_groups, -1, *rest)
