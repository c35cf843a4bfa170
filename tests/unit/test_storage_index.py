"""The LMDB index: transactions, marks, damage, a full disk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.errors import CapacityError, TierUnavailableError
from ucm.storage import index as index_file
from ucm.storage.index import EPOCH_SHIFT, BlockIndex, IndexRecord
from ucm.storage.tier import SlotId
from ucm.testing.tier_conformance import make_key
from ucm.types import ROOT_KEY

MAP_BYTES = 16 << 20


def record(name: int, slot: int, generation: int = 1) -> IndexRecord:
    return IndexRecord(make_key(name), ROOT_KEY, SlotId(slot), generation)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[BlockIndex]:
    index = BlockIndex(tmp_path / "index", MAP_BYTES)
    yield index
    index.close(clean=False)


def test_records_come_back(index: BlockIndex, tmp_path: Path) -> None:
    records = [record(name, name) for name in range(5)]
    assert index.put(records) == []
    index.close(clean=True)
    again = BlockIndex(tmp_path / "index", MAP_BYTES)
    assert sorted(again.records(), key=repr) == sorted(records, key=repr)
    assert again.find(make_key(3)) == records[3]
    assert again.find(make_key("none")) is None
    again.close(clean=True)


def test_put_tells_what_it_replaced(index: BlockIndex) -> None:
    index.put([record(1, 10)])
    assert index.put([record(1, 11, 2), record(2, 12, 3)]) == [record(1, 10)]
    assert index.put([record(1, 11, 4)]) == [], "the same slot is no other"


def test_delete_takes_only_what_matches(index: BlockIndex) -> None:
    index.put([record(1, 10), record(2, 20)])
    items = [(SlotId(10), make_key(1)), (SlotId(99), make_key(2)), (SlotId(3), make_key(3))]
    assert index.delete(items) == [10]
    assert list(index.records()) == [record(2, 20)]


def test_barred_slots_and_segments(index: BlockIndex) -> None:
    index.put([record(1, 10)])
    index.quarantine(SlotId(10), make_key(1), "bad checksum")
    index.retire(3, "fdatasync failed")
    assert (index.quarantined(), index.retired(), list(index.records())) == ([10], [3], [])
    index.lift([SlotId(10)], [3])
    assert (index.quarantined(), index.retired()) == ([], [])


def test_each_epoch_is_above_all_before(index: BlockIndex, tmp_path: Path) -> None:
    first = index.begin_epoch(0)
    index.close(clean=False)
    again = BlockIndex(tmp_path / "index", MAP_BYTES)
    second = again.begin_epoch(0)
    assert second - first == 1 << EPOCH_SHIFT
    assert again.begin_epoch(9 << EPOCH_SHIFT | 5) == 10 << EPOCH_SHIFT
    again.close(clean=True)


def test_a_clean_end_is_vouched_for_until_the_next_opening(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index = BlockIndex(folder, MAP_BYTES)
    index.put([record(1, 1)])
    assert not index_file.is_vouched(folder)
    index.close(clean=True)
    index.close(clean=True)
    assert index_file.is_vouched(folder)
    BlockIndex(folder, MAP_BYTES, read_only=True).close(clean=True)
    assert index_file.is_vouched(folder), "reading changes nothing"
    BlockIndex(folder, MAP_BYTES).close(clean=False)
    assert not index_file.is_vouched(folder)


def test_any_change_of_the_file_ends_the_trust(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    BlockIndex(folder, MAP_BYTES).close(clean=True)
    with (folder / "data.mdb").open("r+b") as file:
        file.seek(5000)
        file.write(b"x")
    assert not index_file.is_vouched(folder)


@pytest.mark.parametrize("size", [0, 1, 4096, 8192, 20000])
def test_a_truncated_file_is_found_without_mapping_it(tmp_path: Path, size: int) -> None:
    folder = tmp_path / "index"
    index = BlockIndex(folder, MAP_BYTES)
    index.put([record(name, name) for name in range(500)])
    index.close(clean=True)
    os.truncate(folder / "data.mdb", size)
    assert not index_file.is_vouched(folder)
    assert index_file.verify(folder)


def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    assert not index_file.is_vouched(tmp_path)
    assert index_file.verify(tmp_path)
    assert index_file.verify(tmp_path / "nowhere")


def test_a_flipped_bit_in_a_record_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index = BlockIndex(folder, MAP_BYTES)
    index.put([record(1, 77)])
    index.close(clean=True)
    data = bytearray((folder / "data.mdb").read_bytes())
    position = data.find(make_key(1)) + 32 + 32  # the slot behind key and parent
    assert data[position] == 77
    data[position] ^= 1
    (folder / "data.mdb").write_bytes(data)
    again = BlockIndex(folder, MAP_BYTES)
    assert list(again.records()) == [make_key(1)], "a bare key: damaged"
    assert again.find(make_key(1)) is None
    again.close(clean=False)


def test_a_full_map_is_a_capacity_error_and_nothing_changed(tmp_path: Path) -> None:
    index = BlockIndex(tmp_path / "index", 64 << 10)
    index.put([record(1, 1)])
    with pytest.raises(CapacityError, match="index_map_bytes"):
        index.put([record(name, name) for name in range(2, 2000)])
    assert list(index.records()) == [record(1, 1)]
    assert index.delete([(SlotId(1), make_key(1))]) == [1]
    index.close(clean=True)


@pytest.mark.parametrize("batch", [1, 40, 10_000])
def test_all_can_be_deleted_from_a_full_map(tmp_path: Path, batch: int) -> None:
    index = BlockIndex(tmp_path / "index", 256 << 10)
    written: list[IndexRecord] = []

    def fill() -> None:
        while True:
            more = [record(len(written) + i, len(written) + i) for i in range(20)]
            index.put(more)
            written.extend(more)

    with pytest.raises(CapacityError, match="index_map_bytes"):
        fill()
    assert len(written) > 200
    for start in range(0, len(written), batch):
        part = [(each.slot, each.key) for each in written[start : start + batch]]
        assert len(index.delete(part)) == len(part)
    index.put(written[:20])
    index.close(clean=True)


def test_a_full_disk_is_a_capacity_error_and_deleting_goes_on(tmp_path: Path) -> None:
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(command, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        index = BlockIndex(mounted / "index", MAP_BYTES)
        written: list[IndexRecord] = []

        def fill() -> None:
            while True:
                batch = [record(len(written) + i, len(written) + i) for i in range(50)]
                index.put(batch)
                written.extend(batch)

        with pytest.raises(CapacityError, match="room"):
            fill()
        assert len(written) > 100
        assert len(list(index.records())) == len(written), "all of a batch or nothing"
        assert index.delete([(each.slot, each.key) for each in written[:50]])
        index.close(clean=False)
        again = BlockIndex(mounted / "index", MAP_BYTES)
        assert len(list(again.records())) == len(written) - 50
        again.close(clean=False)
    finally:
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)


def test_a_closed_index_says_so(index: BlockIndex) -> None:
    index.close(clean=True)
    with pytest.raises(TierUnavailableError, match="closed"):
        index.put([record(1, 1)])
