"""The manager's side of loads that go layer by layer: who reads what where, answered at once.

    begin    lock: plan, pin, choose a source for each block | answer
    DIRECT   blocks that lie on NVMe as they are stay there: pinned by the lease *in place*, so that
             they are neither evicted nor moved nor rewritten while their client reads them
    MEMORY   blocks that are in memory, in both modes
    end      completion, release, deadline or the end of the session: as for any lease

A block that is being moved between segments just now cannot be read in place; it, and what is
behind it, is answered NO_SPACE, as an ordinary load would be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ucm.storage.extents import SegmentFd, SlotPlace
from ucm.storage.tier import SlotId

from .block_columns import PROMOTING
from .errors import TierUnavailableError
from .leases import Lease, LeaseKind
from .manager_state import MAX_WAIT_S, US_PER_S, ManagerState
from .namespaces import Namespace
from .plan_grants import PlanGrants
from .types import (
    BlockKey,
    LoadMode,
    LoadStatus,
    NamespaceId,
    SessionId,
    SourceKind,
    TierKind,
)


class LayerLoads:
    """Layer by layer loads of one manager. Thread-safe."""

    def __init__(self, state: ManagerState) -> None:
        self._state = state
        self._hold_s = state.config.transfer.lease_timeout_s

    def begin_load(
        self,
        session: SessionId,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        mode: LoadMode,
        timeout_s: float,
    ) -> PlanGrants:
        """See `CacheApi.begin_load`. Does no I/O."""
        state = self._state
        keys = state.checked_keys(keys)
        life_s = min(max(0.0, timeout_s), MAX_WAIT_S) + self._hold_s
        with state.lock:
            found, now_us = state.begin_locked(session, namespace)
            rows = found.index.usable_prefix(keys)
            deadline_us = now_us + int(life_s * US_PER_S)
            lease = state.grant_locked(session, found, LeaseKind.LOAD, deadline_us)
            state.hold_locked(lease, found, rows, now_us)
            tiers = found.index.tiers(rows)
            places = self._places_locked(found, rows) if mode is LoadMode.DIRECT else {}
            sources, failure = _sources(found, rows, places)
            _hold_only(found, lease, sources, places)
            failed = [failure] * (len(rows) - len(sources))
            missing = [LoadStatus.MISS] * (len(keys) - len(rows))
            slots = _memory_slots(found, rows, sources)
            grants = PlanGrants(
                lease_id=lease.id,
                statuses=(*[LoadStatus.READY] * len(sources), *failed, *missing),
                sources=tuple(sources),
                tiers=tiers[: len(sources)],
                offsets=tuple(slot * found.memory.arena.slot_bytes for slot in slots),
                checksums=found.memory.packed_checksums(slots),
                places=tuple(places[row] for row in lease.in_place),
                timeout_s=life_s,
            )
        self._count(grants)
        return grants

    def open_segment(self, session: SessionId, namespace: NamespaceId, segment: int) -> SegmentFd:
        """A read-only descriptor of a segment's file, for the client that reads extents.

        Raises:
            BlockNotFoundError: the session has not opened the namespace.
            TierUnavailableError: there is no such file, or it is out of use.
        """
        with self._state.lock:
            found = self._state.namespace_locked(session, namespace)
            extents = found.nvme.extents if found.nvme is not None else None
        if extents is None:
            raise TierUnavailableError("this namespace has no files")
        return extents.open_segment(segment)

    def _places_locked(self, found: Namespace, rows: Sequence[int]) -> dict[int, SlotPlace]:
        """Where those of `rows` that memory lacks lie on NVMe, if their client can read them."""
        extents = found.nvme.extents if found.nvme is not None else None
        if extents is None:
            return {}
        index = found.index
        slower = [
            row
            for row in index.lacking(rows, TierKind.MEMORY)
            if row in found.promotions or not index.in_flight(row, PROMOTING)  # else it moves
        ]
        places = extents.places(index.slots(slower, TierKind.NVME))
        return {row: place for row, place in zip(slower, places, strict=True) if place is not None}

    def _count(self, grants: PlanGrants) -> None:
        metrics = self._state.metrics
        for tier, count in Counter(grants.tiers).items():
            metrics.add("ucm_loaded_blocks_total", count, tier=tier.value)
        for reason, count in Counter(grants.statuses[len(grants.tiers) :]).items():
            metrics.add("ucm_load_failures_total", count, reason=reason.value)


def _sources(
    found: Namespace, rows: Sequence[int], places: dict[int, SlotPlace]
) -> tuple[list[SourceKind], LoadStatus]:
    """The source of each leading row that has one, and what is said of the others."""
    lacking = set(found.index.lacking(rows, TierKind.MEMORY))
    sources: list[SourceKind] = []
    for row in rows:
        if row not in lacking:
            sources.append(SourceKind.MEMORY)
        elif row in places:
            sources.append(SourceKind.EXTENT)
        else:
            break
    return sources, LoadStatus.NO_SPACE


def _hold_only(
    found: Namespace, lease: Lease, sources: Sequence[SourceKind], places: dict[int, SlotPlace]
) -> None:
    """Let go of rows without a source; note which are read in place."""
    found.index.unpin_all(lease.rows[len(sources) :])
    del lease.rows[len(sources) :]
    lease.in_place = tuple(row for row in lease.rows if row in places)
    found.in_place.update(lease.in_place)
    lease.num_bytes = (len(lease.rows) - len(lease.in_place)) * found.layout.block_bytes


def _memory_slots(
    found: Namespace, rows: Sequence[int], sources: Sequence[SourceKind]
) -> list[SlotId]:
    held = [row for row, source in zip(rows, sources, strict=False) if source is SourceKind.MEMORY]
    return found.index.slots(held, TierKind.MEMORY)
