"""The records of the registry of collections: what they say and how they are written.

The grammar is in `registry.py`. Whatever is read is checked: by its sum, then by its lengths.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from ucm.checksum import checksum
from ucm.errors import CorruptionError
from ucm.types import KEY_BYTES, BlockKey, NamespaceId

NUMBER: Final = struct.Struct("<Q")
_COLLECTION = struct.Struct("<QQ")
_HEAD = struct.Struct("<QQQQ32sII")


class DocumentKey(NamedTuple):
    """Names one registered document."""

    collection: str
    id: str
    namespace: NamespaceId


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentRecord:
    """One registered document."""

    key: DocumentKey
    version: int
    added_us: int
    expires_us: int
    """0 is never."""
    num_tokens: int
    digest: bytes
    chunks: tuple[tuple[BlockKey, ...], ...]

    def says_as(self, other: DocumentRecord) -> bool:
        """Whether content and chunks are the same."""
        return (self.digest, self.chunks) == (other.digest, other.chunks)

    @property
    def keys(self) -> set[BlockKey]:
        """Every block that it names."""
        return {key for chunk in self.chunks for key in chunk}


@dataclass(frozen=True, slots=True)
class CollectionRecord:
    """One collection."""

    name: str
    version: int
    created_us: int


@dataclass(frozen=True, slots=True)
class DeletedKey:
    """A block that may not come back."""

    namespace: NamespaceId
    key: BlockKey
    erased_us: int
    """0: its bytes may still be somewhere."""


def encode_collection(record: CollectionRecord) -> bytes:
    """The value of a collection."""
    return _COLLECTION.pack(record.version, record.created_us)


def decode_collection(key: bytes, value: bytes) -> CollectionRecord:
    """A collection whose sum was checked."""
    return CollectionRecord(key.decode(), *_COLLECTION.unpack(value))


def decode_deleted(key: bytes, value: bytes) -> DeletedKey:
    """A barred block whose sum was checked."""
    namespace, block = NamespaceId(key[:KEY_BYTES]), BlockKey(key[KEY_BYTES:])
    return DeletedKey(namespace, block, NUMBER.unpack(value)[0])


def encode_document(record: DocumentRecord, version: int, expires_us: int) -> bytes:
    """The value of a document, with another version or expiry than it has."""
    name = record.key.id.encode()
    head = _HEAD.pack(
        version,
        record.added_us,
        expires_us,
        record.num_tokens,
        record.digest,
        len(name),
        len(record.chunks),
    )
    lengths = struct.pack(f"<{len(record.chunks)}I", *map(len, record.chunks))
    return head + lengths + name + b"".join(key for chunk in record.chunks for key in chunk)


def sealed(key: bytes, value: bytes) -> bytes:
    """The value with the sum of its record."""
    return value + NUMBER.pack(checksum(key + value))


def prefix_of(collection: str, document: str | None = None) -> bytes:
    """What the keys of a collection's documents begin with, or those of one document."""
    prefix = collection.encode() + b"\0"
    return prefix if document is None else prefix + hashlib.sha256(document.encode()).digest()


def key_of(key: DocumentKey) -> bytes:
    """The key of a document's record."""
    return prefix_of(key.collection, key.id) + key.namespace


def unsealed(key: bytes, value: bytes) -> bytes:
    """The value without its sum.

    Raises:
        CorruptionError: the sum is not that of the record.
    """
    body = value[: -NUMBER.size]
    if value[-NUMBER.size :] != NUMBER.pack(checksum(key + body)):
        raise CorruptionError(
            f"a record of the registry of collections is damaged ({key.hex()[:16]}): run "
            "`ucm fsck --repair` on the data folder"
        )
    return body


def decode_document(key: bytes, value: bytes) -> DocumentRecord:
    """A document whose sum was checked.

    Raises:
        CorruptionError: its lengths contradict each other.
    """
    try:
        *numbers, digest, id_bytes, num_chunks = _HEAD.unpack_from(value)
        lengths = struct.unpack_from(f"<{num_chunks}I", value, _HEAD.size)
        start = _HEAD.size + 4 * num_chunks
        name = value[start : start + id_bytes].decode()
        packed = value[start + id_bytes :]
        collection = key[: -2 * KEY_BYTES - 1].decode()
    except (struct.error, UnicodeDecodeError) as error:
        raise CorruptionError(f"a document of the registry is damaged: {error}") from error
    if len(packed) != sum(lengths) * KEY_BYTES:
        raise CorruptionError("a document of the registry is damaged: its keys are cut off")
    keys = iter([BlockKey(bytes(key)) for (key,) in struct.iter_unpack(f"{KEY_BYTES}s", packed)])
    version, added_us, expires_us, num_tokens = numbers
    return DocumentRecord(
        key=DocumentKey(collection, name, NamespaceId(key[-KEY_BYTES:])),
        version=version,
        added_us=added_us,
        expires_us=expires_us,
        num_tokens=num_tokens,
        digest=digest,
        chunks=tuple(tuple(next(keys) for _ in range(length)) for length in lengths),
    )
