"""The durable log of which block is in which slot: one LMDB environment a namespace.

    blocks      key (32)            -> parent (32) | slot (8) | generation (8) | xxh3_64 (8)
    quarantine  slot (8)            -> reason, ASCII
    retired     segment (8)         -> reason, ASCII
    meta        "epoch"             -> number of openings (8)

    files `clean` and `snapshot`: see `clean_mark.py`

All integers little-endian, the record's checksum over key and value. With the clean mark, its
digest vouches for the whole file; without it, `verify` walks the file without mapping it. LMDB
settings are those that lost nothing in simulated power cuts: sync, no writemap (a full disk is a
SIGBUS there). metasync is off, so the last commit is made final by one explicit sync, only where
the caller promises durability.

One writer at a time (LMDB's own lock). All lmdb errors are translated here, once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lmdb
import lmdb.verify
import numpy as np

from ucm.checksum import checksum
from ucm.errors import CapacityError, CorruptionError, TierUnavailableError, UcmError
from ucm.types import KEY_BYTES, BlockKey

from . import clean_mark
from .entry_table import make_table
from .file_io import sync_folder
from .segments import NO_SPACE_ERRNOS
from .tier import SlotId

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from lmdb import _Database as Database

    from .entry_table import EntryTable

log = logging.getLogger(__name__)

MAX_READERS = 126
EPOCH_SHIFT = 40
"""Generations: opening number << 40, plus a counter. 16 M openings of 1 T writes each."""

ALMOST_FULL_BYTES = 1 << 20
"""With less than this free, an I/O error of a commit counts as a full disk."""

LIVE_SHARE = 4
"""Records may take one part in this many of the map. LMDB writes every page that a transaction
touches anew and reuses the old ones only two transactions later, so without the rest of the map
nothing could be deleted from a full one."""

_DAMAGE = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.NotFoundError)
_DATABASES = (b"blocks", b"quarantine", b"retired", b"meta")
_VALUE = struct.Struct("<32sQQQ")
_NUMBER = struct.Struct("<Q")
_FIELDS_BYTES = _VALUE.size - _NUMBER.size
_NO_ROOM = (
    "the index {} has no room: free some disk, raise nvme.index_map_bytes or lower "
    "nvme.capacity_bytes"
)


@dataclass(frozen=True, slots=True)
class IndexRecord:
    """One committed block."""

    key: BlockKey
    parent: BlockKey
    slot: SlotId
    generation: int


class BlockIndex:
    """An open index. Thread-safe. Every method may block on the disk."""

    def __init__(self, folder: Path, map_bytes: int, *, read_only: bool = False) -> None:
        """Open or create; the caller has made sure that the file is sound.

        Takes the clean mark away, so that a crash from here on is seen.

        Raises:
            CorruptionError: it is an LMDB file, but not an index.
            TierUnavailableError, CapacityError: LMDB cannot open it.
        """
        self._folder = folder
        self._read_only = read_only
        self._closed = False
        self._failed = False
        self._lock = threading.Lock()
        if not read_only:
            _clear_marks(folder)
        is_new = not read_only and not (folder / "data.mdb").exists()
        with _translated(folder), contextlib.ExitStack() as on_failure:
            self._env = lmdb.open(
                str(folder),
                map_size=map_bytes,
                max_dbs=len(_DATABASES),
                max_readers=MAX_READERS,
                mode=0o600,
                sync=True,
                metasync=False,
                writemap=False,
                readonly=read_only,
                lock=not read_only,
                readahead=False,
            )
            on_failure.callback(self._env.close)
            self._blocks, self._quarantine, self._retired, self._meta = self._databases(is_new)
            self._max_live_bytes = self._env.info()["map_size"] // LIVE_SHARE
            on_failure.pop_all()

    @property
    def is_usable(self) -> bool:
        """Whether it still takes changes; not after a commit of which nobody knows the outcome."""
        return not (self._closed or self._failed)

    def put(self, records: Sequence[IndexRecord]) -> list[IndexRecord]:
        """Commit `records` in one durable transaction: all or, on an error, none.

        Returns:
            The records that were replaced: their keys are in other slots now.

        Raises:
            CapacityError: the map or the disk is full.
            TierUnavailableError: anything else; nothing of it is visible.
        """
        replaced = []
        with self._transaction() as transaction:
            for record in records:
                old = self._get(transaction, record.key)
                transaction.put(record.key, _encode(record), db=self._blocks)
                if old is not None and old.slot != record.slot:
                    replaced.append(old)
            self._check_room(transaction)
        return replaced

    def delete(self, items: Iterable[tuple[SlotId, BlockKey]]) -> list[SlotId]:
        """Forget blocks in one durable transaction.

        Returns:
            The slots of those that were there; a key that is in another slot stays.

        Raises:
            CapacityError, TierUnavailableError: nothing was forgotten.
        """
        with self._transaction() as transaction:
            return [slot for slot, key in items if self._remove(transaction, slot, key)]

    def quarantine(self, slot: SlotId, key: BlockKey, reason: str) -> None:
        """Forget a block and bar its slot, in one durable transaction.

        Raises:
            CapacityError, TierUnavailableError: nothing was changed.
        """
        with self._transaction() as transaction:
            self._remove(transaction, slot, key)
            transaction.put(_NUMBER.pack(slot), reason.encode("ascii"), db=self._quarantine)

    def retire(self, segment: int, reason: str) -> None:
        """Bar a whole segment, durably. Its records are dropped at the next opening.

        Raises:
            CapacityError, TierUnavailableError: nothing was changed.
        """
        with self._transaction() as transaction:
            transaction.put(_NUMBER.pack(segment), reason.encode("ascii"), db=self._retired)

    def lift(self, slots: Iterable[SlotId], segments: Iterable[int]) -> None:
        """End quarantines and retirements, durably.

        Raises:
            CapacityError, TierUnavailableError: nothing was changed.
        """
        with self._transaction() as transaction:
            for slot in slots:
                transaction.delete(_NUMBER.pack(slot), db=self._quarantine)
            for segment in segments:
                transaction.delete(_NUMBER.pack(segment), db=self._retired)

    def begin_epoch(self, above_generation: int) -> int:
        """Count this opening, durably.

        Args:
            above_generation: the largest generation that is known to be on the disk.

        Returns:
            A generation above all that were ever handed out; the next 2**40 are the caller's.

        Raises:
            CapacityError, TierUnavailableError: LMDB cannot write.
        """
        with self._transaction() as transaction:
            stored = transaction.get(b"epoch", db=self._meta)
            last = _NUMBER.unpack(stored)[0] if stored and len(stored) == 8 else 0
            epoch = max(last, above_generation >> EPOCH_SHIFT) + 1
            transaction.put(b"epoch", _NUMBER.pack(epoch), db=self._meta)
        generation: int = epoch << EPOCH_SHIFT
        return generation

    def records(self) -> Iterator[IndexRecord | BlockKey]:
        """Every record, by key; a bare key stands for a record that is damaged.

        Raises:
            TierUnavailableError: LMDB cannot read.
        """
        with _translated(self._folder), self._env.begin() as transaction:
            for key, value in transaction.cursor(db=self._blocks):
                yield _decode(bytes(key), bytes(value))

    def find(self, key: BlockKey) -> IndexRecord | None:
        """The record of one key.

        Raises:
            TierUnavailableError: LMDB cannot read.
        """
        with _translated(self._folder), self._env.begin() as transaction:
            return self._get(transaction, key)

    def quarantined(self) -> list[SlotId]:
        """Slots that are barred.

        Raises:
            TierUnavailableError: LMDB cannot read.
        """
        return [SlotId(number) for number in self._numbers(self._quarantine)]

    def retired(self) -> list[int]:
        """Segments that are barred.

        Raises:
            TierUnavailableError: LMDB cannot read.
        """
        return self._numbers(self._retired)

    def drop(self, keys: Iterable[bytes]) -> None:
        """Remove records by key alone, durably.

        Raises:
            CapacityError, TierUnavailableError: nothing was changed.
        """
        with self._transaction() as transaction:
            for key in keys:
                transaction.delete(key, db=self._blocks)

    def close(self, *, clean: bool) -> None:
        """Close; `clean` vouches for the file by a mark. Idempotent.

        Raises:
            CapacityError, TierUnavailableError: closed, but the mark could not be written.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            vouch = clean and not self._read_only and not self._failed
            with _translated(self._folder):
                table = self._table() if vouch else None
                self._sync_and_close(sync=vouch)
                if vouch:
                    clean_mark.vouch(self._folder, table)

    def _table(self) -> EntryTable | None:
        """All records in columns, each checked; None when one is damaged or out of order."""
        try:
            with self._env.begin() as transaction:
                count = transaction.stat(self._blocks)["entries"]
                cursor = transaction.cursor(db=self._blocks)
                keys = b"".join(cursor.iternext(keys=True, values=False))
                values = b"".join(cursor.iternext(keys=False, values=True))
        except lmdb.Error as error:
            log.warning("the index %s is not snapshotted: %s", self._folder, error)
            return None
        if (len(keys), len(values)) != (count * KEY_BYTES, count * _VALUE.size):
            return None
        return _table_of(count, keys, values)

    def _databases(self, is_new: bool) -> list[Database]:
        """Handles of `_DATABASES`, made in one transaction: a file has all, or it is not ours."""
        if is_new:
            with self._env.begin(write=True) as transaction:
                for name in _DATABASES:
                    self._env.open_db(name, txn=transaction)
        return [self._env.open_db(name, create=False) for name in _DATABASES]

    def _sync_and_close(self, *, sync: bool) -> None:
        try:
            if sync:
                self._env.sync(True)
        finally:
            self._env.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[lmdb.Transaction]:
        """One write transaction, final when it is left; concurrent ones queue."""
        with self._lock, _translated(self._folder):
            if self._closed or self._failed:
                state = "closed" if self._closed else "out of use after a failed commit"
                raise TierUnavailableError(f"the index {self._folder} is {state}")
            with self._env.begin(write=True) as transaction:
                yield transaction
            try:
                self._env.sync(True)
            except lmdb.Error:
                self._failed = True  # committed, but nobody knows whether it is on the disk
                raise

    def _check_room(self, transaction: lmdb.Transaction) -> None:
        """Refuse to fill the map so far that nothing could be deleted any more."""
        if live_bytes(transaction, self._blocks) > self._max_live_bytes:
            raise CapacityError(_NO_ROOM.format(self._folder))

    def _get(self, transaction: lmdb.Transaction, key: BlockKey) -> IndexRecord | None:
        value = transaction.get(key, db=self._blocks)
        record = None if value is None else _decode(key, bytes(value))
        return record if isinstance(record, IndexRecord) else None

    def _remove(self, transaction: lmdb.Transaction, slot: SlotId, key: BlockKey) -> bool:
        record = self._get(transaction, key)
        if record is None or record.slot != slot:
            return False
        return transaction.delete(key, db=self._blocks)

    def _numbers(self, database: Database) -> list[int]:
        with _translated(self._folder), self._env.begin() as transaction:
            keys = [bytes(key) for key, _ in transaction.cursor(db=database)]
        return [_NUMBER.unpack(key)[0] for key in keys if len(key) == _NUMBER.size]


