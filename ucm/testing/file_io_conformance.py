"""What every `FileIo` must do. A test subclasses `FileIoTests` and says how one is made.

class TestPosixFileIo(FileIoTests):
def make_io(self) -> FileIo:
return PosixFileIo(3)

The memory that is transferred is the subclass's, too (`make_buffer`): the same suite runs over host
memory and over device memory.
"""

from __future__ import annotations

import abc
import errno
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from ucm.storage.device import DeviceRequest
from ucm.storage.file_io import IoRequest, aligned_buffer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ucm.storage.device import DeviceBuffer, DeviceFileIo
    from ucm.storage.file_io import FileHandle, FileIo

PAGE = 4096
FILE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class TestBuffer:
    """Memory to transfer, and its bytes as the test sees them."""

    __test__ = False

    memory: memoryview | DeviceBuffer
    view: memoryview

    def part(self, start: int, stop: int) -> TestBuffer:
        """A slice of it."""
        return TestBuffer(self.memory[start:stop], self.view[start:stop])


def pattern(size: int, seed: int = 1) -> bytes:
    """Bytes that differ for each seed."""
    return random.Random(seed).randbytes(size)


class FileIoTests(abc.ABC):
    """Behaviour that the tiers rely on."""

    @abc.abstractmethod
    def make_io(self) -> FileIo | DeviceFileIo:
        """A fresh one."""

    def make_buffer(self, size: int) -> TestBuffer:
        """`size` bytes on a page boundary."""
        memory = aligned_buffer(size)
        return TestBuffer(memory, memory)

    @pytest.fixture
    def io(self) -> Iterator[FileIo | DeviceFileIo]:
        """One, closed afterwards."""
        io = self.make_io()
        yield io
        io.close()

    @pytest.fixture
    def file(self, io: FileIo, tmp_path: Path) -> Iterator[FileHandle]:
        """A file of 4 MiB."""
        file = io.open(tmp_path / "data", create=True, writable=True)
        io.preallocate(file, FILE_BYTES)
        yield file
        io.close_file(file)

    def request(
        self,
        file: FileHandle,
        offset: int,
        *buffers: TestBuffer,
        check: Callable[[], bool] | None = None,
    ) -> IoRequest:
        """A request for the buffers, of the class that their memory takes."""
        memory = tuple(buffer.memory for buffer in buffers)
        if all(isinstance(part, memoryview) for part in memory):
            return IoRequest(file, offset, memory, check)  # type: ignore[arg-type]
        return DeviceRequest(file, offset, memory, check)  # type: ignore[return-value]

    def filled(self, size: int, seed: int = 1) -> TestBuffer:
        """A buffer of `pattern`."""
        buffer = self.make_buffer(size)
        buffer.view[:] = pattern(size, seed)
        return buffer

    def test_what_is_written_is_read(self, io: FileIo, file: FileHandle) -> None:
        """Batches of several requests of several buffers, each to its own place."""
        sources = [self.filled(4 * PAGE, seed) for seed in range(20)]
        writes = [
            self.request(file, n * 4 * PAGE, source.part(0, PAGE), source.part(PAGE, 4 * PAGE))
            for n, source in enumerate(sources)
        ]
        assert io.write_batch(writes) == [0] * 20
        io.fdatasync(file)
        targets = [self.make_buffer(4 * PAGE) for _ in range(20)]
        reads = [self.request(file, n * 4 * PAGE, target) for n, target in enumerate(targets)]
        assert io.read_batch(reads) == [0] * 20
        assert [target.view for target in targets] == [source.view for source in sources]
        assert io.size(file) == FILE_BYTES

    def test_a_large_request_is_transferred_whole(self, io: FileIo, file: FileHandle) -> None:
        """Larger than any piece that an implementation works in."""
        source, target = self.filled(FILE_BYTES), self.make_buffer(FILE_BYTES)
        assert io.write_batch([self.request(file, 0, source)]) == [0]
        assert io.read_batch([self.request(file, 0, target)]) == [0]
        assert target.view == source.view

    def test_nothing_but_the_range_is_touched(self, io: FileIo, file: FileHandle) -> None:
        """Neither in the file nor in memory."""
        assert io.write_batch([self.request(file, 0, self.filled(8 * PAGE, 1))]) == [0]
        assert io.write_batch([self.request(file, 2 * PAGE, self.filled(PAGE, 2))]) == [0]
        target = self.filled(4 * PAGE, 3)
        assert io.read_batch([self.request(file, 2 * PAGE, target.part(PAGE, 3 * PAGE))]) == [0]
        before, after = pattern(4 * PAGE, 3)[:PAGE], pattern(4 * PAGE, 3)[3 * PAGE :]
        middle = pattern(PAGE, 2) + pattern(8 * PAGE, 1)[3 * PAGE : 4 * PAGE]
        assert bytes(target.view) == before + middle + after

    def test_host_memory_anywhere_is_transferred(self, io: FileIo, file: FileHandle) -> None:
        """Python's own buffers are not page-aligned."""
        size = (1 << 20) + PAGE
        odd = memoryview(bytearray(size + 1))[1:]
        odd[:] = pattern(size)
        assert io.write_batch([IoRequest(file, PAGE, (odd,))] * 5) == [0] * 5
        back = memoryview(bytearray(size + 3))[3:]
        assert io.read_batch([IoRequest(file, PAGE, (back,))]) == [0]
        assert back == odd

    def test_read_only_memory_can_be_written_from(self, io: FileIo, file: FileHandle) -> None:
        """A store's source needs no permission to be changed."""
        source = aligned_buffer(2 * PAGE)
        source[:] = pattern(2 * PAGE)
        assert io.write_batch([IoRequest(file, 0, (source.toreadonly(),))]) == [0]
        target = self.make_buffer(2 * PAGE)
        assert io.read_batch([self.request(file, 0, target)]) == [0]
        assert target.view == source

    def test_empty_batches_do_nothing(self, io: FileIo) -> None:
        """No request, no result."""
        assert io.read_batch([]) == []
        assert io.write_batch([]) == []

    def test_the_end_of_the_file_is_no_data(self, io: FileIo, file: FileHandle) -> None:
        """Beginning before it, at it, behind it; the others of the batch are not disturbed."""
        pages = [self.make_buffer(2 * PAGE) for _ in range(4)]
        places = (FILE_BYTES - PAGE, FILE_BYTES, 2 * FILE_BYTES, 0)
        batch = [self.request(file, *each) for each in zip(places, pages, strict=True)]
        assert io.read_batch(batch) == [errno.ENODATA] * 3 + [0]
        os.ftruncate(file, PAGE + 100)  # not a whole page
        assert io.read_batch([self.request(file, PAGE, pages[0].part(0, PAGE))]) == [errno.ENODATA]

    def test_a_check_sees_what_was_read(self, io: FileIo, file: FileHandle) -> None:
        """It runs once, after the transfer; no check after a failed one."""
        source = self.filled(PAGE)
        assert io.write_batch([self.request(file, PAGE, source)]) == [0]
        target, seen = self.make_buffer(PAGE), list[bytes]()

        def check() -> bool:
            seen.append(bytes(target.view))
            return True

        requests = [
            self.request(file, PAGE, target, check=check),
            self.request(file, FILE_BYTES, self.make_buffer(PAGE), check=check),
        ]
        assert io.read_batch(requests) == [0, errno.ENODATA]
        assert seen == [bytes(source.view)]

    def test_a_check_that_says_no_fails_its_request(self, io: FileIo, file: FileHandle) -> None:
        """Reads after, writes before the transfer."""
        page = self.filled(PAGE)
        refused = self.request(file, 0, page, check=lambda: False)
        allowed = self.request(file, PAGE, page, check=lambda: True)
        assert io.write_batch([refused, allowed]) == [errno.EBADMSG, 0]
        assert io.read_batch([refused, allowed]) == [errno.EBADMSG, 0]
        target = self.make_buffer(PAGE)
        assert io.read_batch([self.request(file, 0, target)]) == [0]
        assert bytes(target.view) == bytes(PAGE), "what was refused was not written"

    def test_a_check_that_raises_is_the_callers_error(self, io: FileIo, file: FileHandle) -> None:
        """It comes out of the call, and the next calls work."""

        def check() -> bool:
            raise ValueError("in a check")

        pages = [self.make_buffer(PAGE) for _ in range(8)]
        batch = [self.request(file, n * PAGE, page, check=check) for n, page in enumerate(pages)]
        for call in (io.read_batch, io.write_batch):
            with pytest.raises(ValueError, match="in a check"):
                call(batch)
        assert io.read_batch([self.request(file, 0, pages[0])]) == [0]

    def test_a_call_that_raises_has_ended(self, io: FileIo, file: FileHandle) -> None:
        """Whoever gets the exception may use the memory of all its requests again."""
        started, ended = threading.Event(), threading.Event()

        def refuse() -> bool:
            started.wait(timeout=0.5)  # in vain where checks run one after another
            raise ValueError("in a check")

        def take_longer() -> bool:
            started.set()
            ended.wait(timeout=0.1)  # by nobody: time for the other one to be seen
            ended.set()
            return True

        pages = [self.make_buffer(PAGE) for _ in range(2)]
        batch = [
            self.request(file, 0, page, check=check)
            for page, check in zip(pages, (refuse, take_longer), strict=True)
        ]
        with pytest.raises(ValueError, match="in a check"):
            io.read_batch(batch)
        assert ended.is_set() == started.is_set()

    def test_threads_do_not_disturb_each_other(self, io: FileIo, file: FileHandle) -> None:
        """Each writes and reads its own part, all at once."""
        num_threads, rounds = 4, 8
        start = threading.Barrier(num_threads)

        def work(thread: int) -> None:
            start.wait()
            for turn in range(rounds):
                source = self.filled(8 * PAGE, thread * rounds + turn)
                target = self.make_buffer(8 * PAGE)
                place = thread * 8 * PAGE
                assert io.write_batch([self.request(file, place, source)]) == [0]
                assert io.read_batch([self.request(file, place, target)]) == [0]
                assert target.view == source.view

        with ThreadPoolExecutor(num_threads) as pool:
            for future in [pool.submit(work, thread) for thread in range(num_threads)]:
                future.result()

    def test_a_read_only_file_takes_no_writes(self, io: FileIo, tmp_path: Path) -> None:
        """A result like any other error."""
        (tmp_path / "old").write_bytes(pattern(PAGE))
        file = io.open(tmp_path / "old", create=False, writable=False)
        target = self.make_buffer(PAGE)
        assert io.write_batch([self.request(file, 0, target)]) == [errno.EBADF]
        assert io.read_batch([self.request(file, 0, target)]) == [0]
        assert bytes(target.view) == pattern(PAGE)
        io.close_file(file)

    def test_files_are_opened_strictly(self, io: FileIo, tmp_path: Path) -> None:
        """No links, no surprise, nobody else's eyes."""
        (tmp_path / "link").symlink_to(tmp_path / "target")
        (tmp_path / "target").write_bytes(b"")
        with pytest.raises(OSError, match="symbolic"):
            io.open(tmp_path / "link", create=False, writable=True)
        with pytest.raises(FileExistsError):
            io.open(tmp_path / "target", create=True, writable=True)
        with pytest.raises(FileNotFoundError):
            io.open(tmp_path / "missing", create=False, writable=True)
        assert not (tmp_path / "missing").exists()
        io.close_file(io.open(tmp_path / "new", create=True, writable=True))
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600

    def test_closing_a_file_gives_its_descriptors_back(self, io: FileIo, tmp_path: Path) -> None:
        """All of them."""
        io.close_file(io.open(tmp_path / "first", create=True, writable=True))
        before = set(os.listdir("/proc/self/fd"))
        for turn in range(10):
            io.close_file(io.open(tmp_path / f"data{turn}", create=True, writable=True))
        assert set(os.listdir("/proc/self/fd")) == before

    def test_preallocating_keeps_what_is_there(self, io: FileIo, file: FileHandle) -> None:
        """And reserves the space."""
        page = self.filled(PAGE)
        assert io.write_batch([self.request(file, 0, page)]) == [0]
        io.preallocate(file, 2 * FILE_BYTES)
        assert io.size(file) == 2 * FILE_BYTES
        assert os.fstat(file).st_blocks * 512 >= 2 * FILE_BYTES
        target = self.make_buffer(PAGE)
        assert io.read_batch([self.request(file, 0, target)]) == [0]
        assert target.view == page.view

    def test_a_hole_reads_as_zeros(self, io: FileIo, file: FileHandle) -> None:
        """Its space is given back; a wrong range is an error."""
        page = self.filled(PAGE)
        assert io.write_batch([self.request(file, PAGE, page)]) == [0]
        io.fdatasync(file)
        io.punch_hole(file, PAGE, PAGE)
        assert io.read_batch([self.request(file, PAGE, page)]) == [0]
        assert bytes(page.view) == bytes(PAGE)
        with pytest.raises(OSError, match=r"nvalid|upport"):
            io.punch_hole(file, -PAGE, PAGE)

    def test_small_files_are_replaced_whole(self, io: FileIo, tmp_path: Path) -> None:
        """And names are made durable."""
        path = tmp_path / "superblock"
        for data in (b"old", b"new and longer"):
            io.replace_file(path, data)
            assert path.read_bytes() == data
        assert [entry.name for entry in tmp_path.iterdir()] == ["superblock"]
        io.sync_folder(tmp_path)
        with pytest.raises(FileNotFoundError):
            io.sync_folder(tmp_path / "missing")

    def test_closes_twice(self) -> None:
        """Closing is idempotent."""
        io = self.make_io()
        io.close()
        io.close()
