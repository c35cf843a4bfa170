"""The memory tier beyond what all tiers do: views, adoption, verification."""

from __future__ import annotations

import pytest

from ucm.checksum import block_checksums
from ucm.errors import InvalidArgumentError
from ucm.storage.memory import MemoryTier
from ucm.storage.tier import IoStatus, SlotId
from ucm.testing.tier_conformance import LAYOUT, get, make_block, make_key, put


@pytest.fixture
def tier() -> MemoryTier:
    return MemoryTier(LAYOUT, 4)


def test_a_block_read_into_the_view_is_adopted(tier: MemoryTier) -> None:
    (slot,) = tier.allocate(1)
    data = make_block("promoted")
    tier.view(slot)[:] = data
    tier.adopt(slot, make_key("promoted"), block_checksums(LAYOUT, data))
    assert get(tier, slot, "promoted") is IoStatus.OK
    assert tier.checksums(slot) == block_checksums(LAYOUT, data)
    assert tier.check_integrity() == []


def test_adopting_needs_an_allocated_slot_and_all_checksums(tier: MemoryTier) -> None:
    with pytest.raises(InvalidArgumentError, match="allocated"):
        tier.adopt(SlotId(0), make_key(1), (1, 2, 3))
    (slot,) = tier.allocate(1)
    with pytest.raises(InvalidArgumentError, match="2 checksums"):
        tier.adopt(slot, make_key(1), (1, 2))


def test_damaged_memory_is_quarantined(tier: MemoryTier) -> None:
    slots = put(tier, [1, 2])
    tier.view(slots[1])[0] ^= 1
    assert get(tier, slots[1], 1) is IoStatus.CORRUPT
    assert tier.usage().quarantined_slots == 1
    assert get(tier, slots[2], 2) is IoStatus.OK
    assert slots[1] not in tier.allocate(4)
    assert tier.check_integrity() == []


def test_verify_reads_in_place(tier: MemoryTier) -> None:
    slots = put(tier, [1])
    assert tier.verify(slots[1], make_key(1))
    assert not tier.verify(slots[1], make_key(2))
    tier.view(slots[1])[LAYOUT.slab_bytes] ^= 1  # padding
    assert tier.verify(slots[1], make_key(1))
    tier.view(slots[1])[LAYOUT.block_bytes - LAYOUT.slab_stride_bytes] ^= 1
    assert not tier.verify(slots[1], make_key(1))
    assert tier.usage().quarantined_slots == 1


def test_each_hand_out_has_a_new_generation(tier: MemoryTier) -> None:
    (slot,) = tier.allocate(1)
    first = tier.generation(slot)
    tier.free([slot])
    assert tier.allocate(1) == [slot]
    assert tier.generation(slot) == first + 1


def test_the_arena_is_what_the_tier_serves(tier: MemoryTier) -> None:
    slots = put(tier, ["seen"])
    view = tier.arena.view(slots["seen"])
    assert bytes(view[LAYOUT.slab_slice(0)]) == bytes(make_block("seen")[LAYOUT.slab_slice(0)])
    assert tier.arena.size_bytes == 4 * LAYOUT.block_bytes


def test_a_slot_that_gets_another_block_during_a_read_is_not_believed() -> None:
    class Racing(MemoryTier):
        """Between the look at the key and that at the checksums the slot changes hands."""

        def checksums(self, slot: SlotId) -> tuple[int, ...]:
            self.delete([(slot, make_key(1))])
            assert put(self, [2]) == {2: slot}
            return super().checksums(slot)

    tier = Racing(LAYOUT, 1)
    slots = put(tier, [1])
    assert get(tier, slots[1], 1) is IoStatus.CORRUPT
    assert tier.usage().quarantined_slots == 0
