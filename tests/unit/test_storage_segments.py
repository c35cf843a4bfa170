"""Segment files: places, growth within the budget, a full disk, missing and short files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.storage.budget import IdleSegments, SegmentBudget, TenantBudget
from ucm.storage.file_io import PosixFileIo
from ucm.storage.format import Superblock
from ucm.storage.segments import Segments, segment_numbers
from ucm.storage.tier import SlotId
from ucm.testing.nvme import NAMESPACE, SLOT_BYTES
from ucm.testing.tier_conformance import LAYOUT

SUPERBLOCK = Superblock(namespace=NAMESPACE, layout=LAYOUT, segment_bytes=3 * SLOT_BYTES + 4096)


@pytest.fixture
def io() -> Iterator[PosixFileIo]:
    io = PosixFileIo(2)
    yield io
    io.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def budget_of(segments: int) -> TenantBudget:
    return SegmentBudget(segments * SUPERBLOCK.segment_bytes).of("")


def test_slots_lie_side_by_side(folder: Path, io: PosixFileIo) -> None:
    segments = Segments(folder, SUPERBLOCK, io, budget_of(2))
    assert segments.growable_slots() == 6
    assert (segments.grow(), segments.grow(), segments.grow()) == (3, 3, 0)
    assert segment_numbers(folder) == [0, 1]
    places = [segments.locate(SlotId(slot)) for slot in range(6)]
    assert all(place is not None for place in places)
    offsets = [place[1] for place in places if place is not None]
    assert offsets == [0, SLOT_BYTES, 2 * SLOT_BYTES] * 2
    assert [segments.segment_of(SlotId(slot)) for slot in range(6)] == [0, 0, 0, 1, 1, 1]
    assert list(segments.slots_of(1)) == [3, 4, 5]
    assert segments.locate(SlotId(6)) is None
    assert segments.locate(SlotId(-1)) is None
    assert os.stat(folder / "0001.seg").st_size == SUPERBLOCK.segment_bytes
    assert os.stat(folder / "0001.seg").st_blocks * 512 >= SUPERBLOCK.segment_bytes
    segments.close()
    segments.close()
    assert segments.locate(SlotId(0)) is None


def test_the_budget_is_shared(tmp_path: Path, io: PosixFileIo) -> None:
    budget = budget_of(3)
    both = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        both.append(Segments(tmp_path / name, SUPERBLOCK, io, budget))
    assert [both[0].grow(), both[1].grow(), both[0].grow(), both[1].grow()] == [3, 3, 3, 0]
    assert both[1].growable_slots() == 0
    for segments in both:
        segments.close()


def test_a_lowered_capacity_stops_growth_only(folder: Path, io: PosixFileIo) -> None:
    budget = budget_of(1)
    for _ in range(3):
        budget.count_existing(SUPERBLOCK.segment_bytes)
    assert budget.remaining_bytes == 0
    segments = Segments(folder, SUPERBLOCK, io, budget)
    assert segments.grow() == 0
    segments.close()


def test_idle_segments_make_way(folder: Path, io: PosixFileIo) -> None:
    size_bytes = SUPERBLOCK.segment_bytes
    idle = [size_bytes, size_bytes]
    made = IdleSegments(lambda: {"": sum(idle)}, lambda _: ("", idle.pop() if idle else 0))
    budget = SegmentBudget(2 * size_bytes, idle=made).of("")
    for _ in idle:
        budget.count_existing(size_bytes)
    segments = Segments(folder, SUPERBLOCK, io, budget)
    assert segments.growable_slots() == 6
    assert (segments.grow(), segments.grow(), segments.grow()) == (3, 3, 0)
    assert idle == []
    assert not segments.disk_is_full
    segments.close()


def test_idle_segments_that_cannot_go_are_not_promised_again() -> None:
    idle_bytes = [10]
    made = IdleSegments(lambda: {"": idle_bytes[0]}, lambda _: ("", 0))
    budget = SegmentBudget(10, idle=made).of("")
    budget.count_existing(10)
    assert budget.remaining_bytes == 10
    assert not budget.reserve(10)
    assert budget.remaining_bytes == 0
    idle_bytes[0] = 20  # another namespace was closed
    assert budget.remaining_bytes == 20


def test_a_full_disk_leaves_no_file_and_gives_the_budget_back(
    folder: Path, io: PosixFileIo, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = budget_of(2)
    segments = Segments(folder, SUPERBLOCK, io, budget)
    with monkeypatch.context() as patch:

        def no_room(*_: object) -> None:
            raise OSError(errno.ENOSPC, "injected")

        patch.setattr(io, "preallocate", no_room)
        assert segments.grow() == 0
    assert segment_numbers(folder) == []
    assert budget.remaining_bytes == 2 * SUPERBLOCK.segment_bytes
    assert segments.growable_slots() == 0, "known to be full"
    segments.look_for_room()
    assert segments.growable_slots() == 0, "nobody freed anything"
    assert segments.grow() == 3
    assert segments.growable_slots() == 3
    segments.close()


def test_who_asks_how_full_it_is_does_not_wait_for_the_disk(
    folder: Path, io: PosixFileIo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store asks under its lock, and a file system may hang."""
    free_bytes = [0]

    def asked(_folder: Path) -> int:
        assert free_bytes, "the disk was asked"
        return free_bytes[-1]

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "injected")

    monkeypatch.setattr("ucm.storage.segments._free_bytes", asked)
    monkeypatch.setattr(io, "preallocate", no_room)
    segments = Segments(folder, SUPERBLOCK, io, budget_of(2))
    assert segments.grow() == 0
    free_bytes.clear()
    assert (segments.growable_slots(), segments.disk_is_full) == (0, True)
    free_bytes.append(SUPERBLOCK.segment_bytes - 1)
    segments.look_for_room()
    assert (segments.growable_slots(), segments.disk_is_full) == (0, True)
    free_bytes.append(SUPERBLOCK.segment_bytes)
    segments.look_for_room()
    assert (segments.growable_slots(), segments.disk_is_full) == (6, False)
    segments.close()


