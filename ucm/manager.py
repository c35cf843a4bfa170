"""The facade of the store, shared by the daemon and embedded mode.

    loads.py  stores.py  write_behind.py      the three paths; effects
    placement  eviction  leases  block_index  what they decide with; pure
    namespaces.py  manager_state.py           tiers under one budget; sessions under one lock

*Decide under the lock, do I/O outside.* The cache fails open: an I/O or corruption error is a
counted miss here and an exception nowhere above. Calls raise only for a caller's mistakes, limits
and the end of the store.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ucm.storage.arena import Arena

from . import __version__
from .api import LookupResult, NamespaceHandle, PinLease, SlabChecksums
from .clock import Clock, SystemClock
from .collection_desk import CollectionDesk
from .config import Config
from .enum_words import word_of
from .errors import CapacityError, TierUnavailableError, UcmError
from .grants import LoadGrants, ManagerStatus, StoreGrants, TierStatus
from .hashing import NamespaceSpec
from .layer_loads import LayerLoads
from .leases import LeaseKind
from .loads import LoadPath
from .loads_at_once import LoadsAtOnce
from .manager_state import MAX_WAIT_S, ManagerState, Session
from .manager_status import check_namespace, namespace_statuses, tier_status
from .metrics import Metrics
from .namespaces import Namespace, NamespaceTable, NvmeStoreLike, TierFactory, tiers_of
from .pins import PinPath
from .plan_grants import PlanGrants
from .selection import Selections
from .staging import Staging
from .stores import StorePath
from .summary_fills import SummaryFills
from .transfer import TransferPool
from .types import (
    BlockKey,
    LeaseId,
    LoadMode,
    NamespaceId,
    SessionId,
    StoreStatus,
    SummaryKind,
    TierKind,
)
from .write_behind import WriteBehind

_log = logging.getLogger(__name__)

_FLUSH_TURN_S = 0.25
"""How long a flush waits before it looks whether somebody still wants it."""

TRANSFER_THREADS = 4
"""Batches in flight; each is spread over the NVMe tier's own I/O threads."""


