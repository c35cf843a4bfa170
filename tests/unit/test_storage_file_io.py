"""PosixFileIo: alignment, short transfers, errors, atomic replacement."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.storage.file_io import (
    BOUNCE_BYTES,
    FileHandle,
    IoRequest,
    PosixFileIo,
    aligned_buffer,
    is_aligned,
    replace_file,
)

PAGE = 4096


@pytest.fixture
def io() -> Iterator[PosixFileIo]:
    io = PosixFileIo(3)
    yield io
    io.close()


@pytest.fixture
def file(io: PosixFileIo, tmp_path: Path) -> Iterator[FileHandle]:
    file = io.open(tmp_path / "data", create=True, writable=True)
    io.preallocate(file, 4 << 20)
    yield file
    io.close_file(file)


def pattern(size: int, seed: int = 1) -> bytes:
    return bytes((seed * 31 + i * 7 + i // 251) % 256 for i in range(PAGE)) * (size // PAGE)


def test_what_is_written_is_read(io: PosixFileIo, file: FileHandle) -> None:
    sources = [aligned_buffer(2 * PAGE) for _ in range(8)]
    for number, source in enumerate(sources):
        source[:] = pattern(2 * PAGE, number)
    writes = [
        IoRequest(file, number * 2 * PAGE, (source[:PAGE], source[PAGE:]))
        for number, source in enumerate(sources)
    ]
    assert io.write_batch(writes) == [0] * 8
    io.fdatasync(file)
    targets = [aligned_buffer(2 * PAGE) for _ in range(8)]
    reads = [IoRequest(file, n * 2 * PAGE, (target,)) for n, target in enumerate(targets)]
    assert io.read_batch(reads) == [0] * 8
    assert targets == sources
    assert io.size(file) == 4 << 20


def test_buffers_anywhere_are_bounced(io: PosixFileIo, file: FileHandle) -> None:
    size = BOUNCE_BYTES + PAGE
    odd = memoryview(bytearray(size + 1))[1:]
    odd[:] = pattern(size)
    assert not is_aligned(odd)
    head = aligned_buffer(PAGE)
    head[:] = pattern(PAGE, 9)
    assert io.write_batch([IoRequest(file, PAGE, (head, odd))] * 5) == [0] * 5
    target, back = aligned_buffer(PAGE), memoryview(bytearray(size + 3))[3:]
    assert io.read_batch([IoRequest(file, PAGE, (target, back))]) == [0]
    assert (target, back) == (head, odd)


def test_short_transfers_are_continued(
    io: PosixFileIo, file: FileHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write, real_read = os.pwritev, os.preadv

    def short_write(fd: int, buffers: list[memoryview], offset: int) -> int:
        return real_write(fd, [buffers[0][:PAGE]], offset)

    def short_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        return real_read(fd, [buffers[0][:PAGE]], offset)

    monkeypatch.setattr(os, "pwritev", short_write)
    monkeypatch.setattr(os, "preadv", short_read)
    source, target = aligned_buffer(5 * PAGE), aligned_buffer(5 * PAGE)
    source[:] = pattern(5 * PAGE)
    halves = (source[: 2 * PAGE], source[2 * PAGE :])
    assert io.write_batch([IoRequest(file, 0, halves)]) == [0]
    assert io.read_batch([IoRequest(file, 0, (target,))]) == [0]
    assert target == source


def test_errors_are_results(
    io: PosixFileIo, file: FileHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == PAGE:
            raise OSError(errno.ENOSPC, "injected")
        return sum(buffer.nbytes for buffer in buffers)

    monkeypatch.setattr(os, "pwritev", no_room)
    page = aligned_buffer(PAGE)
    requests = [IoRequest(file, number * PAGE, (page,)) for number in range(3)]
    assert io.write_batch(requests) == [0, errno.ENOSPC, 0]


def test_the_end_of_the_file_is_no_data(io: PosixFileIo, file: FileHandle) -> None:
    page = aligned_buffer(2 * PAGE)
    assert io.read_batch([IoRequest(file, (4 << 20) - PAGE, (page,))]) == [errno.ENODATA]
    os.ftruncate(file, PAGE + 100)  # not a whole page
    assert io.read_batch([IoRequest(file, PAGE, (page[:PAGE],))]) == [errno.ENODATA]


def test_a_check_that_says_no_fails_its_request(io: PosixFileIo, file: FileHandle) -> None:
    page = aligned_buffer(PAGE)
    page[:] = pattern(PAGE)
    refused = IoRequest(file, 0, (page,), check=lambda: False)
    allowed = IoRequest(file, PAGE, (page,), check=lambda: True)
    assert io.write_batch([refused, allowed]) == [errno.EBADMSG, 0]
    assert io.read_batch([refused, allowed]) == [errno.EBADMSG, 0]
    assert bytes(page) == pattern(PAGE), "what was refused was not written"
    target = aligned_buffer(PAGE)
    assert io.read_batch([IoRequest(file, 0, (target,))]) == [0]
    assert bytes(target) == bytes(PAGE)


def test_a_hole_reads_as_zeros(io: PosixFileIo, file: FileHandle) -> None:
    page = aligned_buffer(PAGE)
    page[:] = pattern(PAGE)
    assert io.write_batch([IoRequest(file, PAGE, (page,))]) == [0]
    io.punch_hole(file, PAGE, PAGE)
    assert io.read_batch([IoRequest(file, PAGE, (page,))]) == [0]
    assert bytes(page) == bytes(PAGE)
    with pytest.raises(OSError, match=r"nvalid|upport"):
        io.punch_hole(file, -PAGE, PAGE)


def test_a_file_system_without_direct_io_is_used_buffered(
    io: PosixFileIo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def refuse_direct(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "injected")
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse_direct)
    assert io.is_direct
    file = io.open(tmp_path / "buffered", create=True, writable=True)
    assert not io.is_direct
    page = aligned_buffer(PAGE)
    page[:] = pattern(PAGE)
    assert io.write_batch([IoRequest(file, 0, (page,))]) == [0]
    assert io.read_batch([IoRequest(file, 0, (page,))]) == [0]
    io.close_file(file)


def test_links_are_not_followed_and_old_files_not_created(io: PosixFileIo, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "target").write_bytes(b"")
    with pytest.raises(OSError, match="symbolic"):
        io.open(tmp_path / "link", create=False, writable=True)
    with pytest.raises(FileExistsError):
        io.open(tmp_path / "target", create=True, writable=True)


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "superblock"
    replace_file(path, b"old")
    for name in ("write", "fsync"):

        def fail(*_: object) -> int:
            raise OSError(errno.ENOSPC, "injected")

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="injected"):
                replace_file(path, b"new")
        assert path.read_bytes() == b"old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["superblock"]
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
