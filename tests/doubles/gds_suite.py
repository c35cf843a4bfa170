"""The real kvikio wheel over the doubles: `GdsFileIo`, and the NVMe tier over it.

Run by tests/conformance/test_on_doubles.py in a process of its own. It runs on a double of the CUDA
driver: it proves our code, not NVIDIA's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ucm.config import Config, MemoryConfig, NvmeConfig
from ucm.errors import InvalidArgumentError
from ucm.manager import Manager
from ucm.storage import io_choice
from ucm.storage.device import DeviceBuffer, DeviceRequest
from ucm.storage.file_io import FileHandle, IoRequest, aligned_buffer
from ucm.storage.gds import GdsFileIo, GdsOptions
from ucm.storage.io_choice import IoKind, Machine, open_file_io
from ucm.storage.nvme import NvmeStore
from ucm.storage.tier import Tier
from ucm.testing.doubles import Doubles, device_bytes
from ucm.testing.file_io_conformance import FILE_BYTES, PAGE, FileIoTests, TestBuffer, pattern
from ucm.testing.nvme import NAMESPACE, nvme_config
from ucm.testing.tier_conformance import LAYOUT, TierTests

DOUBLES = Doubles(Path(os.environ["UCM_DOUBLES"]))  # before anything imports kvikio
MIB = 1 << 20


class TestHostMemoryDirect(FileIoTests):
    def make_io(self) -> GdsFileIo:
        return GdsFileIo(GdsOptions(direct=True, io_threads=3))


class TestHostMemoryCompat(FileIoTests):
    def make_io(self) -> GdsFileIo:
        return GdsFileIo(GdsOptions(direct=False, io_threads=3))


class DeviceMemoryTests(FileIoTests):
    """The whole suite, with buffers in "device" memory."""

    @pytest.fixture(autouse=True)
    def _memory(self) -> Iterator[None]:
        with contextlib.ExitStack() as self.memory:
            yield

    def make_buffer(self, size: int) -> TestBuffer:
        buffer = self.memory.enter_context(DOUBLES.device_memory(size))
        return TestBuffer(buffer, device_bytes(buffer))


class TestDeviceMemoryDirect(DeviceMemoryTests):
    def make_io(self) -> GdsFileIo:
        return GdsFileIo(GdsOptions(direct=True, io_threads=3))


class TestDeviceMemoryCompat(DeviceMemoryTests):
    def make_io(self) -> GdsFileIo:
        return GdsFileIo(GdsOptions(direct=False, io_threads=3))


class TestNvmeTierOverGds(TierTests):
    direct = True

    @pytest.fixture(autouse=True)
    def _stores(self) -> Iterator[None]:
        self.stores: list[NvmeStore] = []
        yield
        for store in self.stores:
            store.close()

    def make_tier(self, folder: Path, num_slots: int) -> Tier:
        io = GdsFileIo(GdsOptions(direct=self.direct, io_threads=2))
        store = NvmeStore(nvme_config(folder / "data", num_slots, slots_per_segment=2), io)
        self.stores.append(store)
        return store.open_namespace(NAMESPACE, LAYOUT)


class TestNvmeTierOverKvikioCompat(TestNvmeTierOverGds):
    direct = False


# ---------------------------------------------------------------- what only device memory has


@pytest.fixture
def make_io() -> Iterator[Callable[..., GdsFileIo]]:
    made: list[GdsFileIo] = []

    def make(**options: int) -> GdsFileIo:
        direct = bool(options.pop("direct", True))
        made.append(GdsFileIo(GdsOptions(direct=direct, **options)))
        return made[-1]

    yield make
    for io in made:
        io.close()


def new_file(io: GdsFileIo, folder: Path, size: int = FILE_BYTES) -> tuple[FileHandle, bytes]:
    """A file of `size` random bytes; closed with the process."""
    data = pattern(size)
    (folder / "data").write_bytes(data)
    return io.open(folder / "data", create=False, writable=True), data


def test_direct_transfers_copy_nothing(make_io: Callable[..., GdsFileIo], tmp_path: Path) -> None:
    io = make_io()
    file, data = new_file(io, tmp_path)
    before, copies = DOUBLES.cufile_counts(), DOUBLES.driver_counts().copied_bytes
    with DOUBLES.device_memory(MIB) as buffer:
        assert io.read_batch([DeviceRequest(file, MIB, (buffer,))]) == [0]
        assert device_bytes(buffer) == data[MIB : 2 * MIB]
        assert io.write_batch([DeviceRequest(file, 0, (buffer,))]) == [0]
        io.registry.forget(buffer)
    after = DOUBLES.cufile_counts()
    assert (after.transfers - before.transfers, after.bytes - before.bytes) == (2, 2 * MIB)
    assert DOUBLES.driver_counts().copied_bytes == copies
    assert (tmp_path / "data").read_bytes() == data[MIB : 2 * MIB] + data[MIB:]
    io.close_file(file)


def test_compatibility_mode_copies_through_host_memory(
    make_io: Callable[..., GdsFileIo], tmp_path: Path
) -> None:
    io = make_io(direct=False)
    file, data = new_file(io, tmp_path)
    before, copies = DOUBLES.cufile_counts().transfers, DOUBLES.driver_counts().copied_bytes
    with DOUBLES.device_memory(MIB) as buffer:
        assert io.read_batch([DeviceRequest(file, 0, (buffer,))]) == [0]
        assert device_bytes(buffer) == data[:MIB]
    assert DOUBLES.cufile_counts().transfers == before
    assert DOUBLES.driver_counts().copied_bytes == copies + MIB
    assert len(io.registry) == 0
    io.close_file(file)


def test_an_allocation_is_registered_once_and_deregistered_at_close(
    make_io: Callable[..., GdsFileIo], tmp_path: Path
) -> None:
    io = make_io()
    file, data = new_file(io, tmp_path)
    before = DOUBLES.cufile_counts()
    with DOUBLES.device_memory(MIB) as arena:
        slots = [arena[start : start + 64 * PAGE] for start in range(0, MIB, 64 * PAGE)]
        for _ in range(3):
            batch = [DeviceRequest(file, n * 64 * PAGE, (slot,)) for n, slot in enumerate(slots)]
            assert io.read_batch(batch) == [0] * 4
        assert device_bytes(arena) == data[:MIB]
        assert DOUBLES.cufile_counts().registrations - before.registrations == 1
        io.close_file(file)
        io.close()
    assert DOUBLES.cufile_counts().deregistrations - before.deregistrations == 1


def test_the_registry_is_bounded_and_does_without(
    make_io: Callable[..., GdsFileIo], tmp_path: Path
) -> None:
    io = make_io(max_registrations=2)
    file, data = new_file(io, tmp_path)
    with contextlib.ExitStack() as memory:
        buffers = [memory.enter_context(DOUBLES.device_memory(16 * PAGE)) for _ in range(4)]
        assert io.read_batch([DeviceRequest(file, 0, (buffer,)) for buffer in buffers]) == [0] * 4
        assert all(device_bytes(buffer) == data[: 16 * PAGE] for buffer in buffers)
        assert len(io.registry) == 2
        io.registry.forget(buffers[0])
        io.registry.forget(buffers[3])  # never was
        assert len(io.registry) == 1
        assert io.read_batch([DeviceRequest(file, 0, (buffers[3],))]) == [0]
        assert len(io.registry) == 2


def test_a_buffer_that_cufile_refuses_still_works(
    make_io: Callable[..., GdsFileIo], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    io = make_io()
    file, data = new_file(io, tmp_path)
    with DOUBLES.device_memory(16 * PAGE) as buffer:
        DOUBLES.refuse_buffers(1)
        for _ in range(3):
            assert io.read_batch([DeviceRequest(file, 0, (buffer,))]) == [0]
        assert device_bytes(buffer) == data[: 16 * PAGE]
    assert len(io.registry) == 0
    assert caplog.text.count("does not register") == 1, "asked once, said once"


def test_a_failing_transfer_is_an_error_of_its_request(
    make_io: Callable[..., GdsFileIo], tmp_path: Path
) -> None:
    io = make_io(io_threads=1)
    file, data = new_file(io, tmp_path)
    with DOUBLES.device_memory(MIB) as buffer:
        parts = [buffer[n * 16 * PAGE : (n + 1) * 16 * PAGE] for n in range(4)]
        DOUBLES.fail_transfers(1)
        batch = [DeviceRequest(file, n * 16 * PAGE, (part,)) for n, part in enumerate(parts)]
        assert io.read_batch(batch) == [errno.EIO, 0, 0, 0]
        assert device_bytes(buffer)[16 * PAGE : 64 * PAGE] == data[16 * PAGE : 64 * PAGE]


def test_device_memory_that_is_not_aligned_is_refused(
    make_io: Callable[..., GdsFileIo], tmp_path: Path
) -> None:
    io = make_io()
    file, _ = new_file(io, tmp_path)
    with DOUBLES.device_memory(4 * PAGE) as buffer:
        odd = [
            DeviceRequest(file, 0, (buffer[1 : PAGE + 1],)),
            DeviceRequest(file, 0, (buffer[:100],)),
            DeviceRequest(file, 512, (buffer[:PAGE],)),
            DeviceRequest(file, 0, (memoryview(bytearray(PAGE + 1))[1:], buffer[:PAGE])),
        ]
        assert io.read_batch(odd) == [errno.EINVAL] * 4
        assert io.write_batch(odd) == [errno.EINVAL] * 4


def test_one_request_may_fill_host_and_device_memory(
    make_io: Callable[..., GdsFileIo], tmp_path: Path
) -> None:
    """A slot: its header where the CPU checks it, its block where the GPU needs it."""
    io = make_io()
    file, data = new_file(io, tmp_path)
    header, other = aligned_buffer(PAGE), aligned_buffer(PAGE)
    with DOUBLES.device_memory(MIB) as block:
        request = DeviceRequest(
            file, MIB, (header, block), check=lambda: bytes(header) == data[MIB : MIB + PAGE]
        )
        assert io.read_batch([request, IoRequest(file, 0, (other,))]) == [0, 0]
        assert bytes(other) == data[:PAGE]
        assert device_bytes(block) == data[MIB + PAGE : 2 * MIB + PAGE]


@pytest.mark.parametrize(("limit", "most"), [(16 * PAGE, 1), (3 * 16 * PAGE, 3)])
def test_bytes_in_flight_are_bounded(
    limit: int, most: int, make_io: Callable[..., GdsFileIo], tmp_path: Path
) -> None:
    io = make_io(max_inflight_bytes=limit, io_threads=8)
    file, _ = new_file(io, tmp_path)
    seen: list[int] = []

    def check() -> bool:
        seen.append(io.inflight_bytes)
        return True

    with DOUBLES.device_memory(MIB) as buffer, DOUBLES.slow_transfers(3000):
        parts = [buffer[n * 16 * PAGE : (n + 1) * 16 * PAGE] for n in range(16)]
        batch = [DeviceRequest(file, n * 16 * PAGE, (p,), check) for n, p in enumerate(parts)]
        with ThreadPoolExecutor(3) as pool:
            for future in [pool.submit(io.read_batch, batch) for _ in range(3)]:
                assert future.result() == [0] * 16
    assert max(seen) <= limit
    assert io.inflight_bytes == 0
    assert DOUBLES.cufile_counts().most_at_once >= most


def test_a_request_above_the_bound_goes_alone(
    make_io: Callable[..., GdsFileIo], tmp_path: Path
) -> None:
    io = make_io(max_inflight_bytes=PAGE)
    file, data = new_file(io, tmp_path)
    with DOUBLES.device_memory(MIB) as buffer:
        assert io.read_batch([DeviceRequest(file, 0, (buffer,))] * 3) == [0] * 3
        assert device_bytes(buffer) == data[:MIB]


def test_the_interpreter_runs_while_a_transfer_does(
    make_io: Callable[..., GdsFileIo], tmp_path: Path
) -> None:
    """A thread that waits for kvikio holds no lock of Python's."""
    io = make_io()
    file, _ = new_file(io, tmp_path)
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks[0] += 1

    ticker = threading.Thread(target=tick)
    with DOUBLES.device_memory(MIB) as buffer, DOUBLES.slow_transfers(300_000):
        ticker.start()
        assert io.read_batch([DeviceRequest(file, 0, (buffer,))]) == [0]
    stop.set()
    ticker.join()
    assert ticks[0] > 20


