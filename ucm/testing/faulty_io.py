"""A `FileIo` that loses power, and fails the Nth call: what an honest but cruel disk does.

    call       what becomes of it at once          what a power cut leaves of it
    write      visible to reads, volatile          each 512-byte sector, or not, in any order
    open new   visible, volatile name              the file, or not, unless the folder was synced
    grow       visible, volatile size              the size, or the old one, unless synced
    fdatasync  all of the file is durable          -
    fails      EIO: the volatile part is torn, then forgotten, as kernels do

With a `FaultyMedia` it also misdirects, rots and loses sectors without a word.

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

from .faulty_media import SECTOR_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ucm.storage.file_io import IoRequest

    from .faulty_media import FaultyMedia

SURVIVAL = ("some", "none", "all")
"""What of the unsynced survives a cut: a random part, torn at sectors, nothing, or everything."""


class PowerCut(BaseException):
    """The machine is gone; nothing but the files is left."""


class FaultyFileIo:
    """`FileIo` with faults; see the module."""

    def __init__(
        self,
        *,
        seed: int = 0,
        cut_at: int | None = None,
        faults: Mapping[int, int] | None = None,
        survival: str = "some",
        media: FaultyMedia | None = None,
    ) -> None:
        """Plan the faults.

        Args:
            seed: decides what a cut leaves.
            cut_at: number of the call, from 1, during which the power goes.
            faults: errno by number of the call.
            survival: one of `SURVIVAL`.
            media: what lies below and lies.
        """
        assert survival in SURVIVAL, survival
        self.num_calls = 0
        self._random = random.Random(seed)
        self._cut_at = cut_at
        self._faults = dict(faults or {})
        self._is_dead = False
        self.survival = survival
        self._media = media
        self._paths: dict[FileHandle, Path] = {}
        self._failed_syncs: set[str] = set()
        """Names of files whose sync failed: another one would be a retry."""
        self._faults_by_name: dict[str, int] = {}
        self._pending: dict[FileHandle, list[tuple[int, bytes]]] = {}
        self._old_sizes: dict[FileHandle, int] = {}
        self._new_names: set[Path] = set()

    def fail_next(self, code: int, count: int = 1) -> None:
        """Fail the next `count` calls with this errno."""
        first = self.num_calls + 1
        self._faults.update(dict.fromkeys(range(first, first + count), code))

    def fail_once(self, name: str) -> None:
        """Fail the next call of this name with EIO, whatever is called before it."""
        self._faults_by_name[name] = errno.EIO

    @property
    def is_dead(self) -> bool:
        """Whether the power is gone."""
        return self._is_dead

    @property
    def has_failed(self) -> bool:
        """Whether a planned fault or the cut was reached."""
        return self._is_dead or any(call <= self.num_calls for call in self._faults)

    def open(self, path: Path, *, create: bool, writable: bool) -> FileHandle:
        """See `FileIo.open`."""
        if create:
            self.call()
        flags = os.O_CLOEXEC | (os.O_RDWR if writable else os.O_RDONLY)
        flags |= (os.O_CREAT | os.O_EXCL) if create else 0
        file = FileHandle(os.open(path, flags, 0o600))
        self._pending[file] = []
        self._paths[file] = path
        if create:
            self._new_names.add(path)
            self._failed_syncs.discard(path.name)
        return file

    def size(self, file: FileHandle) -> int:
        """See `FileIo.size`."""
        return os.fstat(file).st_size

    def preallocate(self, file: FileHandle, size_bytes: int) -> None:
        """See `FileIo.preallocate`."""
        try:
            self.call()
        except OSError:
            self._doubt(file, 0, size_bytes)
            raise
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
        name = self._paths[file].name
        assert name not in self._failed_syncs, f"{name} was synced again after a failed sync"
        try:
            self.call("fdatasync")
        except OSError:
            self._failed_syncs.add(name)
            self._tear(file)
            self._doubt(file, 0, self.size(file))
            raise
        for offset, data in self._pending[file]:
            os.pwrite(file, data, offset)
        self._pending[file].clear()
        self._old_sizes.pop(file, None)
        if self._media is not None:
            self._media.age(self._paths[file], file)

    def sync_folder(self, path: Path) -> None:
        """See `FileIo.sync_folder`."""
        self.call()
        self._new_names = {name for name in self._new_names if name.parent != path}

    def replace_file(self, path: Path, data: bytes) -> None:
        """See `FileIo.replace_file`. A cut leaves the old or the new one."""
        try:
            self.call()
        except PowerCut:
            if self._random.random() < 0.5:
                replace_file(path, data)
            raise
        replace_file(path, data)

    def punch_hole(self, file: FileHandle, offset: int, length: int) -> None:
        """See `FileIo.punch_hole`."""
        self.call()
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

    def call(self, name: str = "") -> None:
        """Count a call; fail or die if it is its turn.

        Raises:
            OSError: a planned fault.
            PowerCut: the power goes now, or is gone.
        """
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
        path, start = self._paths[request.file], request.offset
        if self._media is not None:
            start = self._media.place_read(path, start, length, self.size(request.file))
        data = bytearray(os.pread(request.file, length, start))
        complete = len(data) == length
        data.extend(bytes(length - len(data)))
        for offset, written in self._pending[request.file]:
            _overlay(data, start, written, offset)
        try:
            self.call()
        except OSError as error:
            _scatter(data[: length // 2], request.buffers)
            self._doubt(request.file, start, length)
            return error.errno or errno.EIO
        if self._media is not None and self._media.is_unreadable(path, start, length):
            return errno.EIO
        if not complete:
            return errno.ENODATA
        _scatter(data, request.buffers)
        return errno.EBADMSG if request.check is not None and not request.check() else 0

    def _write(self, request: IoRequest) -> int:
        if request.check is not None and not request.check():
            return errno.EBADMSG
        data = b"".join(request.buffers)
        pending, start = self._pending[request.file], request.offset
        if self._media is not None:
            path, file_bytes = self._paths[request.file], self.size(request.file)
            start = self._media.place_write(path, start, len(data), file_bytes)
        pending.append((start, data))  # a cut during the call may leave some of it
        try:
            self.call()
        except OSError as error:
            pending.pop()
            pending.extend(self._some_sectors(start, data))
            return error.errno or errno.EIO
        return 0

    def _doubt(self, file: FileHandle, offset: int, length: int) -> None:
        """Excuse what a failed call was about."""
        if self._media is not None:
            self._media.doubt(self._paths[file], offset, length)

    def _lose_power(self) -> None:
        for file in self._pending:
            self._tear(file)
            old_size = self._old_sizes.pop(file, None)
            if old_size is not None and not self._survives():
                os.truncate(file, old_size)
        for name in sorted(self._new_names):
            if not self._survives():
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

    def survival_share(self) -> float:
        """Which share of one write's sectors a cut leaves."""
        shares = {"none": 0.0, "all": 1.0}
        some = self._random.choice((0.0, 0.5, 1.0, self._random.random()))
        return shares.get(self.survival, some)

    def _survives(self) -> bool:
        """Whether one indivisible change outlives a cut."""
        return {"none": False, "all": True}.get(self.survival, self._random.random() < 0.5)

    def _some_sectors(self, offset: int, data: bytes) -> list[tuple[int, bytes]]:
        """All, none, or any of the write's sectors."""
        share = self.survival_share()
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
