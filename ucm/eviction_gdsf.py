"""tree-GDSF: the leaf whose loss would cost the least recomputation goes first.

    value(b) = P_reuse(b) * dT(b) / bytes(b)

P_reuse is what keeping the block for a second earns, by the number of its uses and the time since
the last, as learned from this tier's own work (`reuse_ages`); dT the seconds that a hit saves,
growing with the position in the prompt (`CostModel`); every block of a tier has the same bytes. So
a block is weighed by frequency, cost and size as in GreedyDual-Size-Frequency (Cherkasova,
"Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy", HP Labs 1998),
over a tree of blocks. GDSF's clock, which lets what is not used fall behind, is replaced by
measured ages: see ADR 0008 for what the clock cost.

A *ghost* (`ghost`) remembers when an evicted block was last used and how often, four times as many
as the tier holds. One that comes back gets its uses back, and its age counts as learned: else the
policy would never hear that it evicts too soon.

Values change with time, so no heap keeps them in order: the next victims are the least 64th of a
sample of 512 leaves, and when there are no more leaves than that, the least 64 of all. The least of
64 is among the worst 5 % with a chance of 96 % (1 - 0.95^64); LHD and hyperbolic caching
(Blankstein, Sen and Freedman, USENIX ATC 2017) sample as many. A leaf that appears meanwhile, such
as the parent of a victim, joins the next victims if its value is no higher than theirs: so a chain
goes in one stroke. A choice holds for a tenth of a second. The seed is fixed: the same calls give
the same victims.

Over the tree, a parent is no candidate while a child is in the tier.

Envelope: 13 bytes a row, 4 a leaf, 8 a ghost (32 MiB at most, from the first eviction on). A victim
is O(1). A block stored and evicted took some 25 us more than under LRU in replays on a busy
machine, which was about LRU's own cost.
"""

from __future__ import annotations

from array import array
from bisect import insort
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from .block_columns import NO_ROW, column
from .errors import ConfigError
from .eviction import RowView
from .ghost import GhostSet
from .reuse_ages import MAX_USES, ReuseAges
from .row_uses import FEW_ROWS
from .types import BlockKey

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SAMPLE_SIZE = 512
_NUM_CHOSEN_OF_SAMPLE = SAMPLE_SIZE // 64
"""Looking at a thousand leaves for each victim finds no better ones on public traces."""
_NUM_CHOSEN_OF_ALL = 64
"""Where all leaves were looked at, the order of the least ones is exact but for the time."""
_CHOICE_HOLDS_US = 100_000

DEFAULT_ATTENTION_TOKENS = 8192
"""Between SmolLM2-135M (3,000) and a 7B model (25,000)."""

_TIE_BREAK = 1e-30
"""Value a microsecond of age takes: below any difference between values above 0."""

_GHOSTS_PER_BLOCK = 4
_MAX_GHOSTS = 4 << 20


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

    def values(self, depths: NDArray[np.int32]) -> NDArray[np.float64]:
        """`value` of each of `depths`, [n]."""
        scale = np.float64(self.block_tokens / self.attention_tokens)
        values: NDArray[np.float64] = depths * scale + (1.0 - self.load_share)
        return values


