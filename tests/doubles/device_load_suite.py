"""CUDA streams, and loads into device memory, on the driver's double.

Run by tests/conformance/test_on_doubles.py in a process of its own. It runs on a double of the CUDA
driver: it proves our code, not NVIDIA's. On lazy streams everything is done as late as a GPU may:
who waits too little finds old bytes.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from ucm import device_load
from ucm.checksum import block_checksums
from ucm.clock import SimClock
from ucm.device_load import (
    DeviceLoader,
    DeviceLoadOptions,
    DevicePool,
    FileBlock,
    HostBlock,
    SourceBlock,
)
from ucm.errors import CapacityError, InvalidArgumentError
from ucm.kernels.cuda.driver import CudaDriver
from ucm.kernels.cuda.host_registry import HostRegistry
from ucm.kernels.cuda.streams import CudaStreams
from ucm.kernels.streams import CpuStreams, Work
from ucm.layer_pipeline import Stage
from ucm.layout import KvDtype, KvLayout
from ucm.storage.device import DeviceBuffer, DeviceFileIo
from ucm.storage.gds import GdsFileIo, GdsOptions
from ucm.storage.pinned_io import PinnedFileIo
from ucm.storage.throttled_io import BURST_S
from ucm.testing.doubles import Doubles, device_bytes
from ucm.testing.stream_conformance import StreamTests

DOUBLES = Doubles(Path(os.environ["UCM_DOUBLES"]))


class TestCudaStreams(StreamTests):
    @pytest.fixture(autouse=True)
    def _memory(self) -> Iterator[None]:
        self.driver = CudaDriver()
        with DOUBLES.device_memory(16 * 8) as self.memory:
            self.numbers = np.frombuffer(device_bytes(self.memory), np.int64)
            self.numbers[:] = np.arange(16)
            yield

    def make_streams(self) -> CudaStreams:
        return CudaStreams(self.driver)

    def copy(self, to: int, source: int) -> Work:
        base = self.memory.address
        return lambda handle: self.driver.copy(base + 8 * to, base + 8 * source, 8, handle)

    def cells(self) -> list[int]:
        return [int(number) for number in self.numbers]


class TestCudaStreamsLazily(TestCudaStreams):
    @pytest.fixture(autouse=True)
    def _lazily(self, _memory: None) -> Iterator[None]:
        with DOUBLES.lazy_streams():
            yield

    def test_nothing_is_done_before_somebody_waits(self) -> None:
        """What the other tests count on."""
        streams = self.make_streams()
        stream = streams.stream("copy")
        stream.submit(self.copy(1, 5))
        event = stream.record()
        assert self.cells()[1] == 1
        assert not event.wait(timeout_s=0)
        assert event.wait(timeout_s=5)
        assert self.cells()[1] == 5
        streams.close()

    def test_a_stream_of_torch_waits_like_ours(self) -> None:
        """By its handle; it is not ours to destroy."""
        streams, theirs = self.make_streams(), self.driver.create_stream()
        compute = streams.adopt("compute", theirs)
        streams.stream("load").submit(self.copy(1, 5))
        compute.wait_for(streams.stream("load").record())
        compute.submit(self.copy(2, 1))
        compute.synchronize()
        assert self.cells()[2] == 5
        streams.close()
        self.driver.copy(self.memory.address, self.memory.address + 8, 8, theirs)
        self.driver.destroy_stream(theirs)
        assert self.cells()[0] == 5


def test_a_gpu_does_not_wait_for_a_thread() -> None:
    streams, threads = CudaStreams(CudaDriver()), CpuStreams()
    with pytest.raises(InvalidArgumentError):
        streams.stream("load").wait_for(threads.stream("read").record())
    threads.stream("read").wait_for(streams.stream("load").record())
    threads.stream("read").synchronize()
    with contextlib.closing(streams), contextlib.closing(threads):
        pass


def test_streams_and_events_are_given_back() -> None:
    gc.collect()
    before = DOUBLES.driver_counts()
    streams = CudaStreams(CudaDriver())
    events = [streams.stream(str(n)).record() for n in range(3)]
    assert DOUBLES.driver_counts().events - before.events == 3
    assert all(event.wait() for event in events)
    events.clear()
    gc.collect()
    streams.close()
    after = DOUBLES.driver_counts()
    assert (after.streams, after.events) == (before.streams, before.events)


# ---------------------------------------------------------------- loads

PADDED = KvLayout(num_layers=5, num_kv_heads=2, head_dim=16, block_tokens=8, dtype=KvDtype.FLOAT16)
WHOLE = KvLayout(num_layers=3, num_kv_heads=3, head_dim=64, block_tokens=32, dtype=KvDtype.FLOAT32)
HEADER_BYTES = 4096
POOL_BLOCKS = 24
OLD = 0x5A

IO: dict[str, Callable[[], DeviceFileIo]] = {
    "gds": lambda: GdsFileIo(GdsOptions(direct=True, io_threads=3)),
    "kvikio-compat": lambda: GdsFileIo(GdsOptions(direct=False, io_threads=3)),
    "pinned": lambda: PinnedFileIo(3),
}


@dataclass
class Bench:
    """A pool on the "device", blocks on a disk and in an arena, and what attention saw."""

    layout: KvLayout
    io: DeviceFileIo
    loader: DeviceLoader
    pool: DeviceBuffer
    seen: DeviceBuffer
    arena: mmap.mmap
    path: Path
    rng: random.Random
    right: list[bytes] = field(default_factory=list)

    def file_block(self) -> FileBlock:
        """One more block, in the file."""
        data = self._new()
        with self.path.open("ab") as file:
            offset = file.tell() + HEADER_BYTES
            file.write(bytes(HEADER_BYTES) + data)
        return FileBlock(self.handle, offset, self._sums(data))

    def host_block(self) -> HostBlock:
        """One more block, in the arena."""
        data, start = self._new(), (len(self.right) - 1) * self.layout.block_bytes
        self.arena[start : start + len(data)] = data
        return HostBlock(memoryview(self.arena)[start : start + len(data)], self._sums(data))

    def _new(self) -> bytes:
        self.right.append(self.rng.randbytes(self.layout.block_bytes))
        return self.right[-1]

    def _sums(self, data: bytes) -> Callable[[], tuple[int, ...]]:
        sums = block_checksums(self.layout, memoryview(data))
        return lambda: sums

    def open(self) -> None:
        """The file, as the door passes it."""
        self.path.touch()
        fd = os.open(self.path, os.O_RDONLY)
        self.handle = self.io.adopt(fd)
        os.close(fd)

    def slab(self, memory: DeviceBuffer, layer: int, block_id: int) -> bytes:
        start = (layer * POOL_BLOCKS + block_id) * self.layout.slab_bytes
        return bytes(device_bytes(memory)[start : start + self.layout.slab_bytes])

    def right_slab(self, layer: int, row: int) -> bytes:
        return self.right[row][self.layout.slab_slice(layer)]

    def attend(self, layer: int, stream: int) -> None:
        """A layer's attention, on the GPU: it keeps what it saw in the pool."""
        nbytes = POOL_BLOCKS * self.layout.slab_bytes
        start = layer * nbytes
        self.loader.driver.copy(
            self.seen.address + start, self.pool.address + start, nbytes, stream
        )


