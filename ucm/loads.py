"""The load path: longest usable prefix, pins, promotion from NVMe straight into arena slots.

    prepare   lock: plan, pin, take slots, queue reads | wait | lock: answer
    a read    tier.read into the slot, no lock | lock: place the block, or lose it and say so

Loads of one block share one promotion. A block that cannot be read is lost, counted, and a miss;
what follows it in the chain is then unusable and answered alike. Nothing raises for a block.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from ucm.storage.tier import IoStatus, ReadOutcome, SlotRead

from .block_columns import PROMOTING
from .credits import Credit, ThreadShares
from .errors import CapacityError, TierUnavailableError, UcmError
from .grants import LoadGrants
from .hashing import CheckedKeys
from .layout import KvLayout
from .leases import Lease, LeaseKind
from .manager_state import MAX_WAIT_S, US_PER_S, ManagerState
from .namespaces import LoadWait, Namespace, Promotion
from .placement import PromotionPlan, Victim, plan_load
from .rechecks import recheck_and_end
from .transfer import Priority, TransferPool
from .types import BlockKey, LeaseId, LoadStatus, NamespaceId, SessionId, TierKind

_log = logging.getLogger(__name__)

WAIT_RETRY_S = 0.1
"""Hint to a load that found all waiting places taken: some tens of blocks' reads."""

Admit = Callable[[KvLayout], bool]
"""Whether a load that needs no wait is wanted, by the layout of its blocks; asked before anything
is leased, with the manager's lock held. It may refuse the load by a `CapacityError`."""

BLOCKS_PER_READ = 32
"""Blocks in one job: enough to merge neighbours (a quarter of the processor time of small slabs
went into requests that 16 left unmerged), few enough to interleave loads and to read while the next
slots are made real."""


