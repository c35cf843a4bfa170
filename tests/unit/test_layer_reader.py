"""`LayerReader` over a real file: every source, every way to end, every fault of one block."""

from __future__ import annotations

import dataclasses
import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ucm import layer_reader
from ucm.clock import SimClock
from ucm.errors import InvalidArgumentError
from ucm.layer_reader import LayerReader, ReaderOptions
from ucm.layout import KvLayout
from ucm.reader_io import open_reader_io
from ucm.storage.file_io import FileIo
from ucm.storage.format import HEADER_BYTES
from ucm.storage.throttled_io import TokenBucket
from ucm.testing.blocks import TINY_LAYOUT
from ucm.testing.extent_files import (
    PAGE_LAYOUT,
    ExtentFile,
    FakeProgress,
    GatedIo,
    ShortIo,
    wait_for,
)
from ucm.testing.slab_pool import SlabPool, slabs_of
from ucm.types import LoadOrder, SourceKind

LAST = PAGE_LAYOUT.num_layers - 1
NUM_BLOCKS = 5
BACK = ReaderOptions(order=LoadOrder.BLOCKS_FROM_BACK, num_threads=2)
ONE_LAYER = ReaderOptions(request_bytes=1, num_threads=2, read_ahead_layers=1)
WAIT_S = 10.0


@pytest.fixture(params=[PAGE_LAYOUT, TINY_LAYOUT], ids=["pages", "padded"])
def layout(request: pytest.FixtureRequest) -> KvLayout:
    """Slabs that O_DIRECT takes as they are, and such that it does not."""
    found: KvLayout = request.param
    return found


@pytest.fixture
def file(tmp_path: Path) -> ExtentFile:
    return ExtentFile(tmp_path / "0000.seg", PAGE_LAYOUT, NUM_BLOCKS)


@pytest.fixture
def io() -> Iterator[FileIo]:
    found = open_reader_io()
    yield found
    found.close()


def reader_of(
    file: ExtentFile, pool: SlabPool, io: FileIo, options: ReaderOptions | None = None
) -> LayerReader:
    return LayerReader(file.plan(), file.layout, pool, io, options)


def check_blocks(file: ExtentFile, pool: SlabPool, numbers: range) -> None:
    for number in numbers:
        assert pool.block(number) == slabs_of(file.data[number], file.layout), number


@pytest.mark.parametrize("shift", [0, 64])
@pytest.mark.parametrize("order", LoadOrder)
@pytest.mark.parametrize("request_bytes", [1, 2 * 4096, 1 << 20])
def test_every_source_arrives(
    tmp_path: Path, io: FileIo, layout: KvLayout, order: LoadOrder, request_bytes: int, shift: int
) -> None:
    file = ExtentFile(tmp_path / "0000.seg", layout, 6)
    kinds = [SourceKind.MEMORY] * 2 + [SourceKind.EXTENT, SourceKind.PROMOTING] * 2
    sums = [file.plan([SourceKind.MEMORY] * 6).blocks[number].checksums for number in (3, 5)]
    progress = FakeProgress(2, lambda index: sums[index])
    progress.move(2 * layout.num_layers)
    pool = SlabPool(layout, 6, shift_bytes=shift)
    options = ReaderOptions(order=order, request_bytes=request_bytes, read_ahead_layers=1)
    reader = LayerReader(file.plan(kinds, progress=progress), layout, pool, io, options)
    reader.start()
    for layer in range(layout.num_layers):
        assert reader.wait_layer(layer, WAIT_S) == 6
    assert (reader.is_done, reader.bytes_left(), reader.error) == (True, 0, "")
    assert reader.num_layers_ready() == layout.num_layers
    assert reader.num_blocks_ready_from_back() == 6
    check_blocks(file, pool, range(6))
    assert reader.corrupt_keys() == ()
    assert reader.cancel(WAIT_S)
    assert wait_for(lambda: progress.is_closed)


