"""tree-GDSF: the leaf whose loss would cost the least recomputation goes first.

    H(b) = clock + sqrt( f(b) * dT(b)/bytes(b) )        on every use of b
    the victim is the leaf with the least H, and clock := its H

f is the number of uses, each halved every ten minutes; dT the seconds that a hit saves, growing
with the position in the prompt (`CostModel`); every block of a tier has the same bytes. The clock
ages what is not used: GreedyDual-Size-Frequency (Cherkasova, "Improving WWW proxies performance
with Greedy-Dual-Size-Frequency caching policy", HP Labs 1998), over a tree of blocks.

Why the root. A block with twice the value should not stay twice as long: the chance that it is
used again falls with its age. If ages at reuse have a Pareto tail of density a^-(1+s), a block is
worth its place while value * a^-(1+s) is above a common price, that is up to an age of
value^(1/(1+s)); chat traces have s of 1 to 2. Without the root, long prompts that nobody comes back
to crowd out recent short ones, and with ample room the policy loses to LRU.

f counts up to four, about as many as S3-FIFO does: a conversation of fifty turns is no likelier to
have a next one than one of ten, but its beginning would stay long after its end.

Over the tree, H(parent) >= H(child): a parent is no candidate while a child is in the tier, and
when the last one goes, its H is raised to the clock, which is that child's.

Envelope: 8 bytes a row and 44 a leaf; a use costs one store, a victim O(log n).
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ConfigError
from .eviction import CandidateHeap, RowView

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_USES = 4.0

_SCALE = 1 << 20
"""Ranks are whole numbers: millionths of the value of a prompt's first block."""

DEFAULT_ATTENTION_TOKENS = 8192
"""Between SmolLM2-135M (3,000) and a 7B model (25,000); the root makes the difference small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds that a hit saves, in units of computing a block at the beginning of a prompt.

        T_recompute(n tokens at p) = n * (2P + 4*L*H*D*p) / F   ~   1 + p / attention_tokens
        dT = T_recompute - T_load                               ~   1 + p / attention_tokens - s

    P is the number of weights, L, H and D layers, query heads and head size, F the engine's FLOP/s;
    the store knows none of them but L and D, and needs none: only ratios order blocks.
    """

    attention_tokens: float = DEFAULT_ATTENTION_TOKENS
    """Position at which attention costs as much as the weights: P / (2*L*H*D) tokens."""
    block_tokens: int = 32
    """Tokens in a block: its position is its depth times this."""
    load_share: float = 0.0
    """s: loading a block from the tier, over computing it at the beginning of a prompt."""

    def __post_init__(self) -> None:
        if self.attention_tokens <= 0 or self.block_tokens < 1 or not 0 <= self.load_share <= 1:
            raise ConfigError(f"{self}: positive tokens and a load share of 0 to 1 are expected")

    def value(self, depth: int) -> float:
        """What dT is of the block that `depth` others precede; never below 0."""
        return 1.0 + depth * self.block_tokens / self.attention_tokens - self.load_share


class TreeGdsfPolicy:
    """Least value first; see the module.

    Lazy: a use does not move a row's entry in the heap; one that turns out stale when it comes to
    the top is pushed back with its present value, or dropped if the row may not leave.
    """

    def __init__(self, cost: CostModel | None = None) -> None:
        """Start with an empty tier.

        Args:
            cost: of a hit; the default model of 32-token blocks when None.
        """
        self._cost = cost or CostModel()
        self._clock = 0.0
        self._clock_at_use = array("d")
        self._heap = CandidateHeap()

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def clock(self) -> float:
        """H of the most valuable victim so far."""
        return self._clock

    def placed(self, row: int, view: RowView) -> None:  # noqa: ARG002  the protocol's signature
        """See `EvictionPolicy.placed`."""
        if row >= len(self._clock_at_use):
            self._reserve(row + 1 + len(self._clock_at_use) // 2)
        self._clock_at_use[row] = self._clock

    def filled(self, count: int, view: RowView) -> None:  # noqa: ARG002  the protocol's signature
        """See `EvictionPolicy.filled`; the clock of an empty tier is 0."""
        self._reserve(count)

    def _reserve(self, num_rows: int) -> None:
        self._clock_at_use.frombytes(bytes(8 * max(0, num_rows - len(self._clock_at_use))))

    def touched(self, row: int) -> None:
        """See `EvictionPolicy.touched`."""
        self._clock_at_use[row] = self._clock

    def touched_all(self, rows: Sequence[int]) -> None:
        """See `EvictionPolicy.touched_all`."""
        clock_at_use, clock = self._clock_at_use, self._clock
        for row in rows:
            clock_at_use[row] = clock

    def removed(self, row: int, view: RowView) -> None:
        """Nothing to note: the entry is dropped when it comes up."""

    def offer(self, row: int, view: RowView) -> None:
        """See `EvictionPolicy.offer`; raises H to the clock, so to that of the child that left."""
        self._heap.push(row, max(self._rank(row, view), int(self._clock * _SCALE)))

    def next_victim(self, view: RowView) -> int | None:
        """See `EvictionPolicy.next_victim`."""
        while len(self._heap):
            row, rank = self._heap.pop()
            if not view.may_leave(row):
                continue
            present = self._rank(row, view)
            if present <= rank:
                self._clock = max(self._clock, rank / _SCALE)
                return row
            self._heap.push(row, present)
        return None

    def _rank(self, row: int, view: RowView) -> int:
        value = self._cost.value(view.depth(row))
        priority = math.sqrt(min(view.hits(row), _MAX_USES) * value)
        return int((self._clock_at_use[row] + priority) * _SCALE)
