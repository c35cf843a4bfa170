"""What every `CollectionApi` promises, as tests: embedded and over the admin socket.

class TestEmbeddedCollections(CollectionTests):
    @pytest.fixture
    def harness(self) -> Iterator[CollectionHarness]: ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from ucm.api import CacheApi, NamespaceHandle
from ucm.checksum import block_checksums
from ucm.collection_api import CollectionApi, PutOutcome
from ucm.errors import BlockNotFoundError, InvalidArgumentError
from ucm.types import BlockKey, LoadMode, NamespaceId, SourceKind, StoreStatus, TierKind

from .blocks import chain, content, get, loaded, put, tiny_spec
from .documents import bytes_on_disk, document, names_on_disk, replaced
from .stores import wait_until


class CollectionHarness(Protocol):
    """A store under test, with an NVMe tier."""

    def open_session(self) -> CacheApi:
        """A fresh session; the harness closes what is left open."""

    def collections(self) -> CollectionApi:
        """The store's collections."""

    def pass_time(self, seconds: float) -> None:
        """Make that much time pass on the store's clock, which ends leases."""

    def tick(self) -> None:
        """What an idle daemon does now and then."""

    def store_folder(self) -> Path:
        """Where its files are."""

    def check_integrity(self) -> list[str]:
        """Violated invariants of the store."""


