"""Which slabs of a long sequence are in its few pool blocks: pure decisions, no tensors.

    slot     0      1      2      3      4      5       the pool blocks that the sequence owns
    layer 0  sink   17     40     3      recent filling
    layer 1  sink   8      21     40     recent filling   each layer holds its own selection

A block begins in the same slot of every layer, because a pass writes all layers there. Once it is
full and *kept* (it can be read back) each layer gives its slot up on its own, to a block that
attention wants more.

    role of a slot in a layer
    fresh      its block is not kept                               the same in all layers
    pinned     its block is the sink or recent                     leaves only for a new block
    loading    a read into it is under way                         never given away
    evictable  the rest; the block with the least decayed mass goes first

A sink that was read back (the set was restored) may be in another slot of each layer. A new block
needs one slot in all of them, so where no other is left it takes one that is pinned somewhere.

Invariants: no slot holds two blocks, no block is in two slots of a layer; a block that is not kept
is in its slot in all layers. Ahead-of-time reads are counted: useful (wanted when it was there),
late (wanted before), wasted (never wanted).

The decay is InfLLM's (arXiv 2402.04617): score <- 0.9 score + 0.1 mass.

Envelope: a few NumPy calls on [num_slots] or [num_blocks] a layer, some 30 us.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ucm.errors import CapacityError

Indexes = npt.NDArray[np.int64]
Mass = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

NOBODY = -1
_PINNED = 1e9
"""Worth of a pinned slot: a block's decayed mass is at most about 1."""


@dataclass(slots=True)
class ResidencyStats:
    """Counters of one sequence's life; blocks are counted in each layer."""

    hits: int = 0
    """Wanted and in the pool."""
    misses: int = 0
    evicted: int = 0
    useful_ahead: int = 0
    """Read ahead, and there when it was wanted."""
    late_ahead: int = 0
    """Read ahead, and still on its way when it was wanted."""
    wasted_ahead: int = 0
    """Read ahead, and gone before it was wanted."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where missing blocks of one layer go."""

    blocks: Indexes
    """Those that get a slot."""
    slots: Indexes
    """Theirs, in the order of `blocks`."""
    rest: Indexes
    """Those that get none: they pass through without staying."""


