"""Between the registry's records and what `CollectionApi` answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ucm.storage.registry_records import DocumentKey, DocumentRecord

from .collection_api import CollectionInfo, Document, DocumentInfo
from .manager_state import US_PER_S

if TYPE_CHECKING:
    from ucm.storage.registry import Registry


def record_of(collection: str, document: Document, now_us: int) -> DocumentRecord:
    """A checked document as it is registered; its version is the registry's to set."""
    return DocumentRecord(
        key=DocumentKey(collection, document.id, document.namespace),
        version=0,
        added_us=now_us,
        expires_us=int(document.expires_s * US_PER_S),
        num_tokens=document.num_tokens,
        digest=document.digest,
        chunks=document.chunks,
    )


def document_info(record: DocumentRecord) -> DocumentInfo:
    """One document, without its keys."""
    return DocumentInfo(
        id=record.key.id,
        namespace=record.key.namespace,
        digest=record.digest,
        version=record.version,
        num_chunks=len(record.chunks),
        num_blocks=sum(map(len, record.chunks)),
        num_tokens=record.num_tokens,
        added_s=record.added_us / US_PER_S,
        expires_s=record.expires_us / US_PER_S,
    )


def collection_infos(registry: Registry | None) -> tuple[CollectionInfo, ...]:
    """All collections, by name. O(documents)."""
    if registry is None:
        return ()
    documents: dict[str, list[DocumentInfo]] = {}
    for record in registry.documents():
        documents.setdefault(record.key.collection, []).append(document_info(record))
    found = []
    for each in registry.collections():
        own = documents.get(each.name, [])
        info = CollectionInfo(
            name=each.name,
            version=each.version,
            created_s=each.created_us / US_PER_S,
            num_documents=len(own),
            num_chunks=sum(document.num_chunks for document in own),
            num_blocks=sum(document.num_blocks for document in own),
            num_tokens=sum(document.num_tokens for document in own),
        )
        found.append(info)
    return tuple(found)
