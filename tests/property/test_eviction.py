"""LRU over trees: order, bounds, and the watermarks' arithmetic."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ucm.block_columns import NO_ROW
from ucm.block_index import BlockIndex
from ucm.eviction import LruPolicy, Watermarks
from ucm.placement import evict
from ucm.storage.tier import SlotId
from ucm.types import BlockKey, TierKind


def key_of(number: int) -> BlockKey:
    return BlockKey((number + 1).to_bytes(32, "little"))


class EverythingMayGo:
    """A view without trees: plain LRU."""

    def __init__(self) -> None:
        self.used_us: dict[int, int] = {}

    def may_leave(self, row: int) -> bool:
        return row in self.used_us

    def last_use_us(self, row: int) -> int:
        return self.used_us[row]


@given(uses=st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_lru_is_the_textbook_lru(uses: list[int]) -> None:
    policy, view = LruPolicy(), EverythingMayGo()
    for now_us, row in enumerate(uses):
        known = row in view.used_us
        view.used_us[row] = now_us
        if not known:
            policy.offer(row, view)
    order = []
    while (victim := policy.next_victim(view)) is not None:
        order.append(victim)
        del view.used_us[victim]
    last_use = {row: now_us for now_us, row in enumerate(uses)}
    assert order == sorted(last_use, key=lambda row: last_use[row])
    assert len(policy) == 0


@given(
    parents=st.lists(st.integers(-1, 20), min_size=1, max_size=20),
    uses=st.lists(st.integers(0, 19), max_size=40),
    leased=st.sets(st.integers(0, 19), max_size=4),
)
def test_a_tree_is_evicted_leaf_first_and_oldest_leaf_first(
    parents: list[int], uses: list[int], leased: set[int]
) -> None:
    index = BlockIndex((LruPolicy(), LruPolicy()))
    tree = {row: min(parent, row - 1) for row, parent in enumerate(parents)}
    for row, parent in tree.items():
        added = index.add_row(key_of(row), parent if parent >= 0 else NO_ROW)
        assert added == row
        index.place(row, TierKind.MEMORY, SlotId(row))
    leased = {row for row in leased if row in tree}
    for row in leased:
        index.pin(row)
    last_use = dict.fromkeys(tree, 0)
    for now_us, row in enumerate(uses, start=1):
        if row in tree:
            index.touch(row, now_us)
            last_use[row] = now_us
    left = set(tree)
    for victim in evict(index, TierKind.MEMORY, len(tree)):
        row = int.from_bytes(victim.key, "little") - 1
        leaves = {each for each in left - leased if not any(tree[c] == each for c in left)}
        assert row in leaves
        assert last_use[row] == min(last_use[each] for each in leaves)
        left.discard(row)
    for row in left:  # what stays is leased, or an ancestor of something leased
        assert row in leased or any(tree[child] == row for child in left)
    assert index.check_integrity() == []


@given(
    total=st.integers(1, 1000),
    used_share=st.floats(0, 1),
    needed=st.integers(0, 1200),
    high=st.floats(0.5, 1.0),
    gap=st.floats(0, 0.4),
)
def test_watermarks_make_room_and_no_more_than_needed(
    total: int, used_share: float, needed: int, high: float, gap: float
) -> None:
    used = int(total * used_share)
    marks = Watermarks(high, high - gap)
    excess = marks.excess_slots(used=used, total=total, needed=needed)
    assert 0 <= excess <= used
    if used + needed <= total * high:
        assert excess == 0
    else:
        left = used - excess
        assert left == 0 or left + needed <= int(total * (high - gap))


@given(num_rows=st.integers(1, 300))
def test_the_heap_never_outgrows_its_rows(num_rows: int) -> None:
    policy, view = LruPolicy(), EverythingMayGo()
    for repeat in range(3):
        for row in range(num_rows):
            view.used_us[row] = repeat
            policy.offer(row, view)
    assert len(policy) == num_rows