def live_bytes(transaction: lmdb.Transaction, database: Database) -> int:
    """What a database's records take of the map."""
    pages = transaction.stat(database)
    live = pages["branch_pages"] + pages["leaf_pages"] + pages["overflow_pages"]
    return int(live * pages["psize"])


def is_vouched(folder: Path) -> bool:
    """Whether the clean mark matches `data.mdb` byte for byte.

    Raises:
        TierUnavailableError: a file is there but cannot be read.
    """
    with _translated(folder):
        return clean_mark.matches(folder)


def read_snapshot(folder: Path) -> EntryTable | None:
    """The records that a clean end left in columns; None without, or when it is not that file.

    Read it before the index is opened, which takes the mark away.

    Raises:
        TierUnavailableError: a file is there but cannot be read.
    """
    with _translated(folder):
        return clean_mark.read_snapshot(folder)


def verify(folder: Path) -> list[str]:
    """Check the whole LMDB file without mapping it; every problem in words.

    py-lmdb's own walker in pure Python: nothing in the file can crash it.
    """
    try:
        return list(lmdb.verify.verify(str(folder)))  # type: ignore[no-untyped-call]
    except (lmdb.verify.VerifyError, OSError) as error:
        return [str(error)]
    except (struct.error, IndexError, RecursionError, ValueError) as error:
        return [f"the verifier gave up: {type(error).__name__}: {error}"]


