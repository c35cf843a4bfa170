"""EntryTable: chains in order, a file and back, and what is left to the slow path."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from ucm.block_index import BlockIndex
from ucm.storage.entry_table import EntryTable, decode_table, encode_table, make_table
from ucm.storage.index import IndexRecord
from ucm.storage.recovery import order_by_chain
from ucm.storage.tier import SlotId, TierEntry
from ucm.testing.tier_conformance import make_key
from ucm.types import KEY_BYTES, ROOT_KEY, BlockKey, TierKind


def table_of(records: Sequence[IndexRecord]) -> EntryTable | None:
    """The table of records in any order."""
    records = sorted(records, key=lambda record: record.key)

    def column(keys: list[BlockKey]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
        return np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), KEY_BYTES)

    return make_table(
        column([record.key for record in records]),
        column([record.parent for record in records]),
        np.array([record.slot for record in records], np.int64),
        np.array([record.generation for record in records], np.uint64),
    )


def record(name: int, parent: int | None, generation: int, slot: int | None = None) -> IndexRecord:
    parent_key = ROOT_KEY if parent is None else make_key(parent)
    slot = name if slot is None else slot
    return IndexRecord(make_key(name), parent_key, SlotId(slot), generation)


def forest(seed: int, count: int = 300) -> list[IndexRecord]:
    """Random chains; one block in ten was written again, after its children."""
    choice = random.Random(seed)
    parents = [
        None if n == 0 or choice.random() < 0.1 else choice.randrange(n) for n in range(count)
    ]
    ages = [n if choice.random() < 0.9 else count + n for n in range(count)]
    return [record(n, parents[n], 100 + ages[n]) for n in range(count)]


def entries_of(records: Sequence[IndexRecord]) -> list[TierEntry]:
    return [TierEntry(each.key, each.parent, each.slot) for each in records]


@pytest.mark.parametrize("seed", range(10))
def test_parents_come_first_and_nothing_is_lost(seed: int) -> None:
    records = forest(seed)
    table = table_of(records)
    assert table is not None
    entries = list(table)
    assert sorted(entries, key=lambda entry: entry.slot) == entries_of(records)
    seen = {ROOT_KEY}
    for entry in entries:
        assert entry.parent in seen
        seen.add(entry.key)
    ages = {each.slot: each.generation for each in records}
    assert table.generations.tolist() == [ages[SlotId(slot)] for slot in table.slots.tolist()]


def test_without_exceptions_the_order_is_that_of_age() -> None:
    records = [record(n, n - 1 if n % 7 else None, 1000 + n) for n in range(50)]
    table = table_of(records)
    assert table is not None
    assert list(table) == entries_of(order_by_chain(records)[0]) == entries_of(records)


@pytest.mark.parametrize("seed", range(5))
def test_an_index_filled_from_columns_is_the_same(seed: int) -> None:
    table = table_of(forest(seed))
    assert table is not None
    fast, slow = BlockIndex(), BlockIndex()
    fast.load(table, TierKind.NVME)
    slow.load(iter(table), TierKind.NVME)
    assert fast.check_integrity() == []
    for entry in table:
        assert fast.slot(fast.find(entry.key), TierKind.NVME) == entry.slot
        assert fast.parent_key(fast.find(entry.key)) == entry.parent
        assert not fast.has(fast.find(entry.key), TierKind.MEMORY)
    assert victims(fast) == victims(slow), "eviction takes them in the same order"
    assert len(fast) == len(slow) == 0


def victims(index: BlockIndex) -> list[BlockKey]:
    found = []
    while (row := index.next_victim(TierKind.NVME)) >= 0:
        found.append(index.key(row))
        index.evict(row, TierKind.NVME)
    return found


def test_an_index_that_holds_something_takes_the_entries_one_by_one() -> None:
    table = table_of([record(n, n - 1 if n else None, n + 1) for n in range(9)])
    assert table is not None
    index = BlockIndex()
    index.load(
        [TierEntry(make_key("other"), ROOT_KEY, SlotId(77)), *list(table)[:3]], TierKind.NVME
    )
    index.load(table, TierKind.NVME)
    assert len(index) == 10
    assert index.check_integrity() == []


@pytest.mark.parametrize(
    "wrong",
    [
        [record(0, None, 1), record(1, 0, 2, slot=0)],
        [record(0, None, 1), record(2, 1, 2)],
        [record(0, 1, 1), record(1, 0, 2)],
    ],
    ids=["two in one slot", "an orphan", "a circle"],
)
def test_what_needs_more_than_ordering_is_left_to_others(wrong: list[IndexRecord]) -> None:
    assert table_of(wrong) is None


def test_keys_that_begin_alike_are_not_taken_for_each_other() -> None:
    first, second = (BlockKey(b"samesame" + bytes([n]) * 24) for n in (1, 2))
    records = [
        IndexRecord(first, ROOT_KEY, SlotId(0), 1),
        IndexRecord(second, ROOT_KEY, SlotId(1), 2),
        IndexRecord(make_key("child"), second, SlotId(2), 3),
    ]
    table = table_of(records)
    assert table is None or list(table) == entries_of(records)


@pytest.mark.parametrize("count", [0, 1, 40])
def test_a_file_gives_the_table_back(count: int) -> None:
    table = table_of([record(n, n - 1 if n else None, n + 1) for n in range(count)])
    assert table is not None
    data = encode_table(table)
    again = decode_table(data)
    assert again is not None
    assert list(again) == list(table)
    assert again.generations.tolist() == table.generations.tolist()
    for damaged in (data[:-1], data + b"x", b"X" + data[1:], data[:8], b""):
        assert decode_table(damaged) is None