def test_read_ahead_is_bounded(file: ExtentFile) -> None:
    """Only as many layers as allowed are read beyond the one that is waited for."""
    io = GatedIo()
    io.open_gate()
    pool = SlabPool(PAGE_LAYOUT, NUM_BLOCKS)
    reader = reader_of(file, pool, io, ONE_LAYER)
    reader.start()
    assert wait_for(lambda: reader.num_layers_ready() == 1)
    assert pool.is_untouched(1, 0)
    assert reader.wait_layer(0, WAIT_S) == NUM_BLOCKS
    assert wait_for(lambda: reader.num_layers_ready() == 2)
    assert io.num_reads == 2 * NUM_BLOCKS
    assert pool.is_untouched(2, 0)
    assert reader.bytes_left() == 2 * NUM_BLOCKS * PAGE_LAYOUT.slab_bytes
    assert reader.cancel(WAIT_S)
    io.close()


def test_an_empty_plan_is_done(tmp_path: Path, io: FileIo) -> None:
    file = ExtentFile(tmp_path / "0000.seg", PAGE_LAYOUT, 0)
    reader = reader_of(file, SlabPool(PAGE_LAYOUT, 1), io)
    reader.start()
    assert (reader.wait_layer(LAST, 0), reader.is_done) == (0, True)


@pytest.mark.parametrize("layer", range(PAGE_LAYOUT.num_layers))
def test_a_wrong_slab_ends_the_usable_blocks(file: ExtentFile, io: FileIo, layer: int) -> None:
    """From its layer on; before it every block counts. The key is reported once."""
    file.damage(2, layer)
    pool = SlabPool(PAGE_LAYOUT, NUM_BLOCKS)
    reader = reader_of(file, pool, io, ReaderOptions(request_bytes=1, read_ahead_layers=1))
    reader.start()
    for number in range(layer):
        assert reader.wait_layer(number, WAIT_S) >= 2
    assert reader.wait_layer(layer, WAIT_S) == 2
    assert reader.wait_layer(LAST, WAIT_S) == 2
    assert reader.corrupt_keys() == (file.keys[2],)
    check_blocks(file, pool, range(2))


def test_a_failed_block_from_the_back_ends_the_load_there(file: ExtentFile, io: FileIo) -> None:
    """What is behind it stays; what is in front of it is for the caller to compute."""
    file.damage(2, 1)
    pool = SlabPool(PAGE_LAYOUT, NUM_BLOCKS)
    reader = reader_of(file, pool, io, ReaderOptions(order=BACK.order, num_threads=1))
    reader.start()
    assert wait_for(lambda: reader.is_done)
    assert reader.num_blocks_ready_from_back() == 2
    assert reader.wait_layer(LAST, 0) == 0
    check_blocks(file, pool, range(3, 5))
    assert reader.cancel(WAIT_S)
    assert all(pool.is_untouched(layer, 0) for layer in range(PAGE_LAYOUT.num_layers))


@pytest.mark.parametrize(
    "fault", ["generation", "key", "blank", "garbled", "swapped", "truncated", "eio", "short"]
)
@pytest.mark.parametrize("options", [ONE_LAYER, BACK], ids=["layers", "back"])
def test_a_block_that_is_not_there_is_missing(
    file: ExtentFile, fault: str, options: ReaderOptions
) -> None:
    """Whatever the file says instead: it is reported, and the others are not harmed."""
    io: FileIo = open_reader_io()
    header = 3 * file.slot_bytes
    if fault == "generation":
        file.write(3, generation=7)
    elif fault == "key":
        file.write(3, key=file.keys[0])
    elif fault == "blank":
        file.poke(3, bytes(HEADER_BYTES))
    elif fault == "garbled":
        file.poke(3, b"\xff" * 300, 200)
    elif fault == "swapped":  # a whole block, in another's place
        file.poke(3, file.path.read_bytes()[: file.slot_bytes])
    elif fault == "truncated":
        with file.path.open("r+b") as opened:
            opened.truncate(header + 4096)
    elif fault == "short":
        io = ShortIo({header})
    else:
        gated = GatedIo()
        gated.codes[header] = errno.EIO
        gated.open_gate()
        io = gated
    pool = SlabPool(PAGE_LAYOUT, NUM_BLOCKS)
    reader = reader_of(file, pool, io, options)
    reader.start()
    num_good = reader.wait_layer(LAST, WAIT_S)
    bad = 4 if fault == "truncated" and options is BACK else 3
    assert file.keys[bad] in reader.corrupt_keys()
    if options is BACK:
        assert reader.num_blocks_ready_from_back() == NUM_BLOCKS - 1 - bad
    else:
        assert num_good == 3
        check_blocks(file, pool, range(3))
    assert reader.cancel(WAIT_S)
    io.close()


