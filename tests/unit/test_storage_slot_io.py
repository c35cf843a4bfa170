"""SlotIo: neighbours share a request, and each block still gets its own answer."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ucm.storage.budget import SegmentBudget
from ucm.storage.file_io import IoRequest, PosixFileIo, aligned_buffer
from ucm.storage.format import Superblock
from ucm.storage.segments import Segments
from ucm.storage.slot_io import MERGED_BYTES, REQUESTS_PER_BATCH, SlotIo
from ucm.storage.tier import IoStatus, SlotId, SlotRead, SlotWrite
from ucm.testing.nvme import NAMESPACE, SLOT_BYTES, quick_folder
from ucm.testing.tier_conformance import LAYOUT, make_block, make_key, make_write, slabs

NUM_SLOTS = 64
SEGMENT_SLOTS = 32


class SpyFileIo(PosixFileIo):
    """Remembers the length of every request, and fails those that `refuse` picks."""

    def __init__(self) -> None:
        super().__init__(2)
        self.lengths: list[int] = []
        self.fail_longer_than = 1 << 40

    def _run_spied(self, requests: Sequence[IoRequest], codes: list[int]) -> list[int]:
        lengths = [sum(buffer.nbytes for buffer in request.buffers) for request in requests]
        self.lengths += lengths
        return [
            errno.EIO if length > self.fail_longer_than else code
            for length, code in zip(lengths, codes, strict=True)
        ]

    def read_batch(self, requests: Sequence[IoRequest]) -> list[int]:
        """As the real one, spied upon."""
        return self._run_spied(requests, super().read_batch(requests))

    def write_batch(self, requests: Sequence[IoRequest]) -> list[int]:
        """As the real one, spied upon."""
        return self._run_spied(requests, super().write_batch(requests))


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


@pytest.fixture
def io() -> Iterator[SpyFileIo]:
    io = SpyFileIo()
    yield io
    io.close()


@pytest.fixture
def segments(io: SpyFileIo, folder: Path) -> Iterator[Segments]:
    superblock = Superblock(
        namespace=NAMESPACE, layout=LAYOUT, segment_bytes=SEGMENT_SLOTS * SLOT_BYTES
    )
    budget = SegmentBudget(NUM_SLOTS * SLOT_BYTES).of("")
    segments = Segments(folder, superblock, io, budget)
    while segments.grow():
        pass
    yield segments
    segments.close()


@pytest.fixture
def slot_io(io: SpyFileIo, segments: Segments) -> SlotIo:
    superblock = Superblock(
        namespace=NAMESPACE, layout=LAYOUT, segment_bytes=SEGMENT_SLOTS * SLOT_BYTES
    )
    return SlotIo(superblock, segments, io)


def generation_of(slot: int) -> int:
    return 1000 + slot


def write(slot_io: SlotIo, slots: Sequence[int]) -> list[IoStatus]:
    items = [make_write(SlotId(slot), slot) for slot in slots]
    return slot_io.write(items, [generation_of(slot) for slot in slots])


def read(slot_io: SlotIo, slots: Sequence[int]) -> list[IoStatus]:
    """Read blocks; where one is OK its bytes must be right."""
    buffers = [aligned_buffer(LAYOUT.block_bytes) for _ in slots]
    items = [
        SlotRead(SlotId(slot), make_key(slot), into)
        for slot, into in zip(slots, buffers, strict=True)
    ]
    outcomes = slot_io.read(items, [generation_of(slot) for slot in slots])
    for slot, into, outcome in zip(slots, buffers, outcomes, strict=True):
        assert bool(outcome.checksums) is (outcome.status is IoStatus.OK)
        if outcome.status is IoStatus.OK:
            assert slabs(into) == slabs(make_block(slot))
    return [outcome.status for outcome in outcomes]


def test_neighbours_share_requests_and_no_thread_is_idle(slot_io: SlotIo, io: SpyFileIo) -> None:
    slots = range(NUM_SLOTS)
    assert write(slot_io, slots) == [IoStatus.OK] * NUM_SLOTS
    assert io.lengths == [NUM_SLOTS // REQUESTS_PER_BATCH * SLOT_BYTES] * REQUESTS_PER_BATCH
    io.lengths.clear()
    assert read(slot_io, slots) == [IoStatus.OK] * NUM_SLOTS
    assert len(io.lengths) == REQUESTS_PER_BATCH
    assert max(io.lengths) <= MERGED_BYTES


def test_the_order_of_the_batch_is_that_of_the_answers(slot_io: SlotIo, io: SpyFileIo) -> None:
    slots = [(slot * 37) % NUM_SLOTS for slot in range(NUM_SLOTS)]
    assert write(slot_io, slots) == [IoStatus.OK] * NUM_SLOTS
    io.lengths.clear()
    assert read(slot_io, slots[::-1]) == [IoStatus.OK] * NUM_SLOTS
    assert len(io.lengths) == REQUESTS_PER_BATCH


def test_few_or_scattered_blocks_go_alone(slot_io: SlotIo, io: SpyFileIo) -> None:
    write(slot_io, range(NUM_SLOTS))
    for slots in (range(REQUESTS_PER_BATCH), range(0, NUM_SLOTS, 2)):
        io.lengths.clear()
        assert read(slot_io, slots) == [IoStatus.OK] * len(slots)
        assert io.lengths == [SLOT_BYTES] * len(slots)


def test_segments_are_not_neighbours(slot_io: SlotIo, io: SpyFileIo) -> None:
    write(slot_io, range(NUM_SLOTS))
    io.lengths.clear()
    around = range(SEGMENT_SLOTS - 9, SEGMENT_SLOTS + 9)
    assert read(slot_io, around) == [IoStatus.OK] * len(around)
    assert io.lengths == [2 * SLOT_BYTES] * 4 + [SLOT_BYTES] + [2 * SLOT_BYTES] * 4 + [SLOT_BYTES]


@pytest.mark.parametrize("at", [0, 100, 4096, 4096 + 4096, SLOT_BYTES - 4096])
def test_a_damaged_block_does_not_take_its_neighbours_along(
    slot_io: SlotIo, folder: Path, at: int
) -> None:
    write(slot_io, range(NUM_SLOTS))
    damaged = 11
    with (folder / "0000.seg").open("r+b") as file:
        file.seek(damaged * SLOT_BYTES + at)
        (old,) = file.read(1)
        file.seek(damaged * SLOT_BYTES + at)
        file.write(bytes([old ^ 4]))
    statuses = read(slot_io, range(NUM_SLOTS))
    assert statuses.pop(damaged) is IoStatus.CORRUPT
    assert set(statuses) == {IoStatus.OK}


def test_a_file_that_ends_early_costs_only_what_it_lacks(slot_io: SlotIo, folder: Path) -> None:
    write(slot_io, range(NUM_SLOTS))
    with (folder / "0000.seg").open("r+b") as file:
        file.truncate(21 * SLOT_BYTES + 4096)
    statuses = read(slot_io, range(SEGMENT_SLOTS))
    assert statuses == [IoStatus.OK] * 21 + [IoStatus.CORRUPT] * (SEGMENT_SLOTS - 21)


def test_when_merged_requests_fail_each_block_is_tried_alone(
    slot_io: SlotIo, io: SpyFileIo
) -> None:
    io.fail_longer_than = SLOT_BYTES
    assert write(slot_io, range(NUM_SLOTS)) == [IoStatus.OK] * NUM_SLOTS
    assert io.lengths[REQUESTS_PER_BATCH:] == [SLOT_BYTES] * NUM_SLOTS
    assert read(slot_io, range(NUM_SLOTS)) == [IoStatus.OK] * NUM_SLOTS
    io.fail_longer_than = 0
    assert read(slot_io, range(NUM_SLOTS)) == [IoStatus.IO_ERROR] * NUM_SLOTS


def test_a_block_that_changed_under_the_writer_is_the_only_one_left_out(slot_io: SlotIo) -> None:
    items = [make_write(SlotId(slot), slot) for slot in range(NUM_SLOTS)]
    liar = items[5]
    items[5] = SlotWrite(liar.slot, liar.key, liar.parent, make_block("other"), liar.checksums)
    statuses = slot_io.write(items, [generation_of(slot) for slot in range(NUM_SLOTS)])
    assert statuses.pop(5) is IoStatus.CORRUPT
    assert set(statuses) == {IoStatus.OK}
    assert read(slot_io, range(NUM_SLOTS)).count(IoStatus.OK) == NUM_SLOTS - 1


def test_a_retired_segment_fails_its_own_blocks(slot_io: SlotIo, segments: Segments) -> None:
    write(slot_io, range(NUM_SLOTS))
    segments.retire(1)
    expected = [IoStatus.OK] * SEGMENT_SLOTS + [IoStatus.IO_ERROR] * SEGMENT_SLOTS
    assert read(slot_io, range(NUM_SLOTS)) == expected
    assert write(slot_io, range(NUM_SLOTS)) == expected


def test_memory_for_heads_is_used_again(slot_io: SlotIo) -> None:
    write(slot_io, range(NUM_SLOTS))
    (kept,) = slot_io._spare_heads
    read(slot_io, range(NUM_SLOTS))
    assert slot_io._spare_heads == [kept]
    assert slot_io._spare_heads[0] is kept
