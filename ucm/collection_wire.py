"""Between `CollectionApi` and the messages of service Collections, both ways.

What arrives at the daemon is checked here as far as the messages go, and by `collection_api` as
far as names and documents go.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Final

from .collection_api import (
    CollectionInfo,
    Deletion,
    DeletionStatus,
    Document,
    DocumentInfo,
    PutAnswer,
    PutOutcome,
    RemoveAnswer,
)
from .errors import InvalidArgumentError
from .protos import cache_pb2 as pb
from .types import NamespaceId
from .wire import keys_from_wire, keys_to_wire

OUTCOME_TO_WIRE: Final = {
    PutOutcome.NEW: pb.PUT_OUTCOME_NEW,
    PutOutcome.KNOWN: pb.PUT_OUTCOME_KNOWN,
    PutOutcome.CHANGED: pb.PUT_OUTCOME_CHANGED,
}
OUTCOME_FROM_WIRE: Final = {int(wire): word for word, wire in OUTCOME_TO_WIRE.items()}


def document_to_wire(collection: str, document: Document) -> pb.PutDocumentRequest:
    """A registration as a message.

    Raises:
        InvalidArgumentError: a key is not 32 bytes.
    """
    return pb.PutDocumentRequest(
        collection=collection,
        id=document.id,
        namespace=document.namespace,
        digest=document.digest,
        chunk_blocks=map(len, document.chunks),
        keys=keys_to_wire([key for chunk in document.chunks for key in chunk]),
        num_tokens=document.num_tokens,
        expires_s=document.expires_s,
    )


def document_from_wire(request: pb.PutDocumentRequest, max_keys: int) -> Document:
    """The document in a message.

    Raises:
        InvalidArgumentError: too many keys, or not as many as the chunks have.
    """
    keys = tuple(keys_from_wire(request.keys, limit=max_keys))
    ends = list(accumulate(request.chunk_blocks))
    if (ends[-1] if ends else 0) != len(keys):
        raise InvalidArgumentError(
            f"{len(keys)} keys for chunks of {ends[-1] if ends else 0} blocks together"
        )
    starts = [0, *ends[:-1]] if ends else []
    return Document(
        id=request.id,
        namespace=NamespaceId(request.namespace),
        digest=request.digest,
        chunks=tuple(keys[start:end] for start, end in zip(starts, ends, strict=True)),
        num_tokens=request.num_tokens,
        expires_s=request.expires_s,
    )


def _deletion_to_wire(deletion: Deletion) -> pb.Deletion:
    return pb.Deletion(
        num_blocks=deletion.num_blocks,
        num_kept=deletion.num_kept,
        num_waiting=deletion.num_waiting,
    )


def _deletion_from_wire(deletion: pb.Deletion) -> Deletion:
    return Deletion(
        num_blocks=deletion.num_blocks,
        num_kept=deletion.num_kept,
        num_waiting=deletion.num_waiting,
    )


def put_to_wire(answer: PutAnswer) -> pb.PutDocumentReply:
    """An answer to `put_document` as a message."""
    return pb.PutDocumentReply(
        outcome=OUTCOME_TO_WIRE[answer.outcome],
        version=answer.version,
        deletion=_deletion_to_wire(answer.deletion),
    )


def put_from_wire(reply: pb.PutDocumentReply) -> PutAnswer:
    """The answer in a message; an outcome that this release does not know is a change."""
    return PutAnswer(
        outcome=OUTCOME_FROM_WIRE.get(reply.outcome, PutOutcome.CHANGED),
        version=reply.version,
        deletion=_deletion_from_wire(reply.deletion),
    )


def removal_to_wire(answer: RemoveAnswer) -> pb.RemoveDocumentsReply:
    """An answer to `remove` as a message."""
    return pb.RemoveDocumentsReply(
        num_documents=answer.num_documents,
        missing=answer.missing,
        deletion=_deletion_to_wire(answer.deletion),
    )


def removal_from_wire(reply: pb.RemoveDocumentsReply) -> RemoveAnswer:
    """The answer in a message."""
    return RemoveAnswer(
        num_documents=reply.num_documents,
        missing=tuple(reply.missing),
        deletion=_deletion_from_wire(reply.deletion),
    )


def collection_to_wire(info: CollectionInfo) -> pb.CollectionInfo:
    """A collection as a message."""
    return pb.CollectionInfo(
        name=info.name,
        version=info.version,
        created_s=info.created_s,
        num_documents=info.num_documents,
        num_chunks=info.num_chunks,
        num_blocks=info.num_blocks,
        num_tokens=info.num_tokens,
    )


def collection_from_wire(info: pb.CollectionInfo) -> CollectionInfo:
    """The collection in a message."""
    return CollectionInfo(
        name=info.name,
        version=info.version,
        created_s=info.created_s,
        num_documents=info.num_documents,
        num_chunks=info.num_chunks,
        num_blocks=info.num_blocks,
        num_tokens=info.num_tokens,
    )


def document_info_to_wire(info: DocumentInfo) -> pb.DocumentInfo:
    """A document's entry as a message."""
    return pb.DocumentInfo(
        id=info.id,
        namespace=info.namespace,
        digest=info.digest,
        version=info.version,
        num_chunks=info.num_chunks,
        num_blocks=info.num_blocks,
        num_tokens=info.num_tokens,
        added_s=info.added_s,
        expires_s=info.expires_s,
    )


def document_info_from_wire(info: pb.DocumentInfo) -> DocumentInfo:
    """The document's entry in a message."""
    return DocumentInfo(
        id=info.id,
        namespace=NamespaceId(info.namespace),
        digest=info.digest,
        version=info.version,
        num_chunks=info.num_chunks,
        num_blocks=info.num_blocks,
        num_tokens=info.num_tokens,
        added_s=info.added_s,
        expires_s=info.expires_s,
    )


def deletions_to_wire(status: DeletionStatus) -> pb.DeletionsReply:
    """How far deletions are, as a message."""
    return pb.DeletionsReply(
        num_waiting=status.num_waiting, num_barred=status.num_barred, problems=status.problems
    )


def deletions_from_wire(reply: pb.DeletionsReply) -> DeletionStatus:
    """How far deletions are, from a message."""
    return DeletionStatus(
        num_waiting=reply.num_waiting,
        num_barred=reply.num_barred,
        problems=tuple(reply.problems),
    )
