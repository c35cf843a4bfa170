"""The index, case by case; `tests/property/test_block_index.py` has the general truth."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from ucm.block_columns import NO_ROW, NO_SLOT, PROMOTING, WRITING
from ucm.block_index import BlockIndex
from ucm.placement import evict
from ucm.storage.tier import SlotId, TierEntry
from ucm.types import ROOT_KEY, BlockKey, TierKind

MEMORY, NVME = TierKind.MEMORY, TierKind.NVME
A, B, C, D = (BlockKey(bytes([number]) * 32) for number in range(1, 5))


def build(*keys: BlockKey, tier: TierKind = MEMORY) -> tuple[BlockIndex, list[int]]:
    """An index with one chain in one tier."""
    index, rows, parent = BlockIndex(), [], NO_ROW
    for slot, key in enumerate(keys):
        parent = index.add_row(key, parent)
        index.place(parent, tier, SlotId(slot))
        rows.append(parent)
    return index, rows


def test_a_row_knows_its_block() -> None:
    index, (a, b) = build(A, B)
    assert (index.key(b), index.parent(b), index.parent_key(b)) == (B, a, A)
    assert (index.parent(a), index.parent_key(a)) == (NO_ROW, ROOT_KEY)
    assert (index.slot(b, MEMORY), index.slot(b, NVME)) == (1, NO_SLOT)
    assert index.fastest(a) is MEMORY
    assert index.find(C) == NO_ROW
    assert len(index) == 2


def test_the_prefix_ends_where_the_chain_does() -> None:
    index, rows = build(A, B, C)
    assert index.usable_prefix([A, B, C, D]) == rows
    assert index.usable_prefix([A, C]) == rows[:1]
    assert index.usable_prefix([B, C]) == rows[1:]
    assert index.usable_prefix([D]) == []
    assert index.usable_prefix([A, A]) == rows[:1]


def test_a_lost_block_makes_its_descendants_unusable_until_it_is_back() -> None:
    index, (a, b, c) = build(A, B, C)
    index.lose(b, MEMORY)
    assert index.usable_prefix([A, B, C]) == [a]
    assert index.usable_prefix([C]) == []
    assert not index.usable(c)
    assert index.find(B) == b  # a ghost holds the place
    index.place(b, MEMORY, SlotId(9))
    assert index.usable_prefix([A, B, C]) == [a, b, c]
    assert index.check_integrity() == []


def test_a_ghost_goes_with_its_last_child() -> None:
    index, (_, b, c) = build(A, B, C)
    index.lose(b, MEMORY)
    index.evict(c, MEMORY)
    assert index.find(B) == NO_ROW
    assert len(index) == 1
    assert index.check_integrity() == []


def test_a_chain_of_ghosts_goes_at_once() -> None:
    index, (a, b, c) = build(A, B, C)
    index.lose(a, MEMORY)
    index.lose(b, MEMORY)
    assert len(index) == 3
    index.lose(c, MEMORY)
    assert len(index) == 0
    assert index.check_integrity() == []


def test_a_parent_stays_while_a_child_is_in_its_tier() -> None:
    index, (a, b) = build(A, B)
    assert not index.may_leave(a, MEMORY)
    assert index.may_leave(b, MEMORY)
    index.evict(b, MEMORY)
    assert index.may_leave(a, MEMORY)


def test_a_last_copy_stays_while_there_is_a_child_anywhere() -> None:
    index, (a, b) = build(A, B)
    index.place(b, NVME, SlotId(0))
    index.evict(b, MEMORY)
    assert not index.may_leave(a, MEMORY)  # b, on NVMe, would be out of reach
    index.place(a, NVME, SlotId(1))
    assert index.may_leave(a, MEMORY)
    assert not index.may_leave(a, NVME)


@pytest.mark.parametrize("flight", [WRITING, PROMOTING])
def test_what_is_held_stays(flight: int) -> None:
    index, (a,) = build(A)
    index.pin(a)
    assert not index.may_leave(a, MEMORY)
    index.begin_flight(a, flight)
    index.unpin(a)
    assert index.in_flight(a)
    assert not index.may_leave(a, MEMORY)
    index.end_flight(a, flight)
    assert index.may_leave(a, MEMORY)


def test_a_pinned_row_outlives_its_copies() -> None:
    index, (a,) = build(A)
    index.pin(a)
    index.lose(a, MEMORY)
    assert index.key(a) == A
    assert not index.resident(a)
    index.unpin(a)
    assert index.find(A) == NO_ROW


def test_rows_are_reused() -> None:
    index, (a,) = build(A)
    index.touch(a, 77)
    index.evict(a, MEMORY)
    assert index.add_row(B, NO_ROW) == a
    assert index.last_use_us(a) == 0
    index.place(a, NVME, SlotId(0))
    assert index.usable_prefix([A]) == []
    assert index.check_integrity() == []


def test_a_restart_fills_the_index() -> None:
    index = BlockIndex()
    entries = [
        TierEntry(A, ROOT_KEY, SlotId(4)),
        TierEntry(B, A, SlotId(2)),
        TierEntry(B, A, SlotId(3)),  # twice
        TierEntry(D, C, SlotId(1)),  # an orphan
    ]
    index.load(entries, NVME)
    assert index.num_copies(NVME) == 2
    assert [index.slot(row, NVME) for row in index.usable_prefix([A, B])] == [4, 2]
    assert index.find(D) == NO_ROW
    assert index.check_integrity() == []


def test_damage_is_noticed() -> None:
    index, (a, b) = build(A, B, tier=NVME)
    index._child_rows[a] = 7
    index._slots[1][b] = index._slots[1][a]
    problems = " ".join(index.check_integrity())
    assert "child rows" in problems
    assert "used twice" in problems


def test_an_orphan_is_noticed() -> None:
    index, (a, _) = build(A, B, tier=NVME)
    index._slots[1][a] = -1
    assert any("left nvme before it" in problem for problem in index.check_integrity())


@pytest.mark.timeout(120)
def test_a_block_costs_less_than_350_bytes() -> None:
    """Of host memory, keys and eviction heaps included, in both tiers, as many short chains."""
    num_blocks, rng = 12_000, random.Random(1)
    tracemalloc.start()
    index = BlockIndex()
    for number in range(num_blocks):
        parent = NO_ROW if number % 4 == 0 else number - 1
        row = index.add_row(BlockKey(rng.randbytes(32)), parent)
        index.touch(row, 10**15 + number)
        index.place(row, MEMORY, SlotId(number))
        index.place(row, NVME, SlotId(number))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used / num_blocks < 350
    assert len(evict(index, MEMORY, num_blocks)) == num_blocks


def test_many_rows_at_once_are_as_one_by_one() -> None:
    """Chains longer than one probe, in both tiers, with a gap; pins of all rows at once."""
    index, keys = BlockIndex(), [BlockKey(number.to_bytes(32, "big")) for number in range(1, 3001)]
    assert index.usable_prefix(keys) == []
    parent = NO_ROW
    for number, key in enumerate(keys):
        row = index.add_row(key, parent)
        index.place(row, NVME, SlotId(number))
        if number < 1500:
            index.place(row, MEMORY, SlotId(number))
        parent = row
    rows = index.usable_prefix(keys)
    assert rows == [index.find(key) for key in keys]
    assert index.prefix(keys)[1] == (MEMORY,) * 1500 + (NVME,) * 1500
    assert index.usable_prefix([*keys[:1024], keys[1030]]) == rows[:1024]
    assert index.usable_prefix(keys[2000:]) == rows[2000:]
    index.pin_all(rows, now_us=7)
    assert {index.pins(row) for row in rows} == {1}
    index.lose(rows[2000], NVME)
    assert index.usable_prefix(keys) == rows[:2000]
    index.unpin_all(rows)
    assert not index.check_integrity()
    assert index.next_victim(NVME) == rows[-1]


def test_uses_of_many_rows_count_like_uses_of_each() -> None:
    one, many = BlockIndex(), BlockIndex()
    for index in (one, many):
        previous = NO_ROW
        for number in range(5):
            row = index.add_row(BlockKey(bytes([number]) * 32), previous)
            index.place(row, TierKind.MEMORY, SlotId(number))
            previous = row
    rows = [0, 2, 4]
    for now_us in (1_000, 7_000_000, 900_000_000):
        for row in rows:
            one.touch(row, now_us)
        many.pin_all(rows, now_us)
    assert [many.last_use_us(row) for row in range(5)] == [one.last_use_us(row) for row in range(5)]
    many.unpin_all(rows)


def test_the_prefix_of_any_list_of_keys_is_the_longest_chain() -> None:
    """Bisection and the guess that a chain's rows are neighbours against going one by one."""
    index, chains = BlockIndex(), random.Random(7)
    known: list[BlockKey] = []
    for number in range(200):
        parent = NO_ROW if chains.random() < 0.1 else chains.randrange(-1, len(known))
        key = BlockKey(number.to_bytes(32, "little"))
        index.place(index.add_row(key, parent), MEMORY, SlotId(number))
        known.append(key)
    for _ in range(2000):
        row, chain = chains.randrange(200), list[BlockKey]()
        while row != NO_ROW:
            chain.insert(0, index.key(row))
            row = index.parent(row)
        for _ in range(chains.randrange(4)):
            spoilt = chains.choice([*known, BlockKey(chains.randbytes(32))])
            place = chains.randrange(len(chain) + 1)
            chain[place : place + chains.randrange(2)] = [spoilt]
        expected: list[int] = []
        for key in chain:
            row = index.find(key)
            if row == NO_ROW or (expected and index.parent(row) != expected[-1]):
                break
            expected.append(row)
        assert index.usable_prefix(chain) == expected


def test_descendants_come_before_what_they_hang_on() -> None:
    index = BlockIndex()
    keys = [BlockKey(bytes([number]) * 32) for number in range(1, 8)]
    #  0 - 1 - 2        4 - 5
    #       \- 3        6
    parents = [NO_ROW, 0, 1, 1, NO_ROW, 4, NO_ROW]
    for key, parent in zip(keys, parents, strict=True):
        index.place(index.add_row(key, parent), TierKind.MEMORY, SlotId(index.find(key)))
    assert index.with_descendants([]) == []
    assert index.with_descendants([6]) == [6]
    assert index.with_descendants([4, 5]) == [5, 4]
    found = index.with_descendants([0])
    assert sorted(found) == [0, 1, 2, 3]
    assert all(found.index(row) < found.index(parents[row]) for row in found if parents[row] >= 0)