def test_a_hung_read_keeps_its_target(file: ExtentFile) -> None:
    """The wait ends in time; the target is the caller's only once the read has returned."""
    io = GatedIo()
    pool = SlabPool(PAGE_LAYOUT, NUM_BLOCKS)
    reader = reader_of(file, pool, io, ONE_LAYER)
    reader.start()
    assert io.wait_arrived(2)
    assert reader.wait_layer(0, 0.01) == 0
    assert reader.cancel(0.01) is False
    io.open_gate()
    assert reader.cancel(WAIT_S) is True
    assert io.num_reads == 2
    assert reader.wait_layer(0, WAIT_S) == 0


def test_a_hung_read_from_the_back_lands_in_scratch(file: ExtentFile) -> None:
    """Giving up does not wait for it, and nothing is written when it comes."""
    io = GatedIo()
    pool = SlabPool(PAGE_LAYOUT, NUM_BLOCKS)
    reader = reader_of(file, pool, io, BACK)
    reader.start()
    assert io.wait_arrived(2)
    reader.give_up_below(4)
    io.open_gate()
    assert wait_for(lambda: reader.is_done)
    assert reader.num_blocks_ready_from_back() == 1
    assert reader.cancel(WAIT_S)
    assert all(
        pool.is_untouched(layer, index)
        for layer in range(PAGE_LAYOUT.num_layers)
        for index in range(4)
    )


def test_a_block_that_was_given_up_does_not_count_though_it_came(
    file: ExtentFile, io: FileIo
) -> None:
    """The caller computes into it from then on."""
    reader = reader_of(file, SlabPool(PAGE_LAYOUT, NUM_BLOCKS), io, BACK)
    reader.start()
    assert wait_for(lambda: reader.is_done)
    reader.give_up_below(3)
    assert reader.num_blocks_ready_from_back() == 2


def test_a_cancelled_reader_from_the_back_gives_the_target_back_at_once(file: ExtentFile) -> None:
    io = GatedIo()
    pool = SlabPool(PAGE_LAYOUT, NUM_BLOCKS)
    reader = reader_of(file, pool, io, BACK)
    reader.start()
    assert io.wait_arrived(2)
    assert reader.cancel(0.0) is True
    io.open_gate()
    assert wait_for(lambda: not reader.num_threads_alive)
    assert reader.num_blocks_ready_from_back() == 0
    assert all(pool.is_untouched(layer, 4) for layer in range(PAGE_LAYOUT.num_layers))


def test_giving_up_is_for_the_order_from_the_back(file: ExtentFile, io: FileIo) -> None:
    reader = reader_of(file, SlabPool(PAGE_LAYOUT, NUM_BLOCKS), io)
    with pytest.raises(InvalidArgumentError):
        reader.give_up_below(1)


def test_a_plan_whose_time_is_up_is_not_begun(file: ExtentFile, io: FileIo) -> None:
    pool = SlabPool(PAGE_LAYOUT, NUM_BLOCKS)
    reader = LayerReader(file.plan(timeout_s=0.0), PAGE_LAYOUT, pool, io)
    reader.start()
    assert reader.wait_layer(LAST, WAIT_S) == 0
    assert "time is up" in reader.error
    assert pool.is_untouched(0, 0)


def test_promotions_come_as_they_come(file: ExtentFile, io: FileIo) -> None:
    """A layer counts when progress says so; a promotion that fails ends the usable blocks."""
    plan = file.plan([SourceKind.PROMOTING] * NUM_BLOCKS)
    whole = file.plan([SourceKind.MEMORY] * NUM_BLOCKS)
    progress = FakeProgress(NUM_BLOCKS, lambda index: whole.blocks[index].checksums)
    plan = file.plan([SourceKind.PROMOTING] * NUM_BLOCKS, progress=progress)
    pool = SlabPool(PAGE_LAYOUT, NUM_BLOCKS)
    reader = LayerReader(plan, PAGE_LAYOUT, pool, io, ONE_LAYER)
    reader.start()
    assert reader.wait_layer(0, 0.0) == 0
    progress.move(NUM_BLOCKS)
    assert reader.wait_layer(0, WAIT_S) == NUM_BLOCKS
    progress.move(NUM_BLOCKS * PAGE_LAYOUT.num_layers, usable=2)
    assert reader.wait_layer(LAST, WAIT_S) == 2
    assert reader.corrupt_keys() == ()
    check_blocks(file, pool, range(2))