def test_a_call_that_raises_leaves_nothing_in_flight(
    make_io: Callable[..., GdsFileIo], tmp_path: Path
) -> None:
    """Whoever gets an exception may free its memory at once."""
    io = make_io()
    file, _ = new_file(io, tmp_path)

    def check() -> bool:
        raise ValueError("in a check")

    with DOUBLES.device_memory(MIB) as buffer, DOUBLES.slow_transfers(20_000):
        parts = [buffer[n * 16 * PAGE : (n + 1) * 16 * PAGE] for n in range(16)]
        batch = [DeviceRequest(file, 0, (part,), check) for part in parts]
        with pytest.raises(ValueError, match="in a check"):
            io.read_batch(batch)
        assert io.inflight_bytes == 0


def test_closing_waits_and_what_comes_later_is_refused(
    make_io: Callable[..., GdsFileIo], tmp_path: Path
) -> None:
    """No call hangs because of another that closes."""
    io = make_io(max_inflight_bytes=PAGE)
    file, data = new_file(io, tmp_path)
    with DOUBLES.device_memory(MIB) as buffer, DOUBLES.slow_transfers(50_000):
        parts = [buffer[n * 64 * PAGE : (n + 1) * 64 * PAGE] for n in range(4)]
        batch = [DeviceRequest(file, n * 64 * PAGE, (part,)) for n, part in enumerate(parts)]
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(io.read_batch, batch)
            while not io.inflight_bytes:
                pass
            io.close()
            codes = running.result(timeout=10)
        assert codes[0] == 0
        assert codes == sorted(codes)
        assert codes[-1] == errno.EBADF
        assert device_bytes(parts[0]) == data[: 64 * PAGE]
        assert io.read_batch(batch) == [errno.EBADF] * 4


