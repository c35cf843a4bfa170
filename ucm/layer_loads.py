"""The manager's side of loads that go layer by layer: who reads what where, answered at once.

    begin    lock: plan, pin, choose a source for each block | answer
    DIRECT   blocks that lie on NVMe as they are stay there: pinned by the lease *in place*, so that
             they are neither evicted nor moved nor rewritten while their client reads them
    MAPPED   they are promoted layer by layer, see `mapped_loads`; so are encoded ones in DIRECT
    MEMORY   blocks that are in memory, in both modes
    end      completion, release, deadline or the end of the session: as for any lease

A block that is being moved between segments just now cannot be read in place; it, and what is
behind it, is answered NO_SPACE, as an ordinary load would be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ucm.storage.extents import SegmentFd, SlotPlace

from .block_columns import PROMOTING
from .errors import TierUnavailableError
from .leases import Lease, LeaseKind
from .loads import Admit, LoadPath
from .manager_state import MAX_WAIT_S, US_PER_S, ManagerState
from .mapped_loads import MappedLoads
from .namespaces import Namespace
from .placement import plan_load
from .plan_grants import PlanGrants
from .progress import ProgressArea
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

    def __init__(self, state: ManagerState, loads: LoadPath) -> None:
        self._state = state
        self._mapped = MappedLoads(state, loads)
        self._hold_s = state.config.transfer.lease_timeout_s

    def begin_load(
        self,
        session: SessionId,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        mode: LoadMode,
        timeout_s: float,
        chosen: Sequence[int] | None = None,
    ) -> PlanGrants:
        """See `CacheApi.begin_load`. Reads nothing on this thread.

        Args:
            session: whose load it is.
            namespace: of the keys.
            keys: a chain, or a part of one.
            mode: see `LoadMode`.
            timeout_s: see `CacheApi.begin_load`.
            chosen: indexes of the keys to load, ascending; the plan is of these alone. All if None.
        """
        state = self._state
        keys = state.checked_keys(keys)
        life_s = self._life_s(timeout_s)
        if mode is LoadMode.MAPPED:
            self._relieve(session, namespace, keys)
        with state.lock:
            found, now_us = state.begin_locked(session, namespace)
            rows = plan_load(found.index, keys).rows
            if chosen is not None:
                rows = tuple(rows[index] for index in chosen if index < len(rows))
            grants = self._begin_locked(found, session, rows, mode, now_us, life_s)
        num_wanted = len(keys) if chosen is None else len(chosen)
        return self._whole(grants, len(rows), num_wanted, life_s)

    def begin_at_once(
        self,
        session: SessionId,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        mode: LoadMode,
        timeout_s: float,
        admit: Admit,
    ) -> PlanGrants | None:
        """`begin_load`; None, and nothing was done, if room must be made for promotions first."""
        state = self._state
        keys = state.checked_keys(keys)
        life_s = self._life_s(timeout_s)
        with state.lock:
            found, now_us = state.begin_locked(session, namespace)
            rows = plan_load(found.index, keys).rows
            if mode is LoadMode.MAPPED and found.index.lacking(rows, TierKind.MEMORY):
                return None
            if not admit(found.layout):
                return None
            grants = self._begin_locked(found, session, rows, mode, now_us, life_s)
        return self._whole(grants, len(rows), len(keys), life_s)

    def _life_s(self, timeout_s: float) -> float:
        """Of the lease of a load that is expected to take so long."""
        return min(max(0.0, timeout_s), MAX_WAIT_S) + self._hold_s

    def _begin_locked(
        self,
        found: Namespace,
        session: SessionId,
        rows: Sequence[int],
        mode: LoadMode,
        now_us: int,
        life_s: float,
    ) -> PlanGrants:
        """Pin rows, choose a source for each; the plan of those that have one."""
        state = self._state
        deadline_us = now_us + int(life_s * US_PER_S)
        lease = state.grant_locked(session, found, LeaseKind.LOAD, deadline_us)
        state.hold_locked(lease, found, rows, now_us)
        places = self._places_locked(found, rows) if mode is LoadMode.DIRECT else {}
        sources = self._sources_locked(found, lease, places)
        return self._grants_locked(found, lease, sources, places)

    def _whole(
        self, grants: PlanGrants, num_cached: int, num_wanted: int, life_s: float
    ) -> PlanGrants:
        """The plan with a status for every key, counted."""
        missing = [LoadStatus.NO_SPACE] * (num_cached - len(grants.sources))
        missing += [LoadStatus.MISS] * (num_wanted - num_cached)
        grants = replace(grants, statuses=(*grants.statuses, *missing), timeout_s=life_s)
        self._count(grants)
        return grants

    def _relieve(
        self, session: SessionId, namespace: NamespaceId, keys: Sequence[BlockKey]
    ) -> None:
        """Have room made for what must be promoted, if anything must."""
        state = self._state
        with state.lock:
            found, _ = state.begin_locked(session, namespace)
            lacking = found.index.lacking(plan_load(found.index, keys).rows, TierKind.MEMORY)
        if lacking:
            state.namespaces.relieve(found, len(lacking))

    def _sources_locked(
        self, found: Namespace, lease: Lease, places: dict[int, SlotPlace]
    ) -> list[SourceKind]:
        """The source of each leading row that has one; begins the promotions that it takes."""
        index = found.index
        lacking = index.lacking(lease.rows, TierKind.MEMORY)
        slower = [row for row in lacking if row not in places]
        coming: set[int] = set()
        if slower:
            moving = (n for n, row in enumerate(slower) if _is_moving(found, row))
            slower = slower[: next(moving, len(slower))]
            needed = [row for row in slower if row not in found.promotions]
            coming = self._mapped.begin_locked(found, lease, slower, needed)
        in_memory = set(lease.rows).difference(lacking)
        sources: list[SourceKind] = []
        for row in lease.rows:
            if row in in_memory:
                sources.append(SourceKind.MEMORY)
            elif row in places:
                sources.append(SourceKind.EXTENT)
            elif row in coming:
                sources.append(SourceKind.PROMOTING)
            else:
                break
        return sources

    def _grants_locked(
        self,
        found: Namespace,
        lease: Lease,
        sources: Sequence[SourceKind],
        places: dict[int, SlotPlace],
    ) -> PlanGrants:
        """Let go of rows without a source; the plan of the others."""
        index, arena = found.index, found.memory.arena
        index.unpin_all(lease.rows[len(sources) :])
        del lease.rows[len(sources) :]
        by_source = {
            kind: [row for row, own in zip(lease.rows, sources, strict=True) if own is kind]
            for kind in SourceKind
        }
        in_memory = dict(
            zip(
                by_source[SourceKind.MEMORY],
                index.slots(by_source[SourceKind.MEMORY], TierKind.MEMORY),
                strict=True,
            )
        )
        lease.in_place = tuple(by_source[SourceKind.EXTENT])
        found.in_place.update(lease.in_place)
        lease.num_bytes = (len(lease.rows) - len(lease.in_place)) * found.layout.block_bytes
        promoting = by_source[SourceKind.PROMOTING]
        watched = self._mapped.watch_locked(found, lease, promoting) if promoting else None
        targets = {row: found.promotions[row].target for row in promoting}
        slots = in_memory | targets
        return PlanGrants(
            lease_id=lease.id,
            statuses=(LoadStatus.READY,) * len(sources),
            sources=tuple(sources),
            tiers=tuple(map(index.fastest, lease.rows)),
            offsets=tuple(slots[row] * arena.slot_bytes for row in lease.rows if row in slots),
            checksums=found.memory.packed_checksums(list(in_memory.values())),
            places=tuple(places[row] for row in lease.in_place),
            timeout_s=0.0,
            progress=watched.place if watched is not None else None,
        )

    def progress_area(self, session: SessionId) -> ProgressArea:
        """The session's progress area; its descriptors are for this client only.

        Raises:
            BlockNotFoundError: the session has ended.
            CapacityError: the kernel has no memory for it.
        """
        with self._state.lock:
            return self._state.progress_locked(session)

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
        slower = [row for row in index.lacking(rows, TierKind.MEMORY) if not _is_moving(found, row)]
        places = extents.places(index.slots(slower, TierKind.NVME))
        return {row: place for row, place in zip(slower, places, strict=True) if place is not None}

    def _count(self, grants: PlanGrants) -> None:
        metrics = self._state.metrics
        for tier, count in Counter(grants.tiers).items():
            metrics.add("ucm_loaded_blocks_total", count, tier=tier.value)
        for reason, count in Counter(grants.statuses[len(grants.tiers) :]).items():
            metrics.add("ucm_load_failures_total", count, reason=reason.value)


def _is_moving(found: Namespace, row: int) -> bool:
    """Whether the block is on its way to another segment: it has no place that lasts."""
    return row not in found.promotions and found.index.in_flight(row, PROMOTING)
