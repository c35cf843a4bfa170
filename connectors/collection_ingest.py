"""Documents into a collection: cut, registered, computed where they are new, stored, checked.

    put_document -> compute what the cache lacks -> store -> flush -> look again

In this order no block is stored that no document names. It may be interrupted anywhere: the next
run finds the document registered, and computes what is missing.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ucm.collection_api import Deletion, Document, PutOutcome
from ucm.errors import ConfigError, InvalidArgumentError

from .chunk_store import Advance, StoredChunks, store_chunks

if TYPE_CHECKING:
    from ucm.collection_api import CollectionApi
    from ucm.engine.chunk_prompts import ChunkPrompts
    from ucm.reuse.segments import Chunk

    from .cached_engine import CachedEngine


class IngestOutcome(enum.StrEnum):
    """What a document was to its collection."""

    NEW = "new"
    KNOWN = "known"
    """As it is there already."""
    REPLACED = "replaced"
    """It had another content, or was cut otherwise."""
    SKIPPED = "skipped"


_OUTCOMES = {
    PutOutcome.NEW: IngestOutcome.NEW,
    PutOutcome.KNOWN: IngestOutcome.KNOWN,
    PutOutcome.CHANGED: IngestOutcome.REPLACED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingested:
    """What became of one document."""

    name: str
    outcome: IngestOutcome
    detail: str = ""
    """Why it was skipped."""
    version: int = 0
    """Of the collection, with it."""
    num_tokens: int = 0
    num_chunks: int = 0
    num_tail_tokens: int = 0
    """Behind the last full blocks: computed with each request."""
    stored: StoredChunks = field(default_factory=StoredChunks)
    deletion: Deletion = field(default_factory=Deletion)
    """Of the content that it replaces."""


class CollectionIngest:
    """Adds documents to one collection of a store; the engine's thread."""

    def __init__(
        self,
        cached: CachedEngine,
        collections: CollectionApi,
        collection: str,
        prompts: ChunkPrompts,
        *,
        expires_s: float = 0.0,
    ) -> None:
        """Prepare; nothing is written yet.

        Args:
            cached: an engine with `EngineOptions.reuse`, over the store of `collections`.
            collections: the store's.
            collection: name; made when the first document is added.
            prompts: what the chunks will be asked in.
            expires_s: UNIX time after which the documents are removed; 0: never.

        Raises:
            ConfigError: the engine has no cache.
        """
        if cached.session is None:
            raise ConfigError("a collection needs a cache: open the engine with one")
        self._cached = cached
        self._collections = collections
        self._collection = collection
        self._prompts = prompts
        self._expires_s = expires_s
        self._namespace = cached.session.spec.fingerprint()

    def add(self, name: str, text: str, advance: Advance = lambda _: None) -> Ingested:
        """Add one document; blocks for a prefill of what is new in it.

        Args:
            name: what it is called in the collection; replaces what was called so before.
            text: its content.
            advance: told of progress, in tokens.

        Returns:
            What became of it; SKIPPED when the store cannot take such a document.

        Raises:
            UcmError: the registry or the engine cannot go on; what was added before stays.
        """
        chunks = self._prompts.chunks_of(text, self._cached.engine.chunk_space)
        num_tokens = sum(map(len, chunks))
        try:
            answer = self._collections.put_document(
                self._collection, self._document(name, text, chunks)
            )
        except InvalidArgumentError as error:
            return Ingested(
                name=name, outcome=IngestOutcome.SKIPPED, detail=str(error), num_tokens=num_tokens
            )
        return Ingested(
            name=name,
            outcome=_OUTCOMES[answer.outcome],
            version=answer.version,
            num_tokens=num_tokens,
            num_chunks=len(chunks),
            num_tail_tokens=num_tokens - sum(chunk.num_cached_tokens for chunk in chunks),
            stored=store_chunks(self._cached, chunks, advance),
            deletion=answer.deletion,
        )

    def _document(self, name: str, text: str, chunks: list[Chunk]) -> Document:
        keys = (tuple(chunk.keys(self._namespace)) for chunk in chunks if chunk.num_blocks)
        return Document(
            id=name,
            namespace=self._namespace,
            digest=hashlib.sha256(text.encode()).digest(),
            chunks=tuple(keys),
            num_tokens=sum(map(len, chunks)),
            expires_s=self._expires_s,
        )
