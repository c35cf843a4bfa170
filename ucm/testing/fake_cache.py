"""A `CacheApi` over a dictionary that fails on demand: what connectors are tested against.

It behaves as the contract says, verifies what it is given, and never evicts. Faults are switched by
attributes, for one kind of call or for all:

    cache.fail["lookup"] = TierUnavailableError("gone")     raise, from the next call on
    cache.hang.clear()                                      calls wait until `hang` is set again
    cache.damage(key, layer)                                flip a bit of a stored slab
"""

# ruff: noqa: ARG002  a protocol's parameters
from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ucm.api import (
    LoadedBlock,
    LoadLease,
    LookupResult,
    NamespaceHandle,
    PinLease,
    SlabChecksums,
    StoreLease,
    StoreSlot,
)
from ucm.checksum import block_checksums
from ucm.errors import InvalidArgumentError, LeaseExpiredError, UcmError
from ucm.grants import store_slot
from ucm.hashing import NamespaceSpec
from ucm.kernels.summary_record import content_of, decode_summary, summary_bytes
from ucm.layout import KvLayout
from ucm.load_plan import LoadPlan, plan_of_lease
from ucm.select_api import SelectRequest, SelectResult, SummaryLease
from ucm.types import (
    ROOT_KEY,
    BlockKey,
    LeaseId,
    LoadMode,
    LoadStatus,
    NamespaceId,
    StoreStatus,
    SummaryKind,
    SummaryStatus,
    TierKind,
)

LEASE_TIMEOUT_S = 30.0
HANG_LIMIT_S = 30.0


@dataclass(slots=True)
class _Stored:
    data: bytearray
    checksums: SlabChecksums
    summary: bytes = b""


