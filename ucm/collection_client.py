"""`RemoteCollections`: the `CollectionApi` of a daemon, over its admin socket.

Made by `AdminClient`; every call has a deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc

from .collection_api import (
    CollectionInfo,
    DeletionStatus,
    Document,
    DocumentInfo,
    PutAnswer,
    RemoveAnswer,
)
from .collection_wire import (
    collection_from_wire,
    deletions_from_wire,
    document_info_from_wire,
    document_to_wire,
    put_from_wire,
    removal_from_wire,
)
from .protos import cache_pb2 as pb
from .protos import cache_pb2_grpc as pb_grpc
from .types import BlockKey, NamespaceId
from .wire import keys_to_wire

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
        request = document_to_wire(collection, document)
        return put_from_wire(self._call(self._stub.PutDocument, request, COMMIT_TIMEOUT_S))

    def list_collections(self) -> tuple[CollectionInfo, ...]:
        """See `CollectionApi.list_collections`."""
        request = pb.ListCollectionsRequest()
        reply = self._call(self._stub.ListCollections, request, COMMIT_TIMEOUT_S)
        return tuple(map(collection_from_wire, reply.collections))

    def list_documents(self, collection: str) -> tuple[DocumentInfo, ...]:
        """See `CollectionApi.list_documents`. A change between two pages may show or hide some."""
        found: list[DocumentInfo] = []
        while True:
            request = pb.ListDocumentsRequest(collection=collection, first=len(found))
            reply = self._call(self._stub.ListDocuments, request, COMMIT_TIMEOUT_S)
            found += map(document_info_from_wire, reply.documents)
            if not reply.has_more or not reply.documents:
                return tuple(found)

    def remove(
        self, collection: str, ids: Sequence[str] | None = None, *, timeout_s: float = 0.0
    ) -> RemoveAnswer:
        """See `CollectionApi.remove`."""
        if ids is not None and not ids:
            return RemoveAnswer()
        request = pb.RemoveDocumentsRequest(
            collection=collection, ids=ids, all=ids is None, timeout_s=timeout_s
        )
        reply = self._call(self._stub.RemoveDocuments, request, timeout_s + COMMIT_TIMEOUT_S)
        return removal_from_wire(reply)

    def expire(self, collection: str, ids: Sequence[str] | None, at_s: float) -> int:
        """See `CollectionApi.expire`."""
        if ids is not None and not ids:
            return 0
        request = pb.ExpireDocumentsRequest(
            collection=collection, ids=ids, all=ids is None, at_s=at_s
        )
        reply = self._call(self._stub.ExpireDocuments, request, COMMIT_TIMEOUT_S)
        return int(reply.num_documents)

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
