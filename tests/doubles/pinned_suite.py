"""`PinnedFileIo` on the driver's double: what it copies, in which order, and what it gives back.

Run by tests/conformance/test_on_doubles.py in a process of its own. It runs on a double of the CUDA
driver: it proves our code, not NVIDIA's. On lazy streams a copy is done only when somebody waits
for it, so whoever waits too little reads what was in memory before.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.config import NvmeConfig
from ucm.errors import TierUnavailableError
from ucm.kernels.cuda.driver import CudaDriver
from ucm.storage.device import DeviceBuffer, DeviceRequest
from ucm.storage.file_io import FileHandle, IoRequest, aligned_buffer
from ucm.storage.io_choice import IoKind, Machine, open_file_io
from ucm.storage.pinned_io import PIECE_BYTES, PinnedFileIo, pieces_of
from ucm.testing.doubles import Doubles, device_bytes
from ucm.testing.file_io_conformance import FILE_BYTES, PAGE, FileIoTests, TestBuffer, pattern

DOUBLES = Doubles(Path(os.environ["UCM_DOUBLES"]))
MIB = 1 << 20


class TestHostMemoryPinned(FileIoTests):
    """As the daemon uses it."""

    def make_io(self) -> PinnedFileIo:
        return PinnedFileIo(3)


class TestDeviceMemoryPinned(FileIoTests):
    """The whole suite, with buffers in "device" memory."""

    @pytest.fixture(autouse=True)
    def _memory(self) -> Iterator[None]:
        with contextlib.ExitStack() as self.memory:
            yield

    def make_io(self) -> PinnedFileIo:
        return PinnedFileIo(3)

    def make_buffer(self, size: int) -> TestBuffer:
        buffer = self.memory.enter_context(DOUBLES.device_memory(size))
        return TestBuffer(buffer, device_bytes(buffer))


class TestDeviceMemoryPinnedLazily(TestDeviceMemoryPinned):
    @pytest.fixture(autouse=True)
    def _lazily(self, _memory: None) -> Iterator[None]:
        with DOUBLES.lazy_streams():
            yield


@pytest.fixture
def io() -> Iterator[PinnedFileIo]:
    made = PinnedFileIo(3)
    yield made
    made.close()


@pytest.fixture(params=["eager", "lazy"])
def _order(request: pytest.FixtureRequest) -> Iterator[None]:
    with DOUBLES.lazy_streams() if request.param == "lazy" else contextlib.nullcontext():
        yield


def new_file(io: PinnedFileIo, folder: Path) -> tuple[FileHandle, bytes]:
    data = pattern(FILE_BYTES)
    (folder / "data").write_bytes(data)
    return io.open(folder / "data", create=False, writable=True), data


@pytest.mark.parametrize(
    ("sizes", "limit", "shapes"),
    [
        ((4,), 4, [[4]]),
        ((9,), 4, [[4], [4], [1]]),
        ((1, 2, 3), 4, [[1, 2, 1], [2]]),
        ((4, 0, 4), 4, [[4], [4]]),
        ((1, 1, 1), 4, [[1, 1, 1]]),
        ((), 4, []),
    ],
)
def test_requests_are_cut_into_pieces(
    sizes: tuple[int, ...], limit: int, shapes: list[list[int]]
) -> None:
    buffers = tuple(memoryview(bytearray(size)) for size in sizes)
    pieces = list(pieces_of(DeviceRequest(FileHandle(0), 100, buffers), limit))
    assert [[part.buffer.nbytes for part in piece.parts] for piece in pieces] == shapes
    offset = 100
    for piece in pieces:
        assert piece.offset == offset
        assert [part.at for part in piece.parts] == [
            sum(before.buffer.nbytes for before in piece.parts[:index])
            for index in range(len(piece.parts))
        ]
        offset += piece.nbytes
    assert offset == 100 + sum(sizes)


@pytest.mark.usefixtures("_order")
def test_pages_are_not_reused_before_their_copy_ended(io: PinnedFileIo, tmp_path: Path) -> None:
    """More pieces than pages, both ways."""
    file, data = new_file(io, tmp_path)
    with DOUBLES.device_memory(FILE_BYTES) as buffer:
        assert io.read_batch([DeviceRequest(file, 0, (buffer,))]) == [0]
        assert device_bytes(buffer) == data
        device_bytes(buffer)[:] = data[::-1]
        assert io.write_batch([DeviceRequest(file, 0, (buffer,))]) == [0]
    assert (tmp_path / "data").read_bytes() == data[::-1]


@pytest.mark.usefixtures("_order")
def test_a_check_sees_what_is_on_the_device(io: PinnedFileIo, tmp_path: Path) -> None:
    """And a header in host memory beside it."""
    file, data = new_file(io, tmp_path)
    header, other = aligned_buffer(PAGE), aligned_buffer(PAGE)
    with DOUBLES.device_memory(MIB) as block:

        def check() -> bool:
            whole = bytes(header) + bytes(device_bytes(block))
            return whole == data[MIB : 2 * MIB + PAGE]

        request = DeviceRequest(file, MIB, (header, block), check)
        assert io.read_batch([request, IoRequest(file, 0, (other,))]) == [0, 0]
        assert bytes(other) == data[:PAGE]


def test_every_copy_is_from_or_to_pinned_memory(io: PinnedFileIo, tmp_path: Path) -> None:
    """Copies of pageable memory are not asynchronous."""
    file, _ = new_file(io, tmp_path)
    before = DOUBLES.driver_counts()
    with DOUBLES.device_memory(FILE_BYTES) as buffer:
        assert io.read_batch([DeviceRequest(file, 0, (buffer,))]) == [0]
        assert io.write_batch([DeviceRequest(file, 0, (buffer,))]) == [0]
    after = DOUBLES.driver_counts()
    assert after.copied_bytes - before.copied_bytes == 2 * FILE_BYTES
    assert after.copies - before.copies == 2 * FILE_BYTES // PIECE_BYTES
    assert after.pageable_copies == before.pageable_copies


def test_small_buffers_share_a_system_call(
    io: PinnedFileIo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slabs of a block lie together in the file, and apart in the pool."""
    file, data = new_file(io, tmp_path)
    calls: list[int] = []
    real = os.preadv

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    with DOUBLES.device_memory(2 * MIB) as pool:
        slabs = tuple(pool[start : start + 4 * PAGE] for start in range(0, 2 * MIB, 8 * PAGE))
        assert io.read_batch([DeviceRequest(file, PAGE, slabs)]) == [0]
        found = b"".join(bytes(device_bytes(slab)) for slab in slabs)
    assert found == data[PAGE : PAGE + len(found)]
    assert calls == [PAGE]


