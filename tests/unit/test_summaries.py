"""The book of summaries: bounded, pinned slots stay, the least recently used goes first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ucm.errors import CapacityError, LayoutMismatchError
from ucm.kernels.summary_record import content_of
from ucm.layout import KvDtype, KvLayout
from ucm.metrics import Metrics
from ucm.storage.tier import SlotId
from ucm.summaries import StoredKind, SummaryBook, SummaryBudget, SummaryShelf, SummarySource
from ucm.types import BlockKey, SummaryKind

LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=16, dtype=KvDtype.FLOAT32)
SLOT_BYTES = 4096
KIND = SummaryKind.GSA_K4
CLIENT = SummarySource.CLIENT


def key(name: int) -> BlockKey:
    return BlockKey(name.to_bytes(32, "little"))


@pytest.fixture
def budget() -> SummaryBudget:
    return SummaryBudget(8 * SLOT_BYTES, Metrics())


@pytest.fixture
def book(budget: SummaryBudget) -> Iterator[SummaryBook]:
    made = SummaryBook(LAYOUT, KIND, budget)
    yield made
    assert made.check_integrity() == []
    made.close()
    assert budget.used_bytes == 0


def data(book: SummaryBook, fill: int) -> bytes:
    return bytes([fill]) * book.summary_bytes


def fill(book: SummaryBook, names: range) -> None:
    for name in names:
        assert book.put(key(name), data(book, name), name, CLIENT)


def held(book: SummaryBook, names: range) -> list[int]:
    return [name for name in names if (entry := book.get(key(name))) and entry.content == name]


def test_takes_half_of_what_is_left_and_then_the_least_recently_used(
    book: SummaryBook, budget: SummaryBudget
) -> None:
    fill(book, range(1, 5))
    assert budget.used_bytes == 4 * SLOT_BYTES
    assert book.get(key(1)) is not None  # used again: 2 is the oldest
    fill(book, range(5, 6))
    assert budget.used_bytes == 4 * SLOT_BYTES
    assert held(book, range(1, 6)) == [1, 3, 4, 5]
    assert budget.metrics.value("ucm_summaries_evicted_total") == 1
    other = SummaryBook(LAYOUT, SummaryKind.MEAN, budget)
    fill(other, range(1, 6))
    assert len(other) == 2
    other.close()


def test_a_pinned_slot_stays_as_it_is_whatever_happens_to_its_entry(book: SummaryBook) -> None:
    fill(book, range(1, 5))
    entry = book.get(key(2))
    assert entry is not None
    slot, view = entry.slot, book.view(entry.slot)
    assert view.readonly
    book.pin([slot, slot])
    assert book.put(key(2), data(book, 200), 200, CLIENT), "another content of the same block"
    fill(book, range(10, 20))
    assert bytes(view) == data(book, 2)
    book.unpin([slot])
    fill(book, range(20, 30))
    assert bytes(view) == data(book, 2)
    book.unpin([slot])
    fill(book, range(30, 40))
    assert bytes(view) != data(book, 2), "its slot is used again"


def test_refuses_when_all_is_pinned(book: SummaryBook) -> None:
    fill(book, range(1, 5))
    slots = [entry.slot for name in range(1, 5) if (entry := book.get(key(name)))]
    book.pin(slots)
    assert not book.put(key(9), data(book, 9), 9, CLIENT)
    book.unpin(slots)
    assert book.put(key(9), data(book, 9), 9, CLIENT)


def test_says_what_does_not_fit(budget: SummaryBudget) -> None:
    with pytest.raises(CapacityError, match=r"summaries\.capacity_bytes"):
        SummaryBook(LAYOUT, KIND, SummaryBudget(SLOT_BYTES - 1, Metrics()))
    long = KvLayout(
        num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=256, dtype=KvDtype.FLOAT16
    )
    with pytest.raises(LayoutMismatchError):
        SummaryBook(long, KIND, budget)


def test_a_shelf_forgets_what_speaks_for_another_content(budget: SummaryBudget) -> None:
    wanted: list[BlockKey] = []
    shelf = SummaryShelf(LAYOUT, StoredKind(KIND), wanted.append)
    book = shelf.open(KIND, budget)
    assert shelf.open(KIND, budget) is book
    old, new = (1, 2), (3, 4)
    shelf.arrived(key(1), old, (KIND, data(book, 1)), CLIENT)
    assert shelf.to_store(key(1), old) == data(book, 1)
    assert shelf.to_store(key(1), new) == b""
    assert wanted == []
    shelf.arrived(key(1), new, None, CLIENT)
    assert wanted == [key(1)], "the new content has none yet"
    assert book.get(key(1)) is None
    assert shelf.to_store(key(1), old) == b""
    shelf.arrived(key(1), new, (KIND, data(book, 3)), SummarySource.NVME)
    entry = book.get(key(1))
    assert entry is not None
    assert entry.content == content_of(new)
    assert entry.is_stored
    assert shelf.check_integrity() == []
    shelf.close()


def test_a_lost_slot_is_noticed(book: SummaryBook) -> None:
    fill(book, range(1, 3))
    book._free.append(SlotId(1))
    assert "lost or used twice" in book.check_integrity()[0]
    book._free.pop()


def test_a_closed_book_leaves_its_part_to_others(budget: SummaryBudget) -> None:
    first, second = (SummaryBook(LAYOUT, kind, budget) for kind in (KIND, SummaryKind.BOX))
    fill(first, range(8))
    fill(second, range(8))
    assert (len(first), len(second)) == (4, 2)
    first.close()
    fill(second, range(10, 14))
    assert len(second) == 4
    second.close()
    assert budget.used_bytes == 0
    assert budget.metrics.value("ucm_summaries_bytes") == 0
