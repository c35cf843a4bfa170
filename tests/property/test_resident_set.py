"""A random life of a resident set against what a dictionary says should be where."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ucm.errors import CapacityError
from ucm.sparse.resident_set import Placement, ResidentSet

LAYERS = 3
pytestmark = pytest.mark.timeout(60)


class ResidentSetMachine(RuleBasedStateMachine):
    """The oracle: for each layer, the block of each slot and which reads are under way."""

    @initialize(
        num_slots=st.integers(6, 12),
        sink=st.integers(1, 2),
        recent=st.integers(0, 2),
        num_restored=st.sampled_from([0, 0, 15]),
    )
    def start(self, num_slots: int, sink: int, recent: int, num_restored: int) -> None:
        self.sink, self.recent = sink, recent
        self.set = ResidentSet(LAYERS, num_slots, sink_blocks=sink, recent_blocks=recent)
        self.set.restore(num_restored)
        self.where: list[dict[int, int]] = [{} for _ in range(LAYERS)]
        self.reads: list[tuple[int, Placement]] = []

    @rule(count=st.integers(1, 4))
    def begin(self, count: int) -> None:
        before = [dict(layer) for layer in self.where]
        num_fresh = self.set.num_blocks - self.set.num_kept
        first_recent = self.set.num_blocks + count - 1 - self.recent
        is_pinned = {
            slot
            for layer in self.where
            for block, slot in layer.items()
            if block < self.sink or block >= first_recent or block >= self.set.num_kept
        }
        try:
            slots = self.set.begin_blocks(count)
        except CapacityError:
            assert self.reads or num_fresh + count > self.set.num_slots
            return
        if set(slots) & is_pinned:
            assert self.reads or count > self.set.num_slots - len(is_pinned)
        first = self.set.num_blocks - count
        for number, layer in enumerate(self.where):
            gone = {block for block, slot in layer.items() if slot in slots}
            assert all(block < self.set.num_kept for block in gone)
            for block in gone:
                del layer[block]
            layer.update(zip(range(first, first + count), slots, strict=True))
            assert len(before[number]) <= len(layer) + len(slots)

    @rule(share=st.floats(0, 1))
    def keep(self, share: float) -> None:
        fresh = self.set.num_blocks - self.set.num_kept
        self.set.keep(self.set.num_kept + round(share * fresh))

    @precondition(lambda self: self.set.num_kept > 0)
    @rule(layer=st.integers(0, LAYERS - 1), data=st.data(), is_ahead=st.booleans())
    def place(self, layer: int, data: st.DataObject, is_ahead: bool) -> None:
        kept = [b for b in range(self.set.num_kept) if b not in self.where[layer]]
        wanted = np.array(sorted(data.draw(st.sets(st.sampled_from(kept or [0])))), dtype=np.int64)
        wanted = wanted[[b in kept for b in wanted.tolist()]]
        held = sorted(self.where[layer])
        protected = np.array(
            sorted(data.draw(st.sets(st.sampled_from(held or [0])))), dtype=np.int64
        )
        mass = np.zeros(self.set.num_blocks, dtype=np.float32)
        mass[wanted] = data.draw(st.sampled_from([0.125, 0.25, 0.5, 1.0]))
        self.set.want(layer, wanted, mass)
        placed = self.set.place(layer, wanted, protected, is_ahead=is_ahead)
        assert sorted([*placed.blocks, *placed.rest]) == wanted.tolist()
        slots = set(placed.slots.tolist())
        assert len(slots) == len(placed.blocks)
        loading = {s for n, read in self.reads if n == layer for s in read.slots.tolist()}
        assert not slots & loading
        for block in [b for b, slot in self.where[layer].items() if slot in slots]:
            assert self.sink <= block < self.set.num_kept
            assert block not in protected
            del self.where[layer][block]
        self.where[layer].update(zip(placed.blocks.tolist(), placed.slots.tolist(), strict=True))
        if len(placed.blocks):
            self.reads.append((layer, placed))

    @precondition(lambda self: self.reads)
    @rule(data=st.data(), share=st.floats(0, 1))
    def end(self, data: st.DataObject, share: float) -> None:
        number = data.draw(st.integers(0, len(self.reads) - 1))
        layer, read = self.reads.pop(number)
        good = round(share * len(read.blocks))
        self.set.end_load(layer, read.slots, good)
        for block in read.blocks[good:].tolist():
            del self.where[layer][block]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "set"):
            return
        assert self.set.check_integrity() == []
        blocks = np.arange(self.set.num_blocks)
        for layer, held in enumerate(self.where):
            loading = {b for n, read in self.reads if n == layer for b in read.blocks.tolist()}
            expected = [-1 if b in loading else held.get(b, -1) for b in blocks.tolist()]
            assert self.set.slots_of(layer, blocks).tolist() == expected
            assert set(blocks[self.set.is_loading(layer, blocks)].tolist()) == loading
            assert self.set.missing(layer).tolist() == [b for b in blocks if b not in held]


TestResidentSet = ResidentSetMachine.TestCase
TestResidentSet.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def filled(num_slots: int = 8, num_blocks: int = 20) -> ResidentSet:
    """A set of one layer whose blocks went through it one by one."""
    made = ResidentSet(1, num_slots)
    for block in range(num_blocks):
        made.begin_blocks(1)
        made.keep(block)
    return made


def test_what_is_wanted_most_stays() -> None:
    made = filled()
    mass = np.zeros(20, dtype=np.float32)
    mass[[5, 7]] = 0.4
    for _ in range(3):
        made.want(0, np.array([5, 7]), mass)
        placed = made.place(0, made.missing(0)[np.isin(made.missing(0), [5, 7])], np.array([5, 7]))
        made.end_load(0, placed.slots, len(placed.slots))
    made.begin_blocks(2)
    made.keep(20)
    assert set(np.flatnonzero(made.slots_of(0, np.arange(22)) >= 0)) >= {0, 5, 7, 19, 20, 21}


def test_nothing_moves_for_what_is_worth_no_more() -> None:
    made = filled()
    held = np.flatnonzero(made.slots_of(0, np.arange(20)) >= 0)
    made.want(0, held, np.full(20, 0.05, dtype=np.float32))
    placed = made.place(0, made.missing(0), np.array([], dtype=np.int64))
    assert len(placed.blocks) == 0
    assert placed.rest.tolist() == made.missing(0).tolist()


def test_reads_ahead_are_counted() -> None:
    made = filled()
    mass = np.linspace(1, 0, 20, dtype=np.float32)
    nothing = np.array([], dtype=np.int64)
    for blocks in ([1, 2], [3]):
        made.note_mass(0, np.array(blocks), mass[blocks])
    early = made.place(0, np.array([1, 2]), nothing, is_ahead=True)
    late = made.place(0, np.array([3]), nothing, is_ahead=True)
    made.end_load(0, early.slots, 2)
    made.want(0, np.array([1, 3]), mass)
    made.end_load(0, late.slots, 1)
    made.want(0, np.array([1, 3]), mass)
    assert (made.stats.useful_ahead, made.stats.late_ahead) == (1, 1)
    made.begin_blocks(5)
    assert made.stats.wasted_ahead == 1


def test_a_new_block_finds_a_slot_where_each_layer_has_the_sink_elsewhere() -> None:
    made = ResidentSet(4, 4, recent_blocks=0)
    made.restore(20)
    for layer in range(4):
        blocks = np.roll([0, 5, 6, 7], layer)
        mass = np.zeros(20, dtype=np.float32)
        mass[blocks] = [0.4, 0.3, 0.2, 0.1]
        made.want(layer, blocks, mass)
        placed = made.place(layer, blocks, blocks)
        made.end_load(layer, placed.slots, 4)
    assert len({int(made.slots_of(layer, np.array([0]))[0]) for layer in range(4)}) == 4
    (slot,) = made.begin_blocks(1)
    assert made.slot_of_new(20) == slot
    assert made.check_integrity() == []
    assert [0 in made.missing(layer) for layer in range(4)].count(True) == 1


def test_what_is_not_kept_cannot_leave() -> None:
    made = ResidentSet(2, 6)
    made.begin_blocks(5)
    with pytest.raises(CapacityError, match="more resident blocks"):
        made.begin_blocks(2)
    assert made.num_blocks == 5