def test_pinned_memory_is_bounded_and_given_back(tmp_path: Path) -> None:
    before = DOUBLES.driver_counts()
    io = PinnedFileIo(2)
    file, _ = new_file(io, tmp_path)
    with DOUBLES.device_memory(FILE_BYTES) as buffer:
        parts = [buffer[n * 16 * PAGE : (n + 1) * 16 * PAGE] for n in range(64)]
        batch = [DeviceRequest(file, 0, (part,)) for part in parts]
        assert io.read_batch(batch) == [0] * 64
        during = DOUBLES.driver_counts()
        assert 2 <= during.pinned_ranges - before.pinned_ranges <= 4
        assert "of 2 lanes" in repr(io)
        io.close_file(file)
        io.close()
        assert io.read_batch(batch[:1]) == [errno.EBADF]
    after = DOUBLES.driver_counts()
    for name in ("pinned_ranges", "streams", "events"):
        assert getattr(after, name) == getattr(before, name), name


def test_host_memory_needs_no_driver(tmp_path: Path) -> None:
    """A context takes hundreds of megabytes of device memory: not for a daemon that needs none."""

    def load() -> CudaDriver:
        raise TierUnavailableError("injected")

    io = PinnedFileIo(2, load)
    file, data = new_file(io, tmp_path)
    page = aligned_buffer(PAGE)
    assert io.read_batch([IoRequest(file, PAGE, (page,))] * 3) == [0] * 3
    assert bytes(page) == data[PAGE : 2 * PAGE]
    with DOUBLES.device_memory(PAGE) as buffer:
        both = (DeviceRequest(file, 0, (buffer,)), IoRequest(file, 0, (page,)))
        assert io.read_batch(both) == [errno.EIO, 0]
    io.close()


