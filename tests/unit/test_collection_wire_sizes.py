"""Collections over the wire, where names are long and many: no message outgrows gRPC's limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import grpc
import pytest

from ucm.admin import AdminClient
from ucm.collection_api import MAX_DOCUMENT_ID_BYTES, CollectionApi, Document, DocumentInfo
from ucm.collection_client import RemoteCollections
from ucm.collection_lists import record_of
from ucm.collection_service import PAGE_BYTES, page_of
from ucm.daemon import Daemon
from ucm.errors import InvalidArgumentError, TierUnavailableError
from ucm.protos import cache_pb2 as pb
from ucm.protos import cache_pb2_grpc as pb_grpc
from ucm.sockets import admin_path, grpc_target
from ucm.storage.registry_records import decode_document
from ucm.testing.blocks import chain, tiny_spec
from ucm.testing.daemon import running_daemon, short_folder, small_config
from ucm.testing.documents import document
from ucm.types import BlockKey

NAMESPACE = tiny_spec().fingerprint()
NUM_DOCUMENTS = 1100
"""A page of 1,000 with ids of 4,096 bytes is 4.2 MB, and gRPC takes 4 MiB."""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with short_folder() as folder:
        config = small_config(folder)
        service = dataclasses.replace(config.service, max_message_bytes=5 << 20)
        with running_daemon(dataclasses.replace(config, service=service)) as found:
            yield found


@pytest.fixture
def collections(daemon: Daemon) -> Iterator[CollectionApi]:
    with AdminClient(daemon.config.service.socket_path) as admin:
        yield admin.collections


def long_name(number: int) -> str:
    return f"{number:06}".ljust(MAX_DOCUMENT_ID_BYTES, "x")


def register(daemon: Daemon, names: list[str]) -> None:
    """In one transaction; one for each would take the test's time."""
    registry = daemon.manager.collections._writable()
    registry._make()
    with registry._transaction() as change:
        version = change.bump("docs", 1)
        for number, name in enumerate(names):
            keys = chain(NAMESPACE, 1, number)
            record = record_of("docs", document(NAMESPACE, name, keys, expires_s=3e9), 1)
            change.write(record, version)
            change.name_keys(NAMESPACE, record.keys)


def test_documents_with_long_names_are_listed_and_removed(
    daemon: Daemon, collections: CollectionApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [long_name(number) for number in range(NUM_DOCUMENTS)]
    register(daemon, names)
    decoded: list[bytes] = []

    def count(key: bytes, value: bytes) -> object:
        decoded.append(key)
        return decode_document(key, value)

    with monkeypatch.context() as counted:
        counted.setattr("ucm.storage.registry.decode_document", count)
        assert sorted(each.id for each in collections.list_documents("docs")) == names
    num_pages = -(-NUM_DOCUMENTS * MAX_DOCUMENT_ID_BYTES // PAGE_BYTES)
    assert len(decoded) == NUM_DOCUMENTS + num_pages - 1, "but for the first of each next page"
    assert collections.expire("docs", names, 4e9) == NUM_DOCUMENTS
    unknown = [long_name(NUM_DOCUMENTS + number) for number in range(NUM_DOCUMENTS)]
    answer = collections.remove("docs", [*names, *unknown], timeout_s=1.0)
    assert answer.num_documents == NUM_DOCUMENTS
    assert list(answer.missing) == unknown
    assert answer.deletion.num_blocks == NUM_DOCUMENTS
    assert answer.deletion.num_waiting == 0


def test_a_listing_goes_on_behind_a_document_that_is_gone(
    daemon: Daemon, collections: CollectionApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ucm.collection_service.PAGE_DOCUMENTS", 4)
    names = {f"name {number}" for number in range(12)}
    for name in names:
        collections.put_document("short", document(NAMESPACE, name, chain(NAMESPACE, 1, 1)))
    gone: list[str] = []
    desk = daemon.manager.collections
    take_page = page_of

    def removes_the_last(documents: Iterator[DocumentInfo]) -> tuple[list[DocumentInfo], bool]:
        if gone:
            desk._registry.remove("short", gone[-1:], 1)  # type: ignore[union-attr]
        page, has_more = take_page(documents)
        gone.append(page[-1].id)
        return page, has_more

    monkeypatch.setattr("ucm.collection_service.page_of", removes_the_last)
    listed = [each.id for each in collections.list_documents("short")]
    assert len(listed) == len(names)
    assert set(listed) == names, "each once, as they were when their page was read"


def test_a_daemon_that_knows_no_pages_behind_a_document_is_not_asked_forever() -> None:
    """It answers each call with the first page."""
    pages = 0

    def call(_method: object, _request: object, _timeout_s: float) -> pb.ListDocumentsReply:
        nonlocal pages
        pages += 1
        assert pages <= 3, "the same page is asked for again and again"
        documents = [
            pb.DocumentInfo(id=f"name {number}", namespace=NAMESPACE) for number in range(3)
        ]
        return pb.ListDocumentsReply(documents=documents, has_more=True)

    with grpc.insecure_channel("unix:/nobody") as channel:
        old = RemoteCollections(channel, call)
        with pytest.raises(TierUnavailableError, match="same release"):
            old.list_documents("docs")


def test_a_place_in_a_listing_that_is_none_is_refused(daemon: Daemon) -> None:
    path = daemon.config.service.socket_path
    with grpc.insecure_channel(grpc_target(admin_path(path))) as channel:
        stub = pb_grpc.CollectionsStub(channel)
        for after_id, namespace in (
            ("a", b""),
            ("", bytes(32)),
            ("a", bytes(31)),
            ("\n", bytes(32)),
        ):
            request = pb.ListDocumentsRequest(
                collection="docs", after_id=after_id, after_namespace=namespace
            )
            with pytest.raises(grpc.RpcError) as refused:
                stub.ListDocuments(request, timeout=5)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("name", ["\udcff", "a\ud800"])
def test_names_that_are_no_unicode_are_refused_in_words(
    collections: CollectionApi, name: str
) -> None:
    good = document(NAMESPACE, "one", chain(NAMESPACE, 1, 1))
    for call in (
        lambda: collections.put_document(name, good),
        lambda: collections.put_document("docs", dataclasses.replace(good, id=name)),
        lambda: collections.put_document("docs", dataclasses.replace(good, num_tokens=-1)),
        lambda: collections.list_documents(name),
        lambda: collections.remove(name),
        lambda: collections.remove("docs", [name]),
        lambda: collections.expire("docs", [name], 0),
    ):
        with pytest.raises(InvalidArgumentError):
            call()


def test_a_document_that_no_message_can_carry_is_refused_as_one_too_large(
    collections: CollectionApi,
) -> None:
    keys = tuple(BlockKey(number.to_bytes(32, "big")) for number in range(1, 200_000))
    huge = Document(id="huge", namespace=NAMESPACE, digest=bytes(32), chunks=(keys,), num_tokens=1)
    with pytest.raises(InvalidArgumentError, match="large"):
        collections.put_document("docs", huge)
