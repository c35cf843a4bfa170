"""Open namespaces: memory that is made ready ahead of use counts as used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ucm.clock import SystemClock
from ucm.config import MIB, MemoryConfig
from ucm.layout import KvDtype, KvLayout
from ucm.metrics import Metrics
from ucm.namespaces import Namespace, NamespaceTable, TierFactory
from ucm.testing.blocks import tiny_spec

LAYOUT = KvLayout(
    num_layers=1, num_kv_heads=1, head_dim=64, block_tokens=2048, dtype=KvDtype.FLOAT32
)
"""Blocks of 1 MiB."""

CAPACITY_MIB = 256
PREFAULT_MIB = 24


def make_table(prefault_mib: int) -> NamespaceTable:
    config = MemoryConfig(capacity_bytes=CAPACITY_MIB * MIB, prefault_bytes=prefault_mib * MIB)
    return NamespaceTable(config, 4, TierFactory(), SystemClock(), Metrics())


@pytest.fixture
def table() -> Iterator[NamespaceTable]:
    table = make_table(PREFAULT_MIB)
    yield table
    table.close()


def open_one(table: NamespaceTable, name: str = "one") -> Namespace:
    return table.open(tiny_spec(name, LAYOUT), lambda _: None)


def take(table: NamespaceTable, found: Namespace, count: int) -> None:
    with table.lock:
        assert len(table.take_slots_locked(found, count)) == count


def test_memory_is_ready_ahead_of_use_and_counts(table: NamespaceTable) -> None:
    found = open_one(table)
    assert found.touched_slots == PREFAULT_MIB // 4, "a quarter before the first use"
    take(table, found, 10)
    assert found.touched_slots == 10 + 10, "as much again as was used"
    take(table, found, 50)
    assert found.touched_slots == 60 + PREFAULT_MIB, "at most what is configured"
    found.memory.arena.wait_prefaulted(20.0)
    assert found.memory.arena.prefaulted_bytes == found.touched_bytes


def test_it_stops_at_the_capacity(table: NamespaceTable) -> None:
    first, second = open_one(table), open_one(table, "two")
    take(table, first, 200)
    assert first.touched_slots + second.touched_slots <= CAPACITY_MIB
    take(table, second, 20)
    assert first.touched_slots + second.touched_slots <= CAPACITY_MIB


def test_it_can_be_switched_off() -> None:
    table = make_table(0)
    found = open_one(table)
    take(table, found, 3)
    assert found.touched_slots == 3
    assert found.memory.arena.prefaulted_bytes == 0
    table.close()