class FakeCache:
    """See the module. Thread-safe enough for one engine thread and one background thread."""

    def __init__(self, staging_blocks: int = 1024) -> None:
        self.blocks: dict[BlockKey, _Stored] = {}
        self.calls: list[str] = []
        self.corrupt_reports: list[BlockKey] = []
        self.fail: dict[str, UcmError] = {}
        self.hang = threading.Event()
        """Cleared: every call waits until it is set."""
        self.hang.set()
        self.tier = TierKind.MEMORY
        self.leases: dict[LeaseId, tuple[StoreSlot, ...]] = {}
        self.is_closed = False
        self._staging_blocks = staging_blocks
        self.summary: SummaryKind | None = None
        self._layout: KvLayout | None = None
        self._numbers = itertools.count(1)

    def damage(self, key: BlockKey, layer: int) -> None:
        """Flip the first bit of a stored slab; its checksum stays."""
        assert self._layout is not None
        self.blocks[key].data[self._layout.slab_slice(layer).start] ^= 1

    def _enter(self, call: str) -> None:
        self.calls.append(call)
        self.hang.wait(HANG_LIMIT_S)
        error = self.fail.get(call) or self.fail.get("*")
        if error is not None:
            raise error

    def _lease_id(self) -> LeaseId:
        return LeaseId(next(self._numbers).to_bytes(16, "little"))

    def open_namespace(
        self, spec: NamespaceSpec, *, summary: SummaryKind | None = None
    ) -> NamespaceHandle:
        """See `CacheApi.open_namespace`."""
        self._enter("open_namespace")
        self._layout = spec.layout
        self.summary = summary
        return NamespaceHandle(spec.fingerprint(), spec.layout, 0, summary)

    def lookup(self, namespace: NamespaceId, keys: Sequence[BlockKey]) -> LookupResult:
        """See `CacheApi.lookup`."""
        self._enter("lookup")
        found = list(itertools.takewhile(lambda key: key in self.blocks, keys))
        return LookupResult((self.tier,) * len(found))

    def prefetch(self, namespace: NamespaceId, keys: Sequence[BlockKey]) -> int:
        """See `CacheApi.prefetch`."""
        self._enter("prefetch")
        return 0

    def prepare_load(
        self, namespace: NamespaceId, keys: Sequence[BlockKey], *, timeout_s: float
    ) -> LoadLease:
        """See `CacheApi.prepare_load`."""
        self._enter("prepare_load")
        lease = LoadLease(
            self._lease_id(), tuple(self._loaded(key) for key in keys), LEASE_TIMEOUT_S
        )
        self.leases[lease.id] = ()
        return lease

    def _loaded(self, key: BlockKey) -> LoadedBlock:
        stored = self.blocks.get(key)
        if stored is None:
            return LoadedBlock(key, LoadStatus.MISS)
        view = memoryview(stored.data).toreadonly()
        return LoadedBlock(key, LoadStatus.READY, self.tier, view, stored.checksums)

    def begin_load(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        mode: LoadMode,
        timeout_s: float,
    ) -> LoadPlan:
        """See `CacheApi.begin_load`. Everything is in memory here, in both modes."""
        self._enter("begin_load")
        lease = LoadLease(
            self._lease_id(), tuple(self._loaded(key) for key in keys), LEASE_TIMEOUT_S
        )
        self.leases[lease.id] = ()
        return plan_of_lease(lease, namespace, mode)

    def complete_load(self, lease_id: LeaseId, corrupt: Sequence[BlockKey] = ()) -> None:
        """See `CacheApi.complete_load`."""
        self._enter("complete_load")
        self.corrupt_reports.extend(corrupt)
        for key in corrupt:
            self.blocks.pop(key, None)
        self.leases.pop(lease_id, None)

    def prepare_store(
        self, namespace: NamespaceId, parent: BlockKey, keys: Sequence[BlockKey]
    ) -> StoreLease:
        """See `CacheApi.prepare_store`."""
        self._enter("prepare_store")
        assert self._layout is not None
        is_orphan = parent != ROOT_KEY and parent not in self.blocks
        num_granted = 0
        slots: list[StoreSlot] = []
        for key in keys:
            if key in self.blocks:
                slots.append(StoreSlot(key, StoreStatus.PRESENT))
            elif is_orphan:
                slots.append(StoreSlot(key, StoreStatus.ORPHAN))
            elif num_granted >= self._staging_blocks:
                slots.append(StoreSlot(key, StoreStatus.NO_SPACE))
            else:
                num_granted += 1
                size = summary_bytes(self._layout, self.summary) if self.summary else 0
                run = memoryview(bytearray(self._layout.block_bytes + size))
                slots.append(store_slot(key, StoreStatus.WANTED, run, self._layout.block_bytes))
        lease = StoreLease(self._lease_id(), tuple(slots), LEASE_TIMEOUT_S)
        self.leases[lease.id] = lease.slots
        return lease

    def complete_store(
        self, lease_id: LeaseId, checksums: Mapping[BlockKey, SlabChecksums]
    ) -> tuple[StoreStatus, ...]:
        """See `CacheApi.complete_store`."""
        self._enter("complete_store")
        slots = self.leases.pop(lease_id, None)
        if slots is None:
            raise LeaseExpiredError("no such lease")
        return tuple(self._accept(slot, checksums.get(slot.key)) for slot in slots)

    def _accept(self, slot: StoreSlot, checksums: SlabChecksums | None) -> StoreStatus:
        assert self._layout is not None
        if slot.data is None or checksums is None:
            return slot.status
        if block_checksums(self._layout, slot.data) != checksums:
            return StoreStatus.CORRUPT
        given = bytes(slot.summary or b"")
        if given and decode_summary(self._layout, given, checksums) is None:
            given = b""
        self.blocks[slot.key] = _Stored(bytearray(slot.data), checksums, given)
        return StoreStatus.ACCEPTED

    def pin(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        hold_s: float = 3600.0,
        timeout_s: float,
    ) -> PinLease:
        """See `CacheApi.pin`. Nothing is ever evicted here, so there is nothing to do."""
        self._enter("pin")
        found = list(itertools.takewhile(lambda key: key in self.blocks, keys))
        lease = PinLease(self._lease_id(), len(found), hold_s)
        self.leases[lease.id] = ()
        return lease

    def select(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        request: SelectRequest,
        *,
        timeout_s: float,
    ) -> SelectResult:
        """See `CacheApi.select`. Made for who asks for selections of a real cache: none here."""
        self._enter("select")
        raise InvalidArgumentError("this cache selects nothing")

    def select_and_load(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        request: SelectRequest,
        *,
        mode: LoadMode,
        timeout_s: float,
    ) -> tuple[SelectResult, LoadPlan]:
        """See `CacheApi.select_and_load`; as `select`."""
        self._enter("select_and_load")
        raise InvalidArgumentError("this cache selects nothing")

    def map_summaries(
        self, namespace: NamespaceId, keys: Sequence[BlockKey], *, timeout_s: float
    ) -> SummaryLease:
        """See `CacheApi.map_summaries`."""
        self._enter("map_summaries")
        if self.summary is None:
            raise InvalidArgumentError("this session has no summaries")
        found = [self.blocks.get(key) for key in keys]
        lease_id = self._lease_id()
        self.leases[lease_id] = ()
        return SummaryLease(
            id=lease_id,
            kind=self.summary,
            entries=tuple(
                memoryview(each.summary) if each and each.summary else None for each in found
            ),
            statuses=tuple(_summary_status(each) for each in found),
            contents=tuple(
                content_of(each.checksums) if each and each.summary else 0 for each in found
            ),
            timeout_s=LEASE_TIMEOUT_S,
        )

    def release(self, lease_id: LeaseId) -> None:
        """See `CacheApi.release`."""
        self._enter("release")
        self.leases.pop(lease_id, None)

    def flush(self, *, timeout_s: float) -> bool:
        """See `CacheApi.flush`."""
        self._enter("flush")
        return True

    def close(self) -> None:
        """See `CacheApi.close`."""
        self._enter("close")
        self.is_closed = True
        self.leases.clear()


def _summary_status(stored: _Stored | None) -> SummaryStatus:
    if stored is None:
        return SummaryStatus.MISS
    return SummaryStatus.READY if stored.summary else SummaryStatus.NO_SUMMARY
