"""The arena: slots, seals, and what a client that gets the descriptor can do."""

from __future__ import annotations

import mmap
import os

import pytest

from ucm.errors import ConfigError, InvalidArgumentError, TierUnavailableError
from ucm.storage.arena import Arena, ArenaKind
from ucm.storage.file_io import is_aligned
from ucm.storage.slots import SlotState, SlotTable
from ucm.storage.tier import SlotId
from ucm.testing.tier_conformance import LAYOUT


def test_a_client_can_read_and_nothing_else() -> None:
    arena = Arena(LAYOUT, 4, ArenaKind.READ_ONLY)
    arena.view(SlotId(1))[:5] = b"hello"
    client = os.dup(arena.fd)  # what SCM_RIGHTS does
    with mmap.mmap(client, arena.size_bytes, prot=mmap.PROT_READ) as mapped:
        start = arena.offset(SlotId(1))
        assert mapped[start : start + 5] == b"hello"
        arena.view(SlotId(1))[:5] = b"again"
        assert mapped[start : start + 5] == b"again"
    with pytest.raises(PermissionError):
        mmap.mmap(client, arena.size_bytes, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(client, b"x", 0)
    for size in (0, 2 * arena.size_bytes):
        with pytest.raises(PermissionError):
            os.ftruncate(client, size)
    os.close(client)
    arena.close()


def test_a_staging_arena_is_writable_but_keeps_its_size() -> None:
    arena = Arena(LAYOUT, 2, ArenaKind.STAGING)
    client = os.dup(arena.fd)
    with mmap.mmap(client, arena.size_bytes) as mapped:
        mapped[:5] = b"hello"
    assert bytes(arena.view(SlotId(0))[:5]) == b"hello"
    for size in (0, 2 * arena.size_bytes):
        with pytest.raises(PermissionError):
            os.ftruncate(client, size)
    os.close(client)
    arena.close()


def test_it_costs_only_what_is_written() -> None:
    arena = Arena(LAYOUT, 1 << 20, ArenaKind.READ_ONLY)
    arena.view(SlotId(12345))[:1] = b"x"
    assert arena.size_bytes == LAYOUT.block_bytes << 20
    assert os.fstat(arena.fd).st_blocks * 512 <= 4 << 20
    arena.close()


def test_slots_suit_direct_io() -> None:
    arena = Arena(LAYOUT, 3, ArenaKind.READ_ONLY)
    assert all(is_aligned(arena.view(SlotId(slot))) for slot in range(3))
    assert arena.checksums.shape == (3, LAYOUT.num_layers)
    arena.close()


def test_wrong_slots_and_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="raise"):
        Arena(LAYOUT, 0, ArenaKind.READ_ONLY)
    arena = Arena(LAYOUT, 1, ArenaKind.READ_ONLY)
    for slot in (-1, 1):
        with pytest.raises(InvalidArgumentError, match=str(slot)):
            arena.view(SlotId(slot))
    arena.close()


def test_closing_twice_and_with_a_view_held() -> None:
    arena = Arena(LAYOUT, 1, ArenaKind.READ_ONLY)
    view = arena.view(SlotId(0))
    arena.close()
    arena.close()
    view[:1] = b"x"  # the pages live as long as the view
    assert bytes(view[:1]) == b"x"
    with pytest.raises(TierUnavailableError, match="closed"):
        arena.view(SlotId(0))
    with pytest.raises(TierUnavailableError, match="closed"):
        arena.memory()


def test_slot_table_grows_and_counts() -> None:
    slots = SlotTable(2)
    assert slots.allocate(5) == [0, 1]
    slots.grow(3)
    assert slots.allocate(5) == [2, 3, 4]
    assert slots.change([SlotId(3), SlotId(9)], SlotState.ALLOCATED, SlotState.USED) == [3]
    assert slots.change([SlotId(3)], SlotState.ALLOCATED, SlotState.FREE) == []
    slots.change([SlotId(1), SlotId(4)], SlotState.ALLOCATED, SlotState.FREE)
    assert slots.allocate(1) == [1], "the lowest free slot first"
    slots.quarantine([SlotId(0), SlotId(3), SlotId(4)])
    assert [slots.count(state) for state in SlotState] == [0, 2, 0, 3, 0, 0]
    assert slots.state(SlotId(77)) is SlotState.QUARANTINED
    assert slots.check_integrity() == []


def test_generations_only_grow() -> None:
    slots = SlotTable(1)
    slots.set_generation(SlotId(0), 7)
    assert slots.generation(SlotId(0)) == 7
    with pytest.raises(AssertionError):
        slots.set_generation(SlotId(0), 7)
