"""Documents of tests, and what of them can be seen in a store's files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ucm.collection_api import Document
from ucm.types import BlockKey, NamespaceId

from .blocks import content


def document(
    namespace: NamespaceId, name: str, *chunks: Sequence[BlockKey], expires_s: float = 0.0
) -> Document:
    """A document of these chunks, whose digest follows from them."""
    packed = b"|".join(b"".join(chunk) for chunk in chunks)
    return Document(
        id=name,
        namespace=namespace,
        digest=hashlib.sha256(packed).digest(),
        chunks=tuple(tuple(chunk) for chunk in chunks),
        num_tokens=sum(map(len, chunks)) * 4,
        expires_s=expires_s,
    )


def bytes_on_disk(folder: Path, keys: Sequence[BlockKey]) -> list[bool]:
    """For each block whether a segment file holds the beginning of its first slab anywhere."""
    data = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.seg")))
    return [content(key)[:128] in data for key in keys]


def names_on_disk(folder: Path, keys: Sequence[BlockKey]) -> list[bool]:
    """For each block whether a segment file names it in a header anywhere."""
    data = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.seg")))
    return [bytes(key) in data for key in keys]


def replaced(one: Document, digest: bytes) -> Document:
    """The document with another digest."""
    return Document(
        id=one.id,
        namespace=one.namespace,
        digest=digest,
        chunks=one.chunks,
        num_tokens=one.num_tokens,
        expires_s=one.expires_s,
    )
