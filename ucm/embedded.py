"""Embedded mode: the whole store in this process, behind the same `CacheApi` as the daemon.

One manager, one session; grants become views of memory that is already mapped here. Made for
tools, tests and single-process use; a store folder takes one process at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
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
)
from .block_rows import BlockRows
from .clock import SystemClock
from .collection_api import CollectionApi
from .config import Config
from .errors import TierUnavailableError, UcmError
from .grants import StoreGrant, store_slot, summary_lease
from .hashing import NamespaceSpec
from .leased_blocks import LeasedBlocks
from .load_plan import LoadPlan
from .manager import Manager
from .mapping import map_shared
from .plan_grants import PlanGrants, PlanMemory, planned_blocks
from .progress import ProgressSignal, SessionProgress
from .segment_files import SegmentFiles
from .select_api import SelectRequest, SelectResult, SummaryLease
from .types import (
    BlockKey,
    LeaseId,
    LoadMode,
    NamespaceId,
    SourceKind,
    StoreStatus,
    SummaryKind,
)
from .wire import checksum_rows_from_wire, checksums_from_wire


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
        self._summary_memory: dict[NamespaceId, tuple[Arena, memoryview]] = {}
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

    @property
    def collections(self) -> CollectionApi:
        """Collections of this store."""
        return self.manager.collections

    def open_namespace(
        self, spec: NamespaceSpec, *, summary: SummaryKind | None = None
    ) -> NamespaceHandle:
        """See `CacheApi.open_namespace`."""
        handle = self.manager.open_namespace(self._session, spec, summary=summary)
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
        with self._kept(grants.lease_id):
            arena = self._arenas[namespace]
            ready = BlockRows(arena.memory(), grants.offsets, arena.slot_bytes)
            sums = checksum_rows_from_wire(grants.checksums, num_blocks=len(ready))
            blocks = LeasedBlocks(keys, grants.statuses, grants.tiers, ready, sums)
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
        with self._kept(grants.lease_id):
            return self._plan(namespace, keys, mode, grants)

    @contextlib.contextmanager
    def _kept(self, lease_id: LeaseId) -> Iterator[None]:
        """Give a lease back if the block fails: nobody will know of it."""
        try:
            yield
        except (UcmError, OSError, ValueError):
            with contextlib.suppress(UcmError):  # the session may have ended, and its leases
                self.manager.release(self._session, lease_id)
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
            signal = ProgressSignal(os.dup(area.signal_fd), lambda: self._closed)
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
        block_bytes = self._arenas[namespace].slot_bytes
        run_bytes = block_bytes + grants.summary_bytes
        slots = tuple(
            store_slot(grant.key, grant.status, self._run(grant, run_bytes), block_bytes)
            for grant in grants.slots
        )
        return StoreLease(grants.lease_id, slots, grants.timeout_s)

    def _run(self, grant: StoreGrant, num_bytes: int) -> memoryview | None:
        if grant.status is not StoreStatus.WANTED:
            return None
        return self._staging.view(grant.offset, num_bytes)

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

    def select(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        request: SelectRequest,
        *,
        timeout_s: float,
    ) -> SelectResult:
        """See `CacheApi.select`."""
        selections = self.manager.selections
        return selections.select(self._session, namespace, keys, request, timeout_s=timeout_s)

    def select_and_load(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        request: SelectRequest,
        *,
        mode: LoadMode,
        timeout_s: float,
    ) -> tuple[SelectResult, LoadPlan]:
        """See `CacheApi.select_and_load`."""
        result, grants = self.manager.selections.select_and_load(
            (self._session, namespace), keys, request, mode=mode, timeout_s=timeout_s
        )
        with self._kept(grants.lease_id):
            chosen = [keys[index] for index in result.union()]
            return result, self._plan(namespace, chosen, mode, grants)

    def map_summaries(
        self, namespace: NamespaceId, keys: Sequence[BlockKey], *, timeout_s: float
    ) -> SummaryLease:
        """See `CacheApi.map_summaries`."""
        selections = self.manager.selections
        grants = selections.map_summaries(self._session, namespace, keys, timeout_s=timeout_s)
        with self._kept(grants.lease_id):
            return summary_lease(grants, self._summaries(namespace))

    def _summaries(self, namespace: NamespaceId) -> memoryview:
        """The memory of the session's summaries of a namespace, mapped once."""
        arena = self.manager.selections.arena(self._session, namespace)
        found = self._summary_memory.get(namespace)
        if found is None or found[0] is not arena:
            memory = map_shared(arena.fd, arena.size_bytes, writable=False)
            found = self._summary_memory[namespace] = (arena, memory)
        return found[1]

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
        self._summary_memory.clear()
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