class ResidentSet:
    """The slots of one sequence; see the module. Owned by the engine's thread."""

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        *,
        sink_blocks: int = 1,
        recent_blocks: int = 2,
        decay: float = 0.1,
    ) -> None:
        """Start empty.

        Args:
            num_layers: each has its own map.
            num_slots: pool blocks that the sequence owns.
            sink_blocks: first blocks that stay.
            recent_blocks: last blocks that stay, the one that is being filled not counted.
            decay: weight of a new mass in a block's score.
        """
        self.num_blocks = 0
        """Blocks that have begun."""
        self.num_kept = 0
        """Leading blocks that can be read back."""
        self.num_slots = num_slots
        self.stats = ResidencyStats()
        self._sink_blocks = sink_blocks
        self._recent_blocks = recent_blocks
        self._decay = decay
        self._holder = np.full((num_layers, num_slots), NOBODY, dtype=np.int64)
        self._is_loading = np.zeros((num_layers, num_slots), dtype=np.bool_)
        self._is_ahead = np.zeros((num_layers, num_slots), dtype=np.bool_)
        self._slot = np.full((num_layers, 64), NOBODY, dtype=np.int64)
        self._mass = np.zeros((num_layers, 64), dtype=np.float32)

    @property
    def max_new_blocks(self) -> int:
        """Blocks that can begin at once, whatever was there, when all before are kept."""
        return self.num_slots - self._sink_blocks - max(1, self._recent_blocks)

    def restore(self, num_kept: int) -> None:
        """Start behind blocks that were kept earlier; none of them is in the pool."""
        assert self.num_blocks == 0
        self._grow(num_kept)
        self.num_blocks = self.num_kept = num_kept

    def begin_blocks(self, count: int) -> list[int]:
        """Give the next `count` blocks a slot, the same in all layers; no read may be under way.

        Raises:
            CapacityError: so many blocks are not kept that the rest does not do; nothing was
                changed.
        """
        total = self.num_blocks + count
        pinned = self._pinned(total)
        busy = ((self._holder >= self.num_kept) | self._is_loading).any(0)
        slots = np.flatnonzero(~busy)
        if len(slots) < count:
            raise CapacityError(
                f"resident set: {count} blocks begin, {len(slots)} of {self.num_slots} slots can "
                "be given up; a sequence needs more resident blocks"
            )
        worth = self._worth(pinned).sum(0)[slots]
        chosen = np.sort(slots[np.argsort(worth, kind="stable")[:count]])
        self._grow(total)
        self._evict(slice(None), chosen)
        for block, slot in zip(range(self.num_blocks, total), chosen, strict=True):
            self._holder[:, slot] = block
            self._slot[:, block] = slot
        self.num_blocks = total
        return [int(slot) for slot in chosen]

    def keep(self, num_blocks: int) -> None:
        """The first `num_blocks` blocks can be read back from now on."""
        assert self.num_kept <= num_blocks <= self.num_blocks
        self.num_kept = num_blocks

    def slots_of(self, layer: int, blocks: Indexes) -> Indexes:
        """The slots of blocks in a layer; `NOBODY` for those that are not there or on their way."""
        slots = self._slot[layer, blocks]
        return np.where(self._is_loading[layer, slots], NOBODY, slots)

    def slot_of_new(self, block: int) -> int:
        """The slot, in all layers, of a block that is not kept."""
        assert block >= self.num_kept
        return int(self._slot[0, block])

    def is_loading(self, layer: int, blocks: Indexes) -> Flags:
        """Which of the blocks are on their way into the layer."""
        slots = self._slot[layer, blocks]
        flags: Flags = (slots >= 0) & self._is_loading[layer, slots]
        return flags

    def missing(self, layer: int) -> Indexes:
        """Blocks that a layer neither has nor awaits, ascending."""
        return np.flatnonzero(self._slot[layer, : self.num_blocks] < 0)

    def want(self, layer: int, blocks: Indexes, mass: Mass | None = None) -> None:
        """Attention reads these blocks: count them, and let the scores follow.

        Args:
            layer: the layer.
            blocks: chosen ones, ascending.
            mass: [num_blocks], the share of the attention mass that each block, chosen or not, is
                estimated to hold; equal shares of the chosen ones when None.
        """
        count = self.num_blocks
        if mass is None:
            mass = np.zeros(count, dtype=np.float32)
            mass[blocks] = 1.0 / max(1, len(blocks))
        score = self._mass[layer, :count]
        score *= 1.0 - self._decay
        score[: len(mass)] += self._decay * mass[:count]
        slots = self._slot[layer, blocks]
        slots = slots[slots >= 0]
        was_ahead, on_way = self._is_ahead[layer, slots], self._is_loading[layer, slots]
        self.stats.late_ahead += int((was_ahead & on_way).sum())
        self.stats.useful_ahead += int((was_ahead & ~on_way).sum())
        self._is_ahead[layer, slots] = False
        num_there = len(slots) - int(on_way.sum())
        self.stats.hits += num_there
        self.stats.misses += len(blocks) - num_there

    def place(
        self, layer: int, blocks: Indexes, protected: Indexes, *, is_ahead: bool = False
    ) -> Placement:
        """Give missing blocks slots of what is worth less, the best first; reads into them follow.

        Args:
            layer: the layer.
            blocks: neither there nor on their way, kept.
            protected: blocks that may not leave the layer now.
            is_ahead: nobody has asked for them yet.

        Returns:
            Their places; the slots are loading until `end_load`.
        """
        if len(blocks) == 0:
            return Placement(blocks, blocks, blocks)
        holder = self._holder[layer]
        free = ~(self._pinned_of(holder, self.num_blocks) & (holder >= 0))
        free &= ~self._is_loading[layer]
        held = self._slot[layer, protected]
        free[held[held >= 0]] = False
        slots = np.flatnonzero(free)
        worth = np.where(holder[slots] >= 0, self._mass[layer, holder[slots]], -1.0)
        order = np.argsort(worth, kind="stable")
        gain = self._mass[layer, blocks]
        best = np.argsort(-gain, kind="stable")
        num_tried = min(len(slots), len(blocks))
        pays = gain[best[:num_tried]] > worth[order[:num_tried]]
        count = num_tried if bool(pays.all()) else int(np.argmin(pays))
        taken, chosen = slots[order[:count]], blocks[best[:count]]
        self._evict(layer, taken)
        self._holder[layer, taken] = chosen
        self._slot[layer, chosen] = taken
        self._is_loading[layer, taken] = True
        self._is_ahead[layer, taken] = is_ahead
        return Placement(chosen, taken, np.sort(blocks[best[count:]]))

    def end_load(self, layer: int, slots: Indexes, num_good: int) -> None:
        """Reads into `slots` are over: the first `num_good` succeeded, the others hold nothing."""
        self._is_loading[layer, slots] = False
        lost = slots[num_good:]
        self._slot[layer, self._holder[layer, lost]] = NOBODY
        self._holder[layer, lost] = NOBODY
        self._is_ahead[layer, lost] = False

    def best_missing(self, layer: int, mass: Mass, count: int) -> Indexes:
        """The kept blocks with the most of `mass` that the layer neither has nor awaits."""
        num = min(len(mass), self.num_kept)
        missing = np.flatnonzero(self._slot[layer, :num] < 0)
        order = np.argsort(-mass[missing], kind="stable")[:count]
        return missing[order]

    def note_mass(self, layer: int, blocks: Indexes, mass: Mass) -> None:
        """Raise the scores of blocks that a prediction wants to what it says of them."""
        score = self._mass[layer]
        score[blocks] = np.maximum(score[blocks], self._decay * mass)

    def check_integrity(self) -> list[str]:
        """Every violated invariant, in words; empty when sound."""
        faults: list[str] = []
        for layer, holder in enumerate(self._holder):
            held = holder[holder >= 0]
            if len(np.unique(held)) != len(held):
                faults.append(f"layer {layer}: a block is in two slots")
            where = np.full(self._slot.shape[1], NOBODY, dtype=np.int64)
            where[held] = np.flatnonzero(holder >= 0)
            if not np.array_equal(where, self._slot[layer]):
                faults.append(f"layer {layer}: the two directions of the map differ")
            fresh = self._slot[layer, self.num_kept : self.num_blocks]
            if bool((fresh < 0).any()) or not np.array_equal(
                fresh, self._slot[0, self.num_kept : self.num_blocks]
            ):
                faults.append(f"layer {layer}: a block that is not kept has left its slot")
            if bool((self._is_loading[layer] & (holder < 0)).any()):
                faults.append(f"layer {layer}: a read goes to a slot that holds nothing")
        return faults

    def _pinned(self, num_blocks: int) -> Flags:
        return self._pinned_of(self._holder, num_blocks)

    def _pinned_of(self, holder: Indexes, num_blocks: int) -> Flags:
        """Slots whose block may not leave when the sequence has `num_blocks` blocks.

        The last one is being filled; those before it are recent.
        """
        first_recent = num_blocks - 1 - self._recent_blocks
        is_kept = holder < min(self.num_kept, max(first_recent, 0))
        return (holder < self._sink_blocks) | ~is_kept

    def _worth(self, pinned: Flags) -> npt.NDArray[np.float64]:
        """[L, num_slots]: what is lost with each slot; older blocks go first among equals.

        More is lost with one that is pinned than with all others together.
        """
        holder = self._holder
        rows = np.arange(len(holder))[:, None]
        worth = np.where(holder >= 0, self._mass[rows, holder] + 1e-12 * (holder + 1), 0.0)
        return np.where(pinned & (holder >= 0), _PINNED, worth).astype(np.float64)

    def _evict(self, layers: int | slice, slots: Indexes) -> None:
        holder = self._holder[layers][..., slots]
        table = self._slot[layers]
        rows = np.nonzero(holder >= 0)
        blocks = holder[rows]
        if isinstance(layers, int):
            table[blocks] = NOBODY
        else:
            table[rows[0], blocks] = NOBODY
        self.stats.evicted += len(blocks)
        self.stats.wasted_ahead += int(self._is_ahead[layers][..., slots].sum())
        self._is_ahead[layers][..., slots] = False
        self._holder[layers][..., slots] = NOBODY

    def _grow(self, num_blocks: int) -> None:
        width = self._slot.shape[1]
        if num_blocks <= width:
            return
        more = max(num_blocks, 2 * width) - width
        self._slot = np.pad(self._slot, ((0, 0), (0, more)), constant_values=NOBODY)
        self._mass = np.pad(self._mass, ((0, 0), (0, more)))


def as_indexes(blocks: Sequence[int]) -> Indexes:
    """`blocks` as the functions of this module take them."""
    return np.asarray(blocks, dtype=np.int64)