def _is_full(error: lmdb.Error, folder: Path) -> bool:
    """Whether there was no room; LMDB calls a write that a full disk cut short an I/O error."""
    if isinstance(error, lmdb.MapFullError) or error.code in NO_SPACE_ERRNOS:
        return True
    with contextlib.suppress(OSError):
        disk = os.statvfs(folder)
        return error.code == errno.EIO and disk.f_bavail * disk.f_frsize < ALMOST_FULL_BYTES
    return False


def _table_of(count: int, keys: bytes, values: bytes) -> EntryTable | None:
    """The table of `count` records whose keys and values lie one behind the other."""
    key_rows = np.frombuffer(keys, np.uint8).reshape(count, KEY_BYTES)
    value_rows = np.frombuffer(values, np.uint8).reshape(count, _VALUE.size)
    record_bytes = KEY_BYTES + _FIELDS_BYTES
    flat = memoryview(np.hstack([key_rows, value_rows[:, :_FIELDS_BYTES]]).tobytes())
    numbers = np.ascontiguousarray(value_rows[:, KEY_BYTES:]).view("<u8")
    slots, generations, stored = (np.ascontiguousarray(column) for column in numbers.T)
    starts = range(0, len(flat), record_bytes)
    for start, expected in zip(starts, stored.tolist(), strict=True):
        if checksum(flat[start : start + record_bytes]) != expected:
            return None
    parents = np.ascontiguousarray(value_rows[:, :KEY_BYTES])
    return make_table(key_rows, parents, slots.astype(np.int64), generations.astype(np.uint64))


