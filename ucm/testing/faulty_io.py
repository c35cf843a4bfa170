"""A `FileIo` that loses power, and fails the Nth call: what an honest but cruel disk does.

    call       what becomes of it at once          what a power cut leaves of it
    write      visible to reads, volatile          each 512-byte sector, or not, in any order
    open new   visible, volatile name              the file, or not, unless the folder was synced
    grow       visible, volatile size              the size, or the old one, unless synced
    fdatasync  all of the file is durable          -
    fails      EIO: the volatile part is torn, then forgotten, as kernels do

Everything that changes state counts as a call, in program order, so a run can be cut or failed at
its first, second, ... call until none is left ("the Nth-call loop" of SQLite's I/O error tests). A
seed replays a run. Not thread-safe: batches run one request after another.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
from typing import TYPE_CHECKING

from ucm.storage.file_io import FileHandle, replace_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ucm.storage.file_io import IoRequest

SECTOR_BYTES = 512


class PowerCut(BaseException):
    """The machine is gone; nothing but the files is left."""


class FaultyFileIo:
    """`FileIo` with faults; see the module."""

    def __init__(
        self, *, seed: int = 0, cut_at: int | None = None, faults: Mapping[int, int] | None = None
    ) -> None:
        """Plan the faults.

        Args:
            seed: decides what a cut leaves.
            cut_at: number of the call, from 1, during which the power goes.
            faults: errno by number of the call.
        """
        self.num_calls = 0
        self._random = random.Random(seed)
        self._cut_at = cut_at
        self._faults = dict(faults or {})
        self._is_dead = False
        self._faults_by_name: dict[str, int] = {}
        self._pending: dict[FileHandle, list[tuple[int, bytes]]] = {}
        self._old_sizes: dict[FileHandle, int] = {}
        self._new_names: set[Path] = set()

    def fail_next(self, code: int, count: int = 1) -> None:
        """Fail the next `count` calls with this errno."""
        first = self.num_calls + 1
        self._faults.update(dict.fromkeys(range(first, first + count), code))

    def fail_fdatasync_once(self) -> None:
        """Fail the next `fdatasync` with EIO, whatever is called before it."""
        self._faults_by_name["fdatasync"] = errno.EIO

    @property
    def has_failed(self) -> bool:
        """Whether a planned fault or the cut was reached."""
        return self._is_dead or any(call <= self.num_calls for call in self._faults)

    def open(self, path: Path, *, create: bool, writable: bool) -> FileHandle:
        """See `FileIo.open`."""
        if create:
            self._call()
        flags = os.O_CLOEXEC | (os.O_RDWR if writable else os.O_RDONLY)
        flags |= (os.O_CREAT | os.O_EXCL) if create else 0
        file = FileHandle(os.open(path, flags, 0o600))
        self._pending[file] = []
        if create:
            self._new_names.add(path)
        return file

    def size(self, file: FileHandle) -> int:
        """See `FileIo.size`."""
        return os.fstat(file).st_size

    def preallocate(self, file: FileHandle, size_bytes: int) -> None:
        """See `FileIo.preallocate`."""
        self._call()
        size = self.size(file)
        if size < size_bytes:
            self._old_sizes.setdefault(file, size)
            os.truncate(file, size_bytes)

    def read_batch(self, requests: Sequence[IoRequest]) -> list[int]:
        """See `FileIo.read_batch`. A failing read fills half of its buffers."""
        return [self._read(request) for request in requests]

    def write_batch(self, requests: Sequence[IoRequest]) -> list[int]:
        """See `FileIo.write_batch`. A failing write leaves some of its sectors."""
        return [self._write(request) for request in requests]

    def fdatasync(self, file: FileHandle) -> None:
        """See `FileIo.fdatasync`."""
        try:
            self._call("fdatasync")
        except OSError:
            self._tear(file)
            raise
        for offset, data in self._pending[file]:
            os.pwrite(file, data, offset)
        self._pending[file].clear()
        self._old_sizes.pop(file, None)

    def sync_folder(self, path: Path) -> None:
        """See `FileIo.sync_folder`."""
        self._call()
        self._new_names = {name for name in self._new_names if name.parent != path}

    def replace_file(self, path: Path, data: bytes) -> None:
        """See `FileIo.replace_file`. A cut leaves the old or the new one."""
        try:
            self._call()
        except PowerCut:
            if self._random.random() < 0.5:
                replace_file(path, data)
            raise
        replace_file(path, data)

    def punch_hole(self, file: FileHandle, offset: int, length: int) -> None:
        """See `FileIo.punch_hole`."""
        self._call()
        self._pending[file].append((offset, bytes(length)))

    def close_file(self, file: FileHandle) -> None:
        """See `FileIo.close_file`. What was not synced reaches the disk, as it would in time."""
        for offset, data in self._pending.pop(file, []):
            os.pwrite(file, data, offset)
        os.close(file)

    def close(self) -> None:
        """See `FileIo.close`; closes what a power cut left open."""
        for file in list(self._pending):
            self.close_file(file)

    def _call(self, name: str = "") -> None:
        """Count a call; fail or die if it is its turn."""
        if self._is_dead:
            raise PowerCut
        self.num_calls += 1
        if self.num_calls == self._cut_at:
            self._lose_power()
        code = self._faults.get(self.num_calls, 0) or self._faults_by_name.pop(name, 0)
        if code:
            raise OSError(code, os.strerror(code))

    def _read(self, request: IoRequest) -> int:
        length = sum(buffer.nbytes for buffer in request.buffers)
        data = bytearray(os.pread(request.file, length, request.offset))
        complete = len(data) == length
        data.extend(bytes(length - len(data)))
        for offset, written in self._pending[request.file]:
            _overlay(data, request.offset, written, offset)
        try:
            self._call()
        except OSError as error:
            _scatter(data[: length // 2], request.buffers)
            return error.errno or errno.EIO
        if not complete:
            return errno.ENODATA
        _scatter(data, request.buffers)
        return errno.EBADMSG if request.check is not None and not request.check() else 0

    def _write(self, request: IoRequest) -> int:
        if request.check is not None and not request.check():
            return errno.EBADMSG
        data = b"".join(request.buffers)
        pending = self._pending[request.file]
        pending.append((request.offset, data))  # a cut during the call may leave some of it
        try:
            self._call()
        except OSError as error:
            pending.pop()
            pending.extend(self._some_sectors(request.offset, data))
            return error.errno or errno.EIO
        return 0

    def _lose_power(self) -> None:
        for file in self._pending:
            self._tear(file)
            old_size = self._old_sizes.pop(file, None)
            if old_size is not None and self._random.random() < 0.5:
                os.truncate(file, old_size)
        for name in sorted(self._new_names):
            if self._random.random() < 0.5:
                with contextlib.suppress(FileNotFoundError):
                    name.unlink()
        self._is_dead = True
        raise PowerCut

    def _tear(self, file: FileHandle) -> None:
        """Let some of what was not synced reach the disk, out of order; forget the rest."""
        sectors = [
            sector
            for offset, data in self._pending[file]
            for sector in self._some_sectors(offset, data)
        ]
        self._random.shuffle(sectors)
        for offset, data in sectors:
            os.pwrite(file, data, offset)
        self._pending[file].clear()

    def _some_sectors(self, offset: int, data: bytes) -> list[tuple[int, bytes]]:
        """All, none, or any of the write's sectors."""
        share = self._random.choice((0.0, 0.5, 1.0, self._random.random()))
        return [
            (offset + start, data[start : start + SECTOR_BYTES])
            for start in range(0, len(data), SECTOR_BYTES)
            if self._random.random() < share
        ]


def _overlay(target: bytearray, target_offset: int, data: bytes, offset: int) -> None:
    """Copy what of `data` (at `offset` of the file) lies inside `target`."""
    start, end = max(offset, target_offset), min(offset + len(data), target_offset + len(target))
    if start < end:
        target[start - target_offset : end - target_offset] = data[start - offset : end - offset]


def _scatter(data: bytes | bytearray, buffers: Sequence[memoryview]) -> None:
    """Fill `buffers` in order for as long as there is data."""
    position = 0
    for buffer in buffers:
        part = data[position : position + buffer.nbytes]
        buffer[: len(part)] = part
        position += buffer.nbytes