class Leaves:
    """A set of rows from which any can be drawn by its place. All operations are O(1)."""

    def __init__(self) -> None:
        self._rows = array("i")
        self._places = array("i")

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, row: int) -> bool:
        return self._places[row] != NO_ROW

    def add(self, row: int) -> None:
        """Add a row, unless it is there already."""
        missing = row + 1 - len(self._places)
        if missing > 0:
            self._places.extend([NO_ROW] * (missing + len(self._places) // 2))
        if self._places[row] == NO_ROW:
            self._places[row] = len(self._rows)
            self._rows.append(row)

    def discard(self, row: int) -> None:
        """Remove a row if it is there; the last one takes its place."""
        place = self._places[row] if 0 <= row < len(self._places) else NO_ROW
        if place != NO_ROW:
            self._places[row] = NO_ROW
            last = self._rows.pop()
            if last != row:
                self._rows[place] = last
                self._places[last] = place

    def sample(self, rng: np.random.Generator) -> NDArray[np.int32]:
        """`SAMPLE_SIZE` rows, one perhaps more than once; all of them if there are no more."""
        count = len(self._rows)
        rows = column(self._rows)
        drawn: NDArray[np.int32] = (
            rows.copy()
            if count <= SAMPLE_SIZE
            else rows[(rng.random(SAMPLE_SIZE) * count).astype(np.intp)]
        )
        return drawn


class Ghosts:
    """Last use and number of uses of blocks that have left, in the 32 bits of a ghost's stamp.

    bits 31..3   quarters of a second since the first block left
    bits  2..0   uses
    """

    def __init__(self, capacity: int) -> None:
        """Allocate nothing yet: a tier that never evicts needs no ghosts.

        Args:
            capacity: blocks to remember.
        """
        self._capacity = capacity
        self._ghosts: GhostSet | None = None
        self._epoch_us = 0

    def add(self, key: BlockKey, uses: int, last_use_us: int) -> None:
        """Remember a block that leaves."""
        ticks = (last_use_us - self._epoch_us) // _TICK_US
        if self._ghosts is None or ticks >= 1 << _TICK_BITS:  # the first, or years have passed
            self._ghosts, self._epoch_us, ticks = GhostSet(self._capacity), last_use_us, 0
        self._ghosts.add(key, max(0, ticks) << _USES_BITS | uses)

    def take(self, key: BlockKey) -> tuple[int, int] | None:
        """Forget a block; its uses and last use in microseconds, None if it was not known."""
        stamp = self._ghosts.take(key) if self._ghosts is not None else None
        if stamp is None:
            return None
        last_use_us = self._epoch_us + (stamp >> _USES_BITS) * _TICK_US
        return stamp & MAX_USES, last_use_us


_TICK_US = 250_000
_USES_BITS = MAX_USES.bit_length()
_TICK_BITS = 32 - _USES_BITS


class TreeGdsfPolicy:
    """Least value first; see the module."""

    def __init__(self, cost: CostModel | None = None, capacity: int = 1 << 16) -> None:
        """Start with an empty tier.

        Args:
            cost: of a hit; the default model of 32-token blocks when None.
            capacity: blocks that the tier can hold, which sets how many ghosts are remembered.
        """
        self._cost = cost or CostModel()
        self._ages = ReuseAges()
        self._ghosts = Ghosts(min(_GHOSTS_PER_BLOCK * capacity, _MAX_GHOSTS))
        self._leaves = Leaves()
        self._rng = np.random.default_rng(0)
        self._uses = bytearray()
        self._last_use_us = array("q")
        self._now_us = 0
        self._chosen: list[tuple[float, int, int]] = []
        """Next victims, the last one first: value with its sign changed, row, and the last use
        that the value was computed for."""
        self._ceiling = -inf
        """Least value of a leaf that was looked at and not chosen."""
        self._chosen_at_us = 0

    def __len__(self) -> int:
        return len(self._leaves)

    def placed(self, row: int, view: RowView) -> None:
        """See `EvictionPolicy.placed`."""
        if row >= len(self._uses):
            self._reserve(row + 1)
        now_us = view.last_use_us(row)
        uses = 1
        known = self._ghosts.take(view.key(row))
        if known is not None:
            uses, before_us = known
            self._ages.note_reuse(uses, max(0, now_us - before_us))
            uses = min(MAX_USES, uses + 1)
        self._ages.note_use(uses)
        self._uses[row] = uses
        self._last_use_us[row] = now_us
        self._now_us = max(self._now_us, now_us)
        self._leaves.discard(view.parent(row))

    def filled(self, count: int, view: RowView) -> None:  # noqa: ARG002  the protocol's signature
        """See `EvictionPolicy.filled`: without uses, so the first to go, and the oldest of them."""
        self._reserve(count)
        column(self._last_use_us, np.int64)[:count] = np.arange(-count, 0)

    def touched(self, row: int, now_us: int) -> None:
        """See `EvictionPolicy.touched`."""
        uses = self._uses[row]
        self._ages.note_reuse(uses, now_us - self._last_use_us[row])
        uses = min(MAX_USES, uses + 1)
        self._ages.note_use(uses)
        self._uses[row] = uses
        self._last_use_us[row] = self._now_us = now_us

    def touched_all(self, rows: Sequence[int], now_us: int) -> None:
        """See `EvictionPolicy.touched_all`."""
        if len(rows) <= FEW_ROWS:
            self._touch_few(rows, now_us)
            return
        numbers = np.array(rows, np.int32)
        all_uses = np.frombuffer(self._uses, np.uint8)
        last_use_us = column(self._last_use_us, np.int64)
        uses = all_uses[numbers]
        self._ages.note_reuses(uses, now_us - last_use_us[numbers])
        all_uses[numbers] = np.minimum(uses + 1, MAX_USES)
        last_use_us[numbers] = self._now_us = now_us

    def _touch_few(self, rows: Sequence[int], now_us: int) -> None:
        """The blocks of a prompt were mostly used together before, too: what is alike counts once.

        64 rows take 30 us, one by one 170, by numpy 60 (350 when its code is not in the cache).
        """
        all_uses, last_use_us = self._uses, self._last_use_us
        alike: dict[tuple[int, int], int] = {}
        for row in rows:
            before = all_uses[row], last_use_us[row]
            alike[before] = alike.get(before, 0) + 1
            all_uses[row] = min(MAX_USES, before[0] + 1)
            last_use_us[row] = now_us
        for (uses, used_us), count in alike.items():
            self._ages.note_reuse(uses, now_us - used_us, count)
            self._ages.note_use(min(MAX_USES, uses + 1), count)
        self._now_us = now_us

    def removed(self, row: int, view: RowView) -> None:
        """See `EvictionPolicy.removed`."""
        self._leaves.discard(row)
        if self._uses[
            row
        ]:  # of one found at the start and not used since, there is nothing to know
            self._ghosts.add(view.key(row), self._uses[row], self._last_use_us[row])

    def offer(self, row: int, view: RowView) -> None:
        """See `EvictionPolicy.offer`."""
        self._leaves.add(row)
        if self._chosen_at_us <= self._now_us - _CHOICE_HOLDS_US:
            return
        last_use_us = self._last_use_us[row]
        age_us = self._now_us - last_use_us
        value = self._ages.index_of(self._uses[row], age_us) * self._cost.value(view.depth(row))
        value -= age_us * _TIE_BREAK
        if value <= self._ceiling:
            insort(self._chosen, (-value, row, last_use_us))

    def next_victim(self, view: RowView) -> int | None:
        """See `EvictionPolicy.next_victim`."""
        while len(self._leaves):
            if not self._chosen or self._chosen_at_us <= self._now_us - _CHOICE_HOLDS_US:
                self._choose(view)
            _, row, last_use_us = self._chosen.pop()
            if row not in self._leaves or self._last_use_us[row] != last_use_us:
                continue  # it got a child, left or was used since
            self._leaves.discard(row)
            if view.may_leave(row):
                return row
        return None

    def _choose(self, view: RowView) -> None:
        """Look at leaves and choose those of least value; of equal ones, those used first."""
        rows = self._leaves.sample(self._rng)
        uses = np.frombuffer(self._uses, np.uint8)[rows]
        last_use_us = column(self._last_use_us, np.int64)[rows]
        ages_us = self._now_us - last_use_us
        values = self._ages.index(uses, ages_us) * self._cost.values(view.depths(rows))
        values -= ages_us * _TIE_BREAK
        is_sample = len(self._leaves) > SAMPLE_SIZE
        count = _NUM_CHOSEN_OF_SAMPLE if is_sample else _NUM_CHOSEN_OF_ALL
        least = values.argsort()
        self._ceiling = float(values[least[count]]) if count < len(least) else inf
        least = least[:count][::-1]
        self._chosen_at_us = self._now_us
        self._chosen = list(
            zip(
                (-values[least]).tolist(),
                rows[least].tolist(),
                last_use_us[least].tolist(),
                strict=True,
            )
        )

    def _reserve(self, count: int) -> None:
        """Have columns for `count` rows."""
        missing = count - len(self._uses)
        if missing > 0:
            missing += len(self._uses) // 2
            self._uses.extend(bytes(missing))
            self._last_use_us.frombytes(bytes(8 * missing))
