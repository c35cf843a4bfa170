"""The registry of collections: what counts, what is doomed, what survives."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ucm.checksum import checksum
from ucm.errors import CapacityError, CorruptionError, TierUnavailableError
from ucm.storage.registry import Registry
from ucm.storage.registry_records import DocumentKey, DocumentRecord
from ucm.testing.nvme import quick_folder
from ucm.types import BlockKey, NamespaceId

MAP_BYTES = 4 << 20
NAMESPACE, OTHER = NamespaceId(b"n" * 32), NamespaceId(b"o" * 32)


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(32, "big"))


def record(
    name: str, *chunks: tuple[int, ...], collection: str = "docs", digest: int = 0, expires: int = 0
) -> DocumentRecord:
    return DocumentRecord(
        key=DocumentKey(collection, name, NAMESPACE),
        version=0,
        added_us=7,
        expires_us=expires,
        num_tokens=99,
        digest=bytes([digest]) * 32,
        chunks=tuple(tuple(key(number) for number in chunk) for chunk in chunks),
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path / "collections"


@pytest.fixture
def registry(folder: Path) -> Iterator[Registry]:
    found = Registry(folder, MAP_BYTES)
    yield found
    assert found.check_integrity() == []
    found.close()


def test_nothing_is_made_before_the_first_document(folder: Path) -> None:
    registry = Registry(folder, MAP_BYTES)
    assert registry.is_empty
    assert (registry.collections(), list(registry.documents()), list(registry.deleted())) == (
        [],
        [],
        [],
    )
    assert registry.remove("docs", None, 1) is None
    registry.close()
    assert not folder.exists()


def test_records_survive_a_restart_as_they_were(folder: Path) -> None:
    first = record("ä/b c.txt", (1, 2), (1, 3), expires=5)
    registry = Registry(folder, MAP_BYTES)
    assert registry.put(first).version == 1
    registry.close()
    assert (folder / "clean").exists()
    registry = Registry(folder, MAP_BYTES)
    assert not (folder / "clean").exists()
    (found,) = registry.documents()
    assert (found.key, found.chunks, found.digest) == (first.key, first.chunks, first.digest)
    assert (found.version, found.added_us, found.expires_us, found.num_tokens) == (1, 7, 5, 99)
    (collection,) = registry.collections()
    assert (collection.name, collection.version, collection.created_us) == ("docs", 1, 7)
    registry.abort()
    assert list(Registry(folder, MAP_BYTES).documents()) == [found], "after a crash it is verified"


def test_the_layout_of_a_document_is_fixed(folder: Path) -> None:
    registry = Registry(folder, MAP_BYTES)
    registry.put(record("x", (1,), (2, 3), expires=5))
    registry.close()
    with lmdb.open(str(folder), max_dbs=5, readonly=True) as env:
        documents = env.open_db(b"documents", create=False)
        with env.begin() as transaction:
            ((name, value),) = transaction.cursor(db=documents)
    assert name[:5] == b"docs\0"
    assert name[-32:] == NAMESPACE
    body = struct.pack("<QQQQ32sII", 1, 7, 5, 99, bytes(32), 1, 2)
    body += struct.pack("<II", 1, 2) + b"x" + b"".join(key(number) for number in (1, 2, 3))
    assert value == body + struct.pack("<Q", checksum(name + body))


def test_a_key_is_doomed_with_its_last_name(registry: Registry) -> None:
    registry.put(record("one", (1, 2), (1, 3)))
    registry.put(record("two", (1, 2), collection="more"))
    change = registry.remove("docs", ["one"], 1)
    assert change is not None
    assert (change.doomed, change.num_kept) == ({NAMESPACE: [key(3)]}, 2)
    change = registry.remove("more", None, 1)
    assert change is not None
    assert change.doomed == {NAMESPACE: [key(1), key(2)]}
    assert [each.name for each in registry.collections()] == ["docs"]
    assert {each.key for each in registry.deleted()} == {key(1), key(2), key(3)}


def test_putting_a_document_lifts_the_bar(registry: Registry) -> None:
    registry.put(record("one", (1, 2)))
    registry.remove("docs", None, 1)
    registry.mark_erased(NAMESPACE, [key(1)], 50)
    assert registry.put(record("one", (1, 4))).lifted == {key(1)}
    assert [(each.key, each.erased_us) for each in registry.deleted()] == [(key(2), 0)]
    registry.mark_erased(NAMESPACE, [key(1)], 60)
    assert len(list(registry.deleted())) == 1, "what is named again is not erased"


def test_a_change_keeps_what_both_versions_have(registry: Registry) -> None:
    registry.put(record("one", (1, 2), (3,)))
    change = registry.put(record("one", (1, 2), (4,), digest=1))
    assert (change.version, change.doomed, change.is_known) == (2, {NAMESPACE: [key(3)]}, False)
    assert change.num_documents == 1
    assert len(list(registry.documents())) == 1


def test_another_expiry_is_no_other_document(registry: Registry) -> None:
    registry.put(record("one", (1,)))
    change = registry.put(record("one", (1,), expires=9))
    assert (change.is_known, change.doomed) == (True, {})
    assert registry.remove_due(8).num_documents == 0
    change = registry.remove_due(9)
    assert (change.num_documents, change.doomed) == (1, {NAMESPACE: [key(1)]})
    registry.put(record("two", (2,), expires=9))
    change_of_all = registry.expire("docs", None, 0)
    assert change_of_all is not None
    assert change_of_all.num_documents == 1
    assert registry.remove_due(10**15).num_documents == 0


def test_bars_end(registry: Registry) -> None:
    registry.doom(NAMESPACE, [key(1), key(2)])
    registry.mark_erased(NAMESPACE, [key(1)], 50)
    assert registry.forget_bars(50) == {}
    assert registry.forget_bars(51) == {NAMESPACE: [key(1)]}
    assert [each.key for each in registry.deleted()] == [key(2)], "this one is not erased yet"


def fill(registry: Registry) -> None:
    for number in range(1000):
        registry.put(record(f"{number}", tuple(range(number * 50 + 1, number * 50 + 51))))


def test_a_full_registry_still_deletes(folder: Path) -> None:
    registry = Registry(folder, 1 << 20)
    with pytest.raises(CapacityError, match=r"collections\.map_bytes"):
        fill(registry)
    assert registry.check_integrity() == []
    count = len(list(registry.documents()))
    assert count > 20
    change = registry.remove("docs", None, 1)
    assert change is not None
    assert change.num_doomed == count * 50
    registry.close()


def test_damage_is_an_error_not_a_document(folder: Path) -> None:
    registry = Registry(folder, MAP_BYTES)
    registry.put(record("one", (1,)))
    registry.close()
    with lmdb.open(str(folder), max_dbs=5, map_size=MAP_BYTES) as env:
        documents = env.open_db(b"documents", create=False)
        with env.begin(write=True) as transaction:
            ((name, value),) = list(transaction.cursor(db=documents))
            transaction.put(bytes(name), b"\2" + bytes(value)[1:], db=documents)
    (folder / "clean").unlink()
    registry = Registry(folder, MAP_BYTES)
    with pytest.raises(CorruptionError, match="fsck"):
        list(registry.documents())
    with pytest.raises(CorruptionError):
        registry.remove("docs", None, 1)
    assert len(registry.check_integrity()) == 1
    registry.close()


def test_a_missing_file_is_damage(folder: Path) -> None:
    """The folder appears with its file in it, so somebody has deleted that."""
    folder.mkdir()
    with pytest.raises(CorruptionError, match="missing"):
        Registry(folder, MAP_BYTES)


def test_another_format_is_refused(folder: Path) -> None:
    registry = Registry(folder, MAP_BYTES)
    registry.put(record("one", (1,)))
    registry.close()
    with lmdb.open(str(folder), max_dbs=5, map_size=MAP_BYTES) as env:
        meta = env.open_db(b"meta", create=False)
        with env.begin(write=True) as transaction:
            transaction.put(b"format", b"\2" + bytes(7), db=meta)
    with pytest.raises(CorruptionError, match="another format"):
        Registry(folder, MAP_BYTES)


def test_what_a_crash_left_unfinished_is_removed(folder: Path) -> None:
    unfinished = folder.with_name("collections.tmp")
    unfinished.mkdir(parents=True)
    (unfinished / "data.mdb").write_bytes(b"half")
    registry = Registry(folder, MAP_BYTES)
    assert registry.is_empty
    assert not unfinished.exists()
    registry.put(record("one", (1,)))
    registry.close()
    with pytest.raises(TierUnavailableError, match="closed"):
        registry.put(record("two", (1,)))


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "remove", "erase"]),
        st.integers(0, 2),
        st.integers(0, 2),
        st.lists(st.integers(1, 6), max_size=4, unique=True),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(events=EVENTS)
def test_counts_and_bars_agree_with_a_dictionary(
    events: list[tuple[str, int, int, list[int]]],
) -> None:
    """A key is named, or barred, or neither; never both."""
    with quick_folder() as path:
        registry = Registry(path / "collections", MAP_BYTES)
        documents: dict[tuple[str, str], set[int]] = {}
        barred: set[int] = set()
        for what, collection, name, numbers in events:
            place, place_id = f"c{collection}", f"d{name}"
            before = set().union(*documents.values()) if documents else set()
            if what == "put":
                digest = sum(1 << number for number in numbers) % 251
                chunks = (tuple(numbers),) if numbers else ()
                registry.put(record(place_id, *chunks, collection=place, digest=digest))
                documents[place, place_id] = set(numbers)
            elif what == "remove":
                registry.remove(place, [place_id], 1)
                documents.pop((place, place_id), None)
            else:
                registry.mark_erased(NAMESPACE, map(key, barred), 5) if barred else None
                registry.forget_bars(6)
                barred.clear()
            named = set().union(*documents.values()) if documents else set()
            barred = (barred | before) - named
            assert {each.key for each in registry.deleted()} == set(map(key, barred))
            assert registry.check_integrity() == []
        registry.close()
        shutil.rmtree(path / "collections", ignore_errors=True)
