"""Collections of one store: the registry, what is deleted of it, and when that is done.

    put, remove, expire   registry, durably | lock: bar and doom blocks | `deletion_rounds` | wait
    tick                  documents whose time has come, bars that end, rounds that were held back

A deletion that a crash cut short is found in the registry at the next start. One lock orders all
changes of the registry; it is never held while somebody waits, and is taken before the manager's.
In a store without a data folder the registry is a temporary one and ends with it.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from ucm.storage.folder import COLLECTIONS_FOLDER
from ucm.storage.registry_records import DocumentKey

from .collection_api import (
    CollectionInfo,
    Deletion,
    DeletionStatus,
    Document,
    DocumentInfo,
    PutAnswer,
    PutOutcome,
    RemoveAnswer,
    check_collection_name,
    check_document,
    check_document_id,
    check_time,
)
from .collection_lists import collection_infos, document_info, record_of
from .deletion_rounds import RETRY_S, DeletionRounds, ErasedDisk
from .errors import BlockNotFoundError, TierUnavailableError, UcmError
from .hashing import check_key
from .manager_state import MAX_WAIT_S, US_PER_S, ManagerState
from .namespaces import NvmeStoreLike
from .types import BlockKey, NamespaceId
from .write_behind import WriteBehind

if TYPE_CHECKING:
    from ucm.storage.registry import Registry
    from ucm.storage.registry_change import Change, DoomedKeys

Documents = TypeVar("Documents")

_log = logging.getLogger(__name__)

BARS_INTERVAL_S: Final = 600.0
"""How often bars are looked through for some that end."""


class CollectionDesk:
    """`CollectionApi` of one manager. Thread-safe."""

    def __init__(
        self,
        state: ManagerState,
        write_behind: WriteBehind | None,
        forget_tables: Callable[[NamespaceId], None],
        store: NvmeStoreLike | None,
    ) -> None:
        """Read the registry and finish what a crash cut short in closed namespaces.

        Args:
            state: of the manager.
            write_behind: whose commits erase; None without NVMe.
            forget_tables: drops what selections have kept of a namespace.
            store: what opens tiers; None without NVMe.

        Raises:
            CorruptionError: the registry is damaged.
            TierUnavailableError, CapacityError: it cannot be opened.
        """
        self._state = state
        self._forget_tables = forget_tables
        self._path = state.config.nvme.path if store is not None else None
        self._lock = threading.Lock()
        disk = ErasedDisk(store, self._path) if store is not None else None
        self._rounds = DeletionRounds(state, write_behind, disk, (self._lock, self._mark_erased))
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._registry: Registry | None = None
        self._next_expiry_us = 0
        self._next_bars_s = 0.0
        self._closed = False
        if self._path is not None:
            self._load(self._path)

    def _load(self, path: Path) -> None:
        folder = path / COLLECTIONS_FOLDER
        if not folder.exists():
            return
        registry = self._open(path)
        doomed: DoomedKeys = {}
        with self._state.lock:
            for each in registry.deleted():
                self._rounds.bar_locked(each.namespace, (each.key,))
                if not each.erased_us:
                    doomed.setdefault(each.namespace, []).append(each.key)
            self._rounds.doom_locked(doomed)
        self._note_expiry(registry)
        for namespace in doomed:
            self._rounds.erase_closed(namespace)
        self.tick()

    def _open(self, path: Path) -> Registry:
        from ucm.storage.registry import Registry  # needs LMDB, which memory alone does not

        map_bytes = self._state.config.collections.map_bytes
        self._registry = Registry(path / COLLECTIONS_FOLDER, map_bytes)
        return self._registry

    def _writable(self) -> Registry:
        """The registry, made if there is none. Needs `_lock`."""
        if self._closed:
            raise TierUnavailableError("the store is closed")
        if self._registry is not None:
            return self._registry
        path = self._path
        if path is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="ucm-collections-")
            path = Path(self._temporary.name)
        return self._open(path)

    # ------------------------------------------------------------- changing

    def put_document(self, collection: str, document: Document) -> PutAnswer:
        """See `CollectionApi.put_document`."""
        check_collection_name(collection)
        check_document(document, self._state.config.service.max_keys_per_call)
        with self._lock:
            registry = self._writable()
            change = registry.put(record_of(collection, document, _now_us()))
            with self._state.lock:
                self._rounds.lift_locked(document.namespace, change.lifted)
                number = self._rounds.doom_locked(change.doomed)
            self._note_expiry(registry, int(document.expires_s * US_PER_S))
        outcome = PutOutcome.KNOWN if change.is_known else PutOutcome.NEW
        if not change.is_known and change.num_documents:
            outcome = PutOutcome.CHANGED
        deletion = self._settle(change, number, 0.0)
        return PutAnswer(outcome=outcome, version=change.version, deletion=deletion)

    def remove(
        self, collection: str, ids: Sequence[str] | None = None, *, timeout_s: float = 0.0
    ) -> RemoveAnswer:
        """See `CollectionApi.remove`."""
        self._check_names(collection, ids)
        if ids is not None and not ids:
            return RemoveAnswer()
        with self._lock:
            change = self._writable().remove(collection, ids, _now_us())
            if change is None:
                raise _no_such(collection)
            with self._state.lock:
                number = self._rounds.doom_locked(change.doomed)
        self._state.metrics.add("ucm_deleted_documents_total", change.num_documents)
        deletion = self._settle(change, number, timeout_s)
        return RemoveAnswer(
            num_documents=change.num_documents, missing=tuple(change.missing), deletion=deletion
        )

    def expire(self, collection: str, ids: Sequence[str] | None, at_s: float) -> int:
        """See `CollectionApi.expire`. What is due already goes with the next tick."""
        self._check_names(collection, ids)
        check_time(at_s)
        if ids is not None and not ids:
            return 0
        with self._lock:
            registry = self._writable()
            change = registry.expire(collection, ids, int(at_s * US_PER_S))
            if change is None:
                raise _no_such(collection)
            self._note_expiry(registry)
        return change.num_documents

    def remove_blocks(
        self, namespace: NamespaceId, keys: Sequence[BlockKey], *, timeout_s: float = 0.0
    ) -> RemoveAnswer:
        """See `CollectionApi.remove_blocks`."""
        namespace = NamespaceId(check_key(namespace))
        checked = self._state.checked_keys(keys)
        with self._lock:
            change = self._writable().doom(namespace, checked)
            with self._state.lock:
                number = self._rounds.doom_locked(change.doomed)
        return RemoveAnswer(deletion=self._settle(change, number, timeout_s))

    # --------------------------------------------------------------- asking

    def list_collections(self) -> tuple[CollectionInfo, ...]:
        """See `CollectionApi.list_collections`."""
        self.tick()
        with self._lock:
            return collection_infos(self._registry)

    def list_documents(self, collection: str) -> tuple[DocumentInfo, ...]:
        """See `CollectionApi.list_documents`."""
        return self.read_documents(collection, tuple)

    def read_documents(
        self,
        collection: str,
        take: Callable[[Iterator[DocumentInfo]], Documents],
        after: DocumentKey | None = None,
    ) -> Documents:
        """What `take` makes of a collection's documents; it reads as many as it wants.

        Args:
            collection: whose.
            take: is given them in the order of their records, and blocks changes meanwhile.
            after: they begin behind this one; it may be gone.

        Raises:
            InvalidArgumentError, BlockNotFoundError: no such name, no such collection.
        """
        check_collection_name(collection)
        self.tick()
        with self._lock:
            registry = self._registry
            names = {each.name for each in registry.collections()} if registry is not None else ()
            if registry is None or collection not in names:
                raise _no_such(collection)
            return take(map(document_info, registry.documents(collection, after)))

    @property
    def rounds(self) -> DeletionRounds:
        """What erases deleted blocks."""
        return self._rounds

    def deletions(self) -> DeletionStatus:
        """See `CollectionApi.deletions`."""
        self.tick()
        with self._state.lock:
            return self._rounds.status_locked()

    def _check_names(self, collection: str, ids: Iterable[str] | None) -> None:
        check_collection_name(collection)
        for each in ids or ():
            check_document_id(each)

    def _settle(self, change: Change, number: int, timeout_s: float) -> Deletion:
        """Have doomed blocks erased and wait for it; see `CollectionApi.remove`."""
        for namespace in change.doomed:
            self._forget_tables(namespace)
            self._rounds.erase_closed(namespace)
        timeout_s = min(max(0.0, timeout_s), MAX_WAIT_S)
        waiting = self._rounds.wait(change.doomed, number, timeout_s)
        return Deletion(num_blocks=change.num_doomed, num_kept=change.num_kept, num_waiting=waiting)

    def _mark_erased(self, namespace: NamespaceId, keys: Sequence[BlockKey]) -> str:
        """See `MarkErased`. Needs `_lock`."""
        if self._registry is None:
            return ""
        try:
            self._registry.mark_erased(namespace, keys, _now_us())
        except UcmError as error:
            return str(error)
        return ""

    # ----------------------------------------------------------------- time

    def tick(self) -> None:
        """Remove what has expired, and go on with what was held back. Cheap when nothing is.

        A daemon does it all the time; an embedded store when it opens, and in calls that ask.
        """
        if self._closed:
            return
        now_us, now_s = _now_us(), time.monotonic()
        if 0 < self._next_expiry_us <= now_us:
            self._remove_due(now_us)
        self._rounds.tick()
        if now_s >= self._next_bars_s:
            self._next_bars_s = now_s + BARS_INTERVAL_S
            self._forget_bars(now_us)

    def _remove_due(self, now_us: int) -> None:
        try:
            with self._lock:
                registry = self._writable()
                change = registry.remove_due(now_us)
                with self._state.lock:
                    self._rounds.doom_locked(change.doomed)
                self._note_expiry(registry)
        except UcmError as error:
            _log.warning("documents that have expired are not removed yet: %s", error)
            self._next_expiry_us = now_us + int(RETRY_S * US_PER_S)
            return
        self._state.metrics.add("ucm_deleted_documents_total", change.num_documents)
        for namespace in change.doomed:
            self._forget_tables(namespace)
            self._rounds.erase_closed(namespace)

    def _forget_bars(self, now_us: int) -> None:
        bar_us = int(self._state.config.collections.bar_s * US_PER_S)
        if self._registry is None or not bar_us:
            return
        try:
            with self._lock:
                ended = self._registry.forget_bars(now_us - bar_us)
                with self._state.lock:
                    self._rounds.lift_all_locked(ended)
        except UcmError as error:
            _log.warning("bars on deleted blocks do not end yet: %s", error)

    def _note_expiry(self, registry: Registry, added_us: int = -1) -> None:
        """Remember when the next document expires; `added_us` is one more, or looks at all."""
        if added_us >= 0:
            times = [each for each in (self._next_expiry_us, added_us) if each]
        else:
            times = [each.expires_us for each in registry.documents() if each.expires_us]
        self._next_expiry_us = min(times, default=0)

    def check_integrity(self) -> list[str]:
        """Every violated invariant, in words. O(documents)."""
        with self._lock:
            return self._registry.check_integrity() if self._registry is not None else []

    def close(self) -> None:
        """Close the registry; what is not erased yet goes on at the next start. Idempotent."""
        with self._lock:
            self._closed = True
            if self._registry is not None:
                self._registry.close()
            if self._temporary is not None:
                self._temporary.cleanup()


def _now_us() -> int:
    """UNIX time: it must mean the same after a restart."""
    return time.time_ns() // 1000


def _no_such(collection: str) -> BlockNotFoundError:
    return BlockNotFoundError(f"there is no collection {collection!r}; see `ucm collection ls`")
