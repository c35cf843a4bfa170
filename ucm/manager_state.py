"""What the manager's parts share: the one lock, sessions, leases, and how a lease is undone.

Everything here is changed with `lock` held, and only decided here: no I/O under the lock.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .clock import Clock
from .config import Config
from .errors import BlockNotFoundError, InvalidArgumentError, TierUnavailableError
from .hashing import CheckedKeys, check_keys
from .leases import Lease, LeaseKind, LeaseTable
from .metrics import Metrics
from .namespaces import Namespace, NamespaceTable
from .progress import ProgressArea
from .staging import Staging
from .types import BlockKey, NamespaceId, SessionId, SummaryKind, TierKind

US_PER_S = 1_000_000

MAX_WAIT_S = 3600.0
"""Longest that any call waits, whatever it asks for: infinity is no time-out."""


@dataclass(slots=True, eq=False)
class Session:
    """One client."""

    id: SessionId
    client: str
    staging: Staging
    progress: ProgressArea | None = None
    """Made at its first use."""
    namespaces: set[NamespaceId] = field(default_factory=set)
    summaries: dict[NamespaceId, SummaryKind] = field(default_factory=dict)
    """The kind of summaries that it opened a namespace with, where it did."""
    num_copying: int = 0
    """Stores that read its staging memory now; it is not closed under them."""
    ended: bool = False


class ManagerState:
    """The state of one manager. Methods named `_locked` need `lock` held."""

    def __init__(
        self, config: Config, namespaces: NamespaceTable, clock: Clock, metrics: Metrics
    ) -> None:
        self.config = config
        self.clock = clock
        self.metrics = metrics
        self.namespaces = namespaces
        self.lock = namespaces.lock
        self.copied = threading.Condition(self.lock)
        """Notified when a namespace's `num_copying` falls."""
        self.leases = LeaseTable(config.transfer.max_leases_per_session)
        self.sessions: dict[SessionId, Session] = {}
        self.draining = False
        self.closed = False

    def session_locked(self, session: SessionId) -> Session:
        """The live session of that id.

        Raises:
            TierUnavailableError: the manager is closed.
            BlockNotFoundError: it has ended or never was.
        """
        if self.closed:
            raise TierUnavailableError("the store is closed")
        found = self.sessions.get(session)
        if found is None:
            raise BlockNotFoundError(f"session {session} has ended; connect again")
        return found

    def progress_locked(self, session: SessionId) -> ProgressArea:
        """The session's progress area.

        Raises:
            TierUnavailableError, BlockNotFoundError: see `session_locked`.
            CapacityError: the kernel has no memory for it.
        """
        found = self.session_locked(session)
        if found.progress is None:
            found.progress = ProgressArea(self.config.transfer.progress_bytes)
        return found.progress

    def namespace_locked(self, session: SessionId, namespace: NamespaceId) -> Namespace:
        """A namespace that the session has opened.

        Raises:
            BlockNotFoundError: it has not.
        """
        opened = namespace in self.session_locked(session).namespaces
        found = self.namespaces.get_locked(namespace) if opened else None
        if found is None:
            raise BlockNotFoundError(
                f"this session has not opened namespace {namespace.hex()[:8]}; open it first"
            )
        return found

    def checked_keys(self, keys: Sequence[bytes]) -> CheckedKeys:
        """The keys of one call, checked for number and length.

        Raises:
            InvalidArgumentError: too many, or one of the wrong length.
        """
        limit = self.config.service.max_keys_per_call
        if len(keys) > limit:
            raise InvalidArgumentError(f"{len(keys)} keys in one call, at most {limit} are taken")
        return check_keys(keys)

    def begin_locked(self, session: SessionId, namespace: NamespaceId) -> tuple[Namespace, int]:
        """Start a call: expire what is due; the session's namespace and the time."""
        now_us = self.clock.now_us()
        self.expire_locked(now_us)
        found = self.namespace_locked(session, namespace)
        found.last_use_us = now_us
        return found, now_us

    def grant_locked(
        self, session: SessionId, namespace: Namespace, kind: LeaseKind, deadline_us: int
    ) -> Lease:
        """A new lease of the session.

        Raises:
            CapacityError: it holds too many.
        """
        lease = self.leases.grant(session, kind, namespace.id, deadline_us=deadline_us)
        namespace.num_leases += 1
        return lease

    def hold_locked(
        self, lease: Lease, namespace: Namespace, rows: Sequence[int], now_us: int
    ) -> None:
        """Pin and touch rows for a lease."""
        namespace.index.pin_all(rows, now_us)
        lease.rows.extend(rows)

    def undo_locked(self, lease: Lease) -> None:
        """Give back what an ended lease holds: pins and staging memory."""
        namespace = self.namespaces.get_locked(lease.namespace)
        assert namespace is not None, "a namespace with leases is not closed"
        if lease.kind is LeaseKind.PIN:
            namespace.pinned.subtract(lease.rows)
            for row in lease.rows:
                if not namespace.pinned[row]:
                    del namespace.pinned[row]
        if lease.at_end is not None:
            lease.at_end()
            lease.at_end = None
        if lease.in_place:
            namespace.in_place -= Counter(lease.in_place)
            lease.in_place = ()
        namespace.index.unpin_all(lease.rows)
        lease.rows.clear()
        namespace.num_leases -= 1
        session = self.sessions.get(lease.session)
        for offer in lease.offers:
            if offer.staging_offset >= 0 and session is not None:
                session.staging.free(offer.staging_offset, offer.staging_bytes)

    def expire_locked(self, now_us: int) -> None:
        """End every lease whose deadline has passed."""
        expired = self.leases.expire(now_us)
        for lease in expired:
            self.undo_locked(lease)
        if expired:
            self.metrics.add("ucm_expired_leases_total", len(expired))

    def end_session_locked(self, session: SessionId) -> Session | None:
        """End a session and its leases.

        Returns:
            The session, when its staging memory may be closed now; None when a store still reads
            it (that store closes it) or the session was not there.
        """
        found = self.sessions.get(session)
        if found is None:
            return None
        for lease in self.leases.end_session(session):
            self.undo_locked(lease)
        for namespace in found.namespaces:
            opened = self.namespaces.get_locked(namespace)
            assert opened is not None, "a namespace with sessions is not closed"
            opened.num_sessions -= 1
        del self.sessions[session]
        found.ended = True
        if found.progress is not None:
            found.progress.close()
        return None if found.num_copying else found

    def recheck(self, namespace: Namespace, key: BlockKey) -> None:
        """Drop the memory copy of a held block if its bytes are really bad. Call without `lock`.

        The caller holds the block by a pin or a flight. The slot stays quarantined: others may
        still read it, and find out by their checksums.
        """
        index = namespace.index
        with self.lock:
            slot = index.slot(index.find(key), TierKind.MEMORY)
        if slot < 0 or namespace.memory.verify(slot, key):
            return
        with self.lock:
            row = index.find(key)
            if index.slot(row, TierKind.MEMORY) == slot:
                index.lose(row, TierKind.MEMORY)
        self.metrics.add("ucm_corrupt_blocks_total", tier="memory")
