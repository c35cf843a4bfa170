"""What every `Tier` must do. A tier's test subclasses `TierTests` and says how one is made.

class TestMemoryTier(TierTests):
def make_tier(self, folder: Path, num_slots: int) -> Tier:
return MemoryTier(LAYOUT, num_slots)
"""

from __future__ import annotations

import abc
import functools
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ucm.checksum import block_checksums
from ucm.errors import LayoutMismatchError, UcmError
from ucm.kernels.summarize import summarize_blocks
from ucm.kernels.summary_record import encode_summary
from ucm.layout import KvDtype, KvLayout
from ucm.storage.tier import IoStatus, SlotId, SlotRead, SlotWrite
from ucm.types import ROOT_KEY, BlockKey, SummaryKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ucm.storage.tier import Tier

LAYOUT = KvLayout(num_layers=3, num_kv_heads=1, head_dim=8, block_tokens=32, dtype=KvDtype.FLOAT32)
"""Slabs of 2 KiB in strides of 4 KiB: padding is exercised."""


def make_key(name: int | str) -> BlockKey:
    """A key that differs for each name."""
    return BlockKey(hashlib.sha256(f"key {name}".encode()).digest())


@functools.lru_cache(maxsize=128)
def make_block(name: int | str, layout: KvLayout = LAYOUT) -> memoryview:
    """Bytes that differ for each name; read-only.

    In float32 the elements are whole numbers from 0 to 255, and every token and every channel has
    both ends among its eight: what an 8-bit codec keeps exactly too. The padding is noise.
    """
    stream = hashlib.shake_128(f"block {name}".encode()).digest(layout.block_bytes)
    if layout.dtype is not KvDtype.FLOAT32:
        return memoryview(stream)
    block = np.frombuffer(bytearray(stream), np.uint8).reshape(layout.num_layers, -1)
    slab = block[:, : layout.slab_bytes].view(np.float32)
    numbers = np.frombuffer(stream, np.uint8)[: slab.size].astype(np.float32)
    numbers = numbers.reshape(layout.num_layers, *layout.slab_shape)
    tokens = np.arange(layout.block_tokens)
    numbers[..., tokens, tokens % layout.head_dim] = 0
    numbers[..., tokens, (tokens + 1) % layout.head_dim] = 255
    slab[:] = numbers.reshape(slab.shape)
    return memoryview(block.tobytes())


def make_write(
    slot: SlotId,
    name: int | str,
    parent: int | str | None = None,
    *,
    summary: SummaryKind | None = None,
) -> SlotWrite:
    """A write of `make_block(name)` under `make_key(name)`, with its summary if a kind is named."""
    data = make_block(name)
    parent_key = ROOT_KEY if parent is None else make_key(parent)
    item = SlotWrite(slot, make_key(name), parent_key, data, block_checksums(LAYOUT, data))
    return replace(item, summary=make_summary(name, summary)) if summary else item


@functools.cache
def make_summary(name: int | str, kind: SummaryKind) -> bytes:
    """The encoded summary of `make_block(name)`."""
    data = make_block(name)
    records = summarize_blocks(LAYOUT, kind, [data])[0]
    return encode_summary(LAYOUT, kind, records, block_checksums(LAYOUT, data))


def slabs(data: memoryview | bytes, layout: KvLayout = LAYOUT) -> list[bytes]:
    """The slabs of a block without their padding: what must come back."""
    return [bytes(data[layout.slab_slice(layer)]) for layer in range(layout.num_layers)]


def put(tier: Tier, names: Sequence[int | str]) -> dict[int | str, SlotId]:
    """Write a chain of blocks, each the parent of the next; all must succeed."""
    slots = tier.allocate(len(names))
    parents: list[int | str | None] = [None, *names[:-1]]
    items = [make_write(*each) for each in zip(slots, names, parents, strict=True)]
    assert tier.write(items) == [IoStatus.OK] * len(names)
    return dict(zip(names, slots, strict=True))


def get(tier: Tier, slot: SlotId, name: int | str) -> IoStatus:
    """Read one block; when the tier says OK the bytes must be right, and the summary or none."""
    into = memoryview(bytearray(LAYOUT.block_bytes))
    (outcome,) = tier.read([SlotRead(slot, make_key(name), into)])
    if outcome.status is IoStatus.OK:
        assert slabs(into) == slabs(make_block(name))
        assert outcome.checksums == block_checksums(LAYOUT, make_block(name))
        if outcome.summary:
            assert tier.summaries is not None
            assert outcome.summary == make_summary(name, tier.summaries.kind)
    return outcome.status


