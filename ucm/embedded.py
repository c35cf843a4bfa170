"""Embedded mode: the whole store in this process, behind the same `CacheApi` as the daemon.

One manager, one session; grants become views of memory that is already mapped here. Made for
tools, tests and single-process use; a store folder takes one process at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from ucm.storage.arena import Arena
from ucm.storage.throttled_io import limit_of
from ucm.storage.tier import SlotId

from .api import (
    LoadLease,
    LookupResult,
    NamespaceHandle,
    PinLease,
    SlabChecksums,
    StoreLease,
    StoreSlot,
)
from .clock import SystemClock
from .config import Config
from .errors import TierUnavailableError, UcmError
from .grants import StoreGrant
from .hashing import NamespaceSpec
from .load_plan import LoadPlan
from .manager import Manager
from .plan_grants import PlanGrants, PlanMemory, planned_blocks
from .progress import ProgressSignal, SessionProgress
from .segment_files import SegmentFiles
from .types import BlockKey, LeaseId, LoadMode, NamespaceId, SourceKind, StoreStatus
from .wire import checksums_from_wire


class EmbeddedCache:
    """`CacheApi` over a manager in this process. Thread-safe."""

    def __init__(self, manager: Manager, *, owns_manager: bool = True) -> None:
        """Start a session on `manager`.

        Args:
            manager: the store.
            owns_manager: whether `close` closes it too.
        """
        self.manager = manager
        self._owns_manager = owns_manager
        self._session = manager.open_session("embedded")
        self._staging = manager.staging(self._session)
        self._arenas: dict[NamespaceId, Arena] = {}
        self._files = SegmentFiles(
            lambda namespace, segment: manager.layer_loads.open_segment(
                self._session, namespace, segment
            )
        )
        self._read_limit = limit_of(manager.config.nvme.max_read_bytes_per_s, SystemClock())
        self._progress: SessionProgress | None = None
        self._closing = threading.Lock()
        self._closed = False

    def __enter__(self) -> EmbeddedCache:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def open_namespace(self, spec: NamespaceSpec) -> NamespaceHandle:
        """See `CacheApi.open_namespace`."""
        handle = self.manager.open_namespace(self._session, spec)
        self._arenas[handle.id] = self.manager.arena(self._session, handle.id)
        return handle

    def lookup(self, namespace: NamespaceId, keys: Sequence[BlockKey]) -> LookupResult:
        """See `CacheApi.lookup`."""
        return self.manager.lookup(self._session, namespace, keys)

    def prefetch(self, namespace: NamespaceId, keys: Sequence[BlockKey]) -> int:
        """See `CacheApi.prefetch`."""
        return self.manager.prefetch(self._session, namespace, keys)

    def prepare_load(
        self, namespace: NamespaceId, keys: Sequence[BlockKey], *, timeout_s: float
    ) -> LoadLease:
        """See `CacheApi.prepare_load`."""
        grants = self.manager.prepare_load(self._session, namespace, keys, timeout_s=timeout_s)
        arena = self._arenas[namespace]
        views = [_ready_view(arena, offset) for offset in grants.offsets]
        checksums = checksums_from_wire(grants.checksums, num_blocks=len(views))
        blocks = grants.loaded_blocks(keys, views, checksums)
        return LoadLease(grants.lease_id, blocks, grants.timeout_s)

    def begin_load(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        mode: LoadMode,
        timeout_s: float,
    ) -> LoadPlan:
        """See `CacheApi.begin_load`."""
        grants = self.manager.begin_load(
            self._session, namespace, keys, mode=mode, timeout_s=timeout_s
        )
        try:
            return self._plan(namespace, keys, mode, grants)
        except (UcmError, OSError, ValueError):
            with contextlib.suppress(UcmError):  # the session may have ended, and its leases
                self.manager.release(self._session, grants.lease_id)
            raise

    def _plan(
        self, namespace: NamespaceId, keys: Sequence[BlockKey], mode: LoadMode, grants: PlanGrants
    ) -> LoadPlan:
        arena = self._arenas[namespace]
        in_memory = grants.sources.count(SourceKind.MEMORY)
        memory = PlanMemory(
            view=lambda offset: _ready_view(arena, offset),
            checksums=checksums_from_wire(grants.checksums, num_blocks=in_memory),
            file=lambda place: self._files.get(namespace, place),
        )
        blocks = planned_blocks(keys, grants, memory)
        layout, promoting = arena.layout, grants.sources.count(SourceKind.PROMOTING)
        shared = self._shared_progress() if promoting else None
        progress = shared.of(grants.progress, promoting, layout.num_layers) if shared else None
        plan = LoadPlan(grants.lease_id, namespace, mode, blocks, grants.timeout_s, progress)
        return dataclasses.replace(plan, read_limit=self._read_limit)

    def _shared_progress(self) -> SessionProgress:
        found = self._progress
        if found is None:
            area = self.manager.layer_loads.progress_area(self._session)
            signal = ProgressSignal(os.dup(area.event_fd), lambda: self._closed)
            found = self._progress = SessionProgress(area.memory, signal)
        return found

    def complete_load(self, lease_id: LeaseId, corrupt: Sequence[BlockKey] = ()) -> None:
        """See `CacheApi.complete_load`."""
        self.manager.complete_load(self._session, lease_id, corrupt)

    def prepare_store(
        self, namespace: NamespaceId, parent: BlockKey, keys: Sequence[BlockKey]
    ) -> StoreLease:
        """See `CacheApi.prepare_store`."""
        grants = self.manager.prepare_store(self._session, namespace, parent, keys)
        num_bytes = self._arenas[namespace].slot_bytes
        slots = tuple(self._store_slot(grant, num_bytes) for grant in grants.slots)
        return StoreLease(grants.lease_id, slots, grants.timeout_s)

    def _store_slot(self, grant: StoreGrant, num_bytes: int) -> StoreSlot:
        if grant.status is not StoreStatus.WANTED:
            return StoreSlot(grant.key, grant.status)
        return StoreSlot(grant.key, grant.status, self._staging.view(grant.offset, num_bytes))

    def complete_store(
        self, lease_id: LeaseId, checksums: Mapping[BlockKey, SlabChecksums]
    ) -> tuple[StoreStatus, ...]:
        """See `CacheApi.complete_store`."""
        return self.manager.complete_store(self._session, lease_id, checksums)

    def pin(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        hold_s: float = 3600.0,
        timeout_s: float,
    ) -> PinLease:
        """See `CacheApi.pin`."""
        return self.manager.pin(self._session, namespace, keys, hold_s=hold_s, timeout_s=timeout_s)

    def release(self, lease_id: LeaseId) -> None:
        """See `CacheApi.release`."""
        self.manager.release(self._session, lease_id)

    def flush(self, *, timeout_s: float) -> bool:
        """See `CacheApi.flush`."""
        if self._closed:
            raise TierUnavailableError("the store is closed")
        return self.manager.flush(timeout_s=timeout_s)

    def close(self) -> None:
        """End the session and, if it is this object's, the store. Idempotent."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._files.close()
        self._progress = None
        self.manager.close_session(self._session)
        if self._owns_manager:
            self.manager.close()


def _ready_view(arena: Arena, offset: int) -> memoryview:
    return arena.view(SlotId(offset // arena.slot_bytes)).toreadonly()


def open_embedded(path: Path | str | None, config: Config | None = None) -> EmbeddedCache:
    """Open a store in this process.

    Args:
        path: data folder, created if need be; None for host memory only.
        config: limits and sizes; the defaults when None. Its `nvme.path` is replaced by `path`.

    Raises:
        ConfigError: the folder belongs to another user, format version or running daemon.
    """
    config = config or Config()
    folder = None if path is None else Path(path)
    config = dataclasses.replace(config, nvme=dataclasses.replace(config.nvme, path=folder))
    return EmbeddedCache(Manager(config))