@pytest.fixture(params=["eager", "lazy"])
def order(request: pytest.FixtureRequest) -> Iterator[str]:
    with DOUBLES.lazy_streams() if request.param == "lazy" else contextlib.nullcontext():
        yield request.param


def pool_bytes(layout: KvLayout) -> int:
    return layout.num_layers * POOL_BLOCKS * layout.slab_bytes


@contextlib.contextmanager
def bench_of(
    layout: KvLayout, io_kind: str, folder: Path, options: DeviceLoadOptions | None = None
) -> Iterator[Bench]:
    io, driver = IO[io_kind](), CudaDriver()
    with (
        DOUBLES.device_memory(pool_bytes(layout)) as pool,
        DOUBLES.device_memory(pool_bytes(layout)) as seen,
        contextlib.ExitStack() as ends,
    ):
        device_bytes(pool)[:] = bytes([OLD]) * pool.nbytes
        loader = DeviceLoader(driver, io, DevicePool(pool.address, POOL_BLOCKS, layout), options)
        ends.callback(io.close)
        ends.callback(loader.close)
        rng, arena = random.Random(folder.name), mmap.mmap(-1, POOL_BLOCKS * layout.block_bytes)
        bench = Bench(layout, io, loader, pool, seen, arena, folder / "segment", rng)
        bench.open()
        ends.callback(lambda: io.close_file(bench.handle))
        yield bench
        gc.collect()


