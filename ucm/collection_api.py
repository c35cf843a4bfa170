"""`CollectionApi`: named, versioned collections of documents, and their deletion from every tier.

A *document* is a text whose chunks are cached; a *chunk* is a chain of blocks from `ROOT_KEY`. The
store sees only keys: who registers a document has cut it up. Two implementations pass one
conformance suite: the store in this process (`EmbeddedCache.collections`) and a daemon's, over its
admin socket (`AdminClient.collections`). Both are thread-safe.

    add       put_document -> store the blocks -> flush        in this order
    change    put_document with another digest: the new version counts at once, the old blocks go
    delete    remove -> wait until `num_waiting` is 0

`put_document` comes first, so that no block of a document is ever stored without a document that
names it: what a crash leaves in between can still be deleted by its name. It also lifts the bar on
blocks of that document that were deleted before; stored before it, they are answered REFUSED.

Who guarantees what: once `remove` returned, the document is durably gone from the registry, no
load finds a block of it that nobody else names, and no engine can store one again until a document
that names it is put (or `collections.bar_s` after it was erased). Its bytes are erased (memory
zeroed; index, header and payload on NVMe) before `remove` answers, but for those that a lease
holds or a sick disk refuses: they are counted in `num_waiting` and go by themselves, also after a
crash.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from .errors import InvalidArgumentError
from .hashing import check_key
from .types import KEY_BYTES, ROOT_KEY, BlockKey, NamespaceId

DIGEST_BYTES: Final = 32
"""Length of a document's digest: SHA-256 of its content."""

MAX_DOCUMENT_ID_BYTES: Final = 4096
"""Of its UTF-8: any path."""

MAX_TIME_S: Final = 253_402_300_799
"""The last second of the year 9999; later ones no calendar shows."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One document as it is registered, for one namespace (one model)."""

    id: str
    """Its name within the collection, a path for instance; no control characters."""
    namespace: NamespaceId
    """That the blocks are stored in."""
    digest: bytes
    """32 bytes that change with its content."""
    chunks: tuple[tuple[BlockKey, ...], ...]
    """Keys of each chunk, the first one's parent is `ROOT_KEY`. A key may stand in several."""
    num_tokens: int
    """For people."""
    expires_s: float = 0.0
    """UNIX time after which it is removed; 0 is never."""


class PutOutcome(enum.StrEnum):
    """What a registration changed."""

    NEW = "new"
    KNOWN = "known"
    """Same digest, same chunks: nothing but the expiry may have changed."""
    CHANGED = "changed"
    """It replaced another version, in this namespace or (by its digest) in others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """What became of blocks that are to go."""

    num_blocks: int = 0
    """Keys that nobody names any more, cached or not."""
    num_kept: int = 0
    """Keys that another live document names: they stay."""
    num_waiting: int = 0
    """Of `num_blocks`: not erased yet, because a lease holds them or the disk refuses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PutAnswer:
    """Answer to `put_document`."""

    outcome: PutOutcome
    version: int
    """Of the collection, with this change."""
    deletion: Deletion = Deletion()
    """Of the blocks of the version before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveAnswer:
    """Answer to `remove` and `remove_blocks`."""

    num_documents: int = 0
    missing: tuple[str, ...] = ()
    """Document ids that the collection does not have."""
    deletion: Deletion = Deletion()


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionInfo:
    """One collection."""

    name: str
    version: int
    """Grows with every change."""
    created_s: float
    """UNIX time."""
    num_documents: int
    """One for each namespace that a document is registered for."""
    num_chunks: int
    num_blocks: int
    """Over all documents; a block of two counts twice."""
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentInfo:
    """One document of a collection."""

    id: str
    namespace: NamespaceId
    digest: bytes
    version: int
    """Of the collection, when it was put."""
    num_chunks: int
    num_blocks: int
    num_tokens: int
    added_s: float
    """UNIX time."""
    expires_s: float
    """UNIX time; 0 is never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletionStatus:
    """How far deletions are, over the whole store."""

    num_waiting: int
    """Blocks that are deleted but whose bytes may still be somewhere."""
    num_barred: int
    """Blocks, the waiting ones included, that no store may bring back."""
    problems: tuple[str, ...] = ()
    """Why some wait, where it is not a lease; for an operator."""