def get_summary(tier: Tier, slot: SlotId, name: int | str) -> bytes:
    """What the tier has as the summary of a block, without reading it: the right one, or b""."""
    areas = tier.summaries
    (found,) = areas.read([(slot, make_key(name))]) if areas is not None else (None,)
    if areas is None or found is None:
        return b""
    assert found.data == make_summary(name, areas.kind)
    assert found.checksums == block_checksums(LAYOUT, make_block(name))
    return found.data


class TierTests(abc.ABC):
    """Behaviour that callers of any tier rely on."""

    @abc.abstractmethod
    def make_tier(self, folder: Path, num_slots: int) -> Tier:
        """A fresh, empty tier of exactly `num_slots` slots of `LAYOUT`."""

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        """A tier of eight slots, closed afterwards and sound until then."""
        tier = self.make_tier(tmp_path, 8)
        yield tier
        assert tier.check_integrity() == []
        tier.close()

    def test_is_empty_at_first(self, tier: Tier) -> None:
        """Nothing is found and every slot is free."""
        assert list(tier.entries()) == []
        usage = tier.usage()
        assert (usage.used_slots, usage.free_slots, usage.quarantined_slots) == (0, 8, 0)
        assert usage.total_slots == 8
        assert usage.slot_bytes >= LAYOUT.block_bytes // 4
        assert tier.layout == LAYOUT

    def test_returns_what_was_written(self, tier: Tier) -> None:
        """Bytes and checksums come back, in one batch or several."""
        slots = put(tier, [1, 2, 3])
        buffers = [memoryview(bytearray(LAYOUT.block_bytes)) for _ in slots]
        reads = [
            SlotRead(slot, make_key(name), into)
            for (name, slot), into in zip(slots.items(), buffers, strict=True)
        ]
        assert [outcome.status for outcome in tier.read(reads)] == [IoStatus.OK] * 3
        assert [slabs(into) for into in buffers] == [slabs(make_block(n)) for n in (1, 2, 3)]
        assert [get(tier, slot, name) for name, slot in slots.items()] == [IoStatus.OK] * 3

    def test_empty_batches_do_nothing(self, tier: Tier) -> None:
        """No item, no result, no error."""
        assert tier.write([]) == []
        assert tier.read([]) == []
        assert tier.allocate(0) == []
        tier.free([])
        tier.delete([])

    def test_allocates_each_slot_once(self, tier: Tier) -> None:
        """Slots are unique, and fewer than asked for when there are not as many."""
        slots = tier.allocate(5) + tier.allocate(5)
        assert sorted(slots) == list(range(8))
        assert tier.allocate(1) == []
        assert tier.usage().free_slots == 0
        tier.free(slots[:3])
        assert sorted(tier.allocate(5)) == sorted(slots[:3])

    def test_free_returns_slots_that_were_never_written(self, tier: Tier) -> None:
        """A block that never arrived leaves nothing behind."""
        slots = tier.allocate(4)
        tier.free(slots)
        tier.free(slots)  # again: ignored
        assert tier.usage().free_slots == 8
        assert get(tier, slots[0], "never written") is not IoStatus.OK

    def test_free_does_not_take_a_written_slot(self, tier: Tier) -> None:
        """`free` is for slots without a block."""
        (slot,) = put(tier, ["kept"]).values()
        tier.free([slot])
        assert get(tier, slot, "kept") is IoStatus.OK

    def test_another_key_does_not_read_a_block(self, tier: Tier) -> None:
        """The key is compared, not trusted."""
        (slot,) = put(tier, ["mine"]).values()
        assert get(tier, slot, "other") is IoStatus.CORRUPT
        assert get(tier, slot, "mine") is IoStatus.OK, "asking wrongly costs nothing"

    def test_wrong_checksums_are_not_stored(self, tier: Tier) -> None:
        """One bad item of a batch is refused, the others are stored."""
        slots = tier.allocate(3)
        items = [make_write(slot, name) for slot, name in zip(slots, (1, 2, 3), strict=True)]
        sums = items[1].checksums
        bad = SlotWrite(slots[1], make_key(2), ROOT_KEY, items[1].data, (*sums[:-1], sums[-1] ^ 1))
        statuses = tier.write([items[0], bad, items[2]])
        assert statuses == [IoStatus.OK, IoStatus.CORRUPT, IoStatus.OK]
        assert get(tier, slots[1], 2) is not IoStatus.OK
        tier.free([slots[1]])
        assert tier.usage().free_slots == 6
        assert [get(tier, slots[0], 1), get(tier, slots[2], 3)] == [IoStatus.OK] * 2

    def test_too_few_checksums_are_corrupt(self, tier: Tier) -> None:
        """A block needs one for each slab."""
        (slot,) = tier.allocate(1)
        item = make_write(slot, 1)
        short = SlotWrite(slot, item.key, item.parent, item.data, item.checksums[:-1])
        assert tier.write([short]) == [IoStatus.CORRUPT]
        tier.free([slot])

    def test_keeps_its_own_copy(self, tier: Tier) -> None:
        """What the caller does to its memory afterwards changes nothing."""
        (slot,) = tier.allocate(1)
        data = bytearray(make_block("copied"))
        sums = block_checksums(LAYOUT, memoryview(data))
        item = SlotWrite(slot, make_key("copied"), ROOT_KEY, memoryview(data), sums)
        assert tier.write([item]) == [IoStatus.OK]
        data[:] = bytes(len(data))
        assert get(tier, slot, "copied") is IoStatus.OK

    def test_padding_is_not_checked(self, tier: Tier) -> None:
        """Bytes behind a slab carry no meaning."""
        (slot,) = tier.allocate(1)
        data = bytearray(make_block("padded"))
        sums = block_checksums(LAYOUT, memoryview(data))
        data[LAYOUT.slab_bytes] ^= 0xFF
        item = SlotWrite(slot, make_key("padded"), ROOT_KEY, memoryview(data), sums)
        assert tier.write([item]) == [IoStatus.OK]
        assert get(tier, slot, "padded") is IoStatus.OK

    def test_delete_frees_and_forgets(self, tier: Tier) -> None:
        """A deleted block cannot be read, and its slot is another's."""
        slots = put(tier, [1, 2])
        tier.delete([(slots[1], make_key(1))])
        assert get(tier, slots[1], 1) is not IoStatus.OK
        assert get(tier, slots[2], 2) is IoStatus.OK
        assert tier.usage().free_slots == 7
        assert tier.usage().quarantined_slots == 0

    def test_delete_ignores_what_is_not_there(self, tier: Tier) -> None:
        """Another key in the slot, or no block at all, stays as it is."""
        slots = put(tier, [1])
        (empty,) = tier.allocate(1)
        tier.delete([(slots[1], make_key("other")), (empty, make_key("nothing"))])
        assert get(tier, slots[1], 1) is IoStatus.OK
        assert tier.usage().free_slots == 6
        tier.free([empty])

    def test_a_slot_can_be_reused(self, tier: Tier) -> None:
        """Every slot, many times; only the last block is read."""
        for turn in range(3):
            slots = put(tier, [f"{turn} {i}" for i in range(8)])
            assert all(get(tier, slot, name) is IoStatus.OK for name, slot in slots.items())
            tier.delete([(slot, make_key(name)) for name, slot in slots.items()])
        slots = put(tier, ["last"])
        assert get(tier, slots["last"], "2 0") is not IoStatus.OK

    def test_a_key_can_move(self, tier: Tier) -> None:
        """The same block written to another slot is found there."""
        put(tier, ["moving"])
        (slot,) = put(tier, ["moving"]).values()
        assert get(tier, slot, "moving") is IoStatus.OK

    def test_buffers_of_another_size_are_refused(self, tier: Tier) -> None:
        """A wrong length is the caller's error."""
        (slot,) = tier.allocate(1)
        short = memoryview(bytearray(LAYOUT.block_bytes - 1))
        with pytest.raises(LayoutMismatchError):
            tier.write([SlotWrite(slot, make_key(1), ROOT_KEY, short, (0, 0, 0))])
        with pytest.raises(LayoutMismatchError):
            tier.read([SlotRead(slot, make_key(1), short)])
        tier.free([slot])

    def test_writing_needs_an_allocated_slot(self, tier: Tier) -> None:
        """Nobody overwrites a block."""
        (slot,) = put(tier, ["there"]).values()
        with pytest.raises(UcmError):
            tier.write([make_write(slot, "intruder")])
        assert get(tier, slot, "there") is IoStatus.OK

    def test_a_slot_that_does_not_exist_is_a_miss(self, tier: Tier) -> None:
        """A stale number is no crash."""
        for slot in (8, 1 << 40, -1):
            into = memoryview(bytearray(LAYOUT.block_bytes))
            (outcome,) = tier.read([SlotRead(SlotId(slot), make_key(1), into)])
            assert outcome.status is not IoStatus.OK
            tier.free([SlotId(slot)])
            tier.delete([(SlotId(slot), make_key(1))])

    def test_closes_twice(self, tmp_path: Path) -> None:
        """Closing is idempotent."""
        tier = self.make_tier(tmp_path, 2)
        put(tier, [1])
        tier.close()
        tier.close()
