"""S3-FIFO over leaves: probation, promotion with ancestors, ghosts."""

from __future__ import annotations

from ucm.block_columns import NO_ROW
from ucm.block_index import BlockIndex
from ucm.eviction import LruPolicy
from ucm.eviction_s3fifo import S3FifoPolicy
from ucm.placement import evict
from ucm.storage.tier import SlotId
from ucm.types import BlockKey, TierKind

MEMORY = TierKind.MEMORY


def key_of(number: int) -> BlockKey:
    return BlockKey((number * 2654435761).to_bytes(8, "little") * 4)


class Store:
    """One memory tier of `capacity` blocks under S3-FIFO; keys are numbers."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.policy = S3FifoPolicy(capacity)
        self.index = BlockIndex((self.policy, LruPolicy()))
        self.names: dict[BlockKey, int] = {}

    def store(self, *numbers: int, parent: int = 0) -> list[int]:
        """Store a chain; what had to go for it."""
        row = self.index.find(key_of(parent)) if parent else NO_ROW
        gone: list[int] = []
        for number in numbers:
            gone += self.evict(self.index.num_copies(MEMORY) + 1 - self.capacity)
            self.names[key_of(number)] = number
            row = self.index.add_row(key_of(number), row)
            self.index.touch(row, 0)
            self.index.place(row, MEMORY, SlotId(len(self.names)))
        return gone

    def use(self, *numbers: int) -> None:
        for number in numbers:
            self.index.touch(self.index.find(key_of(number)), 0)

    def evict(self, count: int) -> list[int]:
        return [self.names.pop(victim.key) for victim in evict(self.index, MEMORY, count)]


def test_new_blocks_leave_in_the_order_of_arrival() -> None:
    store = Store(10)
    for number in range(1, 6):
        store.store(number)
    store.use(1)  # one use is not enough
    assert store.evict(3) == [1, 2, 3]


def test_what_was_used_twice_outlives_a_scan() -> None:
    store = Store(20)
    for number in range(1, 11):
        store.store(number)
    store.use(1, 2, 3)
    store.use(1, 2, 3)
    gone = [each for number in range(100, 400) for each in store.store(number)]
    assert not {1, 2, 3} & set(gone)
    assert len(gone) == 300 - 10


def test_what_main_never_sees_again_leaves_it() -> None:
    store = Store(4)
    for number in range(1, 5):
        store.store(number)
        store.use(number)
        store.use(number)
    gone = [each for number in range(100, 140) for each in store.store(number)]
    assert {1, 2, 3, 4} & set(gone)


def test_a_ghost_that_comes_back_goes_to_main() -> None:
    store = Store(10)
    for number in range(1, 11):
        store.store(number)
    assert store.store(11) == [1]
    store.store(1)
    gone = [each for number in range(100, 108) for each in store.store(number)]
    assert 1 not in gone
    assert set(gone) <= set(range(2, 12))


def test_a_promoted_leaf_takes_its_ancestors_along() -> None:
    store = Store(12)
    store.store(1, 2, 3)
    store.use(1, 2, 3)
    store.use(1, 2, 3)
    gone = [each for number in range(100, 200) for each in store.store(number)]
    assert not {1, 2, 3} & set(gone)
    assert store.policy._sizes[1] == 3


def test_leaves_go_before_their_parents() -> None:
    store = Store(10)
    store.store(1, 2, 3)
    store.store(4, parent=1)
    gone = store.evict(10)
    assert gone.index(3) < gone.index(2) < gone.index(1)
    assert gone.index(4) < gone.index(1)
    assert store.policy._sizes == [0, 0]
    assert len(store.policy) == 0


def test_a_block_that_moves_within_the_tier_keeps_its_queue() -> None:
    store = Store(10)
    for number in range(1, 12):
        store.store(number)
    store.store(1)  # a ghost: to main
    row = store.index.find(key_of(1))
    store.index.move(row, MEMORY, SlotId(99))
    assert store.index.slot(row, MEMORY) == 99
    gone = [each for number in range(100, 108) for each in store.store(number)]
    assert 1 not in gone