def test_progress_is_told_to_whoever_asked(file: ExtentFile, io: FileIo) -> None:
    calls = threading.Semaphore(0)
    reader = reader_of(file, SlabPool(PAGE_LAYOUT, NUM_BLOCKS), io)
    reader.start(calls.release)
    assert reader.wait_layer(LAST, WAIT_S) == NUM_BLOCKS
    assert calls.acquire(timeout=WAIT_S)


def test_the_plans_limit_is_kept_to(file: ExtentFile, io: FileIo) -> None:
    """Over all readers of it; a reader that is cancelled does not wait, and gives back its turn."""
    clock = SimClock()
    limit = TokenBucket(1e6, PAGE_LAYOUT.block_bytes, clock)
    plan = dataclasses.replace(file.plan(), read_limit=limit)
    pool = SlabPool(PAGE_LAYOUT, NUM_BLOCKS)
    options = ReaderOptions(num_threads=1, request_bytes=1 << 20, read_ahead_layers=4)
    slow = LayerReader(plan, PAGE_LAYOUT, pool, io, options)
    limit.take(10**9)
    slow.start()
    assert slow.wait_layer(0, 0.05) == 0
    start = time.monotonic()
    assert slow.cancel(WAIT_S)
    assert time.monotonic() - start < WAIT_S / 2
    assert pool.is_untouched(0, 0)
    assert wait_for(lambda: not slow.num_threads_alive)
    limit.take(-(10**9))
    assert limit.take(0) == 0.0
    quick = LayerReader(plan, PAGE_LAYOUT, pool, io, options)
    quick.start()
    assert quick.wait_layer(LAST, WAIT_S) == NUM_BLOCKS
    owed = limit.take(0)  # the clock stood still: it knows what was read beyond the burst
    assert owed == pytest.approx((NUM_BLOCKS - 1) * PAGE_LAYOUT.block_bytes / 1e6)


def test_the_first_read_does_not_wait_for_the_other_threads(
    file: ExtentFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = GatedIo()
    start_thread = layer_reader._started

    def start_behind_a_read(run: Callable[[], None], number: int) -> bool:
        return (number == 0 or gated.wait_arrived()) and start_thread(run, number)

    monkeypatch.setattr(layer_reader, "_started", start_behind_a_read)
    reader = reader_of(file, SlabPool(PAGE_LAYOUT, NUM_BLOCKS), gated, ONE_LAYER)
    reader.start()
    assert gated.wait_arrived(2)
    gated.open_gate()
    assert reader.wait_layer(LAST, WAIT_S) == NUM_BLOCKS


def test_readers_share_a_limit_of_threads(
    file: ExtentFile, io: FileIo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hung reads cannot pile up: the next reader says that it cannot work."""
    monkeypatch.setattr("ucm.layer_reader._threads", threading.BoundedSemaphore(2))
    gated = GatedIo()
    pool = SlabPool(PAGE_LAYOUT, NUM_BLOCKS)
    hung = reader_of(file, pool, gated, ONE_LAYER)
    hung.start()
    assert gated.wait_arrived(2)
    other = reader_of(file, SlabPool(PAGE_LAYOUT, NUM_BLOCKS), io)
    other.start()
    assert other.wait_layer(LAST, WAIT_S) == 0
    assert "hang" in other.error
    gated.open_gate()
    assert hung.wait_layer(LAST, WAIT_S) == NUM_BLOCKS


def test_a_target_that_fails_ends_the_load(file: ExtentFile, io: FileIo) -> None:
    class Gone(SlabPool):
        def view(self, layer: int, index: int) -> memoryview:
            raise ValueError("released")

    reader = reader_of(file, Gone(PAGE_LAYOUT, NUM_BLOCKS), io)
    reader.start()
    assert reader.wait_layer(LAST, WAIT_S) == 0
    assert "released" in reader.error


@pytest.mark.parametrize(
    ("ahead", "threads", "size"), [(0, 1, 1), (481, 1, 1), (1, 0, 1), (1, 65, 1), (1, 1, 0)]
)
def test_options_are_checked(ahead: int, threads: int, size: int) -> None:
    with pytest.raises(InvalidArgumentError):
        ReaderOptions(read_ahead_layers=ahead, num_threads=threads, request_bytes=size)
