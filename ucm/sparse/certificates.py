"""Certified attention: reads blocks until a sound bound on the output's error is small enough.

For one query and head, with S the tokens read, R the blocks not read, weights w_i = exp(q.k_i),
Z = sum of w, v_bar and nu >= max |v_i - v_bar| of a block, and for every unread token a sound
interval of its logit (hence Z_low <= Z_b <= Z_high for its block):

    drop         o_hat = N_S / Z_S
                 |o - o_hat| <= min( tau max_b d_b, sum_b Z_high d_b / (Z_S + sum_b Z_low) ),
                 d_b = |v_bar_b - o_hat| + nu_b,  tau = sum Z_high / (Z_S + sum Z_high)
    compensated  o_hat = (N_S + sum_b Z_hat v_bar_b) / (Z_S + sum_b Z_hat),  Z_hat in the middle
                 |o - o_hat| <= sum_b( sum_i w_high nu_i + (Z_high - Z_hat) |v_bar_b - o_hat| )
                                / (Z_S + sum_b Z_low)

Both follow from o - o_hat = (1/Z) sum_b [Z_b (v'_b - v_bar_b) + (Z_b - Z_hat)(v_bar_b - o_hat)],
v'_b being the block's weighted mean value. Each row takes the smaller. Blocks are read in
descending bound of what they can contribute, for all heads together, because a slab holds all
heads; what is read replaces its bound by the exact term, so the end is dense attention.

The intervals come from a key shadow (quantised keys with the norm of each one's error):
|q.k - q.k_hat| <= |q| |k - k_hat|. Bounds from a block's geometry are sound here as well, and too
wide to save reads: see `docs/sparse-certificates.md`.

Invariants: a bound is never below the true error, in exact arithmetic over the stored keys and
values, of the float32 output that is returned. Everything is computed in float64, and its
rounding is part of the bound; a read block with a NaN or an infinity ends in reading everything.

Sources: error of a truncated softmax as tail mass times the distance of means, "Top-k attention"
theory (arXiv 2512.07647); reading in descending upper bound until a threshold holds, Fagin, Lotem
and Naor, "Optimal aggregation algorithms for middleware" (arXiv cs/0204046).

Envelope: R rows x N blocks x B tokens exponentials once (9 x 128 x 32: 37 k, 0.3 ms), then some
matrix products of R x N x D a round, about log2(N) rounds.

Shapes: Q queries, H query heads, G KV heads, X = Q * H / G rows of a KV head, N blocks, B, D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ucm.errors import InvalidArgumentError

from .tail_bounds import (
    F64,
    BlockBeliefs,
    Estimate,
    Floats,
    ReadPart,
    UnreadBlocks,
    best_estimate,
    split_rows,
)

ReadBlocks: TypeAlias = Callable[[NDArray[np.int64]], tuple[Floats, Floats]]
"""Ascending candidate indexes [n] -> their keys and values, each [n, G, B, D]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifiedOptions:
    """When the bound is good enough: one of the conditions that are set must hold in each row."""

    relative_error: float = 2.0**-8
    """Of the output's norm; 2**-8 is what rounding to bf16 does. 0 reads everything."""
    absolute_error: float = 0.0
    """In units of the values."""
    tail_mass: float | None = None
    """Bound of the softmax mass that was not read (total variation); instead of the errors."""

    def __post_init__(self) -> None:
        """Refuse what is not a limit."""
        for name in ("relative_error", "absolute_error"):
            limit = getattr(self, name)
            if not 0.0 <= limit < np.inf:
                raise InvalidArgumentError(
                    f"certificate: {name} is {limit}, must be finite and not negative"
                )
        if self.tail_mass is not None and not 0.0 <= self.tail_mass < 1.0:
            raise InvalidArgumentError(
                f"certificate: tail_mass is {self.tail_mass}, a share of the softmax mass in [0, 1)"
            )

    @property
    def is_dense(self) -> bool:
        """Whether only reading everything will do."""
        if self.tail_mass is not None:
            return self.tail_mass == 0.0
        return self.relative_error == 0.0 and self.absolute_error == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowKv:
    """Tokens that are read in any case: the sink, the recent ones, the block being filled."""

    keys: Floats
    """[G, S, D]"""
    values: Floats
    """[G, S, D]"""
    hidden: NDArray[np.bool_] | None = None
    """[Q, S]: True where a query must not look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifiedResult:
    """An output with its certificate."""

    out: NDArray[np.float32]
    """[Q, H, D]"""
    error_bound: F64
    """[Q, H]: at least |o - out|; infinite where keys or values are not finite."""
    tail_bound: F64
    """[Q, H]: at least the share of the softmax mass that was not read."""
    blocks: NDArray[np.int64]
    """Candidates that were read, ascending."""
    is_complete: bool
    """Whether all candidates were read: the caller may then use its dense kernel."""


def certify(
    q_QHD: Floats,
    beliefs: BlockBeliefs,
    read: ReadBlocks,
    options: CertifiedOptions,
    window: WindowKv | None = None,
) -> CertifiedResult:
    """Attend to the window and as many of the candidate blocks as the options ask for.

    Args:
        q_QHD: [Q, H, D] queries, not scaled; H is a multiple of G.
        beliefs: the candidates; all Q queries see all of them.
        read: called with the blocks to read next, disjoint from call to call; may block.
        options: when to stop.
        window: what is attended to besides.

    Raises:
        InvalidArgumentError: shapes that do not fit each other, or a query that is not finite.
    """
    _check(q_QHD, beliefs, window)
    num_blocks, num_groups = beliefs.mean_values.shape[:2]
    rows = split_rows(q_QHD.astype(np.float64), num_groups)
    part = ReadPart(rows * q_QHD.shape[-1] ** -0.5)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        if window is not None:
            part.add(window.keys, window.values, _hidden_rows(window, q_QHD.shape, num_groups))
        unread = UnreadBlocks.build(beliefs, num_groups)
        left = np.arange(num_blocks)
        chosen = left if options.is_dense else left[unread.is_unknown]
        while True:
            left = _read(part, left, chosen, read)
            estimate = best_estimate(part, unread.take(left))
            chosen = _choose(estimate, left, options)
            if not len(chosen):
                return _result(estimate, q_QHD.shape, left, num_blocks)


def _choose(
    estimate: Estimate, left: NDArray[np.int64], options: CertifiedOptions
) -> NDArray[np.int64]:
    """The blocks to read next, none if every row's condition holds."""
    if options.tail_mass is None:
        target = np.fmax(options.relative_error * estimate.norm, options.absolute_error)
        is_done = estimate.error <= target
        parts, limit = estimate.error_parts, (target - estimate.rounding) * estimate.scale
    else:
        is_done = estimate.tail <= options.tail_mass
        parts = estimate.mass_parts
        limit = options.tail_mass * estimate.scale
    if is_done.all() or not len(left):
        return left[:0]
    if (limit[~is_done] <= 0.0).any():
        # Below what rounding allows, or nothing read that could be compared with.
        return left if (estimate.scale > 0.0).all() else left[: len(left) // 4 + 1]
    shares = np.minimum(parts[~is_done] / limit[~is_done][:, None], 1e100)
    order = np.argsort(-shares.sum(0), kind="stable")
    rest = shares[:, order[::-1]].cumsum(1)[:, ::-1]
    needed = int((rest > 1.0).any(0).sum())
    # Half of them: reading raises Z as well, so the other half may not be needed any more.
    return np.sort(left[order[: max(1, -(-needed // 2))]])


def _read(
    part: ReadPart,
    left: NDArray[np.int64],
    chosen: NDArray[np.int64],
    read: ReadBlocks,
) -> NDArray[np.int64]:
    """Read `chosen` of `left`; what is left then."""
    if not len(chosen):
        return left
    keys, values = (np.moveaxis(x, 1, 0) for x in read(chosen))
    groups, dim = keys.shape[0], keys.shape[-1]
    part.add(keys.reshape(groups, -1, dim), values.reshape(groups, -1, dim), None)
    return np.setdiff1d(left, chosen, assume_unique=True)


def _result(
    estimate: Estimate, shape: tuple[int, ...], left: NDArray[np.int64], num_blocks: int
) -> CertifiedResult:
    return CertifiedResult(
        out=_join_rows(estimate.out, shape).astype(np.float32),
        error_bound=_join_rows(estimate.error[..., None], shape)[..., 0],
        tail_bound=_join_rows(estimate.tail[..., None], shape)[..., 0],
        blocks=np.setdiff1d(np.arange(num_blocks), left, assume_unique=True),
        is_complete=not len(left),
    )


def _hidden_rows(
    window: WindowKv, shape_QHD: tuple[int, ...], num_groups: int
) -> NDArray[np.bool_] | None:
    """[G, X, S] of the window's [Q, S]."""
    if window.hidden is None:
        return None
    rows = np.repeat(window.hidden, shape_QHD[1] // num_groups, axis=0)
    return np.broadcast_to(rows, (num_groups, *rows.shape))


def _join_rows(rows_GX: F64, shape_QHD: tuple[int, ...]) -> F64:
    """[G, X, ...] back to [Q, H, ...]."""
    groups, rest = rows_GX.shape[0], rows_GX.shape[2:]
    grouped = rows_GX.reshape(groups, shape_QHD[0], -1, *rest)
    return np.moveaxis(grouped, 0, 1).reshape(*shape_QHD[:2], *rest)


def _check(q_QHD: Floats, beliefs: BlockBeliefs, window: WindowKv | None) -> None:
    """Refuse what would broadcast into nonsense."""
    if q_QHD.ndim != 3 or beliefs.mean_values.ndim != 3 or beliefs.logits.ndim != 4:
        raise InvalidArgumentError(
            f"queries {q_QHD.shape}, logits {beliefs.logits.shape} and mean values "
            f"{beliefs.mean_values.shape} must be [Q, H, D], [Q, H, N, B] and [N, G, D]"
        )
    queries, heads, dim = q_QHD.shape
    num_blocks, groups, value_dim = beliefs.mean_values.shape
    block_tokens = beliefs.logits.shape[3]
    fits = (
        groups > 0
        and heads % groups == 0
        and value_dim == dim
        and beliefs.logits.shape[:3] == (queries, heads, num_blocks)
        and beliefs.value_radii.shape[:2] == (num_blocks, groups)
        and beliefs.value_radii.shape[2:] in ((), (block_tokens,))
    )
    if fits and window is not None:
        keys = window.keys.shape
        fits = keys == window.values.shape and (keys[0], keys[2]) == (groups, dim)
        fits = fits and (window.hidden is None or window.hidden.shape == (queries, keys[1]))
    if not fits:
        raise InvalidArgumentError(
            f"queries {q_QHD.shape}, logits {beliefs.logits.shape}, mean values "
            f"{beliefs.mean_values.shape}, radii {beliefs.value_radii.shape} do not fit each other"
        )
    if not np.isfinite(q_QHD).all():
        raise InvalidArgumentError("a query holds a NaN or an infinity: nothing can be certified")
