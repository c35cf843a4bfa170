"""How long loading and computing take together: the arithmetic of overlap.

Layer by layer (AttentionStore / CachedAttention, arXiv:2403.19708, layer-wise pre-loading): layer l
is computed when layer l-1 was computed and layer l is loaded,

    LoadDone(l) = lead + (l+1) * load          CompDone(l) = max(CompDone(l-1), LoadDone(l)) + comp

       load   |0  |1  |2  |3  |                comp <= load: every layer waits for its bytes
       comp       |0 |.|1 |.|2 |.|3 |
                                               load <= comp: only the first one does
       load   |0 |1 |2 |3 |
       comp      |0   |1   |2   |3   |

From both ends (Cake, Compute Or Load KV Cache? Why Not Both?, arXiv:2410.03065): chunks are
computed from the front while blocks are loaded from the back, until the two meet:

       blocks |comp> comp> comp>|<load <load <load <load| suffix >

Pure functions of seconds and counts; all times count from the moment of the decision.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """One layer-wise pass."""

    done_s: float
    """When its last layer is computed."""
    stall_s: float
    """How long it waited for layers in all."""


def layerwise(
    *,
    num_layers: int,
    load_layer_s: float,
    comp_layer_s: float,
    begin_s: float,
    spread_s: float = 0.0,
) -> Overlap:
    """A pass that follows the load layer by layer.

    Args:
        num_layers: of the model.
        load_layer_s: to load one layer; the load begins at 0.
        comp_layer_s: to compute one layer.
        begin_s: when the pass can begin at the earliest.
        spread_s: standard deviation of how much longer computing takes than loading. Where the two
            take about as long, each waits for the other's bad moments.

    Returns:
        Its end; the maximum over l of LoadDone(l) + (num_layers - l) * comp is reached at one of
        the two ends, for both terms are linear in l.
    """
    comp_s = num_layers * comp_layer_s
    load_s = num_layers * load_layer_s
    done_s = expected_max(
        max(begin_s, load_layer_s) + comp_s, load_s + comp_layer_s, spread_s=spread_s
    )
    return Overlap(done_s=done_s, stall_s=done_s - begin_s - comp_s)


def expected_max(first: float, second: float, *, spread_s: float) -> float:
    """The mean of the larger of two normal variables; `spread_s`: deviation of their difference.

    C. E. Clark, The greatest of a finite set of random variables, Operations Research 9 (1961).
    """
    largest, gap = max(first, second), abs(first - second)
    if gap >= 4 * spread_s:
        return largest
    ratio = gap / spread_s
    density = math.exp(-0.5 * ratio * ratio) / math.sqrt(2 * math.pi)
    return largest + spread_s * density - gap * 0.5 * math.erfc(ratio / math.sqrt(2))


def read_ahead_layers(
    num_layers: int, load_layer_s: float, comp_layer_s: float, *, least: int = 4, most: int
) -> int:
    """How many layers to read before the pass reaches them, so that no layer is waited for.

    Layer l is there in time if (l+1) * load <= p * load + l * comp; the last layer asks for most,
    p >= L - (L-1) * comp / load. That is CachedAttention's read buffer, L * (load - comp) / load
    (arXiv:2403.19708), plus the layer that is read while none is computed yet. Where loading is
    the faster one, `least` layers absorb what single reads take longer than others, and that one
    read often is of two or three layers.

    Args:
        num_layers: of the model.
        load_layer_s: to load one layer.
        comp_layer_s: to compute one layer.
        least: lower bound, >= 1.
        most: upper bound, what the reader may have in flight.
    """
    depth = least
    if load_layer_s > comp_layer_s:
        depth = math.ceil(num_layers - (num_layers - 1) * comp_layer_s / load_layer_s)
    return max(1, min(max(depth, least), most, num_layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where computing from the front meets loading from the back."""

    num_computed: int
    """Blocks that were computed; the rest was loaded."""
    done_s: float
    """When both have finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackLoad:
    """When blocks that are loaded from the back have arrived."""

    done_s: tuple[float, ...]
    """done_s[j]: when the last j+1 blocks are there; not decreasing."""

    @classmethod
    def of(cls, block_s: Sequence[float]) -> BackLoad:
        """From what each block takes, in the order of the prompt."""
        return cls(done_s=tuple(accumulate(reversed(block_s))))

    def num_loaded(self, now_s: float) -> int:
        """Blocks that are there at `now_s`."""
        return bisect_right(self.done_s, now_s)

    def when(self, num_blocks: int) -> float:
        """When the last `num_blocks` are there."""
        return self.done_s[num_blocks - 1] if num_blocks else 0.0


def claim(
    num_left: int, comp_s: Callable[[int], float], load_s: Callable[[int], float], *, most: int
) -> int:
    """How many of the blocks between the two ends to compute next.

    The x for which computing x blocks and loading the others ends soonest, cut to what one pass
    takes: so the last claim and the last load end together. 0: the loader has the rest nearly done.

    Args:
        num_left: blocks that are neither computed nor loaded.
        comp_s: seconds to compute the first x of them, increasing in x.
        load_s: seconds until the last y of them are loaded, increasing in y.
        most: blocks of one pass, >= 1.
    """
    low, high = 0, num_left
    while low < high:
        middle = (low + high) // 2
        if comp_s(middle) < load_s(num_left - middle):
            low = middle + 1
        else:
            high = middle
    # `low` is the first x that computes no sooner than the others load; x - 1 is the other end.
    if low and load_s(num_left - low + 1) < comp_s(low):
        low -= 1
    return min(low, most)


def meet(
    back: BackLoad,
    comp_s: Callable[[int, int], float],
    *,
    begin_s: float,
    most: int,
) -> Meeting:
    """Play computing from the front against loading from the back.

    Args:
        back: the load, which begins at 0.
        comp_s: seconds to compute blocks a to b - 1 beside the load.
        begin_s: when computing can begin at the earliest.
        most: blocks of one pass, >= 1.
    """
    num_blocks, num_computed, now_s = len(back.done_s), 0, begin_s
    while True:
        count = _next_claim(back, comp_s, num_computed, now_s, most)
        if count == 0:
            done_s = max(now_s, back.when(num_blocks - num_computed))
            return Meeting(num_computed=num_computed, done_s=done_s)
        now_s += comp_s(num_computed, num_computed + count)
        num_computed += count


def _next_claim(
    back: BackLoad, comp_s: Callable[[int, int], float], front: int, now_s: float, most: int
) -> int:
    """What `claim` says when `front` blocks are computed at `now_s`."""
    num_behind = len(back.done_s) - front
    num_loaded = min(back.num_loaded(now_s), num_behind)
    return claim(
        num_behind - num_loaded,
        lambda count: comp_s(front, front + count),
        lambda count: back.when(num_loaded + count) - now_s,
        most=most,
    )
