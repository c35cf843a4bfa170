"""One change of the registry of collections: documents that come and go, and what that dooms.

Everything happens in one transaction of LMDB, which `registry.py` begins and makes final. The
rules: a document counts once for each key that it names; a key whose last name goes is barred in
the same transaction; a name lifts a bar.
"""

from __future__ import annotations

from collections.abc import Collection as Keys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ucm.types import BlockKey, NamespaceId

from .registry_records import (
    NUMBER,
    CollectionRecord,
    DocumentKey,
    DocumentRecord,
    decode_collection,
    decode_document,
    encode_collection,
    encode_document,
    key_of,
    prefix_of,
    sealed,
    unsealed,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    import lmdb
    from lmdb import _Database as Database

DoomedKeys = dict[NamespaceId, list[BlockKey]]
"""Keys that nobody names any more, by namespace."""


@dataclass(slots=True)
class Change:
    """What one transaction changed."""

    version: int = 0
    """Of the collection; 0 when it is gone."""
    is_known: bool = False
    """Put: the document was there with this digest and these chunks."""
    num_documents: int = 0
    """Documents that were removed, made way for another version, or got another expiry."""
    missing: list[str] = field(default_factory=list)
    doomed: DoomedKeys = field(default_factory=dict)
    """Keys that went into `deleted`."""
    lifted: set[BlockKey] = field(default_factory=set)
    """Put: keys of its namespace that left `deleted`."""
    num_kept: int = 0
    """Keys that lost a name and still have one."""

    @property
    def num_doomed(self) -> int:
        """Keys in `doomed`."""
        return sum(map(len, self.doomed.values()))


class RegistryChange:
    """A change in the making; `result` says what it did."""

    def __init__(self, transaction: lmdb.Transaction, databases: dict[bytes, Database]) -> None:
        self.transaction = transaction
        self.databases = databases
        self.result = Change()
        self._unnamed: set[tuple[NamespaceId, BlockKey]] = set()
        self._kept: set[tuple[NamespaceId, BlockKey]] = set()

    def get(self, name: bytes, key: bytes) -> bytes | None:
        """The value of a record, checked."""
        value = self.transaction.get(key, db=self.databases[name])
        return None if value is None else unsealed(key, bytes(value))

    def put(self, name: bytes, key: bytes, value: bytes) -> None:
        """Write a record with its sum."""
        self.transaction.put(key, sealed(key, value), db=self.databases[name])

    def collection(self, name: str) -> CollectionRecord | None:
        """A collection, if it is there."""
        value = self.get(b"collections", name.encode())
        return None if value is None else decode_collection(name.encode(), value)

    def bump(self, name: str, now_us: int) -> int:
        """The next version of a collection, which is made if need be."""
        found = self.collection(name) or CollectionRecord(name, 0, now_us)
        version = self.result.version = found.version + 1
        record = CollectionRecord(name, version, found.created_us)
        self.put(b"collections", name.encode(), encode_collection(record))
        return version

    def drop_collection(self, name: str) -> None:
        """Forget a collection whose documents are gone."""
        self.transaction.delete(name.encode(), db=self.databases[b"collections"])

    def document(self, key: DocumentKey) -> DocumentRecord | None:
        """A document, if it is there."""
        whole = key_of(key)
        value = self.get(b"documents", whole)
        return None if value is None else decode_document(whole, value)

    def documents(self, name: str, document: str | None = None) -> list[DocumentRecord]:
        """Of a collection, or of one id in every namespace."""
        prefix = prefix_of(name, document)
        cursor = self.transaction.cursor(db=self.databases[b"documents"])
        found, is_there = list[DocumentRecord](), cursor.set_range(prefix)
        while is_there and bytes(cursor.key()).startswith(prefix):
            key = bytes(cursor.key())
            found.append(decode_document(key, unsealed(key, bytes(cursor.value()))))
            is_there = cursor.next()
        return found

    def select(self, name: str, ids: Iterable[str] | None) -> list[DocumentRecord]:
        """Documents by id, all when None; ids that are not there are noted."""
        if ids is None:
            return self.documents(name)
        found: list[DocumentRecord] = []
        for each in dict.fromkeys(ids):
            records = self.documents(name, each)
            found += records
            if not records:
                self.result.missing.append(each)
        return found

    def write(self, record: DocumentRecord, version: int, expires_us: int | None = None) -> None:
        """Write a document with this version, and another expiry if one is given."""
        expires_us = record.expires_us if expires_us is None else expires_us
        value = encode_document(record, version, expires_us)
        self.put(b"documents", key_of(record.key), value)

    def name_keys(self, namespace: NamespaceId, keys: Keys[BlockKey]) -> None:
        """Count one document more for each key, and lift its bar."""
        for key in keys:
            self._add(namespace + key, 1)
            if self.unbar(namespace, key):
                self.result.lifted.add(key)

    def unbar(self, namespace: NamespaceId, key: BlockKey) -> bool:
        """End the bar on a key; whether there was one."""
        return self.transaction.delete(namespace + key, db=self.databases[b"deleted"])

    def forget(self, record: DocumentRecord, *, is_replaced: bool = False) -> None:
        """Take a document away, and its name off its keys; `is_replaced`: the record is new."""
        if not is_replaced:
            self.transaction.delete(key_of(record.key), db=self.databases[b"documents"])
        self.result.num_documents += 1
        for key in record.keys:
            place = (record.key.namespace, key)
            is_named = self._add(record.key.namespace + key, -1) > 0
            (self._kept if is_named else self._unnamed).add(place)

    def settle(self) -> None:
        """Doom what nobody names any more."""
        self.result.num_kept = len(self._kept - self._unnamed)
        for namespace, key in sorted(self._unnamed):
            self._bar(namespace, key)

    def doom(self, namespace: NamespaceId, keys: Iterable[BlockKey]) -> None:
        """Doom keys that no document names."""
        for key in dict.fromkeys(keys):
            if self.get(b"blocks", namespace + key) is None:
                self._bar(namespace, key)
            else:
                self.result.num_kept += 1

    def _bar(self, namespace: NamespaceId, key: BlockKey) -> None:
        self.put(b"deleted", namespace + key, NUMBER.pack(0))
        self.result.doomed.setdefault(namespace, []).append(key)

    def _add(self, whole: bytes, number: int) -> int:
        stored = self.get(b"blocks", whole)
        count: int = number + (NUMBER.unpack(stored)[0] if stored is not None else 0)
        if count > 0:
            self.put(b"blocks", whole, NUMBER.pack(count))
        else:
            self.transaction.delete(whole, db=self.databases[b"blocks"])
        return count
