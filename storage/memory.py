"""The host-memory tier: one namespace's blocks in one sealed arena.

Envelope: a write moves each byte once (copy, 5 to 10 GB/s) and checksums it while it is in the
cache (a fifth of that time); a load that maps the arena moves nothing here. 32 + 9 + 8 x layers
bytes a slot of book keeping, all in columns.

The daemon never trusts memory that a client can still write: `write` copies first and verifies the
copy. A block read in by another tier skips that copy: it is read straight into `view(slot)`,
verified there by the tier that read it, and taken over by `adopt`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ucm import checksum
from ucm.errors import InvalidArgumentError
from ucm.types import KEY_BYTES, BlockKey, TierKind

from .arena import Arena, ArenaKind
from .slots import SlotState
from .tier import IoStatus, ReadOutcome, TierUsage

CHECKSUM_BYTES = 8

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from ucm.api import SlabChecksums
    from ucm.layout import KvLayout

    from .tier import SlotId, SlotRead, SlotWrite, TierEntry


class MemoryTier:
    """`Tier` over host memory. Volatile: `entries` is empty at every opening."""

    def __init__(self, layout: KvLayout, num_slots: int) -> None:
        """Create the arena.

        Raises:
            ConfigError: `num_slots` is below 1.
            CapacityError: the kernel refuses so large a mapping.
        """
        self._layout = layout
        self._arena = Arena(layout, num_slots, ArenaKind.READ_ONLY)
        self._checksum_bytes = self._arena.checksums.view(np.uint8).reshape(-1).data
        self._keys = np.zeros((num_slots, KEY_BYTES), np.uint8)
        """Of the block in each slot, or of the last one that was there."""
        self._is_mixed = np.zeros(num_slots, np.bool_)
        """Slots that were freed before they held a block: of whatever part was written."""
        self._lossy = np.zeros(num_slots, np.bool_)

    def __repr__(self) -> str:
        return f"MemoryTier({self._arena!r})"

    @property
    def kind(self) -> TierKind:
        """See `Tier.kind`."""
        return TierKind.MEMORY

    @property
    def layout(self) -> KvLayout:
        """See `Tier.layout`."""
        return self._layout

    @property
    def arena(self) -> Arena:
        """The memory itself, for the door to pass on."""
        return self._arena

    def prefault(self, num_slots: int) -> None:
        """See `Arena.prefault`."""
        self._arena.prefault(num_slots)

    def wait_real(self, slots: Sequence[SlotId]) -> None:
        """See `Arena.wait_real`."""
        self._arena.wait_real(slots)

    def view(self, slot: SlotId) -> memoryview:
        """The slot's bytes, writable, `layout.block_bytes` long; no copy.

        The caller owns the slot (allocated, not yet written) or only reads.
        """
        return self._arena.view(slot)

    def checksums(self, slot: SlotId) -> SlabChecksums:
        """The slab checksums of the block in `slot`."""
        return tuple(self._arena.checksums[slot].tolist())

    def packed_checksums(self, slots: Sequence[SlotId]) -> bytes:
        """The checksums of the blocks in `slots`, as little-endian 64-bit words back to back."""
        # Slice by slice: numpy's code would have to come from memory for every load.
        size, words = self._layout.num_layers * CHECKSUM_BYTES, self._checksum_bytes
        return b"".join([words[slot * size : (slot + 1) * size] for slot in slots])

    def generation(self, slot: SlotId) -> int:
        """How often the slot was handed out; a reader that outlives its lease sees it change."""
        return self._arena.slots.generation(slot)

    def entries(self) -> Iterator[TierEntry]:
        """Nothing: memory does not survive its process."""
        return iter(())

    def allocate(self, count: int, *, full: bool = False) -> list[SlotId]:
        """See `Tier.allocate`. Every slot takes any block."""
        del full
        table = self._arena.slots
        slots = table.allocate(count)
        table.set_generations(slots, [number + 1 for number in table.generations(slots)])
        return slots

    def free(self, slots: Sequence[SlotId]) -> None:
        """See `Tier.free`."""
        self._is_mixed[[slot for slot in slots if 0 <= slot < len(self._is_mixed)]] = True
        self._arena.slots.change(slots, SlotState.ALLOCATED, SlotState.FREE)

    def write(self, items: Sequence[SlotWrite]) -> list[IoStatus]:
        """See `Tier.write`. Copies on the calling thread; volatile. See `Arena.wait_real`."""
        self._arena.wait_real([item.slot for item in items])
        return [self._write_one(item) for item in items]

    def adopt(
        self, slot: SlotId, key: BlockKey, checksums: SlabChecksums, *, is_lossy: bool = False
    ) -> None:
        """Make the block that is already in `view(slot)` readable; no copy, no verification.

        `is_lossy` says that a lossy codec made it; see `was_lossy`.
        The caller guarantees that the bytes were verified there and that it allocated the slot.

        Raises:
            InvalidArgumentError: the slot is not allocated, or the number of checksums is wrong.
        """
        if len(checksums) != self._layout.num_layers:
            raise InvalidArgumentError(
                f"{len(checksums)} checksums for a block of {self._layout.num_layers} slabs"
            )
        self._require_allocated(slot)
        self._arena.checksums[slot] = checksums
        self._lossy[slot] = is_lossy
        self._keys[slot] = np.frombuffer(key, np.uint8)
        self._is_mixed[slot] = False
        self._arena.slots.change([slot], SlotState.ALLOCATED, SlotState.USED)

    def was_lossy(self, slot: SlotId) -> bool:
        """Whether the block in `slot` came from a lossy copy: its original is gone."""
        return bool(self._lossy[slot])

    def read(self, items: Sequence[SlotRead]) -> list[ReadOutcome]:
        """See `Tier.read`. Copies on the calling thread."""
        return [self._read_one(item) for item in items]

    def verify(self, slot: SlotId, key: BlockKey) -> bool:
        """Whether the block is there and its bytes still have their checksums; reads it once.

        A block that fails is quarantined.
        """
        if not self._holds(slot, key):
            return False
        if checksum.verify(self._layout, self._arena.view(slot), self.checksums(slot)):
            return True
        self._arena.slots.change([slot], SlotState.USED, SlotState.QUARANTINED)
        return False

    def erase(self, slots: Sequence[SlotId]) -> None:
        """Write zeros over slots that nobody may read any more; they stay what they are."""
        for slot in slots:
            view = self._arena.view(slot)
            view[:] = bytes(len(view))

    def erase_left(self, keys: Collection[BlockKey]) -> None:
        """Write zeros over what is left of `keys` in slots that hold no block.

        That is where eviction left one, where a transfer ended early (nobody knows of whose bytes)
        and what is quarantined. Slots that somebody is about to write are theirs.
        """
        table = self._arena.slots
        self.erase(self._with_one_of(keys, table.in_state(SlotState.QUARANTINED)))
        free = self._with_one_of(keys, table.in_state(SlotState.FREE))
        held = table.change(free, SlotState.FREE, SlotState.ALLOCATED)
        try:
            self.erase(held)
            self._keys[held] = 0
            self._is_mixed[held] = False
        finally:
            table.change(held, SlotState.ALLOCATED, SlotState.FREE)

    def _with_one_of(self, keys: Collection[BlockKey], slots: list[SlotId]) -> list[SlotId]:
        held = self._keys[slots].tobytes()
        return [
            slot
            for number, slot in enumerate(slots)
            if self._is_mixed[slot] or held[number * KEY_BYTES : (number + 1) * KEY_BYTES] in keys
        ]

    def delete(self, items: Sequence[tuple[SlotId, BlockKey]]) -> None:
        """See `Tier.delete`. Items that are not in the tier are ignored. The bytes stay."""
        held = [slot for slot, key in items if self._holds(slot, key)]
        self._arena.slots.change(held, SlotState.USED, SlotState.FREE)

    def usage(self) -> TierUsage:
        """See `Tier.usage`."""
        slots = self._arena.slots
        return TierUsage(
            used_slots=slots.count(SlotState.USED) + slots.count(SlotState.ALLOCATED),
            free_slots=slots.count(SlotState.FREE),
            quarantined_slots=slots.count(SlotState.QUARANTINED),
            slot_bytes=self._arena.slot_bytes,
        )

    @property
    def shrinker(self) -> None:
        """See `Tier.shrinker`: a sealed arena gives no pages back."""
        return

    @property
    def eraser(self) -> None:
        """See `Tier.eraser`: `erase` is what memory needs."""
        return

    @property
    def extents(self) -> None:
        """See `Tier.extents`: memory is no file."""
        return

    @property
    def summaries(self) -> None:
        """See `Tier.summaries`: those of blocks in memory are kept by `ucm.summaries`."""
        return

    def check_integrity(self) -> list[str]:
        """See `Tier.check_integrity`."""
        problems = self._arena.slots.check_integrity()
        used = self._arena.slots.in_state(SlotState.USED)
        named = int(np.count_nonzero(self._keys[used].any(axis=1)))
        if named != len(used):
            problems.append(f"{len(used)} used slots, but {named} of them have a key")
        return problems

    def close(self) -> None:
        """See `Tier.close`. Views that are still held keep their pages alive."""
        self._arena.close()

    def _write_one(self, item: SlotWrite) -> IoStatus:
        checksum.check_block_length(self._layout, item.data)
        self._require_allocated(item.slot)
        view = self._arena.view(item.slot)
        if checksum.copy_block(self._layout, item.data, view) != tuple(item.checksums):
            return IoStatus.CORRUPT
        self.adopt(item.slot, item.key, item.checksums)
        return IoStatus.OK

    def _read_one(self, item: SlotRead) -> ReadOutcome:
        checksum.check_block_length(self._layout, item.into)
        if not self._holds(item.slot, item.key):
            return ReadOutcome(IoStatus.CORRUPT)
        generation, checksums = self.generation(item.slot), self.checksums(item.slot)
        view = self._arena.view(item.slot)
        is_whole = checksum.copy_block(self._layout, view, item.into) == checksums
        if self.generation(item.slot) != generation or not self._holds(item.slot, item.key):
            return ReadOutcome(IoStatus.CORRUPT)  # reused meanwhile: whose bytes are these?
        if is_whole:
            return ReadOutcome(IoStatus.OK, checksums)
        self._arena.slots.change([item.slot], SlotState.USED, SlotState.QUARANTINED)
        return ReadOutcome(IoStatus.CORRUPT)

    def _holds(self, slot: SlotId, key: BlockKey) -> bool:
        used = self._arena.slots.state(slot) is SlotState.USED
        return used and self._keys[slot].tobytes() == key

    def _require_allocated(self, slot: SlotId) -> None:
        if self._arena.slots.state(slot) is not SlotState.ALLOCATED:
            raise InvalidArgumentError(f"slot {slot} was not allocated to be written")
