"""The store path: who offers what, staging slots, and the copy that is verified before it counts.

    prepare   lock: plan, pin the parent, reserve staging
    complete  lock: take the lease and arena slots | copy and verify, no lock | lock: accept, queue

The first of two stores of one block wins, the second finds it PRESENT. A block whose predecessor
was not accepted is an ORPHAN. `DiskHealth` stops stores while the disk refuses writes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ucm.kernels.summary_record import HEADER_BYTES as SUMMARY_HEADER_BYTES
from ucm.kernels.summary_record import decode_summary
from ucm.storage.tier import IoStatus, SlotId, SlotWrite

from .api import SlabChecksums
from .block_columns import NO_ROW
from .errors import InvalidArgumentError, LeaseExpiredError
from .grants import StoreGrant, StoreGrants
from .hashing import check_key
from .leases import Lease, LeaseKind, Offer
from .manager_state import US_PER_S, ManagerState, Session
from .namespaces import Namespace
from .placement import StorePlan, plan_store
from .staging import Staging
from .summaries import SummaryBook, SummarySource
from .types import (
    ROOT_KEY,
    BlockKey,
    LeaseId,
    NamespaceId,
    SessionId,
    StoreStatus,
    SummaryKind,
    TierKind,
)
from .write_behind import WriteBehind


@dataclass(slots=True)
class _Copy:
    """One offer on its way from staging to the arena."""

    offer: Offer
    parent: BlockKey
    status: StoreStatus
    slot: SlotId | None = None
    summary: tuple[SummaryKind, bytes] | None = None
    """What came with it and was believed."""


class StorePath:
    """Stores of one manager. Thread-safe."""

    def __init__(self, state: ManagerState, write_behind: WriteBehind | None) -> None:
        self._state = state
        self._write_behind = write_behind

    def prepare_store(
        self,
        session: SessionId,
        namespace: NamespaceId,
        parent: BlockKey,
        keys: Sequence[BlockKey],
    ) -> StoreGrants:
        """See `CacheApi.prepare_store`."""
        state = self._state
        keys, parent = state.checked_keys(keys), check_key(parent)
        with state.lock:
            found, now_us = state.begin_locked(session, namespace)
            plan = _plan(found, parent, keys)
            hold_us = int(state.config.transfer.lease_timeout_s * US_PER_S)
            lease = state.grant_locked(session, found, LeaseKind.STORE, now_us + hold_us)
            state.hold_locked(lease, found, plan.hold, now_us)
            if self._write_behind is not None and not self._write_behind.admits_all:
                pairs = zip(keys, plan.statuses, strict=True)
                again = [key for key, status in pairs if status is StoreStatus.PRESENT]
                self._write_behind.use_locked(found, again)
            wanted = StoreStatus.WANTED in plan.statuses
            refused = wanted and self._refuses_locked(found, now_us)
            owner = state.session_locked(session)
            book = _book(found, owner)
            room = _Room(found.layout.block_bytes, book.slot_bytes if book is not None else 0)
            lease.parent = parent
            lease.offers = self._offers(None if refused else owner.staging, room, plan, keys)
            lease.num_bytes = sum(offer.staging_bytes for offer in lease.offers)
        self._count(offer.status for offer in lease.offers if offer.staging_offset < 0)
        slots = tuple(
            StoreGrant(offer.key, offer.status, offer.staging_offset) for offer in lease.offers
        )
        summary_bytes = book.summary_bytes if book is not None else 0
        return StoreGrants(lease.id, slots, state.config.transfer.lease_timeout_s, summary_bytes)

    def _refuses_locked(self, found: Namespace, now_us: int) -> bool:
        if self._state.draining:
            return True
        if self._write_behind is None or found.nvme is None:
            return False
        return not self._write_behind.health.admits_store(now_us)

    def _offers(
        self, staging: Staging | None, room: _Room, plan: StorePlan, keys: Sequence[BlockKey]
    ) -> tuple[Offer, ...]:
        """Reserve staging for what is wanted; None refuses, and the first that fails ends it."""
        offers: list[Offer] = []
        full = False
        for key, status in zip(keys, plan.statuses, strict=True):
            if status is not StoreStatus.WANTED:
                offers.append(Offer(key, status))
                continue
            if staging is None:
                offers.append(Offer(key, StoreStatus.REFUSED))
                continue
            offset = None if full else room.reserve(staging)
            full = offset is None
            no_space = Offer(key, StoreStatus.NO_SPACE)
            taken = no_space if offset is None else Offer(key, status, offset, room.num_bytes)
            offers.append(taken)
        return tuple(offers)

    def complete_store(
        self,
        session: SessionId,
        lease_id: LeaseId,
        checksums: Mapping[BlockKey, SlabChecksums],
    ) -> tuple[StoreStatus, ...]:
        """See `CacheApi.complete_store`. Copies and verifies on the calling thread."""
        state = self._state
        given = dict(zip(state.checked_keys(list(checksums)), checksums.values(), strict=True))
        with state.lock:
            owner, found, lease = self._take_locked(session, lease_id, given)
            copies = _copies_of(lease, given, found.layout.num_layers)
        try:
            self._copy(owner, found, copies, given)
        finally:
            with state.lock:
                self._accept_locked(found, copies)
                state.undo_locked(lease)
                found.num_copying -= 1
                owner.num_copying -= 1
                abandoned = owner.ended and not owner.num_copying
                state.copied.notify_all()
            if abandoned:
                owner.staging.close()
        self._count(copy.status for copy in copies if copy.offer.staging_offset >= 0)
        return tuple(copy.status for copy in copies)

    def _take_locked(
        self, session: SessionId, lease_id: LeaseId, given: Mapping[BlockKey, SlabChecksums]
    ) -> tuple[Session, Namespace, Lease]:
        """End the lease, so that nothing else undoes it, and announce the copying."""
        state = self._state
        now_us = state.clock.now_us()
        state.expire_locked(now_us)
        owner = state.session_locked(session)
        lease = state.leases.find(session, lease_id, now_us=now_us)
        if lease is None:
            raise LeaseExpiredError("this store lease has ended; prepare the store again")
        if lease.kind is not LeaseKind.STORE:
            raise InvalidArgumentError("this is the lease of a load, not of a store")
        unknown = given.keys() - {offer.key for offer in lease.offers if offer.staging_offset >= 0}
        if unknown:
            raise InvalidArgumentError(
                f"checksums for {len(unknown)} blocks that this lease has no staging slot for"
            )
        state.leases.take(session, lease_id)
        found = state.namespaces.get_locked(lease.namespace)
        assert found is not None, "a namespace with leases is not closed"
        found.num_copying += 1
        owner.num_copying += 1
        return owner, found, lease

    def _copy(
        self,
        owner: Session,
        found: Namespace,
        copies: list[_Copy],
        given: Mapping[BlockKey, SlabChecksums],
    ) -> None:
        """Move what was filled to arena slots; each copy is verified there."""
        filled = [copy for copy in copies if copy.status is StoreStatus.ACCEPTED]
        if not filled:
            return
        for copy in filled:
            copy.status = StoreStatus.NO_SPACE
        state, num_bytes = self._state, found.layout.block_bytes
        state.namespaces.relieve(found, len(filled))
        with state.lock:
            slots = state.namespaces.take_slots_locked(found, len(filled))
        moving = list(zip(filled, slots, strict=False))
        for copy, slot in moving:
            copy.slot = slot
        items = [
            SlotWrite(
                slot,
                copy.offer.key,
                copy.parent,
                owner.staging.view(copy.offer.staging_offset, num_bytes),
                given[copy.offer.key],
            )
            for copy, slot in moving
        ]
        start = time.perf_counter()
        written = found.memory.write(items)
        state.metrics.observe(
            "ucm_io_duration_seconds", time.perf_counter() - start, tier="memory", op="write"
        )
        state.metrics.add("ucm_io_bytes_total", len(items) * num_bytes, tier="memory", op="write")
        for (copy, _), status in zip(moving, written, strict=True):
            good = status is IoStatus.OK
            copy.status = StoreStatus.ACCEPTED if good else StoreStatus.CORRUPT
        book = _book(found, owner)
        if book is not None:
            self._take_summaries(owner, book, [copy for copy, _ in moving], given)

    def _take_summaries(
        self,
        owner: Session,
        book: SummaryBook,
        copies: Sequence[_Copy],
        given: Mapping[BlockKey, SlabChecksums],
    ) -> None:
        """Copy the summaries that came with good blocks, and believe those that speak for them."""
        num_refused = 0
        for copy in copies:
            run_bytes = book.layout.block_bytes + book.slot_bytes
            if copy.status is not StoreStatus.ACCEPTED or copy.offer.staging_bytes != run_bytes:
                continue  # no such run: the session opened the namespace anew since it prepared
            start = copy.offer.staging_offset + book.layout.block_bytes
            data = bytes(owner.staging.view(start, book.summary_bytes))
            decoded = decode_summary(book.layout, data, given[copy.offer.key])
            if decoded is not None and decoded.kind is book.kind:
                copy.summary = book.kind, data
            else:
                num_refused += any(data[:SUMMARY_HEADER_BYTES])  # zeros: none was written
        if num_refused:
            self._state.metrics.add("ucm_summaries_refused_total", num_refused)

    def _accept_locked(self, found: Namespace, copies: list[_Copy]) -> None:
        """Make what arrived well visible, parents first; give back every other slot."""
        now_us = self._state.clock.now_us()
        for copy in copies:
            if copy.slot is None:
                continue
            if copy.status is not StoreStatus.ACCEPTED:
                found.memory.free([copy.slot])
                continue
            copy.status = self._place_locked(found, copy, copy.slot, now_us)
            if copy.status is not StoreStatus.ACCEPTED:
                found.memory.delete([(copy.slot, copy.offer.key)])
            elif found.summaries is not None:
                sums = found.memory.checksums(copy.slot)
                found.summaries.arrived(copy.offer.key, sums, copy.summary, SummarySource.CLIENT)

    def _place_locked(
        self, found: Namespace, copy: _Copy, slot: SlotId, now_us: int
    ) -> StoreStatus:
        index, key = found.index, copy.offer.key
        if key in found.barred:  # its document was deleted meanwhile
            return StoreStatus.REFUSED
        parent = index.find(copy.parent)
        if copy.parent != ROOT_KEY and (parent == NO_ROW or not index.resident(parent)):
            return StoreStatus.ORPHAN
        row = index.find(key)
        if row != NO_ROW and index.parent(row) != parent:
            return StoreStatus.ORPHAN
        if row != NO_ROW and index.resident(row):
            return StoreStatus.PRESENT
        if row == NO_ROW:
            row = index.add_row(key, parent)
        index.touch(row, now_us)
        index.place(row, TierKind.MEMORY, slot)
        if self._write_behind is not None and found.nvme is not None:
            self._write_behind.enqueue_locked(found, row)
        return StoreStatus.ACCEPTED

    def _count(self, statuses: Iterable[StoreStatus]) -> None:
        for status, count in Counter(statuses).items():
            self._state.metrics.add("ucm_stored_blocks_total", count, status=status.value)


@dataclass(frozen=True, slots=True)
class _Room:
    """What one block takes in a staging arena."""

    block_bytes: int
    summary_bytes: int
    """Whole pages behind the block; 0 without summaries."""

    @property
    def num_bytes(self) -> int:
        return self.block_bytes + self.summary_bytes

    def reserve(self, staging: Staging) -> int | None:
        """A run for one block, with no summary in it; None when there is no room."""
        offset = staging.reserve(self.num_bytes)
        if offset is not None and self.summary_bytes:
            size = SUMMARY_HEADER_BYTES
            staging.view(offset + self.block_bytes, size)[:] = bytes(size)
        return offset


def _plan(found: Namespace, parent: BlockKey, keys: Sequence[BlockKey]) -> StorePlan:
    """What is wanted; nothing from the first block of a deleted document on."""
    cut = len(keys)
    if found.barred:
        cut = next((at for at, key in enumerate(keys) if key in found.barred), cut)
    plan = plan_store(found.index, parent, keys[:cut])
    refused = (StoreStatus.REFUSED,) * (len(keys) - cut)
    return StorePlan((*plan.statuses, *refused), plan.hold)


def _book(found: Namespace, owner: Session) -> SummaryBook | None:
    """The book of the summaries that the session's stores bring along."""
    kind = owner.summaries.get(found.id)
    return found.summaries.books.get(kind) if kind and found.summaries is not None else None


def _copies_of(
    lease: Lease, given: Mapping[BlockKey, SlabChecksums], num_layers: int
) -> list[_Copy]:
    """What each offer is to become: ACCEPTED stands for "to be copied"."""
    assert lease.parent is not None, "a store lease has a parent"
    copies: list[_Copy] = []
    parent = lease.parent
    for offer in lease.offers:
        status = offer.status
        if offer.key in given:
            right = len(given[offer.key]) == num_layers
            status = StoreStatus.ACCEPTED if right else StoreStatus.CORRUPT
        copies.append(_Copy(offer, parent, status))
        parent = offer.key
    return copies