class LoadPath:
    """Lookups, loads and prefetches of one manager. Thread-safe."""

    def __init__(self, state: ManagerState, pool: TransferPool) -> None:
        self._state = state
        self._pool = pool
        self._hold_s = state.config.transfer.lease_timeout_s
        service = state.config.service
        self._interrupted = False
        self._waits: dict[LoadWait, SessionId] = {}
        self._places = Credit(
            min(service.max_waiting_loads, ThreadShares.of(service.rpc_threads).waiting),
            "{limit} loads wait for the disk, as many as may; come again or compute",
            retry_after_s=WAIT_RETRY_S,
        )
        self._reading_bytes = Credit(service.inflight_bytes_per_session, "", retry_after_s=0.0)

    def lookup(
        self, session: SessionId, namespace: NamespaceId, keys: Sequence[BlockKey]
    ) -> tuple[TierKind, ...]:
        """See `CacheApi.lookup`."""
        state = self._state
        keys = state.checked_keys(keys)
        with state.lock:
            found, _ = state.begin_locked(session, namespace)
            _, tiers = found.index.prefix(keys)
        state.metrics.add("ucm_lookups_total")
        state.metrics.add("ucm_lookup_blocks_total", len(keys))
        self._count_by_tier("ucm_hit_blocks_total", tiers)
        return tiers

    def prefetch(self, session: SessionId, namespace: NamespaceId, keys: Sequence[BlockKey]) -> int:
        """See `CacheApi.prefetch`."""
        state = self._state
        keys = state.checked_keys(keys)
        with state.lock:
            found, now_us = state.begin_locked(session, namespace)
            plan = plan_load(found.index, keys)
            found.index.pin_all(plan.rows, now_us)
            affordable = self.affordable(session, found, plan.promote)
            promoted = self._promote_locked(found, session, affordable, Priority.PREFETCH)
            found.index.unpin_all(plan.rows)
            return promoted

    def prepare_load(
        self,
        session: SessionId,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        timeout_s: float,
    ) -> LoadGrants:
        """See `CacheApi.prepare_load`. Blocks up to `timeout_s` of real time."""
        state = self._state
        keys = state.checked_keys(keys)
        with state.lock:
            found, now_us = state.begin_locked(session, namespace)
            grants = self._at_once_locked(found, session, keys, now_us)
        if grants is None:
            state.namespaces.relieve(found, len(keys))
            timeout_s = min(max(0.0, timeout_s), MAX_WAIT_S)
            grants = self._load_slowly(session, namespace, keys, timeout_s)
        self._count(grants)
        return grants

    def prepare_at_once(
        self, session: SessionId, namespace: NamespaceId, keys: Sequence[BlockKey], admit: Admit
    ) -> LoadGrants | None:
        """`prepare_load` of what is in memory; None, and nothing was done, if anything is not."""
        state = self._state
        keys = state.checked_keys(keys)
        with state.lock:
            found, now_us = state.begin_locked(session, namespace)
            grants = self._at_once_locked(found, session, keys, now_us, admit)
        if grants is not None:
            self._count(grants)
        return grants

    def _at_once_locked(
        self,
        found: Namespace,
        session: SessionId,
        keys: CheckedKeys,
        now_us: int,
        admit: Admit = lambda _layout: True,
    ) -> LoadGrants | None:
        plan = plan_load(found.index, keys)
        if not plan.in_memory or not admit(found.layout):
            return None
        lease = self._grant_locked(session, found, now_us)
        self._hold_locked(found, lease, plan, now_us)
        num_missed = len(keys) - len(plan.rows)
        statuses = (LoadStatus.READY,) * len(plan.rows) + (LoadStatus.MISS,) * num_missed
        return _granted(found, lease, statuses, plan.tiers, self._hold_s)

    def _load_slowly(
        self, session: SessionId, namespace: NamespaceId, keys: CheckedKeys, timeout_s: float
    ) -> LoadGrants:
        """A load that reads; what it found before it has to be looked up again."""
        state = self._state
        wait_us, hold_us = int(timeout_s * US_PER_S), int(self._hold_s * US_PER_S)
        with contextlib.ExitStack() as places:
            with state.lock:
                found, now_us = state.begin_locked(session, namespace)
                plan = plan_load(found.index, keys)
                if wait_us and found.index.lacking(plan.rows, TierKind.MEMORY):
                    places.enter_context(self._places.taken())
                lease = self._grant_locked(session, found, now_us + wait_us)
                wait = self._start_locked(found, lease, plan, now_us)
            if wait.pending and not self._interrupted:
                wait.done.wait(timeout_s)
        with state.lock:
            self._waits.pop(wait, None)
            statuses = self._statuses_locked(found, lease, plan, wait, len(keys))
            state.leases.set_deadline(lease, state.clock.now_us() + hold_us)
            return _granted(found, lease, statuses, plan.tiers, self._hold_s)

    def _grant_locked(self, session: SessionId, found: Namespace, begin_us: int) -> Lease:
        """A lease that counts from `begin_us`."""
        deadline_us = begin_us + int(self._hold_s * US_PER_S)
        return self._state.grant_locked(session, found, LeaseKind.LOAD, deadline_us)

    def _hold_locked(
        self, found: Namespace, lease: Lease, plan: PromotionPlan, now_us: int
    ) -> None:
        """Pin the prefix for the lease."""
        self._state.hold_locked(lease, found, plan.rows, now_us)
        lease.num_bytes = len(plan.rows) * found.layout.block_bytes

    def waiting_place(self) -> contextlib.AbstractContextManager[None]:
        """A waiting place for the length of a `with` block.

        Raises:
            CapacityError: all are taken.
        """
        return self._places.taken()

    def end_waits_locked(self, session: SessionId | None = None) -> None:
        """Let loads that wait answer now: an ended session's, or all, for good, when None."""
        self._interrupted = self._interrupted or session is None
        for wait, owner in self._waits.items():
            if session in (None, owner):
                wait.done.set()

    def _start_locked(
        self, found: Namespace, lease: Lease, plan: PromotionPlan, now_us: int
    ) -> LoadWait:
        """Pin the prefix, queue what must be read, and join what is being read."""
        self._hold_locked(found, lease, plan, now_us)
        affordable = self.affordable(lease.session, found, plan.promote)
        self._promote_locked(found, lease.session, affordable, Priority.LOAD)
        wait = LoadWait()
        for row in found.index.lacking(plan.rows, TierKind.MEMORY):
            promotion = found.promotions.get(row)
            if promotion is not None:
                promotion.waits.append(wait)
                wait.pending.add(row)
            else:
                wait.failed[row] = LoadStatus.NO_SPACE
        if wait.pending:
            self._waits[wait] = lease.session
        return wait

    def affordable(
        self, session: SessionId, found: Namespace, rows: Sequence[int]
    ) -> Sequence[int]:
        """The leading rows that the session's credit covers; one, if nothing is read for it."""
        count = self._reading_bytes.left(session) // found.layout.block_bytes
        return rows[: max(count, int(not self._reading_bytes.used(session)))]

    def _promote_locked(
        self, found: Namespace, session: SessionId, rows: Sequence[int], priority: Priority
    ) -> int:
        """As `promote_locked`, in jobs that read whole blocks."""
        return self.promote_locked(found, session, rows, self.whole_blocks(found, priority))

    def whole_blocks(
        self, found: Namespace, priority: Priority
    ) -> tuple[Callable[[list[Promotion]], bool], int]:
        """How `promote_locked` reads whole blocks."""

        def submit(batch: list[Promotion]) -> bool:
            return self.submit(lambda: self.read(found, batch), len(batch), priority)

        return submit, BLOCKS_PER_READ

    def promote_locked(
        self,
        found: Namespace,
        session: SessionId,
        rows: Sequence[int],
        how: tuple[Callable[[list[Promotion]], bool], int],
    ) -> int:
        """Give rows memory slots and queue their reads; those that find no room stay behind.

        Args:
            found: the namespace.
            session: who pays for the reads.
            rows: on NVMe only, nobody reads them yet, pinned by the caller.
            how: queues the reads of a batch, False when it cannot; and how many blocks one takes.

        Returns:
            How many leading rows are on their way.
        """
        submit, batch_blocks = how
        slots = self._state.namespaces.take_slots_locked(found, len(rows))
        promotions = [
            Promotion(
                row, found.index.key(row), found.index.slot(row, TierKind.NVME), slot, session
            )
            for row, slot in zip(rows, slots, strict=False)
        ]
        queued = 0
        for start in range(0, len(promotions), batch_blocks):
            batch = promotions[start : start + batch_blocks]
            if not submit(batch):
                found.memory.free([promotion.target for promotion in promotions[start:]])
                break
            for promotion in batch:
                found.index.begin_flight(promotion.row, PROMOTING)
                found.promotions[promotion.row] = promotion
            self._reading_bytes.charge(session, len(batch) * found.layout.block_bytes)
            queued += len(batch)
        return queued

    def submit(self, job: Callable[[], None], weight: int, priority: Priority) -> bool:
        """Queue a transfer; False when it finds no place."""
        try:
            self._pool.submit(priority, job, weight=weight)
        except (CapacityError, TierUnavailableError):
            return False
        return True

    def read(self, found: Namespace, batch: list[Promotion]) -> None:
        """One job of the pool: read blocks into their slots and settle them."""
        nvme = found.nvme
        assert nvme is not None, "only NVMe blocks are promoted"
        found.memory.wait_real([item.target for item in batch])
        items = [SlotRead(item.source, item.key, found.memory.view(item.target)) for item in batch]
        start = time.perf_counter()
        try:
            outcomes = nvme.read(items)
        except (UcmError, OSError) as error:
            _log.warning("reading %d blocks: %s", len(batch), error)
            outcomes = [ReadOutcome(IoStatus.IO_ERROR)] * len(batch)
        metrics = self._state.metrics
        metrics.observe(
            "ucm_io_duration_seconds", time.perf_counter() - start, tier="nvme", op="read"
        )
        num_bytes = len(batch) * found.layout.block_bytes
        metrics.add("ucm_io_bytes_total", num_bytes, tier="nvme", op="read")
        with self._state.lock:
            for promotion, outcome in zip(batch, outcomes, strict=True):
                self.settle_locked(found, promotion, outcome)
            publish(batch)

    def settle_locked(self, found: Namespace, promotion: Promotion, outcome: ReadOutcome) -> None:
        """A promotion's reads are over: place the block, or lose it, and say so."""
        row, index = promotion.row, found.index
        del found.promotions[row]
        self._reading_bytes.give_back(promotion.session, found.layout.block_bytes)
        failure: LoadStatus | None = None
        if outcome.status is IoStatus.OK:
            found.memory.adopt(
                promotion.target, promotion.key, outcome.checksums, is_lossy=outcome.is_lossy
            )
            index.place(row, TierKind.MEMORY, promotion.target)
            if found.summaries is not None:
                found.summaries.promoted(promotion.key, outcome)
        else:
            found.memory.free([promotion.target])
            corrupt = outcome.status is IoStatus.CORRUPT
            failure = LoadStatus.CORRUPT if corrupt else LoadStatus.MISS
            slot = index.lose(row, TierKind.NVME)
            if corrupt:
                self._state.metrics.add("ucm_corrupt_blocks_total", tier="nvme")
            else:
                found.undeleted.append(Victim(promotion.key, slot))
        index.end_flight(row, PROMOTING)
        for wait in promotion.waits:
            if failure is None:
                wait.advance(row, found.layout.num_layers, outcome.checksums)
            wait.settle(row, failure)

    def abandon_locked(self, found: Namespace, promotion: Promotion) -> None:
        """Nobody waits for a promotion any more, and nothing of it is being read."""
        del found.promotions[promotion.row]
        self._reading_bytes.give_back(promotion.session, found.layout.block_bytes)
        found.memory.free([promotion.target])
        found.index.end_flight(promotion.row, PROMOTING)

    def _statuses_locked(
        self, found: Namespace, lease: Lease, plan: PromotionPlan, wait: LoadWait, num_keys: int
    ) -> tuple[LoadStatus, ...]:
        """A status for every key; rows behind the first that failed are let go."""
        for row in wait.pending:
            found.promotions[row].waits.remove(wait)
        statuses: list[LoadStatus] = []
        failure: LoadStatus | None = None
        rows = () if lease.ended else plan.rows
        lacking = set(found.index.lacking(rows, TierKind.MEMORY))
        for row in rows:
            if failure is None:
                failure = LoadStatus.TIMED_OUT if row in wait.pending else wait.failed.get(row)
            elif failure is LoadStatus.CORRUPT:
                failure = LoadStatus.MISS
            if failure is None and row in lacking:
                failure = LoadStatus.MISS
            statuses.append(failure or LoadStatus.READY)
        num_ready = statuses.count(LoadStatus.READY)
        found.index.unpin_all(lease.rows[num_ready:])
        del lease.rows[num_ready:]
        lease.num_bytes = len(lease.rows) * found.layout.block_bytes
        return (*statuses, *[LoadStatus.MISS] * (num_keys - len(statuses)))

    def complete_load(
        self, session: SessionId, lease_id: LeaseId, corrupt: Sequence[BlockKey]
    ) -> None:
        """See `CacheApi.complete_load`. Reads the blocks that are reported corrupt."""
        state = self._state
        corrupt = state.checked_keys(corrupt)
        with state.lock:
            state.expire_locked(state.clock.now_us())
            state.session_locked(session)
            lease = state.leases.take(session, lease_id)
            if lease is None:
                return
            found = state.namespaces.get_locked(lease.namespace)
            assert found is not None, "a namespace with leases is not closed"
            suspects = set(corrupt)
            if suspects:
                suspects &= {found.index.key(row) for row in lease.rows}
            if not suspects or lease.kind is not LeaseKind.LOAD:
                state.undo_locked(lease)
                return
            found.num_copying += 1  # the end of the store waits for it
        # the lease is out of the table but still pins them
        recheck_and_end(state, self._pool, found, lease, suspects)

    def _count(self, grants: LoadGrants) -> None:
        self._count_by_tier("ucm_loaded_blocks_total", grants.tiers)
        for reason, count in Counter(grants.statuses[len(grants.tiers) :]).items():
            self._state.metrics.add("ucm_load_failures_total", count, reason=reason.value)

    def _count_by_tier(self, name: str, tiers: Sequence[TierKind]) -> None:
        num_fast = tiers.count(TierKind.MEMORY)
        if num_fast:
            self._state.metrics.add(name, num_fast, tier=TierKind.MEMORY.value)
        if len(tiers) > num_fast:
            self._state.metrics.add(name, len(tiers) - num_fast, tier=TierKind.NVME.value)


def publish(promotions: Sequence[Promotion]) -> None:
    """Tell everybody who waits for one of these, once, how far they are. Needs the lock."""
    for wait in {wait for promotion in promotions for wait in promotion.waits}:
        wait.publish()


def _granted(
    found: Namespace,
    lease: Lease,
    statuses: tuple[LoadStatus, ...],
    tiers: tuple[TierKind, ...],
    hold_s: float,
) -> LoadGrants:
    """The answer to a load whose leading READY blocks `lease` holds in memory."""
    slots = found.index.slots(lease.rows, TierKind.MEMORY)
    size = found.memory.arena.slot_bytes
    return LoadGrants(
        lease_id=lease.id,
        statuses=statuses,
        tiers=tiers[: len(slots)],
        offsets=tuple([slot * size for slot in slots]),
        checksums=found.memory.packed_checksums(slots),
        timeout_s=hold_s,
    )
