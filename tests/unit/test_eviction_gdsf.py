"""tree-GDSF: what a hit is worth, aging, and a parent's value when its last child goes."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from ucm.block_columns import NO_ROW
from ucm.block_index import BlockIndex
from ucm.errors import ConfigError
from ucm.eviction import LruPolicy
from ucm.eviction_gdsf import CostModel, TreeGdsfPolicy
from ucm.placement import evict
from ucm.row_uses import HIT_HALF_LIFE_US
from ucm.storage.tier import SlotId
from ucm.types import BlockKey, TierKind

MEMORY = TierKind.MEMORY
S = 1_000_000


def key_of(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(32, "little"))


class Store:
    """One memory tier under tree-GDSF; keys are numbers."""

    def __init__(self, **cost: float) -> None:
        model = CostModel(attention_tokens=cost.get("attention_tokens", 64.0), block_tokens=32)
        self.policy = TreeGdsfPolicy(model)
        self.index = BlockIndex((self.policy, LruPolicy()))
        self.num_stored = 0

    def store(self, *numbers: int, parent: int = 0, now_us: int = 0) -> None:
        row = self.index.find(key_of(parent)) if parent else NO_ROW
        for number in numbers:
            row = self.index.add_row(key_of(number), row)
            self.index.touch(row, now_us)
            self.index.place(row, MEMORY, SlotId(self.num_stored))
            self.num_stored += 1

    def use(self, *numbers: int, now_us: int) -> None:
        for number in numbers:
            self.index.touch(self.index.find(key_of(number)), now_us)

    def evict(self, count: int) -> list[int]:
        victims = evict(self.index, MEMORY, count)
        return [int.from_bytes(victim.key, "little") for victim in victims]


def test_a_hit_is_worth_more_further_down_a_prompt() -> None:
    cost = CostModel(attention_tokens=3000, block_tokens=512, load_share=0.25)
    assert cost.value(0) == pytest.approx(0.75)
    assert cost.value(6) == pytest.approx(1 + 6 * 512 / 3000 - 0.25)
    assert CostModel(load_share=1.0).value(0) == 0.0


@pytest.mark.parametrize(
    "wrong", [{"attention_tokens": 0}, {"block_tokens": 0}, {"load_share": 1.5}]
)
def test_a_cost_model_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="CostModel"):
        CostModel(**wrong)  # type: ignore[arg-type]


def test_what_is_used_more_stays_longer() -> None:
    store = Store()
    store.store(1)
    store.store(2)
    store.use(1, now_us=S)
    store.use(2, now_us=2 * S)
    store.use(1, now_us=3 * S)
    store.store(3, now_us=4 * S)
    assert store.evict(3) == [3, 2, 1]


def test_a_deep_leaf_stays_longer_than_a_shallow_one() -> None:
    store = Store()
    store.store(1, 2, 3, 4)
    store.store(9, now_us=S)
    assert store.evict(1) == [9]


def test_uses_long_ago_count_less() -> None:
    store = Store()
    store.store(1)
    for _ in range(4):
        store.use(1, now_us=0)
    assert store.index.hits(store.index.find(key_of(1))) == pytest.approx(5)
    store.use(1, now_us=HIT_HALF_LIFE_US)
    assert store.index.hits(store.index.find(key_of(1))) == pytest.approx(1 + 2.5)


def test_what_was_popular_once_ages() -> None:
    """Without a clock, a block that was used often would stay for ever."""
    store = Store()
    store.store(1)
    for _ in range(20):
        store.use(1, now_us=0)
    victims: list[int] = []
    for number in range(2, 200):
        store.store(number, now_us=number * S)
        victims += store.evict(store.index.num_copies(MEMORY) - 8)
    assert 1 in victims
    assert store.policy.clock > 0


def test_a_parent_never_ranks_below_the_child_that_left() -> None:
    """The parent was used as its child was, so once the child is out it is next among equals."""
    store = Store()
    store.store(1, 2, 3)
    store.store(7, now_us=S)
    store.use(7, now_us=2 * S)
    store.use(7, now_us=3 * S)
    assert store.evict(4) == [3, 2, 1, 7]
    clocks = []
    for number in range(10, 40):
        store.store(number, now_us=4 * S)
    while store.evict(1):
        clocks.append(store.policy.clock)
    assert clocks == sorted(clocks)


def test_it_forgets_nothing_and_invents_nothing_over_many_rounds() -> None:
    """Heap, columns and index agree: what went in is what comes out, once each."""
    store, rng = Store(), random.Random(3)
    stored, gone = set[int](), list[int]()
    for number in range(1, 400):
        held = sorted(stored - set(gone))
        parent = rng.choice(held) if held and rng.random() < 0.7 else 0
        store.store(number, parent=parent, now_us=number * S)
        stored.add(number)
        if held:
            store.use(rng.choice(held), now_us=number * S)
        if number > 50:
            gone += store.evict(1)
    gone += store.evict(1000)
    assert sorted(gone) == sorted(stored)
    assert len(store.policy) == 0
    assert len(store.index) == 0


@pytest.mark.timeout(120)
def test_a_block_costs_less_than_40_bytes_more_than_under_lru() -> None:
    num_blocks = 12_000

    def used_bytes(
        policies: tuple[LruPolicy, LruPolicy] | tuple[TreeGdsfPolicy, TreeGdsfPolicy],
    ) -> float:
        rng = random.Random(1)
        tracemalloc.start()
        index = BlockIndex(policies)
        for number in range(num_blocks):
            row = index.add_row(
                BlockKey(rng.randbytes(32)), NO_ROW if number % 4 == 0 else number - 1
            )
            index.touch(row, 10**15 + number)
            index.place(row, MEMORY, SlotId(number))
            index.place(row, TierKind.NVME, SlotId(number))
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return used / num_blocks

    plain = used_bytes((LruPolicy(), LruPolicy()))
    assert used_bytes((TreeGdsfPolicy(), TreeGdsfPolicy())) - plain < 40
