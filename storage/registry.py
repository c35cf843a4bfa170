"""The durable register of documents, and of blocks that may not come back: one LMDB a store.

    PATH/collections/     data.mdb  lock.mdb  and `clean`, the mark of a clean end (`clean_mark.py`)
    PATH/collections.tmp/ one that is being made; the next opening removes it

    meta         "format"                             -> version (8)
    collections  name                                 -> version (8) | created_us (8) | sum
    documents    name 00 | SHA-256 of id | namespace  -> document | sum
    blocks       namespace | key                      -> number of documents that name it (8) | sum
    deleted      namespace | key                      -> erased_us (8) | sum

    document     version (8) | added_us (8) | expires_us (8) | num_tokens (8) | digest (32)
                 | bytes of id (4) | number of chunks (4) | blocks of each chunk (4 each)
                 | id, UTF-8 | keys (32 each), chunk by chunk
    sum          xxh3_64 over key and value before it (8)

Integers are little-endian, times microseconds of UNIX time. A name has no zero byte, so documents
of a collection lie together. A document counts once for each key, however often it names it.

A key is in `blocks`, in `deleted`, or in neither (nobody ever named it, or its bar has ended).
`erased_us` 0: its bytes may still be somewhere. One transaction takes a document away and puts the
keys that nobody names any more into `deleted`: there is no moment at which a crash would leave
blocks of a document that is gone without saying that they must go. Putting a document that names a
key takes it out of `deleted`. The folder is made with the first document. Settings of LMDB, and
why, as in `index.py`; a transaction is final when its method returns.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

import lmdb

from ucm.errors import CapacityError, CorruptionError, TierUnavailableError, UcmError

from . import clean_mark, index
from .file_io import sync_folder
from .registry_change import Change, DoomedKeys, RegistryChange
from .registry_records import (
    NUMBER,
    CollectionRecord,
    DeletedKey,
    DocumentKey,
    DocumentRecord,
    decode_collection,
    decode_deleted,
    decode_document,
    key_of,
    prefix_of,
    unsealed,
)
from .segments import NO_SPACE_ERRNOS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from lmdb import _Database as Database

    from ucm.types import BlockKey, NamespaceId

log = logging.getLogger(__name__)

FORMAT_VERSION: Final = 1
MAX_READERS: Final = 126

_DATABASES: Final = (b"meta", b"collections", b"documents", b"blocks", b"deleted")


class Registry:
    """An open registry. Thread-safe. Every method may block on the disk."""

    def __init__(self, folder: Path, map_bytes: int, *, read_only: bool = False) -> None:
        """Open what is in `folder`; nothing is made before the first document.

        Args:
            folder: `COLLECTIONS_FOLDER` of a data folder.
            map_bytes: address space of the map.
            read_only: change nothing, not even the mark of a clean end.

        Raises:
            CorruptionError: it is damaged: nobody knows what was deleted.
            TierUnavailableError, CapacityError: LMDB cannot open it.
        """
        self._folder = folder
        self._map_bytes = map_bytes
        self._read_only = read_only
        self._lock = threading.Lock()
        self._closed = False
        self._failed = False
        self._env: lmdb.Environment | None = None
        self._databases: dict[bytes, Database] = {}
        with _translated(folder):
            if not read_only:
                shutil.rmtree(_unfinished(folder), ignore_errors=True)
            if not folder.exists():
                return
            self._check_sound()
            if not read_only:
                clean_mark.remove(folder)
                (folder / "lock.mdb").unlink(missing_ok=True)
                sync_folder(folder)
            self._open()

    @property
    def is_empty(self) -> bool:
        """Whether no document was ever put."""
        return self._env is None

    def close(self) -> None:
        """Close, with the mark of a clean end. Idempotent."""
        self._end(clean=not self._read_only)

    def abort(self) -> None:
        """Close as a crash would. Idempotent."""
        self._end(clean=False)

    # -------------------------------------------------------------- changing

    def put(self, record: DocumentRecord) -> Change:
        """Register a document; its `version` is set here.

        Raises:
            CapacityError: the map or the disk is full; nothing was changed.
            TierUnavailableError: anything else; nothing of it is visible.
        """
        self._make()
        name, key = record.key.collection, record.key
        with self._transaction() as change:
            old = {each.key: each for each in change.documents(name, key.id)}
            same = old.get(key)
            is_known = same is not None and same.says_as(record)
            change.result.is_known = is_known
            if same is not None and is_known and same.expires_us == record.expires_us:
                known = change.collection(name)
                change.result.version = known.version if known is not None else same.version
                return change.result
            stale = [
                each for each in old.values() if each.key == key or each.digest != record.digest
            ]
            version = change.bump(name, record.added_us)
            change.write(record, version)
            change.name_keys(key.namespace, record.keys)
            for each in stale:
                change.forget(each, is_replaced=each.key == key)
            change.settle()
            self._check_room(change.transaction)
        return change.result

    def remove(self, name: str, ids: Iterable[str] | None, now_us: int) -> Change | None:
        """Take documents away, or the whole collection when `ids` is None.

        Returns:
            None when there is no such collection.

        Raises:
            CapacityError, TierUnavailableError: nothing was changed.
        """
        if self._env is None:
            return None
        with self._transaction() as change:
            if change.collection(name) is None:
                return None
            for each in change.select(name, ids):
                change.forget(each)
            if ids is None:
                change.drop_collection(name)
            elif change.result.num_documents:
                change.bump(name, now_us)
            change.settle()
        return change.result

    def expire(self, name: str, ids: Iterable[str] | None, expires_us: int) -> Change | None:
        """Set when documents expire, 0 for never; None when there is no such collection.

        Raises:
            CapacityError, TierUnavailableError: nothing was changed.
        """
        if self._env is None:
            return None
        with self._transaction() as change:
            if change.collection(name) is None:
                return None
            for each in change.select(name, ids):
                change.write(each, each.version, expires_us)
                change.result.num_documents += 1
        return change.result

    def remove_due(self, now_us: int) -> Change:
        """Take away every document whose time has come.

        Raises:
            CapacityError, TierUnavailableError: nothing was changed.
        """
        due = [each for each in self.documents() if 0 < each.expires_us <= now_us]
        if not due:
            return Change()
        with self._transaction() as change:
            for each in due:
                found = change.document(each.key)
                if found is not None and 0 < found.expires_us <= now_us:
                    change.forget(found)
                    change.bump(each.key.collection, now_us)
            change.settle()
        return change.result

    def doom(self, namespace: NamespaceId, keys: Iterable[BlockKey]) -> Change:
        """Bar keys that no document names; the others are counted in `num_kept`.

        Raises:
            CapacityError, TierUnavailableError: nothing was changed.
        """
        self._make()
        with self._transaction() as change:
            change.doom(namespace, keys)
            self._check_room(change.transaction)
        return change.result

    def mark_erased(self, namespace: NamespaceId, keys: Iterable[BlockKey], now_us: int) -> None:
        """Note that no copy of these is left; not of those that a document names again.

        Raises:
            CapacityError, TierUnavailableError: nothing was changed.
        """
        with self._transaction() as change:
            for key in keys:
                whole = namespace + key
                if change.get(b"deleted", whole) is not None:
                    change.put(b"deleted", whole, NUMBER.pack(now_us))

    def forget_bars(self, before_us: int) -> DoomedKeys:
        """End the bars on what was erased before a time; what they were.

        Raises:
            CapacityError, TierUnavailableError: nothing was changed.
        """
        due = [each for each in self.deleted() if 0 < each.erased_us < before_us]
        found: DoomedKeys = {}
        if not due:
            return found
        with self._transaction() as change:
            for each in due:
                change.unbar(each.namespace, each.key)
                found.setdefault(each.namespace, []).append(each.key)
        return found

    # -------------------------------------------------------------- asking

    def collections(self) -> list[CollectionRecord]:
        """Every collection, by name.

        Raises:
            CorruptionError: a record is damaged.
        """
        return [decode_collection(key, value) for key, value in self._items(b"collections")]

    def documents(
        self, name: str | None = None, after: DocumentKey | None = None
    ) -> Iterator[DocumentRecord]:
        """Every document, or those of one collection, behind one of it, in the order of their keys.

        Raises:
            CorruptionError: a record is damaged.
        """
        prefix = b"" if name is None else prefix_of(name)
        start = prefix if after is None else key_of(after) + b"\0"
        for key, value in self._items(b"documents", prefix, start):
            yield decode_document(key, value)

    def deleted(self) -> Iterator[DeletedKey]:
        """Every block that may not come back.

        Raises:
            CorruptionError: a record is damaged.
        """
        for key, value in self._items(b"deleted"):
            yield decode_deleted(key, value)

    def check_integrity(self) -> list[str]:
        """Every violated invariant, in words. O(documents)."""
        try:
            counted: Counter[bytes] = Counter()
            names = {each.name for each in self.collections()}
            problems = []
            for each in self.documents():
                counted.update(each.key.namespace + key for key in each.keys)
                if each.key.collection not in names:
                    problems.append("a document belongs to no collection")
            stored = {key: NUMBER.unpack(value)[0] for key, value in self._items(b"blocks")}
            both = sum(each.namespace + each.key in stored for each in self.deleted())
        except (CorruptionError, TierUnavailableError) as error:
            return [str(error)]
        if stored != counted:
            problems.append("the numbers of documents that name a block are not as counted")
        if both:
            problems.append(f"{both} blocks are named and deleted at the same time")
        return problems

    def _items(
        self, name: bytes, prefix: bytes = b"", first: bytes = b""
    ) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values, without their sums, of what begins with `prefix`, from `first` on.

        Reads in batches.
        """
        start: bytes | None = first or prefix
        while start is not None and self._env is not None:
            with _translated(self._folder), self._env.begin() as transaction:
                self._check_open()
                batch, start = _batch(transaction.cursor(db=self._databases[name]), prefix, start)
            for key, value in batch:
                yield key, unsealed(key, value)

    # -------------------------------------------------------------- the file

    def _check_sound(self) -> None:
        """Look at the whole file before it is mapped, unless a clean end vouches for it."""
        if clean_mark.matches(self._folder):
            return
        is_there = (self._folder / "data.mdb").exists()
        problems = index.verify(self._folder) if is_there else ["its file is missing"]
        if problems:
            raise CorruptionError(
                f"the registry of collections {self._folder} is damaged ({problems[0]}), so nobody "
                "knows which blocks were deleted: run `ucm fsck --repair` on the data folder"
            )

    def _open(self) -> None:
        self._env = self._environment(self._folder)
        try:
            self._databases = {name: self._env.open_db(name, create=False) for name in _DATABASES}
            with self._env.begin() as transaction:
                stored = transaction.get(b"format", db=self._databases[b"meta"])
            if stored != NUMBER.pack(FORMAT_VERSION):
                raise CorruptionError(
                    f"the registry {self._folder} has another format than {FORMAT_VERSION}: use "
                    "the program that wrote it, or run `ucm fsck --repair` to begin anew"
                )
        except (lmdb.Error, UcmError):
            self._env.close()
            self._env = None
            raise

    def _environment(self, folder: Path) -> lmdb.Environment:
        return lmdb.open(
            str(folder),
            map_size=self._map_bytes,
            max_dbs=len(_DATABASES),
            max_readers=MAX_READERS,
            mode=0o600,
            sync=True,
            metasync=False,
            writemap=False,
            readonly=self._read_only,
            lock=not self._read_only,
            readahead=False,
        )

    def _make(self) -> None:
        """Make the registry appear, empty and whole, if there is none."""
        with self._lock, _translated(self._folder):
            self._check_open()
            if self._env is not None:
                return
            unfinished = _unfinished(self._folder)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(mode=0o700)
            env = self._environment(unfinished)
            try:
                with env.begin(write=True) as transaction:
                    handles = {name: env.open_db(name, txn=transaction) for name in _DATABASES}
                    version = NUMBER.pack(FORMAT_VERSION)
                    transaction.put(b"format", version, db=handles[b"meta"])
                env.sync(True)
            finally:
                env.close()
            sync_folder(unfinished)
            unfinished.rename(self._folder)
            sync_folder(self._folder.parent)
            self._open()

    def _check_open(self) -> None:
        if self._closed or self._failed:
            state = "closed" if self._closed else "out of use after a failed commit"
            raise TierUnavailableError(f"the registry {self._folder} is {state}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[RegistryChange]:
        """One write transaction, final when it is left; concurrent ones queue."""
        with self._lock, _translated(self._folder):
            self._check_open()
            assert self._env is not None, "the caller has made it"
            with self._env.begin(write=True) as transaction:
                yield RegistryChange(transaction, self._databases)
            try:
                self._env.sync(True)
            except lmdb.Error:
                self._failed = True  # committed, but nobody knows whether it is on the disk
                raise

    def _check_room(self, transaction: lmdb.Transaction) -> None:
        """Refuse to fill the map so far that nothing could be deleted any more."""
        live = sum(index.live_bytes(transaction, each) for each in self._databases.values())
        if live > self._map_bytes // index.LIVE_SHARE:
            raise CapacityError(_NO_ROOM.format(self._folder))

    def _end(self, *, clean: bool) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._env is None:
                return
            vouch = clean and not self._failed
            try:
                if vouch:
                    self._env.sync(True)
            except lmdb.Error as error:
                vouch = False
                log.warning("the registry %s has no clean end: %s", self._folder, error)
            finally:
                self._env.close()
            if vouch:
                with contextlib.suppress(OSError):  # without it the next opening verifies
                    clean_mark.vouch(self._folder, None)


_NO_ROOM = (
    "the registry {} has no room: remove documents, free some disk or raise collections.map_bytes"
)
_BATCH: Final = 1000
"""Records that are read in one go, so that no reader holds pages of the map for long."""


def wall_us() -> int:
    """UNIX time in microseconds: what registered times mean after a restart."""
    return time.time_ns() // 1000


def _unfinished(folder: Path) -> Path:
    return folder.with_name(folder.name + ".tmp")


def _batch(
    cursor: lmdb.Cursor, prefix: bytes, start: bytes
) -> tuple[list[tuple[bytes, bytes]], bytes | None]:
    """Up to `_BATCH` records from `start` on, and where the next ones begin."""
    found: list[tuple[bytes, bytes]] = []
    is_there = cursor.set_range(start) if start else cursor.first()
    while is_there and bytes(cursor.key()).startswith(prefix):
        if len(found) == _BATCH:
            return found, bytes(cursor.key())
        found.append((bytes(cursor.key()), bytes(cursor.value())))
        is_there = cursor.next()
    return found, None


@contextlib.contextmanager
def _translated(folder: Path) -> Iterator[None]:
    """Turn lmdb's and the system's errors into ours."""
    try:
        yield
    except UcmError:
        raise
    except (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError) as error:
        raise CorruptionError(
            f"the registry {folder} is damaged ({error}): run `ucm fsck --repair`"
        ) from error
    except lmdb.Error as error:
        is_full = isinstance(error, lmdb.MapFullError) or error.code in NO_SPACE_ERRNOS
        kind = CapacityError if is_full else TierUnavailableError
        text = _NO_ROOM.format(folder) if is_full else f"the registry {folder} failed: {error}"
        raise kind(text) from error
    except OSError as error:
        kind = CapacityError if error.errno in NO_SPACE_ERRNOS else TierUnavailableError
        raise kind(f"the registry {folder} failed: {error}") from error
