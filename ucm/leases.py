"""Leases: what a session holds, until when.

A lease is a promise with a deadline to keep blocks (load) or staging bytes (store) in place. It
ends by completion, release, deadline, or the end of its session, whichever comes first, and then
it is *taken*: the caller of this table gets it back once, to undo what it pins. Ids are 16 random
bytes and mean nothing outside their session.

Pure: no clock, no lock, no I/O. O(log n) a call.
"""

from __future__ import annotations

import enum
import heapq
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import CapacityError
from .plurals import counted
from .types import BlockKey, LeaseId, NamespaceId, SessionId, StoreStatus

LEASE_ID_BYTES = 16
MIN_COMPACTION = 1024
"""Stale deadlines that may pile up before the heap is rebuilt."""


class LeaseKind(enum.Enum):
    """What a lease is for."""

    LOAD = "load"
    STORE = "store"
    PIN = "pin"
    """A load that stays."""
    SUMMARIES = "summaries"
    """Summaries of blocks, not the blocks."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One key of a store lease, and what was answered for it."""

    key: BlockKey
    status: StoreStatus
    staging_offset: int = -1
    """Where in the session's staging arena its bytes go; -1 unless WANTED."""
    staging_bytes: int = 0
    """Length of that run: the block, and room for its summary where the session wants any."""


@dataclass(slots=True, eq=False)
class Lease:
    """What one `prepare_` call granted. Mutable: a load fills it while its blocks arrive."""

    id: LeaseId
    session: SessionId
    kind: LeaseKind
    namespace: NamespaceId
    deadline_us: int
    rows: list[int] = field(default_factory=list)
    """Rows of the namespace's index that it pins, each once."""
    parent: BlockKey | None = None
    """Store: the block that the first offer follows."""
    offers: tuple[Offer, ...] = ()
    """Store: every key, in order."""
    in_place: tuple[int, ...] = ()
    """Those of `rows` whose copies on NVMe the client reads where they are."""
    at_end: Callable[[], None] | None = None
    """What else to undo when it ends."""
    num_bytes: int = 0
    """Arena or staging bytes that it holds in place."""
    ended: bool = False
    """Taken out of the table."""


class LeaseTable:
    """All leases of all sessions."""

    def __init__(
        self,
        max_leases_per_session: int,
        new_id: Callable[[], bytes] = lambda: secrets.token_bytes(LEASE_ID_BYTES),
    ) -> None:
        self._max_leases_per_session = max_leases_per_session
        self._new_id = new_id
        self._by_session: dict[SessionId, dict[LeaseId, Lease]] = {}
        self._deadlines: list[tuple[int, LeaseId, SessionId]] = []
        self._num_leases = 0

    def __len__(self) -> int:
        return self._num_leases

    def num_bytes(self) -> int:
        """Bytes that all leases hold in place. O(leases)."""
        return sum(
            lease.num_bytes for leases in self._by_session.values() for lease in leases.values()
        )

    def grant(
        self, session: SessionId, kind: LeaseKind, namespace: NamespaceId, *, deadline_us: int
    ) -> Lease:
        """Create a lease.

        Raises:
            CapacityError: the session holds as many as it may.
        """
        leases = self._by_session.setdefault(session, {})
        if len(leases) >= self._max_leases_per_session:
            raise CapacityError(
                f"session {session} holds {counted(len(leases), 'lease')}, the limit; complete "
                "some first"
            )
        lease = Lease(LeaseId(self._new_id()), session, kind, namespace, deadline_us)
        leases[lease.id] = lease
        self._num_leases += 1
        self._push_deadline(lease)
        return lease

    def set_deadline(self, lease: Lease, deadline_us: int) -> None:
        """Move the deadline of a lease that has not ended."""
        if not lease.ended and deadline_us != lease.deadline_us:
            lease.deadline_us = deadline_us
            self._push_deadline(lease)

    def _push_deadline(self, lease: Lease) -> None:
        if len(self._deadlines) > 2 * self._num_leases + MIN_COMPACTION:
            self._deadlines = [
                (held.deadline_us, held.id, held.session)
                for leases in self._by_session.values()
                for held in leases.values()
            ]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (lease.deadline_us, lease.id, lease.session))

    def find(self, session: SessionId, lease_id: LeaseId, *, now_us: int) -> Lease | None:
        """The session's lease of that id, if its deadline has not passed. It stays."""
        lease = self._by_session.get(session, {}).get(lease_id)
        return lease if lease is not None and lease.deadline_us > now_us else None

    def take(self, session: SessionId, lease_id: LeaseId) -> Lease | None:
        """End the session's lease of that id and return it; None if it has none (any more)."""
        leases = self._by_session.get(session)
        lease = leases.pop(lease_id, None) if leases else None
        if lease is not None:
            lease.ended = True
            self._num_leases -= 1
        return lease

    def expire(self, now_us: int) -> list[Lease]:
        """End and return every lease whose deadline is not after `now_us`."""
        expired: list[Lease] = []
        while self._deadlines and self._deadlines[0][0] <= now_us:
            _, lease_id, session = heapq.heappop(self._deadlines)
            lease = self._by_session.get(session, {}).get(lease_id)
            if lease is not None and lease.deadline_us <= now_us:
                self.take(session, lease_id)
                expired.append(lease)
        return expired

    def end_session(self, session: SessionId) -> list[Lease]:
        """End and return every lease of the session."""
        leases = list(self._by_session.pop(session, {}).values())
        for lease in leases:
            lease.ended = True
        self._num_leases -= len(leases)
        if not self._num_leases:
            self._deadlines.clear()
        return leases

    def of_kind(self, kind: LeaseKind) -> list[Lease]:
        """Every lease of that kind. O(leases)."""
        leases = (lease for held in self._by_session.values() for lease in held.values())
        return [lease for lease in leases if lease.kind is kind]

    def of_namespace(self, namespace: NamespaceId) -> int:
        """Number of leases in a namespace. O(leases)."""
        return sum(
            lease.namespace == namespace
            for leases in self._by_session.values()
            for lease in leases.values()
        )

    def check_integrity(self) -> list[str]:
        """Every violated invariant, in words."""
        leases = [lease for held in self._by_session.values() for lease in held.values()]
        problems = [
            f"lease {lease.id.hex()[:8]} ended but is held" for lease in leases if lease.ended
        ]
        if len(leases) != self._num_leases:
            problems.append(f"{len(leases)} leases held, {self._num_leases} counted")
        return problems