class Manager:
    """One store: sessions, namespaces, and every operation of `CacheApi` in terms of grants.

    Thread-safe. Every operation names its session; ids of one mean nothing in another.
    """

    def __init__(
        self,
        config: Config,
        *,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
        tiers: TierFactory | None = None,
    ) -> None:
        """Open the store.

        Args:
            config: sizes and limits; `nvme.path` None switches the NVMe tier off.
            clock: for deadlines; the machine's when None.
            metrics: where counters go; private ones when None.
            tiers: how tiers are made; those that `config` describes when None.

        Raises:
            ConfigError: the folder belongs to another user, format version or running daemon; or
                the quotas cannot be kept.
        """
        self.config = config
        self.metrics = metrics or Metrics()
        clock = clock or SystemClock()
        tiers = tiers or tiers_of(config)
        self._has_nvme = tiers.nvme is not None
        self._nvme_io = tiers.nvme_io
        namespaces = NamespaceTable(config, tiers, clock, self.metrics)
        self._state = ManagerState(config, namespaces, clock, self.metrics)
        self._pool = TransferPool(TRANSFER_THREADS, config.transfer.max_queued_transfers)
        self._write_behind = (
            WriteBehind(self._state, config.nvme, self._pool) if self._has_nvme else None
        )
        self._loads = LoadPath(self._state, self._pool)
        self.layer_loads = LayerLoads(self._state, self._loads)
        """Layer by layer loads; `begin_load` here is what engines call."""
        self.summaries = SummaryFills(self._state, self._pool, self._loads.waiting_place)
        """Summaries of blocks, for namespaces that are opened with a kind of them."""
        self.selections = Selections(self._state, self.summaries, self.layer_loads)
        """Which blocks a query attends to, by their summaries."""
        self.at_once = LoadsAtOnce(self._loads, self.layer_loads, self._note_use)
        """Loads that need no wait."""
        self._pins = PinPath(self._state, self._loads)
        self._stores = StorePath(self._state, self._write_behind)
        self.collections = self._open_collections(tiers.nvme)
        """Named collections of documents, and their deletion; what operators call."""
        self._session_numbers = itertools.count(1)
        self._interrupted = False
        self._closed_durable = False
        """What `close` found; False until it is through."""
        self.metrics.set("ucm_build_info", 1, version=__version__)

    def _open_collections(self, store: NvmeStoreLike | None) -> CollectionDesk:
        """Open the registry; when that fails, nothing of this store stays open."""
        try:
            forget = self.selections.tables.forget
            return CollectionDesk(self._state, self._write_behind, forget, store)
        except UcmError:
            if self._write_behind is not None:
                self._write_behind.close(timeout_s=1.0)
            self._pool.close(timeout_s=1.0)
            self._state.namespaces.close()
            raise

    # -------------------------------------------------------------- sessions

    def open_session(self, client: str = "") -> SessionId:
        """Start a session with its own staging memory.

        Args:
            client: who it is, for the log and for people.

        Raises:
            CapacityError: as many sessions as allowed, or no memory for its staging.
            TierUnavailableError: the store drains or is closed.
        """
        state, service = self._state, self.config.service
        with state.lock:
            if state.draining:
                raise TierUnavailableError("the store is shutting down")
            if len(state.sessions) >= service.max_sessions:
                raise CapacityError(
                    f"{service.max_sessions} sessions are open, the limit: "
                    "raise service.max_sessions"
                )
            session = SessionId(next(self._session_numbers))
            staging = Staging(service.staging_bytes)
            staging.prefault(min(self.config.memory.prefault_bytes, service.staging_bytes) // 8)
            state.sessions[session] = Session(session, client, staging)
        return session

    def close_session(self, session: SessionId) -> None:
        """End a session: its leases, pins and staging memory go back. Idempotent."""
        with self._state.lock:
            ended = self._state.end_session_locked(session)
            self._loads.end_waits_locked(session)
            self.summaries.end_waits_locked(session)
        if ended is not None:
            ended.staging.close()

    def staging_arena(self, session: SessionId) -> Arena:
        """The session's staging memory; its descriptor is for this client only.

        Raises:
            BlockNotFoundError: the session has ended.
        """
        return self.staging(session).arena

    def staging(self, session: SessionId) -> Staging:
        """The session's staging memory with its views, for a client in this process."""
        with self._state.lock:
            return self._state.session_locked(session).staging

    # ------------------------------------------------------------ namespaces

    def open_namespace(
        self, session: SessionId, spec: NamespaceSpec, *, summary: SummaryKind | None = None
    ) -> NamespaceHandle:
        """See `CacheApi.open_namespace`. Blocks for the recovery of what is on disk."""
        if summary is not None:
            summary = word_of(SummaryKind, summary, "a kind of summaries")
        with self._state.lock:
            self._state.session_locked(session)

        def use(found: Namespace) -> None:
            owner = self._state.session_locked(session)
            if summary is not None:
                self.summaries.open_locked(found, summary)
                owner.summaries[found.id] = summary
            if found.id not in owner.namespaces:
                owner.namespaces.add(found.id)
                found.num_sessions += 1

        found = self._state.namespaces.open(spec, use, summary)
        if self._write_behind is not None:
            self._write_behind.trim(found)
        self.collections.rounds.opened(found.id)
        with self._state.lock:
            kind = self._state.session_locked(session).summaries.get(found.id)
        limit = self.config.nvme.max_read_bytes_per_s
        return NamespaceHandle(found.id, found.layout, limit, kind)

    def arena(self, session: SessionId, namespace: NamespaceId) -> Arena:
        """The arena that the offsets of load grants point into; read-only for clients.

        Raises:
            BlockNotFoundError: the session has not opened the namespace.
        """
        with self._state.lock:
            return self._state.namespace_locked(session, namespace).memory.arena

    # ------------------------------------------------------------ operations

    def lookup(
        self, session: SessionId, namespace: NamespaceId, keys: Sequence[BlockKey]
    ) -> LookupResult:
        """See `CacheApi.lookup`."""
        return LookupResult(self._loads.lookup(session, namespace, keys))

    def prefetch(self, session: SessionId, namespace: NamespaceId, keys: Sequence[BlockKey]) -> int:
        """See `CacheApi.prefetch`."""
        return self._loads.prefetch(session, namespace, keys)

    def prepare_load(
        self,
        session: SessionId,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        timeout_s: float,
    ) -> LoadGrants:
        """See `CacheApi.prepare_load`."""
        grants = self._loads.prepare_load(session, namespace, keys, timeout_s=timeout_s)
        self._note_use(namespace, keys[: len(grants.offsets)])
        return grants

    def begin_load(
        self,
        session: SessionId,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        mode: LoadMode,
        timeout_s: float,
    ) -> PlanGrants:
        """See `CacheApi.begin_load`."""
        loads = self.layer_loads
        grants = loads.begin_load(session, namespace, keys, mode=mode, timeout_s=timeout_s)
        self._note_use(namespace, keys[: len(grants.sources)])
        return grants

    def _note_use(self, namespace: NamespaceId, keys: Sequence[BlockKey]) -> None:
        if self._write_behind is not None:
            self._write_behind.note_use(namespace, keys)

    def complete_load(
        self, session: SessionId, lease_id: LeaseId, corrupt: Sequence[BlockKey] = ()
    ) -> None:
        """See `CacheApi.complete_load`."""
        self._loads.complete_load(session, lease_id, corrupt)

    def prepare_store(
        self,
        session: SessionId,
        namespace: NamespaceId,
        parent: BlockKey,
        keys: Sequence[BlockKey],
    ) -> StoreGrants:
        """See `CacheApi.prepare_store`.

        Raises:
            InvalidArgumentError: the keys are no chain: one twice, or known under another parent.
        """
        return self._stores.prepare_store(session, namespace, parent, keys)

    def complete_store(
        self,
        session: SessionId,
        lease_id: LeaseId,
        checksums: Mapping[BlockKey, SlabChecksums],
    ) -> tuple[StoreStatus, ...]:
        """See `CacheApi.complete_store`.

        Raises:
            LeaseExpiredError: the lease has ended.
            InvalidArgumentError: checksums for a key that was not WANTED.
        """
        return self._stores.complete_store(session, lease_id, checksums)

    def pin(
        self,
        session: SessionId,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        hold_s: float = 3600.0,
        timeout_s: float,
    ) -> PinLease:
        """See `CacheApi.pin`.

        Raises:
            TierUnavailableError: the store drains or is closed.
            LeaseExpiredError: it could not be loaded within a lease's life.
        """
        pin = self._pins.pin(session, namespace, keys, hold_s=hold_s, timeout_s=timeout_s)
        self._note_use(namespace, keys[: pin.num_blocks])
        return pin

    def release(self, session: SessionId, lease_id: LeaseId) -> None:
        """See `CacheApi.release`."""
        state = self._state
        with state.lock:
            state.session_locked(session)
            lease = state.leases.take(session, lease_id)
            if lease is not None:
                state.undo_locked(lease)

    def flush(self, *, timeout_s: float) -> bool:
        """See `CacheApi.flush`. Also False when a block that was waiting could not be written.

        Without an NVMe tier there is nothing to wait for.
        """
        if self._write_behind is None:
            return True
        return self._write_behind.flush(timeout_s=min(timeout_s, MAX_WAIT_S))

    def flush_while(self, wanted: Callable[[], bool], *, timeout_s: float) -> bool:
        """`flush` that gives up, with False, soon after `wanted()` is False or `interrupt`."""
        stop_s = time.monotonic() + min(timeout_s, MAX_WAIT_S)
        while True:
            started_s = time.monotonic()
            turn_s = min(max(stop_s - started_s, 0.0), _FLUSH_TURN_S)
            if self.flush(timeout_s=turn_s):
                return True
            now_s = time.monotonic()
            failed = now_s - started_s < turn_s  # it did not run out of time
            if failed or now_s >= stop_s or self._interrupted or not wanted():
                return False

    def waiting_place(self) -> contextlib.AbstractContextManager[None]:
        """One of the places of calls that wait, for the length of a `with` block.

        Raises:
            CapacityError: all are taken.
        """
        return self._loads.waiting_place()

    def interrupt(self) -> None:
        """Let every call that waits answer now; for the end of the process that serves them."""
        self._interrupted = True
        with self._state.lock:
            self._loads.end_waits_locked()
            self.summaries.end_waits_locked()

    # ------------------------------------------------------------- lifecycle

    def tick(self) -> None:
        """End leases whose deadline has passed, as calls do too, and documents likewise.

        An idle daemon calls this.
        """
        with self._state.lock:
            self._state.expire_locked(self._state.clock.now_us())
        self.collections.tick()

    def drain(self, *, timeout_s: float = 0.0) -> bool:
        """Refuse new stores, pins and sessions and write out what was accepted; loads go on.

        Pins end: nobody waits for them.

        Returns:
            Whether all of it is durable.
        """
        with self._state.lock:
            self._state.draining = True
            for lease in self._state.leases.of_kind(LeaseKind.PIN):
                self._state.leases.take(lease.session, lease.id)
                self._state.undo_locked(lease)
        return self.flush(timeout_s=timeout_s)

    def close(self, *, timeout_s: float | None = None) -> bool:
        """Drain, end every session, close the tiers. Only the first call does anything.

        Args:
            timeout_s: how long the drain may take; `service.drain_timeout_s` when None.

        Returns:
            Whether all that was accepted is durable. Later calls say what the first one found,
            and False while it is not through.
        """
        state = self._state
        timeout_s = self.config.service.drain_timeout_s if timeout_s is None else timeout_s
        with state.lock:
            if state.closed:
                return self._closed_durable
            state.draining = True
            state.closed = True
            sessions = list(state.sessions)
        deadline = time.monotonic() + timeout_s
        durable = self.flush(timeout_s=timeout_s)
        for session in sessions:
            self.close_session(session)
        left_s = max(1.0, deadline - time.monotonic())
        computed = self.summaries.close(timeout_s=left_s)
        with state.lock:
            copied = state.copied.wait_for(
                lambda: not any(found.num_copying for found in state.namespaces), left_s
            )
        self.collections.rounds.finish()
        if self._write_behind is not None:
            durable = self._write_behind.close(timeout_s=left_s) and durable
        self.collections.close()
        if not self._pool.close(timeout_s=left_s) or not copied or not computed:
            _log.warning("transfers still run: the tiers stay open until the process ends")
            return False
        state.namespaces.close()
        self._closed_durable = durable
        return durable

    # ---------------------------------------------------------------- status

    def status(self) -> ManagerStatus:
        """A snapshot; also refreshes the gauges. O(namespaces + leases)."""
        state, queue = self._state, self._write_behind
        with state.lock:
            namespaces = namespace_statuses(state.namespaces)
            tiers = self._tier_statuses_locked()
            word = "closed" if state.closed else "draining" if state.draining else "serving"
            problems = [each.problem for each in namespaces if each.problem]
            problems += self.collections.rounds.status_locked().problems
            problems += [each.memory_shortage for each in state.namespaces if each.memory_shortage]
            problems += [each.nvme_shortage for each in state.namespaces if each.nvme_shortage]
            problems += [
                f"{tier.kind}: stores stop, loads go on: {tier.reason}"
                for tier in tiers
                if not tier.writable
            ]
            snapshot = ManagerStatus(
                state=word,
                num_sessions=len(state.sessions),
                num_leases=len(state.leases),
                leased_bytes=state.leases.num_bytes(),
                write_queue_blocks=queue.num_queued if queue else 0,
                write_queue_bytes=queue.queued_bytes if queue else 0,
                rejected_admissions=queue.num_rejected if queue else 0,
                tiers=tiers,
                namespaces=namespaces,
                problems=tuple(problems),
            )
        self._set_gauges(snapshot)
        return snapshot

    def _tier_statuses_locked(self) -> tuple[TierStatus, ...]:
        found = list(self._state.namespaces)
        memory = tier_status(found, TierKind.MEMORY, self.config.memory.capacity_bytes, "")
        if self._write_behind is None:
            return (memory,)
        reason = self._write_behind.health.reason
        nvme = tier_status(found, TierKind.NVME, self.config.nvme.capacity_bytes, reason)
        if self._nvme_io is not None:
            nvme = replace(nvme, io=self._nvme_io.kind.value, io_reason=self._nvme_io.reason)
        return (memory, nvme)

    def _set_gauges(self, snapshot: ManagerStatus) -> None:
        metrics = self.metrics
        metrics.set("ucm_sessions", snapshot.num_sessions)
        metrics.set("ucm_leases", snapshot.num_leases)
        metrics.set("ucm_leased_bytes", snapshot.leased_bytes)
        metrics.set("ucm_pinned_bytes", sum(each.pinned_bytes for each in snapshot.namespaces))
        metrics.set("ucm_write_queue_bytes", snapshot.write_queue_bytes)
        for tier in snapshot.tiers:
            kind = tier.kind.value
            metrics.set("ucm_tier_used_bytes", tier.used_bytes, tier=kind)
            metrics.set("ucm_tier_capacity_bytes", tier.capacity_bytes, tier=kind)

    def check_integrity(self) -> list[str]:
        """Every violated invariant of every part, in words. O(blocks): for tests and idle times."""
        state = self._state
        with state.lock:
            problems = state.leases.check_integrity() + self.selections.tables.check_integrity()
            for session in state.sessions.values():
                problems += session.staging.runs.check_integrity()
            for found in state.namespaces:
                problems += check_namespace(found)
        return problems + self.collections.check_integrity()