class CollectionApi(Protocol):
    """Collections of one store. Every method blocks on the disk for a commit."""

    def put_document(self, collection: str, document: Document) -> PutAnswer:
        """Register a document, durably; make the collection if it is new.

        Another digest under the same id replaces the document: in this namespace, and in the
        others where it is still the old one. Call it before the blocks are stored.

        Raises:
            InvalidArgumentError: a name, digest or key is malformed, or there are too many keys.
            CapacityError: the registry is full.
            TierUnavailableError: the disk fails; nothing was changed.
        """

    def list_collections(self) -> tuple[CollectionInfo, ...]:
        """All collections, by name."""

    def list_documents(self, collection: str) -> tuple[DocumentInfo, ...]:
        """The documents of a collection, in no particular order.

        Raises:
            BlockNotFoundError: there is no such collection.
        """

    def remove(
        self, collection: str, ids: Sequence[str] | None = None, *, timeout_s: float = 0.0
    ) -> RemoveAnswer:
        """Delete documents, or the whole collection when `ids` is None, with their blocks.

        Waits up to `timeout_s` for leases that hold blocks.

        Raises:
            BlockNotFoundError: there is no such collection.
            TierUnavailableError: the registry cannot be written; nothing was changed.
        """

    def expire(self, collection: str, ids: Sequence[str] | None, at_s: float) -> int:
        """Have documents (all when `ids` is None) removed at UNIX time `at_s`; 0 is never.

        Returns:
            How many were found.

        Raises:
            BlockNotFoundError: there is no such collection.
        """

    def remove_blocks(
        self, namespace: NamespaceId, keys: Sequence[BlockKey], *, timeout_s: float = 0.0
    ) -> RemoveAnswer:
        """Delete blocks by key, with all that follows them in their chains.

        Keys that a live document names stay: remove the document.
        """

    def deletions(self) -> DeletionStatus:
        """How far deletions are."""


def check_collection_name(name: str) -> str:
    """Return the name of a collection.

    Raises:
        InvalidArgumentError: it is empty, too long, or not letters, digits, `.`, `_` and `-`.
    """
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"{name[:80]!a} is no name for a collection: 1 to 64 letters, digits, '.', '_' or '-', "
            "a letter or digit first"
        )
    return name


def check_document_id(text: str) -> str:
    """Return the id of a document.

    Raises:
        InvalidArgumentError: it is empty, too long, or has control characters.
    """
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= MAX_DOCUMENT_ID_BYTES or not text.isprintable():
        raise InvalidArgumentError(
            f"{text[:80]!a} is no id for a document: 1 to {MAX_DOCUMENT_ID_BYTES} bytes of "
            "printable UTF-8"
        )
    return text


def check_document(document: Document, max_keys: int) -> Document:
    """Return a document that can be registered.

    Raises:
        InvalidArgumentError: its id, digest, namespace, a key or a number is malformed.
    """
    check_document_id(document.id)
    if len(document.digest) != DIGEST_BYTES or len(document.namespace) != KEY_BYTES:
        raise InvalidArgumentError(
            f"document {document.id!a}: digest and namespace have {DIGEST_BYTES} bytes each, "
            f"not {len(document.digest)} and {len(document.namespace)}"
        )
    num_keys = sum(map(len, document.chunks))
    if num_keys > max_keys:
        raise InvalidArgumentError(
            f"document {document.id!a} has {num_keys} blocks, at most {max_keys} are taken "
            "(service.max_keys_per_call): split it"
        )
    if not all(document.chunks):
        raise InvalidArgumentError(f"document {document.id!a} has a chunk without blocks")
    for chunk in document.chunks:
        _check_chunk(document.id, chunk)
    if document.num_tokens < 0:
        raise InvalidArgumentError(f"document {document.id!a} has {document.num_tokens} tokens")
    check_time(document.expires_s)
    return document


def check_time(unix_s: float) -> float:
    """Return a time at which documents may expire.

    Raises:
        InvalidArgumentError: it is negative, beyond the year 9999, or no number.
    """
    if not 0 <= unix_s <= MAX_TIME_S:
        raise InvalidArgumentError(
            f"documents cannot expire at {unix_s}: give UNIX time up to the year 9999, or 0"
        )
    return unix_s


def _check_chunk(name: str, chunk: Sequence[BlockKey]) -> None:
    keys = {check_key(key) for key in chunk}
    if len(keys) != len(chunk) or ROOT_KEY in keys:
        raise InvalidArgumentError(
            f"document {name!a}: the keys of a chunk must form a chain: each once, no root"
        )