@pytest.mark.usefixtures("_order")
def test_a_copy_that_is_refused_fails_its_request(
    io: PinnedFileIo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, data = new_file(io, tmp_path)
    with DOUBLES.device_memory(FILE_BYTES) as buffer:
        whole = DeviceRequest(file, 0, (buffer,))
        DOUBLES.fail_copies(1)
        assert io.read_batch([whole]) == [errno.EIO]
        assert "a transfer of device memory failed" in caplog.text
        assert io.read_batch([whole]) == [0]
        DOUBLES.fail_copies(1)
        assert io.write_batch([whole]) == [errno.EIO]
        assert DOUBLES.driver_counts().waiting_operations == 0
    assert (tmp_path / "data").read_bytes() == data


def test_memory_that_is_not_aligned_is_refused(io: PinnedFileIo, tmp_path: Path) -> None:
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


@pytest.mark.usefixtures("_order")
def test_a_call_that_raises_leaves_nothing_in_flight(io: PinnedFileIo, tmp_path: Path) -> None:
    """Whoever gets an exception may free its memory at once."""
    file, data = new_file(io, tmp_path)
    late = threading.Event()

    def refuse() -> bool:
        late.set()
        raise ValueError("in a check")

    def wait_for_refusal() -> bool:
        return late.wait(timeout=10)

    with DOUBLES.device_memory(MIB) as buffer:
        half = MIB // 2
        batch = [
            DeviceRequest(file, 0, (buffer[:half],), wait_for_refusal),
            DeviceRequest(file, 0, (buffer[half:],), refuse),
        ]
        with pytest.raises(ValueError, match="in a check"):
            io.read_batch(batch)
        assert DOUBLES.driver_counts().waiting_operations == 0
        assert device_bytes(buffer)[:half] == data[:half]


def test_many_threads_share_the_lanes(io: PinnedFileIo, tmp_path: Path) -> None:
    file, data = new_file(io, tmp_path)
    failed: list[str] = []

    def work(buffer: DeviceBuffer, offset: int) -> None:
        for _ in range(20):
            if io.read_batch([DeviceRequest(file, offset, (buffer,))]) != [0]:
                failed.append("a read")
            if device_bytes(buffer) != data[offset : offset + buffer.nbytes]:
                failed.append("wrong bytes")

    with contextlib.ExitStack() as memory:
        buffers = [memory.enter_context(DOUBLES.device_memory(MIB // 2)) for _ in range(6)]
        threads = [
            threading.Thread(target=work, args=(buffer, n * (MIB // 2)))
            for n, buffer in enumerate(buffers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []


def test_without_kvikio_it_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, io: PinnedFileIo
) -> None:
    """By what the real probe tries, with the driver's double in it."""
    monkeypatch.setenv("LD_PRELOAD", str(Path(os.environ["UCM_DOUBLES"]) / "libcuda.so.1"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    machine = Machine(device_nodes=(tmp_path,), timeout_s=15)
    chosen, choice = open_file_io(NvmeConfig(), machine)
    assert choice.kind is IoKind.PINNED
    assert choice.reason == "no GPUDirect: kvikio is not installed"
    file, data = new_file(io, tmp_path)
    with DOUBLES.device_memory(MIB) as buffer:
        assert chosen.read_batch([DeviceRequest(file, 0, (buffer,))]) == [0]  # type: ignore[list-item]
        assert device_bytes(buffer) == data[:MIB]
    chosen.close()
