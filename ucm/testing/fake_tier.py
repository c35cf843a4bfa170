"""A slow tier made of a dictionary, that fails, stalls and lies on request.

Stands in for NVMe where a test needs a fault at an exact moment. `FakeDisk` is what survives a
"restart": open a second manager over the same one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ucm.api import SlabChecksums
from ucm.checksum import block_checksums
from ucm.errors import TierUnavailableError
from ucm.layout import KvLayout
from ucm.storage.tier import (
    IoStatus,
    ReadOutcome,
    SlotId,
    SlotRead,
    SlotWrite,
    TierEntry,
    TierUsage,
)
from ucm.types import ROOT_KEY, BlockKey, NamespaceId, SummaryKind, TierKind


@dataclass(slots=True)
class StoredBlock:
    """One block on the fake disk."""

    key: BlockKey
    parent: BlockKey
    data: bytearray
    checksums: SlabChecksums


@dataclass(slots=True)
class Faults:
    """What goes wrong; change it at any time."""

    read_status: IoStatus = IoStatus.OK
    """Every read ends so."""
    write_status: IoStatus = IoStatus.OK
    """Every write ends so."""
    write_status_by_key: dict[BlockKey, IoStatus] = field(default_factory=dict)
    deletes_fail: bool = False
    raises: bool = False
    """Reads and writes raise OSError."""
    reads_may_go: threading.Event = field(default_factory=threading.Event)
    """Clear it to hold reads back."""
    writes_may_go: threading.Event = field(default_factory=threading.Event)
    """Clear it to hold writes back."""

    def __post_init__(self) -> None:
        self.reads_may_go.set()
        self.writes_may_go.set()


class FakeTier:
    """`Tier` over a dictionary of slots."""

    def __init__(self, layout: KvLayout, num_slots: int, faults: Faults) -> None:
        self._layout = layout
        self._num_slots = num_slots
        self._faults = faults
        self._lock = threading.Lock()
        self._allocated: set[SlotId] = set()
        self._quarantined: set[SlotId] = set()
        self.blocks: dict[SlotId, StoredBlock] = {}
        self.read_batches: list[int] = []
        self.write_batches: list[int] = []
        self.is_open = True

    @property
    def kind(self) -> TierKind:
        """See `Tier.kind`."""
        return TierKind.NVME

    @property
    def layout(self) -> KvLayout:
        """See `Tier.layout`."""
        return self._layout

    def reopen(self) -> None:
        """What a restart does: forget what was in flight, drop orphans."""
        self.is_open = True
        self._allocated.clear()
        kept = {entry.slot for entry in self.entries()}
        self.blocks = {slot: block for slot, block in self.blocks.items() if slot in kept}

    def entries(self) -> Iterator[TierEntry]:
        """See `Tier.entries`."""
        known: set[BlockKey] = {ROOT_KEY}
        waiting = dict(self.blocks)
        while True:
            ready = {slot: each for slot, each in waiting.items() if each.parent in known}
            if not ready:
                return
            for slot, block in ready.items():
                known.add(block.key)
                del waiting[slot]
                yield TierEntry(block.key, block.parent, slot)

    def allocate(self, count: int, *, full: bool = False) -> list[SlotId]:
        """See `Tier.allocate`."""
        del full
        with self._lock:
            taken = self.blocks.keys() | self._allocated | self._quarantined
            free = [SlotId(n) for n in range(self._num_slots) if n not in taken][:count]
            self._allocated.update(free)
            return free

    def free(self, slots: Sequence[SlotId]) -> None:
        """See `Tier.free`."""
        with self._lock:
            self._allocated.difference_update(slots)

    def write(self, items: Sequence[SlotWrite]) -> list[IoStatus]:
        """See `Tier.write`; waits for `Faults.writes_may_go`."""
        self._faults.writes_may_go.wait()
        self.write_batches.append(len(items))
        if self._faults.raises:
            raise OSError(5, "injected")
        return [self._write_one(item) for item in items]

    def _write_one(self, item: SlotWrite) -> IoStatus:
        wanted = self._faults.write_status_by_key.get(item.key, self._faults.write_status)
        if wanted is not IoStatus.OK:
            return wanted
        data = bytearray(item.data)
        if block_checksums(self._layout, memoryview(data)) != item.checksums:
            return IoStatus.CORRUPT
        with self._lock:
            assert item.slot in self._allocated, item.slot
            self._allocated.discard(item.slot)
            self.blocks[item.slot] = StoredBlock(item.key, item.parent, data, item.checksums)
        return IoStatus.OK

    def read(self, items: Sequence[SlotRead]) -> list[ReadOutcome]:
        """See `Tier.read`; waits for `Faults.reads_may_go`."""
        self._faults.reads_may_go.wait()
        self.read_batches.append(len(items))
        if self._faults.raises:
            raise OSError(5, "injected")
        return [self._read_one(item) for item in items]

    def _read_one(self, item: SlotRead) -> ReadOutcome:
        if self._faults.read_status is not IoStatus.OK:
            return ReadOutcome(self._faults.read_status)
        block = self.blocks.get(item.slot)
        if block is None or block.key != item.key:
            return ReadOutcome(IoStatus.CORRUPT)
        item.into[:] = block.data
        if block_checksums(self._layout, item.into) != block.checksums:
            with self._lock:
                del self.blocks[item.slot]
                self._quarantined.add(item.slot)
            return ReadOutcome(IoStatus.CORRUPT)
        return ReadOutcome(IoStatus.OK, block.checksums)

    def delete(self, items: Sequence[tuple[SlotId, BlockKey]]) -> None:
        """See `Tier.delete`."""
        if self._faults.deletes_fail:
            raise TierUnavailableError("injected")
        with self._lock:
            for slot, key in items:
                if slot in self.blocks and self.blocks[slot].key == key:
                    del self.blocks[slot]

    def usage(self) -> TierUsage:
        """See `Tier.usage`."""
        with self._lock:
            used = len(self.blocks) + len(self._allocated)
            dead = len(self._quarantined)
            return TierUsage(used, self._num_slots - used - dead, dead, self._layout.block_bytes)

    @property
    def shrinker(self) -> None:
        """See `Tier.shrinker`."""
        return

    @property
    def eraser(self) -> None:
        """See `Tier.eraser`."""
        return

    @property
    def summaries(self) -> None:
        """See `Tier.summaries`."""
        return

    @property
    def extents(self) -> None:
        """See `Tier.extents`."""
        return

    def flip_bit(self, key: BlockKey) -> None:
        """Damage the stored bytes of a block."""
        block = next(block for block in self.blocks.values() if block.key == key)
        block.data[0] ^= 1

    def keys(self) -> set[BlockKey]:
        """What is stored."""
        return {block.key for block in self.blocks.values()}

    def check_integrity(self) -> list[str]:
        """See `Tier.check_integrity`: no block without its parent."""
        keys = self.keys() | {ROOT_KEY}
        return [
            f"slot {slot} is an orphan"
            for slot, block in self.blocks.items()
            if block.parent not in keys and not self._quarantined
        ]

    def close(self) -> None:
        """See `Tier.close`."""
        self.is_open = False


class FakeDisk:
    """Opens fake tiers and keeps them over restarts; an `NvmeStore` for tests."""

    def __init__(self, num_slots: int = 64) -> None:
        self.num_slots = num_slots
        self.faults = Faults()
        self.tiers: dict[NamespaceId, FakeTier] = {}
        self.tenants: dict[NamespaceId, str] = {}
        self.open_error: Exception | None = None

    def open_namespace(
        self,
        namespace: NamespaceId,
        layout: KvLayout,
        tenant: str = "",
        *,
        accepts_lossy: bool = False,
        summary: SummaryKind | None = None,
    ) -> FakeTier:
        """Open or create a namespace's tier; it keeps every bit, whatever is accepted."""
        del accepts_lossy, summary
        self.tenants[namespace] = tenant
        if self.open_error is not None:
            raise self.open_error
        tier = self.tiers.setdefault(namespace, FakeTier(layout, self.num_slots, self.faults))
        tier.reopen()
        return tier

    def close(self) -> None:
        """Nothing to give back."""
