"""tree-GDSF: what a hit is worth, aging, and a parent's value when its last child goes."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest

from ucm.block_columns import NO_ROW
from ucm.block_index import BlockIndex
from ucm.errors import ConfigError
from ucm.eviction import LruPolicy
from ucm.eviction_gdsf import CostModel, Ghosts, TreeGdsfPolicy
from ucm.placement import evict
from ucm.storage.tier import SlotId
from ucm.tier_view import TierView
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


def test_a_block_that_comes_back_has_its_uses_back() -> None:
    store = Store()
    store.store(1)
    store.use(1, now_us=S)
    assert store.evict(1) == [1]
    store.store(2, now_us=2 * S)
    store.store(1, now_us=2 * S)
    assert store.evict(1) == [2]


def test_a_ghost_that_is_older_than_the_first_one_does_not_drive_out_the_others() -> None:
    ghosts = Ghosts(64)
    ghosts.add(key_of(1), 2, 100 * S)
    ghosts.add(key_of(2), 3, 50 * S)
    assert ghosts.take(key_of(1)) == (2, 100 * S)
    assert ghosts.take(key_of(2)) == (3, 100 * S)  # as old as the first, at most


def test_what_a_restart_found_goes_first_and_the_oldest_of_it() -> None:
    store = Store()
    store.policy.filled(3, TierView(store.index, 0))
    for number in range(1, 4):
        row = store.index.add_row(key_of(number), NO_ROW)
        store.index._slots[0][row] = row
        store.index._num_copies[0] += 1
        store.policy.offer(row, TierView(store.index, 0))
    store.store(9, now_us=10**15)
    store.use(2, now_us=10**15)
    assert store.evict(3) == [1, 3, 2]


def test_it_learns_how_soon_blocks_come_back() -> None:
    """Reuse comes after a minute here, so a block nearly that old is worth more than a new one."""
    store = Store()
    for number in range(1, 6001):
        store.store(number, now_us=number * S)
        if number > 60:
            store.use(number - 60, now_us=number * S)
        if number > 200:
            store.evict(1)
    uses = np.ones(3, np.uint8)
    soon, new, late = store.policy._ages.index(uses, np.array([40 * S, 0, 300 * S]))
    assert soon > 1.5 * new
    assert late < new / 10


def test_a_block_that_was_used_or_extended_after_it_was_chosen_is_passed_over() -> None:
    store = Store()
    for number in range(1, 601):
        store.store(number, now_us=number * S)
    first = store.evict(1)[0]
    chosen = [row for _, row, _ in store.policy._chosen]
    assert len(chosen) >= 2
    names = [int.from_bytes(store.index.key(row), "little") for row in chosen]
    store.use(names[-1], now_us=700 * S)
    store.store(1000, parent=names[-2], now_us=700 * S)
    gone = store.evict(len(chosen))
    assert not {names[-1], names[-2], first} & set(gone)


def test_of_few_leaves_each_victim_is_the_least_although_its_parent_came_up_late() -> None:
    """A batch of victims is the same as if the least leaf were looked for before each of them."""
    store, rng = Store(), random.Random(5)
    parents: dict[int, int] = {}
    for chain in range(1, 101):
        numbers = range(chain * 10, chain * 10 + rng.randint(1, 9))
        store.store(*numbers, now_us=chain * S)
        parents |= {each: each - 1 if each > chain * 10 else 0 for each in numbers}
        for _ in range(rng.randint(0, 3)):
            store.use(*numbers[: rng.randint(1, len(numbers))], now_us=chain * S)
    policy = store.policy

    def value(number: int) -> float:
        row = store.index.find(key_of(number))
        age_us = policy._now_us - policy._last_use_us[row]
        index = policy._ages.index_of(policy._uses[row], age_us)
        return index * policy._cost.value(store.index.depth(row)) - age_us * 1e-30

    values = {number: value(number) for number in parents}
    for victim in store.evict(len(parents)):
        inner = set(parents.values())
        leaves = [values[number] for number in parents if number not in inner]
        assert values[victim] == pytest.approx(min(leaves), rel=1e-12)
        del parents[victim]
    assert not parents


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


def test_a_parent_never_ranks_below_the_child_that_left() -> None:
    """The parent was used as its child was, so once the child is out it is next among equals."""
    store = Store(attention_tokens=1e6)
    store.store(1, 2, 3)
    store.store(7, now_us=S)
    store.use(7, now_us=2 * S)
    store.use(7, now_us=3 * S)
    assert store.evict(4) == [3, 2, 1, 7]


def test_it_forgets_nothing_and_invents_nothing_over_many_rounds() -> None:
    """Leaves, columns and index agree: what went in is what comes out, once each."""
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


@pytest.mark.parametrize("count", [3, 64, 300])
def test_many_uses_at_once_count_like_one_after_the_other(count: int) -> None:
    together, singly = TreeGdsfPolicy(), TreeGdsfPolicy()
    rng = random.Random(count)
    for policy in (together, singly):
        policy._reserve(count)
    for now_us in range(S, 12 * S, S):
        rows = rng.sample(range(count), rng.randint(1, count))
        together.touched_all(rows, now_us)
        for row in rows:
            singly.touched(row, now_us)
        ages = np.arange(0, 20 * S, S // 2)
        for policy in (together, singly):
            policy._ages.refresh()
        for uses in np.arange(8, dtype=np.uint8):
            ours, theirs = (
                p._ages.index(np.full_like(ages, uses), ages) for p in (together, singly)
            )
            assert np.allclose(ours, theirs)
    assert together._uses == singly._uses
    assert together._last_use_us == singly._last_use_us
