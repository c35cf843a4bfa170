"""Pins: a prefix that stays in host memory until its lease ends, such as a system prompt.

    pin      load the prefix as any reader does -> its lease becomes a pin with a later deadline
    end      release, deadline, the end of the session or of the store: whichever comes first

A pin is a lease, never a bare count, so nothing stays pinned by a client that died. All pins of a
namespace together take at most `memory.max_pinned_share` of the memory that it can use; a block
under several pins counts once. A pinned block that turns out corrupt is lost like any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .api import PinLease
from .errors import CapacityError, InvalidArgumentError, LeaseExpiredError, TierUnavailableError
from .leases import Lease, LeaseKind
from .loads import LoadPath
from .manager_state import US_PER_S, ManagerState
from .namespaces import Namespace
from .types import BlockKey, LeaseId, NamespaceId, SessionId


class PinPath:
    """Pins of one manager. Thread-safe."""

    def __init__(self, state: ManagerState, loads: LoadPath) -> None:
        self._state = state
        self._loads = loads

    def pin(
        self,
        session: SessionId,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        hold_s: float,
        timeout_s: float,
    ) -> PinLease:
        """See `CacheApi.pin`. Blocks up to `timeout_s` of real time."""
        state = self._state
        if not (math.isfinite(hold_s) and hold_s > 0):
            raise InvalidArgumentError(f"a pin for {hold_s} s; give a number of seconds above 0")
        hold_s = min(hold_s, state.config.memory.max_pin_s)
        keys = state.checked_keys(keys)
        with state.lock:
            if state.draining:
                raise TierUnavailableError("the store is shutting down")
            found, _ = state.begin_locked(session, namespace)
            self._check_room_locked(found, found.index.usable_prefix(keys))
        grants = self._loads.prepare_load(session, namespace, keys, timeout_s=timeout_s)
        with state.lock:
            lease = self._loaded_locked(session, grants.lease_id)
            try:
                self._check_room_locked(found, lease.rows)
            except CapacityError:  # another pin was faster
                state.leases.take(session, lease.id)
                state.undo_locked(lease)
                raise
            lease.kind = LeaseKind.PIN
            found.pinned.update(lease.rows)
            state.leases.set_deadline(lease, state.clock.now_us() + int(hold_s * US_PER_S))
            return PinLease(lease.id, len(lease.rows), hold_s)

    def _loaded_locked(self, session: SessionId, lease_id: LeaseId) -> Lease:
        state = self._state
        state.session_locked(session)
        lease = state.leases.find(session, lease_id, now_us=state.clock.now_us())
        if lease is None or state.draining:
            raise LeaseExpiredError("the lease ended while the blocks were being loaded; try again")
        return lease

    def _check_room_locked(self, found: Namespace, rows: Sequence[int]) -> None:
        share = self._state.config.memory.max_pinned_share
        total = self._state.namespaces.total_slots_locked(found)
        wanted = len(found.pinned) + sum(row not in found.pinned for row in rows)
        if wanted > int(total * share):
            raise CapacityError(
                f"{wanted} blocks would be pinned, at most {int(total * share)} may be: "
                f"memory.max_pinned_share {share} of {total} blocks of memory; "
                "release pins or pin a shorter prefix"
            )