def _clear_marks(folder: Path) -> None:
    """Remove the clean mark, durably, and LMDB's reader table, which a crash may have left odd."""
    with _translated(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        clean_mark.remove(folder)
        (folder / "lock.mdb").unlink(missing_ok=True)
        sync_folder(folder)


def _encode(record: IndexRecord) -> bytes:
    fields = _VALUE.pack(record.parent, record.slot, record.generation, 0)[:-8]
    return fields + _NUMBER.pack(checksum(record.key + fields))


def _decode(key: bytes, value: bytes) -> IndexRecord | BlockKey:
    if len(key) != KEY_BYTES or len(value) != _VALUE.size:
        return BlockKey(key)
    parent, slot, generation, stored = _VALUE.unpack(value)
    if stored != checksum(key + value[:-8]):
        return BlockKey(key)
    return IndexRecord(BlockKey(key), BlockKey(parent), SlotId(slot), generation)


@contextlib.contextmanager
def _translated(folder: Path) -> Iterator[None]:
    """Turn lmdb's and the system's errors into ours."""
    try:
        yield
    except UcmError:
        raise
    except _DAMAGE as error:
        raise CorruptionError(f"the index {folder} is damaged: {error}") from error
    except lmdb.Error as error:
        if _is_full(error, folder):
            raise CapacityError(_NO_ROOM.format(folder)) from error
        raise TierUnavailableError(f"the index {folder} failed: {error}") from error
    except OSError as error:
        if error.errno in NO_SPACE_ERRNOS:
            raise CapacityError(f"the index {folder} finds no room on its disk") from error
        raise TierUnavailableError(f"the index {folder} failed: {error}") from error