class CollectionTests:
    """The suite. One store a test; integrity is checked after each."""

    @pytest.fixture
    def harness(self) -> Iterator[CollectionHarness]:
        """The store under test; the subclass provides it."""
        raise NotImplementedError

    @pytest.fixture
    def cache(self, harness: CollectionHarness) -> Iterator[CacheApi]:
        """One session."""
        yield harness.open_session()
        problems = harness.check_integrity()
        assert problems == [], problems

    @pytest.fixture
    def handle(self, cache: CacheApi) -> NamespaceHandle:
        """One open namespace of it."""
        return cache.open_namespace(tiny_spec())

    @pytest.fixture
    def collections(self, harness: CollectionHarness) -> CollectionApi:
        """The store's collections."""
        return harness.collections()

    @pytest.fixture
    def store(
        self, cache: CacheApi, handle: NamespaceHandle, collections: CollectionApi
    ) -> Callable[..., None]:
        """Registers a document and stores its chunks durably."""

        def add(name: str, *chunks: Sequence[BlockKey], collection: str = "docs") -> None:
            collections.put_document(collection, document(handle.id, name, *chunks))
            for chunk in chunks:
                assert set(put(cache, handle, list(chunk))) <= {
                    StoreStatus.ACCEPTED,
                    StoreStatus.PRESENT,
                }
            assert cache.flush(timeout_s=10)

        return add

    # ------------------------------------------------------------ registry

    def test_a_document_is_listed_as_it_was_put(
        self, handle: NamespaceHandle, collections: CollectionApi
    ) -> None:
        """With its collection's version and sums."""
        first, second = chain(handle.id, 3, 1), chain(handle.id, 2, 2)
        answer = collections.put_document("docs", document(handle.id, "a/b.txt", first, second))
        assert (answer.outcome, answer.version) == (PutOutcome.NEW, 1)
        (info,) = collections.list_collections()
        assert (info.name, info.version, info.num_documents) == ("docs", 1, 1)
        assert (info.num_chunks, info.num_blocks, info.num_tokens) == (2, 5, 20)
        assert abs(info.created_s - time.time()) < 60
        (listed,) = collections.list_documents("docs")
        assert (listed.id, listed.namespace, listed.version) == ("a/b.txt", handle.id, 1)
        assert listed.digest == document(handle.id, "x", first, second).digest
        assert (listed.num_chunks, listed.num_blocks, listed.expires_s) == (2, 5, 0)

    def test_nothing_is_listed_at_first(self, collections: CollectionApi) -> None:
        """And an unknown collection is an error, not an empty one."""
        assert collections.list_collections() == ()
        for call in (
            lambda: collections.list_documents("docs"),
            lambda: collections.remove("docs"),
            lambda: collections.expire("docs", None, 0),
        ):
            with pytest.raises(BlockNotFoundError):
                call()

    def test_a_known_document_changes_nothing(
        self, handle: NamespaceHandle, collections: CollectionApi
    ) -> None:
        """The version stays."""
        same = document(handle.id, "one", chain(handle.id, 3, 1))
        collections.put_document("docs", same)
        again = collections.put_document("docs", same)
        assert (again.outcome, again.version) == (PutOutcome.KNOWN, 1)
        assert len(collections.list_documents("docs")) == 1

    def test_documents_of_one_id_in_two_namespaces(
        self, cache: CacheApi, handle: NamespaceHandle, collections: CollectionApi
    ) -> None:
        """Two models; another digest in one makes the other's old version go."""
        other = cache.open_namespace(tiny_spec("other"))
        chunks = [chain(each.id, 2, 1) for each in (handle, other)]
        old = document(handle.id, "one", chunks[0])
        collections.put_document("docs", old)
        twin = document(other.id, "one", chunks[1])
        collections.put_document("docs", replaced(twin, old.digest))
        assert len(collections.list_documents("docs")) == 2
        changed = collections.put_document("docs", document(handle.id, "one", chunks[0][:1]))
        assert changed.outcome is PutOutcome.CHANGED
        assert changed.deletion.num_blocks == 3
        (left,) = collections.list_documents("docs")
        assert left.namespace == handle.id

    @pytest.mark.parametrize("name", ["", "a b", "../x", "x/y", "a\0b", "n" * 65, "ä", ".x", "a\n"])
    def test_names_are_checked(
        self, handle: NamespaceHandle, collections: CollectionApi, name: str
    ) -> None:
        """They end up in keys, messages and terminals."""
        with pytest.raises(InvalidArgumentError):
            collections.put_document(name, document(handle.id, "one"))
        with pytest.raises(InvalidArgumentError):
            collections.list_documents(name)

    @pytest.mark.parametrize("name", ["", "a\nb", "a\0", "\x1b[2J", "x" * 4097])
    def test_document_ids_are_checked(
        self, handle: NamespaceHandle, collections: CollectionApi, name: str
    ) -> None:
        """As names are."""
        with pytest.raises(InvalidArgumentError):
            collections.put_document("docs", document(handle.id, name))

    def test_malformed_documents_are_refused(
        self, handle: NamespaceHandle, collections: CollectionApi
    ) -> None:
        """And nothing of them is registered."""
        keys = chain(handle.id, 2, 1)
        good = document(handle.id, "one", keys)
        for bad in (
            replaced(good, b"short"),
            document(NamespaceId(b"short"), "one", keys),
            document(handle.id, "one", []),
            document(handle.id, "one", [keys[0], keys[0]]),
            document(handle.id, "one", [BlockKey(bytes(32))]),
            document(handle.id, "one", keys, expires_s=-1.0),
        ):
            with pytest.raises(InvalidArgumentError):
                collections.put_document("docs", bad)
        with pytest.raises(InvalidArgumentError):
            collections.put_document("docs", document(handle.id, "one", [BlockKey(b"short")]))
        assert collections.list_collections() == ()

    def test_more_documents_than_a_page(
        self, handle: NamespaceHandle, collections: CollectionApi
    ) -> None:
        """A listing is whole, however it travels."""
        for number in range(8):
            collections.put_document("docs", document(handle.id, f"{number}"))
        assert {each.id for each in collections.list_documents("docs")} == set("01234567")

    # ------------------------------------------------------------ deletion

    def test_a_removed_document_is_nowhere(
        self,
        harness: CollectionHarness,
        cache: CacheApi,
        handle: NamespaceHandle,
        collections: CollectionApi,
        store: Callable[..., None],
    ) -> None:
        """Not found, not in a header, no byte of it in a file; the others are untouched."""
        keys, others = chain(handle.id, 4, 1), chain(handle.id, 3, 2)
        store("one", keys[:2], keys)
        store("two", others)
        assert all(bytes_on_disk(harness.store_folder(), keys + others))
        answer = collections.remove("docs", ["one", "none"])
        assert (answer.num_documents, answer.missing) == (1, ("none",))
        assert (answer.deletion.num_blocks, answer.deletion.num_waiting) == (4, 0)
        assert cache.lookup(handle.id, keys).num_blocks == 0
        assert not any(bytes_on_disk(harness.store_folder(), keys))
        assert not any(names_on_disk(harness.store_folder(), keys))
        assert get(cache, handle, others) == [content(key) for key in others]
        assert [each.id for each in collections.list_documents("docs")] == ["two"]

    def test_a_whole_collection_goes(
        self,
        harness: CollectionHarness,
        handle: NamespaceHandle,
        collections: CollectionApi,
        store: Callable[..., None],
    ) -> None:
        """And its name with it; another collection stays."""
        keys, others = chain(handle.id, 2, 1), chain(handle.id, 2, 2)
        store("one", keys)
        store("one", others, collection="more")
        assert collections.remove("docs").num_documents == 1
        assert [each.name for each in collections.list_collections()] == ["more"]
        assert bytes_on_disk(harness.store_folder(), keys + others) == [False] * 2 + [True] * 2

    def test_a_block_that_another_document_names_stays(
        self,
        cache: CacheApi,
        handle: NamespaceHandle,
        collections: CollectionApi,
        store: Callable[..., None],
    ) -> None:
        """Until the last of them goes."""
        shared, own = chain(handle.id, 3, 1), chain(handle.id, 2, 2)
        store("one", shared, own)
        store("two", shared, collection="more")
        answer = collections.remove("docs", ["one"])
        assert (answer.deletion.num_blocks, answer.deletion.num_kept) == (2, 3)
        assert get(cache, handle, shared) == [content(key) for key in shared]
        assert collections.remove("more").deletion.num_blocks == 3
        assert cache.lookup(handle.id, shared).num_blocks == 0

    def test_what_follows_a_deleted_block_goes_with_it(
        self,
        harness: CollectionHarness,
        cache: CacheApi,
        handle: NamespaceHandle,
        collections: CollectionApi,
        store: Callable[..., None],
    ) -> None:
        """Nobody could reach it."""
        keys = chain(handle.id, 5, 1)
        store("one", keys[:2])
        assert put(cache, handle, keys[2:], keys[1]) == (StoreStatus.ACCEPTED,) * 3
        assert cache.flush(timeout_s=10)
        assert collections.remove("docs", ["one"]).deletion.num_waiting == 0
        assert not any(bytes_on_disk(harness.store_folder(), keys))

    def test_a_deleted_block_cannot_be_stored_again(
        self,
        cache: CacheApi,
        handle: NamespaceHandle,
        collections: CollectionApi,
        store: Callable[..., None],
    ) -> None:
        """Nor what follows it; until its document is put again."""
        keys = chain(handle.id, 3, 1)
        store("one", keys[:2])
        lease = cache.prepare_store(handle.id, keys[1], keys[2:])
        cache.release(lease.id)
        collections.remove("docs", ["one"])
        assert collections.deletions().num_barred == 2
        assert put(cache, handle, keys) == (StoreStatus.REFUSED,) * 3
        assert put(cache, handle, chain(handle.id, 1, 7)) == (StoreStatus.ACCEPTED,)
        store("one", keys[:2])
        assert get(cache, handle, keys[:2]) == [content(key) for key in keys[:2]]
        assert collections.deletions().num_barred == 0

    def test_a_store_that_was_prepared_before_is_refused(
        self, cache: CacheApi, handle: NamespaceHandle, collections: CollectionApi
    ) -> None:
        """The engine held the block in its staging memory all the time."""
        keys = chain(handle.id, 2, 1)
        collections.put_document("docs", document(handle.id, "one", keys))
        lease = cache.prepare_store(handle.id, BlockKey(bytes(32)), keys)
        sums = {}
        for slot in lease.slots:
            assert slot.data is not None
            slot.data[:] = content(slot.key)
            sums[slot.key] = block_checksums(handle.layout, slot.data)
        collections.remove("docs", ["one"])
        statuses = cache.complete_store(lease.id, sums)
        assert statuses == (StoreStatus.REFUSED,) * 2
        assert cache.lookup(handle.id, keys).num_blocks == 0

    def test_a_reader_keeps_its_bytes(
        self,
        harness: CollectionHarness,
        cache: CacheApi,
        handle: NamespaceHandle,
        collections: CollectionApi,
        store: Callable[..., None],
    ) -> None:
        """The block is gone for everybody else, and erased when the last lease ends."""
        keys = chain(handle.id, 3, 1)
        store("one", keys)
        with loaded(cache, handle, keys) as lease:
            answer = collections.remove("docs", ["one"])
            assert answer.deletion.num_waiting == 3
            assert cache.lookup(handle.id, keys).num_blocks == 0
            for key, block in zip(keys, lease.blocks, strict=True):
                assert block.data is not None
                assert bytes(block.data) == content(key)
        self.settle(harness, collections)
        assert not any(bytes_on_disk(harness.store_folder(), keys))
        assert [bytes(block.data or b"x").strip(b"\0") for block in lease.blocks] == [b""] * 3

    def test_a_reader_of_files_keeps_its_extents(
        self,
        harness: CollectionHarness,
        cache: CacheApi,
        handle: NamespaceHandle,
        collections: CollectionApi,
        store: Callable[..., None],
    ) -> None:
        """Bytes are punched when the lease ends, not under its reader."""
        keys = chain(handle.id, 3, 1)
        store("one", keys)
        seeds = iter(range(20, 60))
        while TierKind.MEMORY in cache.lookup(handle.id, keys).tiers:  # out with it
            put(cache, handle, chain(handle.id, 7, next(seeds)))
            assert cache.flush(timeout_s=10)
        plan = cache.begin_load(handle.id, keys, mode=LoadMode.DIRECT, timeout_s=1.0)
        assert {block.source for block in plan.blocks} == {SourceKind.EXTENT}
        assert collections.remove("docs", ["one"]).deletion.num_waiting == 3
        assert all(bytes_on_disk(harness.store_folder(), keys))
        cache.release(plan.id)
        self.settle(harness, collections)
        assert not any(bytes_on_disk(harness.store_folder(), keys))

    def test_a_lease_that_expires_lets_go(
        self,
        harness: CollectionHarness,
        cache: CacheApi,
        handle: NamespaceHandle,
        collections: CollectionApi,
        store: Callable[..., None],
    ) -> None:
        """A client that died does not keep a deleted document."""
        keys = chain(handle.id, 2, 1)
        store("one", keys)
        cache.prepare_load(handle.id, keys, timeout_s=1)
        assert collections.remove("docs").deletion.num_waiting == 2
        harness.pass_time(3600.0)
        self.settle(harness, collections)
        assert not any(bytes_on_disk(harness.store_folder(), keys))

    def test_a_pin_does_not_keep_a_deleted_block(
        self,
        harness: CollectionHarness,
        cache: CacheApi,
        handle: NamespaceHandle,
        collections: CollectionApi,
        store: Callable[..., None],
    ) -> None:
        """It keeps blocks from eviction, for hours; nobody reads under it."""
        keys = chain(handle.id, 2, 1)
        store("one", keys)
        pin = cache.pin(handle.id, keys, timeout_s=5.0)
        assert pin.num_blocks == 2
        assert collections.remove("docs").deletion.num_waiting == 0
        assert not any(bytes_on_disk(harness.store_folder(), keys))
        cache.release(pin.id)

    def test_a_store_behind_a_deleted_block_does_not_keep_it(
        self,
        harness: CollectionHarness,
        cache: CacheApi,
        handle: NamespaceHandle,
        collections: CollectionApi,
        store: Callable[..., None],
    ) -> None:
        """It is an orphan when it completes."""
        keys = chain(handle.id, 3, 1)
        store("one", keys[:2])
        lease = cache.prepare_store(handle.id, keys[1], keys[2:])
        (slot,) = lease.slots
        assert slot.data is not None
        slot.data[:] = content(keys[2])
        sums = {keys[2]: block_checksums(handle.layout, slot.data)}
        assert collections.remove("docs").deletion.num_waiting == 0
        assert cache.complete_store(lease.id, sums) == (StoreStatus.ORPHAN,)
        assert not any(bytes_on_disk(harness.store_folder(), keys))

    def test_blocks_in_memory_only_go_too(
        self, cache: CacheApi, handle: NamespaceHandle, collections: CollectionApi
    ) -> None:
        """Queued or not: they never reach the disk."""
        keys = chain(handle.id, 4, 1)
        collections.put_document("docs", document(handle.id, "one", keys))
        put(cache, handle, keys)
        assert collections.remove("docs").deletion.num_waiting == 0
        assert cache.lookup(handle.id, keys).num_blocks == 0
        assert cache.flush(timeout_s=10)

    def test_a_changed_document_loses_its_old_blocks(
        self,
        harness: CollectionHarness,
        cache: CacheApi,
        handle: NamespaceHandle,
        collections: CollectionApi,
        store: Callable[..., None],
    ) -> None:
        """The new version counts at once; what both have stays."""
        kept, old, new = (chain(handle.id, 2, seed) for seed in (1, 2, 3))
        store("one", kept, old)
        answer = collections.put_document("docs", document(handle.id, "one", kept, new))
        assert (answer.outcome, answer.version) == (PutOutcome.CHANGED, 2)
        assert (answer.deletion.num_blocks, answer.deletion.num_kept) == (2, 2)
        assert cache.lookup(handle.id, old).num_blocks == 0
        assert get(cache, handle, kept) == [content(key) for key in kept]
        assert put(cache, handle, new) == (StoreStatus.ACCEPTED,) * 2
        assert not any(bytes_on_disk(harness.store_folder(), old))

    def test_blocks_are_removed_by_key(
        self,
        cache: CacheApi,
        handle: NamespaceHandle,
        collections: CollectionApi,
        store: Callable[..., None],
    ) -> None:
        """With what follows them; those of a document stay."""
        keys, named = chain(handle.id, 4, 1), chain(handle.id, 2, 2)
        put(cache, handle, keys)
        store("one", named)
        answer = collections.remove_blocks(handle.id, [keys[1], *named])
        assert (answer.deletion.num_blocks, answer.deletion.num_kept) == (1, 2)
        assert cache.lookup(handle.id, keys).num_blocks == 1
        assert cache.lookup(handle.id, named).num_blocks == 2

    def test_a_document_expires(
        self,
        harness: CollectionHarness,
        cache: CacheApi,
        handle: NamespaceHandle,
        collections: CollectionApi,
        store: Callable[..., None],
    ) -> None:
        """By the wall clock; a later time, or never, can be set in between."""
        keys, others = chain(handle.id, 2, 1), chain(handle.id, 2, 2)
        store("one", keys)
        store("two", others)
        assert collections.expire("docs", ["one", "two", "none"], time.time() + 3600) == 2
        harness.tick()
        assert len(collections.list_documents("docs")) == 2
        assert collections.expire("docs", ["one"], 1.0) == 1
        assert collections.expire("docs", ["two"], 0) == 1

        def is_gone() -> bool:
            harness.tick()
            return [each.id for each in collections.list_documents("docs")] == ["two"]

        wait_until(is_gone)
        self.settle(harness, collections)
        assert cache.lookup(handle.id, keys).num_blocks == 0
        assert cache.lookup(handle.id, others).tiers == (TierKind.MEMORY,) * 2
        assert not any(bytes_on_disk(harness.store_folder(), keys))

    def settle(self, harness: CollectionHarness, collections: CollectionApi) -> None:
        """Wait until nothing deleted is left anywhere."""

        def is_done() -> bool:
            harness.tick()
            return collections.deletions().num_waiting == 0

        wait_until(is_done)
