"""Opening: what is believed, what is checked, what is rebuilt, what is dropped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.storage.format import HEADER_BYTES
from ucm.storage.index import BlockIndex, IndexRecord
from ucm.storage.nvme import NvmeTier
from ucm.storage.recovery import order_by_chain
from ucm.storage.tier import IoStatus, SlotId
from ucm.testing.nvme import NAMESPACE, SLOT_BYTES, open_tier, quick_folder
from ucm.testing.tier_conformance import get, make_key, put
from ucm.types import ROOT_KEY

MAP_BYTES = 16 << 20


@pytest.fixture
def path() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder / "data"


def fill(path: Path, *, clean: bool, count: int = 5) -> None:
    store, tier = open_tier(path)
    put(tier, range(count))
    if clean:
        store.close()
    else:
        store.abort()


def namespace_folder(path: Path) -> Path:
    return path / "ns" / NAMESPACE.hex()


def names_in(tier: NvmeTier) -> list[int]:
    keys = [make_key(name) for name in range(8)]
    return [keys.index(entry.key) for entry in tier.entries()]


def edit_index(path: Path) -> BlockIndex:
    return BlockIndex(namespace_folder(path) / "index", MAP_BYTES)


@pytest.mark.parametrize("size", [0, 3000, 8192, 30000])
@pytest.mark.parametrize("clean", [True, False])
def test_a_truncated_index_is_rebuilt(path: Path, size: int, clean: bool) -> None:
    fill(path, clean=clean)
    os.truncate(namespace_folder(path) / "index" / "data.mdb", size)
    store, tier = open_tier(path)
    assert tier.was_rebuilt
    assert names_in(tier) == [0, 1, 2, 3, 4]
    assert [get(tier, SlotId(name), name) for name in range(5)] == [IoStatus.OK] * 5
    assert (namespace_folder(path) / "index.damaged").is_dir()
    store.close()
    store, tier = open_tier(path)
    assert not tier.was_rebuilt
    assert names_in(tier) == [0, 1, 2, 3, 4]
    store.close()


def test_a_missing_index_is_rebuilt_and_deleted_blocks_stay_away(path: Path) -> None:
    store, tier = open_tier(path)
    slots = put(tier, range(5))
    tier.delete([(slots[4], make_key(4))])
    store.abort()
    shutil.rmtree(namespace_folder(path) / "index")
    store, tier = open_tier(path)
    assert names_in(tier) == [0, 1, 2, 3]
    store.close()


def test_a_rebuild_that_was_cut_short_is_done_again(path: Path) -> None:
    fill(path, clean=True)
    folder = namespace_folder(path)
    shutil.rmtree(folder / "index")
    BlockIndex(folder / "index.new", MAP_BYTES).close(clean=False)
    store, tier = open_tier(path)
    assert names_in(tier) == [0, 1, 2, 3, 4]
    assert not (folder / "index.new").exists()
    store.close()


@pytest.mark.parametrize("newer_slot", [0, 1])
def test_of_two_headers_with_one_key_the_newer_counts(path: Path, newer_slot: int) -> None:
    store, tier = open_tier(path)
    segment = namespace_folder(path) / "segments" / "0000.seg"
    held = tier.allocate(newer_slot ^ 1)
    old_slot = put(tier, ["twice"])["twice"]
    old = segment.read_bytes()[old_slot * SLOT_BYTES :][:SLOT_BYTES]
    tier.free(held)
    assert put(tier, ["twice"])["twice"] == newer_slot  # and blanks the old one
    store.abort()
    with segment.open("r+b") as file:
        file.seek(old_slot * SLOT_BYTES)
        file.write(old)  # as if the blanking had not reached the disk
    shutil.rmtree(namespace_folder(path) / "index")
    store, tier = open_tier(path)
    assert [(entry.key, entry.slot) for entry in tier.entries()] == [
        (make_key("twice"), newer_slot)
    ]
    assert tier.usage().used_slots == 1
    store.close()


def test_headers_are_checked_after_an_unclean_end_only(path: Path) -> None:
    for clean, expected in ((False, [0, 1]), (True, [0, 1, 2, 3, 4])):
        fill(path, clean=clean)
        with (namespace_folder(path) / "segments" / "0000.seg").open("r+b") as file:
            file.seek(2 * SLOT_BYTES)
            file.write(bytes(HEADER_BYTES))
        store, tier = open_tier(path)
        assert names_in(tier) == expected
        assert get(tier, SlotId(2), 2) is IoStatus.CORRUPT
        assert tier.check_integrity() == []
        store.close()
        shutil.rmtree(path)


def test_records_that_cannot_be_right_are_dropped(path: Path) -> None:
    fill(path, clean=True)
    index = edit_index(path)
    generation = min(r.generation for r in index.records() if isinstance(r, IndexRecord))
    index.put(
        [
            IndexRecord(make_key("far"), ROOT_KEY, SlotId(1 << 50), generation),
            IndexRecord(make_key("rival"), ROOT_KEY, SlotId(1), generation - 1),
            IndexRecord(make_key("orphan"), make_key("nobody"), SlotId(3), generation - 2),
            IndexRecord(make_key("own child"), make_key("own child"), SlotId(2), generation - 3),
        ]
    )
    index.close(clean=True)
    store, tier = open_tier(path)
    assert names_in(tier) == [0, 1, 2, 3, 4]
    assert tier.check_integrity() == []
    store.close()
    index = edit_index(path)
    assert len(list(index.records())) == 5, "durably"
    index.close(clean=True)


def test_blocks_in_retired_and_quarantined_places_are_dropped(path: Path) -> None:
    fill(path, clean=True, count=7)
    index = edit_index(path)
    index.retire(1, "fdatasync failed")
    index.quarantine(SlotId(3), make_key(3), "bad checksum or header")
    index.close(clean=True)
    store, tier = open_tier(path)
    assert names_in(tier) == [0, 1, 2]
    assert tier.usage().quarantined_slots == 5
    assert tier.usage().free_slots == 0
    assert get(tier, SlotId(5), 5) is IoStatus.IO_ERROR
    assert tier.check_integrity() == []
    store.close()


def test_a_missing_segment_is_a_miss_for_its_blocks(path: Path) -> None:
    fill(path, clean=False, count=7)
    (namespace_folder(path) / "segments" / "0000.seg").unlink()
    store, tier = open_tier(path)
    assert names_in(tier) == [], "the first ones are gone, so the others are orphans"
    assert tier.usage().free_slots == 8
    put(tier, range(8))
    store.close()


def test_a_half_made_namespace_is_removed(path: Path) -> None:
    fill(path, clean=True)
    unfinished = path / "ns" / ("a" * 64 + ".tmp")
    (unfinished / "segments").mkdir(parents=True)
    store, tier = open_tier(path)
    assert not unfinished.exists()
    assert names_in(tier) == [0, 1, 2, 3, 4]
    store.close()


def test_order_by_chain() -> None:
    def record(name: str, parent: str | None, generation: int) -> IndexRecord:
        parent_key = ROOT_KEY if parent is None else make_key(parent)
        return IndexRecord(make_key(name), parent_key, SlotId(generation), generation)

    root, child, grandchild = record("r", None, 9), record("c", "r", 5), record("g", "c", 1)
    early, lost, lost_child = record("e", None, 2), record("l", "x", 3), record("m", "l", 4)
    loop, pool = record("a", "b", 6), record("b", "a", 7)
    ordered, orphans = order_by_chain(
        [lost_child, grandchild, root, loop, child, lost, pool, early]
    )
    assert ordered == [early, root, child, grandchild]
    assert {record.slot for record in orphans} == {3, 4, 6, 7}
    assert order_by_chain([]) == ([], [])
