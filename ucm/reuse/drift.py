"""How far a row's KV has moved from what is stored.

    drift = |k_new - k_old| / |k_old| + |v_new - v_old| / |v_old|

over all KV heads of a layer, keys both at the new position. It costs nothing: who recomputes a row
has both in hand. Keys and values weigh alike although values drift about twice as far: a key moves
the attention's weights, a value what they weigh.

Shapes: S rows, G KV heads, D head size.
"""

from __future__ import annotations

from torch import Tensor


def relative_drift(new_2GSD: Tensor, old_2GSD: Tensor) -> Tensor:
    """[S] fp32, from 0: the same rows."""
    old = old_2GSD.float()
    moved_2S = (new_2GSD.float() - old).square_().sum((1, 3))
    return (moved_2S / old.square_().sum((1, 3)).clamp_min_(1e-20)).sqrt_().sum(0)


def value_drift(new_2GSD: Tensor, old_2GSD: Tensor) -> Tensor:
    """[S] fp32: squared distance of the values, by which CacheBlend (arXiv 2405.16444) ranks."""
    return (new_2GSD[1].float() - old_2GSD[1].float()).square_().sum((0, 2))