def test_a_large_request_is_not_starved(make_io: Callable[..., GdsFileIo], tmp_path: Path) -> None:
    """Small ones that keep coming do not overtake it for ever."""
    io = make_io(max_inflight_bytes=32 * PAGE, io_threads=4)
    file, _ = new_file(io, tmp_path)
    stop = threading.Event()
    with DOUBLES.device_memory(MIB) as buffer, DOUBLES.slow_transfers(1000):
        io.registry.ensure(buffer)

        def keep_busy(part: DeviceBuffer) -> None:
            while not stop.is_set():
                assert io.read_batch([DeviceRequest(file, 0, (part,))]) == [0]

        parts = [buffer[n * 16 * PAGE : (n + 1) * 16 * PAGE] for n in range(4)]
        with ThreadPoolExecutor(5) as pool:
            small = [pool.submit(keep_busy, part) for part in parts]
            large = pool.submit(io.read_batch, [DeviceRequest(file, 0, (buffer,))])
            assert large.result(timeout=10) == [0]
            stop.set()
            for future in small:
                future.result(timeout=10)


def test_a_device_buffer_is_what_its_array_is() -> None:
    """Contiguous bytes; slices keep the allocation that is registered."""

    class Array:
        def __init__(self, **changes: object) -> None:
            self.__cuda_array_interface__ = {
                "shape": (4, 8),
                "typestr": "<f4",
                "data": (0x10000, False),
                "strides": None,
                "version": 3,
                **changes,
            }

    array = Array(strides=(32, 4))
    buffer = DeviceBuffer.of(array)
    assert (buffer.address, buffer.nbytes, buffer.base) == (0x10000, 128, (0x10000, 128))
    part = buffer[32:96][32:]
    assert (part.address, part.nbytes, part.base) == (0x10040, 32, (0x10000, 128))
    assert part.owner is array
    assert DeviceBuffer.of(part).address == 0x10040
    for wrong in (Array(strides=(64, 4)), b"host memory"):
        with pytest.raises(InvalidArgumentError):
            DeviceBuffer.of(wrong)
    with pytest.raises(InvalidArgumentError):
        buffer[::2]