SMALL = DeviceLoadOptions(request_bytes=3 * 4096, staging_bytes=4 * 3 * 4096, read_ahead_layers=1)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("io_kind", IO)
@pytest.mark.parametrize(("layout", "options"), [(PADDED, SMALL), (PADDED, None), (WHOLE, None)])
def test_attention_sees_every_block_where_it_belongs(
    layout: KvLayout, options: DeviceLoadOptions | None, io_kind: str, tmp_path: Path
) -> None:
    """From the disk and from the arena, ordered by events only: nothing else waits for the GPU."""
    with bench_of(layout, io_kind, tmp_path, options) as bench:
        blocks: list[SourceBlock] = [
            bench.file_block() if bench.rng.random() < 0.6 else bench.host_block()
            for _ in range(11)
        ]
        ids = bench.rng.sample(range(POOL_BLOCKS), len(blocks))
        theirs = bench.loader.driver.create_stream()
        compute = bench.loader.adopt(theirs)
        load = bench.loader.begin(blocks, ids)
        for layer in range(layout.num_layers):
            assert load.wait_layer(layer, 10.0, compute) == len(blocks)
            bench.attend(layer, theirs)
        compute.synchronize()
        assert (load.num_layers_ready(), load.bytes_left) == (layout.num_layers, 0)
        assert load.is_done
        for layer in range(layout.num_layers):
            for row, block_id in enumerate(ids):
                assert bench.slab(bench.seen, layer, block_id) == bench.right_slab(layer, row)
            for block_id in set(range(POOL_BLOCKS)) - set(ids):
                assert set(bench.slab(bench.pool, layer, block_id)) == {OLD}, "not of this load"
        assert load.cancel(5.0)
        bench.loader.driver.destroy_stream(theirs)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("io_kind", IO)
@pytest.mark.parametrize("where", ["file", "arena"])
def test_a_wrong_slab_is_never_placed(where: str, io_kind: str, tmp_path: Path) -> None:
    """From its layer on the rows before it are what there is."""
    with bench_of(PADDED, io_kind, tmp_path, SMALL) as bench:
        blocks: list[SourceBlock] = [bench.file_block() for _ in range(4)]
        blocks += [bench.host_block() for _ in range(4)]
        row, layer = (2, 3) if where == "file" else (6, 3)
        flip(bench, blocks[row], layer)
        load = bench.loader.begin(blocks, list(range(8)))
        assert load.wait_layer(PADDED.num_layers - 1, 10.0) == row
        assert [(f.layer, f.row, f.stage) for f in load.failures] == [(layer, row, Stage.VERIFY)]
        assert load.num_layers_ready() == PADDED.num_layers
        assert load.cancel(5.0)
        assert set(bench.slab(bench.pool, layer, row)) == {OLD}
        for good in range(row):
            assert bench.slab(bench.pool, 4, good) == bench.right_slab(4, good)


def flip(bench: Bench, block: SourceBlock, layer: int) -> None:
    position = PADDED.slab_slice(layer).stop - 1
    if isinstance(block, HostBlock):
        start = np.frombuffer(block.data, np.uint8).__array_interface__["data"][0]
        base = np.frombuffer(bench.arena, np.uint8).__array_interface__["data"][0]
        bench.arena[start - base + position] ^= 1
        return
    data = bytearray(bench.path.read_bytes())
    data[block.offset + position] ^= 1
    with bench.path.open("r+b") as file:
        file.write(data)


