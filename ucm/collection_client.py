"""`RemoteCollections`: the `CollectionApi` of a daemon, over its admin socket.

Made by `AdminClient`; every call has a deadline.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import grpc

from .collection_api import (
    CollectionInfo,
    Deletion,
    DeletionStatus,
    Document,
    DocumentInfo,
    PutAnswer,
    RemoveAnswer,
    check_collection_name,
    check_document,
    check_document_id,
)
from .collection_wire import (
    collection_from_wire,
    deletions_from_wire,
    document_info_from_wire,
    document_to_wire,
    put_from_wire,
    removal_from_wire,
)
from .errors import TierUnavailableError
from .protos import cache_pb2 as pb
from .protos import cache_pb2_grpc as pb_grpc
from .types import BlockKey, NamespaceId
from .wire import keys_to_wire

BATCH_BYTES: Final = 1 << 20
"""Of names in one call: it stays well below `service.max_message_bytes`."""

Call = Callable[[Any, object, float], Any]  # generated code carries no types

COMMIT_TIMEOUT_S: Final = 30.0
"""Deadline of a call that commits to the disk, and erases what is closed, besides what it waits."""


class RemoteCollections:
    """See `CollectionApi`. Thread-safe."""

    def __init__(self, channel: grpc.Channel, call: Call) -> None:
        """Speak over a client's channel; `call` makes one call and translates its errors."""
        self._stub = pb_grpc.CollectionsStub(channel)
        self._call = call

    def put_document(self, collection: str, document: Document) -> PutAnswer:
        """See `CollectionApi.put_document`."""
        check_collection_name(collection)
        check_document(document, sys.maxsize)  # the limit of keys is the daemon's
        request = document_to_wire(collection, document)
        return put_from_wire(self._call(self._stub.PutDocument, request, COMMIT_TIMEOUT_S))

    def list_collections(self) -> tuple[CollectionInfo, ...]:
        """See `CollectionApi.list_collections`."""
        request = pb.ListCollectionsRequest()
        reply = self._call(self._stub.ListCollections, request, COMMIT_TIMEOUT_S)
        return tuple(map(collection_from_wire, reply.collections))

    def list_documents(self, collection: str) -> tuple[DocumentInfo, ...]:
        """See `CollectionApi.list_documents`. A change between two pages may show or hide some.

        Raises:
            TierUnavailableError: a daemon of an older release answers each page with the first.
        """
        check_collection_name(collection)
        found: dict[tuple[str, NamespaceId], DocumentInfo] = {}
        last: DocumentInfo | None = None
        while True:
            request = pb.ListDocumentsRequest(
                collection=collection,
                after_id=last.id if last is not None else "",
                after_namespace=last.namespace if last is not None else b"",
            )
            reply = self._call(self._stub.ListDocuments, request, COMMIT_TIMEOUT_S)
            for last in map(document_info_from_wire, reply.documents):
                # Pages are in the order of records, each begins behind the one before.
                if found.setdefault((last.id, last.namespace), last) is not last:
                    raise TierUnavailableError(
                        f"the daemon shows the documents of {collection!r} from the first again: "
                        "run the same release of ucm on both sides"
                    )
            if not reply.has_more or not reply.documents:
                return tuple(found.values())

    def remove(
        self, collection: str, ids: Sequence[str] | None = None, *, timeout_s: float = 0.0
    ) -> RemoveAnswer:
        """See `CollectionApi.remove`. Thousands of long names go in several calls."""
        check_collection_name(collection)
        answers = []
        for batch in batches_of(ids):
            request = pb.RemoveDocumentsRequest(
                collection=collection, ids=batch, all=ids is None, timeout_s=timeout_s
            )
            reply = self._call(self._stub.RemoveDocuments, request, timeout_s + COMMIT_TIMEOUT_S)
            answers.append(removal_from_wire(reply))
        return sum_of(answers)

    def expire(self, collection: str, ids: Sequence[str] | None, at_s: float) -> int:
        """See `CollectionApi.expire`. Thousands of long names go in several calls."""
        check_collection_name(collection)
        count = 0
        for batch in batches_of(ids):
            request = pb.ExpireDocumentsRequest(
                collection=collection, ids=batch, all=ids is None, at_s=at_s
            )
            reply = self._call(self._stub.ExpireDocuments, request, COMMIT_TIMEOUT_S)
            count += reply.num_documents
        return count

    def remove_blocks(
        self, namespace: NamespaceId, keys: Sequence[BlockKey], *, timeout_s: float = 0.0
    ) -> RemoveAnswer:
        """See `CollectionApi.remove_blocks`."""
        request = pb.RemoveBlocksRequest(
            namespace=namespace, keys=keys_to_wire(keys), timeout_s=timeout_s
        )
        reply = self._call(self._stub.RemoveBlocks, request, timeout_s + COMMIT_TIMEOUT_S)
        return removal_from_wire(reply)

    def deletions(self) -> DeletionStatus:
        """See `CollectionApi.deletions`."""
        reply = self._call(self._stub.Deletions, pb.DeletionsRequest(), COMMIT_TIMEOUT_S)
        return deletions_from_wire(reply)


def batches_of(ids: Sequence[str] | None) -> Iterator[Sequence[str] | None]:
    """`ids`, checked, each once, in lists that one call can carry; None, for all, as it is."""
    if ids is None:
        yield None
        return
    batch: list[str] = []
    num_bytes = 0
    for each in dict.fromkeys(ids):
        size = len(check_document_id(each).encode())
        if batch and num_bytes + size > BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(each)
        num_bytes += size
    if batch:
        yield batch


def sum_of(answers: Sequence[RemoveAnswer]) -> RemoveAnswer:
    """Several removals as one."""
    deletions = [answer.deletion for answer in answers]
    return RemoveAnswer(
        num_documents=sum(answer.num_documents for answer in answers),
        missing=tuple(each for answer in answers for each in answer.missing),
        deletion=Deletion(
            num_blocks=sum(each.num_blocks for each in deletions),
            num_kept=sum(each.num_kept for each in deletions),
            num_waiting=sum(each.num_waiting for each in deletions),
        ),
    )