def test_a_descriptor_outlives_the_file_and_waits_for_no_sync(
    folder: Path, io: PosixFileIo, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = Segments(folder, SUPERBLOCK, io, budget_of(1))
    assert segments.grow() == 3

    def sync_with_a_reader(_file: int) -> None:
        with segments.duplicate(0) as found:
            assert found is not None
            assert os.fstat(found[0]).st_size == SUPERBLOCK.segment_bytes

    monkeypatch.setattr(io, "fdatasync", sync_with_a_reader)
    assert segments.sync([0]) == set()
    with segments.duplicate(0) as found:
        assert found is not None
        assert found[1] == segments.file_id(0)
        assert segments.remove(0)
        assert os.fstat(found[0]).st_nlink == 0
    for number in (-1, 0, 1):
        with segments.duplicate(number) as nothing:
            assert nothing is None
    segments.close()


def test_short_files_are_completed_and_missing_ones_have_left(
    folder: Path, io: PosixFileIo
) -> None:
    segments = Segments(folder, SUPERBLOCK, io, budget_of(3))
    assert [segments.grow() for _ in range(3)] == [3, 3, 3]
    segments.close()
    (folder / "0001.seg").unlink()
    os.truncate(folder / "0002.seg", 100)
    (folder / "notes.txt").touch()
    read_only = Segments(folder, SUPERBLOCK, io, budget_of(0), read_only=True)
    assert not read_only.retired
    assert read_only.left == {1}
    assert os.stat(folder / "0002.seg").st_size == 100
    read_only.close()
    segments = Segments(folder, SUPERBLOCK, io, budget_of(0))
    assert (segments.num_slots, len(segments.retired), set(segments.left)) == (9, 0, {1})
    assert segments.file_bytes == 2 * SUPERBLOCK.segment_bytes
    assert segments.locate(SlotId(3)) is None
    assert segments.bring_back() == -1, "no budget"
    segments.close()
    segments = Segments(folder, SUPERBLOCK, io, budget_of(2))
    assert (segments.growable_slots(), segments.bring_back(), segments.bring_back()) == (6, 1, -1)
    assert segments.locate(SlotId(3)) is not None
    sizes = {os.stat(folder / f"{n:04d}.seg").st_size for n in range(3)}
    assert sizes == {SUPERBLOCK.segment_bytes}
    segments.close()


def test_a_removed_segment_costs_no_disk_space_and_its_number_comes_back(
    folder: Path, io: PosixFileIo
) -> None:
    budget = budget_of(2)
    segments = Segments(folder, SUPERBLOCK, io, budget)
    assert (segments.grow(), segments.grow(), segments.grow()) == (3, 3, 0)
    reader = os.open(folder / "0000.seg", os.O_RDONLY)  # somebody else still has it open
    assert os.fstat(reader).st_blocks * 512 >= SUPERBLOCK.segment_bytes
    assert segments.remove(0)
    assert os.fstat(reader).st_blocks == 0
    assert os.pread(reader, 4, 0) == bytes(4)
    os.close(reader)
    assert segment_numbers(folder) == [1]
    assert budget.remaining_bytes == SUPERBLOCK.segment_bytes
    assert not segments.remove(0)
    assert segments.bring_back() == 0
    assert (segments.bring_back(), segments.grow(), segments.left) == (-1, 0, frozenset())
    segments.retire(1)
    assert not segments.remove(1)
    segments.close()


def test_a_segment_that_cannot_be_opened_is_retired(folder: Path, io: PosixFileIo) -> None:
    (folder / "0000.seg").symlink_to(folder / "elsewhere")
    segments = Segments(folder, SUPERBLOCK, io, budget_of(0))
    assert segments.retired == {0}
    assert segments.locate(SlotId(0)) is None
    assert segments.sync({0}) == {0}
    segments.close()


def test_a_failed_sync_is_not_repeated(
    folder: Path, io: PosixFileIo, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = Segments(folder, SUPERBLOCK, io, budget_of(2))
    assert (segments.grow(), segments.grow()) == (3, 3)
    calls = []

    def fail(file: int) -> None:
        calls.append(file)
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(io, "fdatasync", fail)
        assert segments.sync({0}) == {0}
    assert segments.sync({0, 1}) == {0}
    assert len(calls) == 1
    assert segments.retired == {0}
    assert segments.locate(SlotId(0)) is None
    assert segments.locate(SlotId(3)) is not None
    segments.close()
