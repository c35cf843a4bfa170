"""The index against a plain model: prefixes, counters, ghosts, and no orphan ever by eviction.

Once for each eviction policy: the rules of the tree hold whatever the order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ucm.block_columns import NO_ROW, PROMOTING, WRITING
from ucm.block_index import BlockIndex
from ucm.eviction_gdsf import CostModel
from ucm.eviction_policies import make_policy
from ucm.placement import evict
from ucm.storage.tier import SlotId
from ucm.types import ROOT_KEY, BlockKey, TierKind

NUM_KEYS = 24
MEMORY, NVME = TierKind.MEMORY, TierKind.NVME


def key_of(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(32, "little")) if number else ROOT_KEY


def parent_of(number: int) -> int:
    """A fixed tree: 1 and 2 are roots, the children of n are 2n+1 and 2n+2."""
    return max(0, (number - 1) // 2)


@dataclass
class Model:
    """Copies, pins and flights of each block, by number."""

    copies: dict[TierKind, set[int]] = field(default_factory=lambda: {MEMORY: set(), NVME: set()})
    pins: dict[int, int] = field(default_factory=dict)
    flights: dict[int, int] = field(default_factory=dict)

    def resident(self, number: int) -> bool:
        return any(number in held for held in self.copies.values())

    def usable(self, number: int) -> bool:
        while number:
            if not self.resident(number):
                return False
            number = parent_of(number)
        return True

    def children(self, number: int) -> list[int]:
        return [child for child in (2 * number + 1, 2 * number + 2) if child <= NUM_KEYS]


numbers = st.integers(1, NUM_KEYS)
tiers = st.sampled_from([MEMORY, NVME])


class IndexMachine(RuleBasedStateMachine):
    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        cost = CostModel(attention_tokens=64.0)
        memory, nvme = (make_policy(self.policy, cost=cost, capacity=8) for _ in range(2))
        self.index = BlockIndex((memory, nvme))
        self.model = Model()
        self.now_us = 0
        self.next_slot = 0

    def row(self, number: int) -> int:
        return self.index.find(key_of(number))

    @rule(number=numbers, tier=tiers)
    def place(self, number: int, tier: TierKind) -> None:
        parent = parent_of(number)
        if number in self.model.copies[tier] or (parent and not self.model.usable(parent)):
            return
        if tier is NVME and parent and parent not in self.model.copies[NVME]:
            return
        row = self.row(number)
        if row == NO_ROW:
            row = self.index.add_row(key_of(number), self.row(parent) if parent else NO_ROW)
        self.index.touch(row, self.now_us)
        self.index.place(row, tier, SlotId(self.next_slot))
        self.next_slot += 1
        self.model.copies[tier].add(number)

    @rule(number=numbers, tier=tiers)
    def lose(self, number: int, tier: TierKind) -> None:
        if number in self.model.copies[tier]:
            self.index.lose(self.row(number), tier)
            self.model.copies[tier].discard(number)

    @rule(number=numbers)
    def pin(self, number: int) -> None:
        if self.model.usable(number):
            self.index.pin(self.row(number))
            self.model.pins[number] = self.model.pins.get(number, 0) + 1

    @precondition(lambda self: self.model.pins)
    @rule(choice=st.integers(0, 1000))
    def unpin(self, choice: int) -> None:
        number = sorted(self.model.pins)[choice % len(self.model.pins)]
        self.index.unpin(self.row(number))
        self.model.pins[number] -= 1
        if not self.model.pins[number]:
            del self.model.pins[number]

    @rule(number=numbers, flight=st.sampled_from([WRITING, PROMOTING]))
    def fly(self, number: int, flight: int) -> None:
        if self.model.resident(number) and number not in self.model.flights:
            self.index.begin_flight(self.row(number), flight)
            self.model.flights[number] = flight

    @precondition(lambda self: self.model.flights)
    @rule(choice=st.integers(0, 1000))
    def land(self, choice: int) -> None:
        number = sorted(self.model.flights)[choice % len(self.model.flights)]
        self.index.end_flight(self.row(number), self.model.flights.pop(number))

    @rule(number=numbers, delta_us=st.integers(0, 5))
    def touch(self, number: int, delta_us: int) -> None:
        self.now_us += delta_us
        if self.model.resident(number):
            self.index.touch(self.row(number), self.now_us)

    @rule(tier=tiers, count=st.integers(1, 6))
    def evict(self, tier: TierKind, count: int) -> None:
        for victim in evict(self.index, tier, count):
            number = int.from_bytes(victim.key, "little")
            held = self.model.copies[tier]
            assert number in held
            assert number not in self.model.pins, "a leased block was evicted"
            assert number not in self.model.flights, "a block in flight was evicted"
            children = self.model.children(number)
            assert not any(child in held for child in children), "a parent left before its child"
            held.discard(number)
            if not self.model.resident(number):
                orphans = [child for child in children if self.model.resident(child)]
                assert not orphans, "the last copy of a parent was evicted"

    @rule(number=numbers)
    def find_prefix(self, number: int) -> None:
        path: list[int] = []
        while number:
            path.insert(0, number)
            number = parent_of(number)
        expected = 0
        while expected < len(path) and self.model.usable(path[expected]):
            expected += 1
        keys = [key_of(each) for each in path]
        assert self.index.usable_prefix(keys) == [self.row(each) for each in path[:expected]]
        for start in range(1, len(path)):
            rest = self.index.usable_prefix(keys[start:])
            assert len(rest) == max(0, expected - start)

    @invariant()
    def is_sound(self) -> None:
        assert self.index.check_integrity() == []
        for tier in (MEMORY, NVME):
            assert self.index.num_copies(tier) == len(self.model.copies[tier])

    def teardown(self) -> None:
        """Nothing held and everything evicted leaves nothing behind: no leak of rows."""
        for number, count in self.model.pins.items():
            for _ in range(count):
                self.index.unpin(self.row(number))
        for number, flight in self.model.flights.items():
            self.index.end_flight(self.row(number), flight)
        for _ in range(2):
            evict(self.index, MEMORY, NUM_KEYS)
            evict(self.index, NVME, NUM_KEYS)
        assert len(self.index) == 0


class GdsfMachine(IndexMachine):
    policy = "tree-gdsf"


class S3FifoMachine(IndexMachine):
    policy = "s3-fifo"


TestLru = pytest.mark.timeout(90)(IndexMachine.TestCase)
TestGdsf = pytest.mark.timeout(90)(GdsfMachine.TestCase)
TestS3Fifo = pytest.mark.timeout(90)(S3FifoMachine.TestCase)
for case in (TestLru, TestGdsf, TestS3Fifo):
    case.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
