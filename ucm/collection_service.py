"""The gRPC service of collections, over one manager; on the operators' socket.

The socket's mode is the check of who may call, as for service Admin. A call blocks one of the
socket's few threads for a commit to the disk, and a removal for as long as its client is ready to
wait for leases.
"""

# ruff: noqa: N802, ARG002  generated base classes name the methods and their arguments
from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import grpc

from ucm.storage.registry_records import DocumentKey

from .call_guard import translated
from .collection_api import DocumentInfo, check_document_id
from .collection_desk import CollectionDesk
from .collection_wire import (
    collection_to_wire,
    deletions_to_wire,
    document_from_wire,
    document_info_to_wire,
    put_to_wire,
    removal_to_wire,
)
from .errors import InvalidArgumentError
from .protos import cache_pb2 as pb
from .protos import cache_pb2_grpc as pb_grpc
from .types import KEY_BYTES, NamespaceId
from .wire import keys_from_wire

PAGE_DOCUMENTS: Final = 1000
"""Documents in one answer."""

PAGE_BYTES: Final = 1 << 20
"""And of all their names: an answer stays well below the 4 MiB that clients of gRPC take."""

MAX_WAIT_S: Final = 60.0
"""Longest that a removal holds a thread; the blocks go anyway."""


class CollectionService(pb_grpc.CollectionsServicer):
    """What operators call."""

    def __init__(self, collections: CollectionDesk, max_keys: int) -> None:
        self._collections = collections
        self._max_keys = max_keys

    def PutDocument(
        self, request: pb.PutDocumentRequest, context: grpc.ServicerContext
    ) -> pb.PutDocumentReply:
        """Register a document."""
        with translated(context):
            document = document_from_wire(request, self._max_keys)
            return put_to_wire(self._collections.put_document(request.collection, document))

    def ListCollections(
        self, request: pb.ListCollectionsRequest, context: grpc.ServicerContext
    ) -> pb.ListCollectionsReply:
        """All collections."""
        with translated(context):
            found = self._collections.list_collections()
            return pb.ListCollectionsReply(collections=map(collection_to_wire, found))

    def ListDocuments(
        self, request: pb.ListDocumentsRequest, context: grpc.ServicerContext
    ) -> pb.ListDocumentsReply:
        """A page of a collection."""
        with translated(context):
            page, has_more = self._collections.read_documents(
                request.collection, page_of, _last_seen(request)
            )
            return pb.ListDocumentsReply(
                documents=map(document_info_to_wire, page), has_more=has_more
            )

    def RemoveDocuments(
        self, request: pb.RemoveDocumentsRequest, context: grpc.ServicerContext
    ) -> pb.RemoveDocumentsReply:
        """Delete documents."""
        with translated(context):
            ids = _ids(request)
            timeout_s = _wait_s(request.timeout_s)
            answer = self._collections.remove(request.collection, ids, timeout_s=timeout_s)
            return removal_to_wire(answer)

    def ExpireDocuments(
        self, request: pb.ExpireDocumentsRequest, context: grpc.ServicerContext
    ) -> pb.ExpireDocumentsReply:
        """Set when documents expire."""
        with translated(context):
            count = self._collections.expire(request.collection, _ids(request), request.at_s)
            return pb.ExpireDocumentsReply(num_documents=count)

    def RemoveBlocks(
        self, request: pb.RemoveBlocksRequest, context: grpc.ServicerContext
    ) -> pb.RemoveDocumentsReply:
        """Delete blocks by key."""
        with translated(context):
            keys = keys_from_wire(request.keys, limit=self._max_keys)
            namespace, timeout_s = NamespaceId(request.namespace), _wait_s(request.timeout_s)
            answer = self._collections.remove_blocks(namespace, keys, timeout_s=timeout_s)
            return removal_to_wire(answer)

    def Deletions(
        self, request: pb.DeletionsRequest, context: grpc.ServicerContext
    ) -> pb.DeletionsReply:
        """How far deletions are."""
        with translated(context):
            return deletions_to_wire(self._collections.deletions())


def page_of(documents: Iterator[DocumentInfo]) -> tuple[list[DocumentInfo], bool]:
    """The first of `documents`, as many as fit into an answer, and whether there are more."""
    page: list[DocumentInfo] = []
    num_bytes = 0
    for each in documents:
        num_bytes += len(each.id.encode())
        if page and (len(page) == PAGE_DOCUMENTS or num_bytes > PAGE_BYTES):
            return page, True
        page.append(each)
    return page, False


def _last_seen(request: pb.ListDocumentsRequest) -> DocumentKey | None:
    """The document that a page begins behind; None: at the first.

    Raises:
        InvalidArgumentError: half a document, or what can be none's name.
    """
    if not request.after_id and not request.after_namespace:
        return None
    if len(request.after_namespace) != KEY_BYTES:
        raise InvalidArgumentError(f"a namespace has {KEY_BYTES} bytes")
    namespace = NamespaceId(request.after_namespace)
    return DocumentKey(request.collection, check_document_id(request.after_id), namespace)


def _ids(request: pb.RemoveDocumentsRequest | pb.ExpireDocumentsRequest) -> list[str] | None:
    """The documents that are meant; None for all.

    Raises:
        InvalidArgumentError: both or neither are asked for: an empty list must not delete all.
    """
    if request.all == bool(request.ids):
        raise InvalidArgumentError("name documents, or ask for all of them, and not both")
    return None if request.all else list(request.ids)


def _wait_s(timeout_s: float) -> float:
    if not timeout_s >= 0:
        raise InvalidArgumentError(f"a time-out of {timeout_s} s; it must be 0 or more")
    return min(timeout_s, MAX_WAIT_S)
