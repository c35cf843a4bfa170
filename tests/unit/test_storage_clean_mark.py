"""A clean end's snapshot: believed by one digest, never when anything speaks against it."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ucm.block_index import BlockIndex as Blocks
from ucm.checksum import checksum
from ucm.storage import index as index_file
from ucm.storage.entry_table import EntryTable
from ucm.storage.file_io import FileHandle, PosixFileIo
from ucm.storage.index import IndexRecord
from ucm.storage.nvme import NvmeStore, NvmeTier
from ucm.storage.slots import SlotState
from ucm.storage.tier import IoStatus, SlotId
from ucm.testing.nvme import NAMESPACE, nvme_config, open_tier, quick_folder
from ucm.testing.tier_conformance import LAYOUT, get, make_key, make_write, put
from ucm.types import ROOT_KEY, BlockKey, TierKind

CHAIN_BLOCKS = 64


@pytest.fixture
def path() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder / "data"


def index_folder(path: Path) -> Path:
    return path / "ns" / NAMESPACE.hex() / "index"


def fill(path: Path, count: int = 5) -> None:
    store, tier = open_tier(path)
    put(tier, range(count))
    store.close()


def names_in(tier: NvmeTier, count: int = 8) -> list[int]:
    keys = [make_key(name) for name in range(count)]
    return [keys.index(entry.key) for entry in tier.entries()]


def test_the_first_question_is_answered_in_columns_the_second_from_the_index(path: Path) -> None:
    fill(path)
    store, tier = open_tier(path)
    first, second = tier.entries(), tier.entries()
    assert isinstance(first, EntryTable)
    assert not isinstance(second, EntryTable)
    assert list(first) == list(second)
    assert [get(tier, SlotId(name), name) for name in range(5)] == [IoStatus.OK] * 5
    assert tier.usage().used_slots == 5
    assert tier.check_integrity() == []
    store.close()


def test_it_is_gone_as_soon_as_the_index_is_open(path: Path) -> None:
    fill(path)
    assert index_file.read_snapshot(index_folder(path)) is not None
    store, _ = open_tier(path)
    assert not (index_folder(path) / "snapshot").exists()
    store.abort()
    assert index_file.read_snapshot(index_folder(path)) is None


@pytest.mark.parametrize("what", ["write", "delete", "damage"])
def test_a_change_before_the_first_question_is_in_the_answer(path: Path, what: str) -> None:
    fill(path)
    store, tier = open_tier(path)
    expected = [0, 1, 2, 3, 4]
    if what == "write":
        (slot,) = tier.allocate(1)
        assert tier.write([make_write(slot, 5, 4)]) == [IoStatus.OK]
        expected = [0, 1, 2, 3, 4, 5]
    elif what == "delete":
        tier.delete([(SlotId(4), make_key(4))])
        expected = [0, 1, 2, 3]
    else:
        segment = path / "ns" / NAMESPACE.hex() / "segments" / "0001.seg"
        with segment.open("r+b") as file:
            file.write(b"damage")
        assert get(tier, SlotId(4), 4) is IoStatus.CORRUPT
        expected = [0, 1, 2, 3]
    assert names_in(tier) == expected
    store.close()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_a_damaged_snapshot_costs_time_and_nothing_else(path: Path, damage: str) -> None:
    fill(path)
    snapshot = index_folder(path) / "snapshot"
    data = bytearray(snapshot.read_bytes())
    if damage == "remove":
        snapshot.unlink()
    else:
        data[40] ^= 1
        size = {"flip": len(data), "truncate": len(data) - 1, "empty": 0}[damage]
        snapshot.write_bytes(data[:size])
    store, tier = open_tier(path)
    assert names_in(tier) == [0, 1, 2, 3, 4]
    assert tier.check_integrity() == []
    assert not tier.was_rebuilt
    store.close()


def test_a_snapshot_of_another_time_is_not_believed(path: Path) -> None:
    fill(path)
    old = (index_folder(path) / "snapshot").read_bytes()
    store, tier = open_tier(path)
    tier.delete([(SlotId(4), make_key(4))])
    store.close()
    (index_folder(path) / "snapshot").write_bytes(old)
    store, tier = open_tier(path)
    assert names_in(tier) == [0, 1, 2, 3]
    store.close()


def test_with_orphans_there_is_none_and_they_are_dropped(path: Path) -> None:
    store, tier = open_tier(path)
    slots = put(tier, range(4))
    tier.delete([(slots[1], make_key(1))])
    store.close()
    assert index_file.read_snapshot(index_folder(path)) is None
    store, tier = open_tier(path)
    assert names_in(tier) == [0]
    assert tier.check_integrity() == []
    store.close()
    assert index_file.read_snapshot(index_folder(path)) is not None


def test_a_segment_that_went_missing_takes_its_blocks_along(path: Path) -> None:
    fill(path)
    segments = path / "ns" / NAMESPACE.hex() / "segments"
    (segments / "0001.seg").unlink()
    store, tier = open_tier(path)
    assert names_in(tier) == [0, 1, 2, 3]
    assert tier.check_integrity() == []
    store.close()


def test_quarantined_slots_stay_barred(path: Path) -> None:
    fill(path)
    store, tier = open_tier(path)
    segment = path / "ns" / NAMESPACE.hex() / "segments" / "0001.seg"
    with segment.open("r+b") as file:
        file.write(b"damage")
    assert get(tier, SlotId(4), 4) is IoStatus.CORRUPT
    store.close()
    assert index_file.read_snapshot(index_folder(path)) is not None
    store, tier = open_tier(path)
    assert tier.usage().quarantined_slots == 1
    assert SlotId(4) not in tier.allocate(8)
    store.close()


class SparseFileIo(PosixFileIo):
    """Reserves nothing on the disk."""

    def preallocate(self, file: FileHandle, size_bytes: int) -> None:
        """Only the length."""
        os.ftruncate(file, size_bytes)


def big_store(path: Path, num_blocks: int) -> NvmeStore:
    """A store whose segments are sparse: only its index is of interest."""
    config = nvme_config(path, num_blocks, slots_per_segment=num_blocks // 2)
    return NvmeStore(replace(config, index_map_bytes=4 << 30), SparseFileIo(1))


def big_key(number: int) -> BlockKey:
    return BlockKey(hashlib.sha256(b"%d" % number).digest())


def make_big(path: Path, num_blocks: int) -> None:
    """Records of chains of `CHAIN_BLOCKS`, committed without writing blocks."""
    store = big_store(path, num_blocks)
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    slots = tier.allocate(num_blocks)
    generation = tier._take_generations(num_blocks)
    parent = ROOT_KEY
    for first in range(0, num_blocks, 50_000):
        records = []
        for number in range(first, min(first + 50_000, num_blocks)):
            parent = ROOT_KEY if number % CHAIN_BLOCKS == 0 else parent
            key = big_key(number)
            records.append(IndexRecord(key, parent, slots[number], generation + number))
            parent = key
        tier._index.put(records)
    store.close()


@pytest.mark.timeout(120)
def test_opening_touches_no_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work, not time: one checksum a file, and no Python object a record in the tier."""
    num_blocks = 20_000
    make_big(path, num_blocks)
    calls = 0
    real = checksum

    def counted(data: memoryview | bytes) -> int:
        nonlocal calls
        calls += 1
        return real(data)

    def refuse(*_: object) -> IndexRecord:
        raise AssertionError("a record was decoded")

    monkeypatch.setattr(index_file, "checksum", counted)
    monkeypatch.setattr(index_file, "_decode", refuse)
    store = big_store(path, num_blocks)
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    blocks = Blocks()
    blocks.load(tier.entries(), TierKind.NVME)
    assert calls == 0
    assert len(blocks) == tier._slots.count(SlotState.USED) == num_blocks
    chain = [big_key(number) for number in range(CHAIN_BLOCKS, 2 * CHAIN_BLOCKS)]
    assert len(blocks.usable_prefix(chain)) == CHAIN_BLOCKS
    store.abort()


def private_mib() -> float:
    """Memory that only this process has: LMDB's map is not in it."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_million_blocks_fit_into_400_mib(path: Path) -> None:
    num_blocks = 1_000_000
    make_big(path, num_blocks)
    gc.collect()
    before_mib = private_mib()
    store = big_store(path, num_blocks)
    blocks = Blocks()
    entries = store.open_namespace(NAMESPACE, LAYOUT).entries()
    assert isinstance(entries, EntryTable)
    blocks.load(entries, TierKind.NVME)
    del entries
    assert len(blocks) == num_blocks
    assert private_mib() - before_mib < 400
    store.abort()