# ---------------------------------------------------------------- the choice


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This one with the doubles: what the real probe tries, it finds."""
    folder = Path(os.environ["UCM_DOUBLES"])
    libraries = (str(folder / name) for name in ("libcuda.so.1", "libcufile.so.0"))
    monkeypatch.setenv("LD_PRELOAD", " ".join(libraries))
    (tmp_path / "modules").write_text("nvidia_fs 262144 0 - Live 0x0\n")
    return Machine(
        device_nodes=(tmp_path,), modules=tmp_path / "modules", udev=tmp_path, timeout_s=15
    )


def test_the_probe_finds_the_doubles_and_gds_is_chosen(machine: Machine, tmp_path: Path) -> None:
    io, choice = open_file_io(NvmeConfig(), machine)
    assert choice.kind is IoKind.GDS
    assert isinstance(io, GdsFileIo)
    file, data = new_file(io, tmp_path)
    before = DOUBLES.cufile_counts().transfers
    with DOUBLES.device_memory(MIB) as buffer:
        assert io.read_batch([DeviceRequest(file, 0, (buffer,))]) == [0]
        assert device_bytes(buffer) == data[:MIB]
        io.registry.forget(buffer)
    assert DOUBLES.cufile_counts().transfers == before + 1
    io.close_file(file)
    io.close()


def test_without_nvidia_fs_kvikio_copies(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "modules").write_text("ext4 1 0\n")
    io, choice = open_file_io(NvmeConfig(), machine)
    assert choice.kind is IoKind.KVIKIO_COMPAT
    assert "nvidia_fs is not loaded" in choice.reason
    assert isinstance(io, GdsFileIo)
    assert "compatibility" in repr(io)
    io.close()


def test_the_manager_says_which_and_why(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io_choice, "Machine", lambda: machine)
    nvme = nvme_config(tmp_path / "store", 8)
    manager = Manager(Config(nvme=nvme, memory=MemoryConfig(capacity_bytes=MIB)))
    (_, tier) = manager.status().tiers
    assert (tier.io, tier.io_reason) == ("gds", "every check of GPUDirect Storage passed")
    manager.close()