@pytest.mark.usefixtures("order")
def test_reads_that_fail_are_rows_that_fail(tmp_path: Path) -> None:
    with bench_of(WHOLE, "gds", tmp_path) as bench:  # kvikio reads small slabs by itself
        blocks: list[SourceBlock] = [bench.file_block() for _ in range(3)]
        missing = FileBlock(bench.handle, 1 << 30, lambda: ())
        load = bench.loader.begin([*blocks, missing], list(range(4)))
        assert load.wait_layer(2, 10.0) == 3
        assert [(f.row, f.stage) for f in load.failures] == [(3, Stage.READ)]
        assert load.cancel(5.0)
        DOUBLES.fail_transfers(1)
        load = bench.loader.begin(blocks, list(range(3)))
        assert load.wait_layer(2, 10.0) < 3
        assert load.failures[0].stage is Stage.READ
        assert load.cancel(5.0)


def test_reads_of_files_obey_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together, and nothing else does: the clock stands still, so every byte is waited for."""
    waited_s: list[float] = []
    monkeypatch.setattr(time, "sleep", waited_s.append)
    monkeypatch.setattr(device_load, "SystemClock", SimClock)
    options = DeviceLoadOptions(request_bytes=4096, max_read_bytes_per_s=1 << 20)
    with bench_of(PADDED, "pinned", tmp_path, options) as bench:
        load = bench.loader.begin([bench.file_block(), bench.host_block()], [0, 1])
        assert load.wait_layer(4, 10.0) == 2
        assert load.cancel(5.0)
    read, saved_up = PADDED.block_bytes, (1 << 20) * BURST_S
    assert len(waited_s) == 3, "two layers fit the burst"
    assert waited_s[-1] == pytest.approx((read - saved_up) / (1 << 20))


@pytest.mark.usefixtures("order")
def test_a_copy_that_fails_hurts_no_other_load(tmp_path: Path) -> None:
    with bench_of(PADDED, "pinned", tmp_path) as bench:
        block, good = bench.host_block(), bench.host_block()

        def fail_in_layer_2(layer: int) -> bool:
            DOUBLES.fail_copies(layer == 2)
            return True

        bad = HostBlock(block.data, block.checksums, fail_in_layer_2)
        load = bench.loader.begin([bad], [0])
        assert load.wait_layer(4, 10.0) == 0
        assert [(f.layer, f.stage) for f in load.failures] == [(2, Stage.READ)]
        assert load.cancel(5.0)
        load = bench.loader.begin([good], [0])
        assert load.wait_layer(4, 10.0) == 1
        assert load.cancel(5.0)


@pytest.mark.usefixtures("order")
def test_after_a_cancel_no_copy_is_under_way(tmp_path: Path) -> None:
    """Not even of a step that was given up before anybody waited for it."""
    with bench_of(PADDED, "pinned", tmp_path) as bench:
        missing = FileBlock(bench.handle, 1 << 30, lambda: ())
        load = bench.loader.begin([missing, bench.host_block()], [0, 1])
        assert load.wait_layer(0, 10.0) == 0
        assert load.cancel(5.0)
        assert DOUBLES.driver_counts().waiting_operations == 0


@pytest.mark.usefixtures("order")
def test_a_promotion_is_followed_layer_by_layer(tmp_path: Path) -> None:
    """A layer is copied when it is there; one that never will be is a failure."""
    with bench_of(PADDED, "pinned", tmp_path) as bench:
        block, arrived = bench.host_block(), [threading.Event() for _ in range(5)]
        full = bytes(block.data)
        bench.arena[: len(full)] = bytes(len(full))

        def arrive(layer: int) -> None:
            part = slice(layer * PADDED.slab_stride_bytes, (layer + 1) * PADDED.slab_stride_bytes)
            bench.arena[part] = full[part]
            arrived[layer].set()

        def wait_layer(layer: int) -> bool:
            return arrived[layer].wait(10) and layer < 3

        load = bench.loader.begin([HostBlock(block.data, block.checksums, wait_layer)], [5])
        for layer in range(3):
            assert load.num_layers_ready() == layer
            arrive(layer)
            assert load.wait_layer(layer, 10.0) == 1
            assert bench.slab(bench.pool, layer, 5) == bench.right_slab(layer, 0)
        arrived[3].set()
        assert load.wait_layer(3, 10.0) == 0
        assert [(f.layer, f.stage) for f in load.failures] == [(3, Stage.READ)]
        assert load.cancel(5.0)


@pytest.mark.usefixtures("order")
def test_loads_are_bounded_and_their_memory_is_used_again(tmp_path: Path) -> None:
    options = DeviceLoadOptions(max_loads=2, staging_bytes=1 << 20)
    with bench_of(PADDED, "gds", tmp_path, options) as bench:
        blocks = [bench.file_block() for _ in range(4)]
        before = DOUBLES.driver_counts().allocations
        registered = DOUBLES.cufile_counts().registrations
        for turn in range(3):
            loads = [bench.loader.begin(blocks, [n * 4 + i for i in range(4)]) for n in range(2)]
            with pytest.raises(CapacityError, match="2 loads"):
                bench.loader.begin(blocks, [0, 1, 2, 3])
            assert [load.wait_layer(4, 10.0) for load in loads] == [4, 4]
            assert all(load.cancel(5.0) for load in loads)
            assert all(load.cancel(5.0) for load in loads), f"again, turn {turn}"
        # Two staging areas, a table of ids a load, two tables a checksum.
        assert DOUBLES.cufile_counts().registrations - registered == 2
        assert DOUBLES.driver_counts().allocations > before
        for wrong in ([0, 1, 2], [0, 1, 2, 2], [0, 1, 2, POOL_BLOCKS]):
            with pytest.raises(InvalidArgumentError):
                bench.loader.begin(blocks, wrong)
        load = bench.loader.begin(blocks, [0, 1, 2, 3])
        assert load.cancel(5.0)


def test_everything_is_given_back(tmp_path: Path) -> None:
    gc.collect()
    before = DOUBLES.driver_counts()
    with bench_of(PADDED, "pinned", tmp_path) as bench:
        load = bench.loader.begin([bench.host_block(), bench.file_block()], [1, 2])
        assert load.wait_layer(4, 10.0) == 2
        # The ids once, and the offsets and the sums of each layer's checksums: not the arena.
        assert DOUBLES.driver_counts().pageable_copies - before.pageable_copies == 1 + 2 * 5
        assert load.cancel(5.0)
        bench.loader.close()
        with pytest.raises(CapacityError):
            bench.loader.begin([], [])
        del load, bench
    gc.collect()
    after = DOUBLES.driver_counts()
    for name in ("streams", "events", "pinned_ranges", "waiting_operations"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.allocations - before.allocations == after.frees - before.frees


def test_a_mapping_is_registered_once(caplog: pytest.LogCaptureFixture) -> None:
    registry = HostRegistry(CudaDriver())
    before = DOUBLES.driver_counts().pinned_ranges
    with contextlib.closing(mmap.mmap(-1, 1 << 20)) as arena, memoryview(arena) as whole:
        for start in (0, 4096, 8192):
            registry.ensure(whole[start : start + 4096].toreadonly())
        assert len(registry) == 1
        assert DOUBLES.driver_counts().pinned_ranges == before + 1
        other = HostRegistry(CudaDriver())
        for _ in range(2):
            other.ensure(whole)
        assert caplog.text.count("are not registered") == 1, "asked once, said once"
        assert len(other) == 0
        other.close()
        registry.forget(whole)
        assert DOUBLES.driver_counts().pinned_ranges == before
        registry.ensure(whole)
        registry.close()
        assert DOUBLES.driver_counts().pinned_ranges == before
