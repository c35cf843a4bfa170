"""The segment files of one namespace: where a slot lies, how the files grow, which are retired.

    slot number    0 1 2 ... s-1 | s ... 2s-1 | ...      s = slots_per_segment
    file           0000.seg      | 0001.seg   | ...

A segment's disk space is reserved when it is created, so that a full disk shows then and not in
the middle of a write. `SegmentBudget` is shared by all namespaces of a store. A segment whose
fsync failed once is *retired*: nothing in it is read or written again until `fsck --repair`.
Syncs of one segment are serialised with its retirement: of two threads that sync it, the kernel
tells only one of a failure, and the other must learn of it before it commits.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import threading
from typing import TYPE_CHECKING

import numpy as np

from ucm.errors import TierUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from .file_io import FileHandle, FileIo
    from .format import Superblock
    from .tier import SlotId

log = logging.getLogger(__name__)

MAX_SEGMENTS = 10_000
"""Four digits in the file name."""

NO_SPACE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_NAME = re.compile(r"(\d{4})\.seg")


def _free_bytes(folder: Path) -> int:
    """What the disk still has for this user; 0 when it does not say."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return 0
    return disk.f_bavail * disk.f_frsize


class SegmentBudget:
    """Bytes of segments that all namespaces of a store may have. Thread-safe.

    Segments of namespaces that nobody has open make way when there is no room otherwise: after a
    change of model, say, the old one's blocks must not keep the new one's out for ever.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        idle_bytes: Callable[[], int] = lambda: 0,
        drop_idle: Callable[[], int] = lambda: 0,
    ) -> None:
        """Begin with nothing reserved.

        Args:
            capacity_bytes: the limit.
            idle_bytes: how much of what is reserved could make way; must not block.
            drop_idle: makes one segment go; its bytes, 0 when there is none. May block.
        """
        self._capacity_bytes = capacity_bytes
        self._idle_bytes = idle_bytes
        self._drop_idle = drop_idle
        self._reserved_bytes = 0
        self._stuck_bytes = 0
        """Idle bytes of which none could be dropped when that was tried."""
        self._lock = threading.Lock()

    @property
    def reserved_bytes(self) -> int:
        """What all segments take."""
        return self._reserved_bytes

    @property
    def remaining_bytes(self) -> int:
        """What may still be reserved; 0 when the capacity was lowered below what is there."""
        idle_bytes = self._idle_bytes()
        if idle_bytes == self._stuck_bytes:
            idle_bytes = 0
        return max(0, self._capacity_bytes - self._reserved_bytes + idle_bytes)

    def reserve(self, size_bytes: int) -> bool:
        """Take `size_bytes` if there are as many or idle segments can make way. May block."""
        while not self._take(size_bytes):
            dropped_bytes = self._drop_idle()
            if not dropped_bytes:
                self._stuck_bytes = self._idle_bytes()
                return False
            self.release(dropped_bytes)
        return True

    def _take(self, size_bytes: int) -> bool:
        with self._lock:
            if self._reserved_bytes + size_bytes > self._capacity_bytes:
                return False
            self._reserved_bytes += size_bytes
            return True

    def count_existing(self, size_bytes: int) -> None:
        """Count a segment that is on the disk already, even above the capacity."""
        with self._lock:
            self._reserved_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """Give `size_bytes` back."""
        with self._lock:
            self._reserved_bytes -= size_bytes


def segment_numbers(folder: Path) -> list[int]:
    """Numbers of the segment files in `folder`, ascending; empty when there is no such folder."""
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


class Segments:
    """Open segment files of one namespace. Thread-safe; growing and syncing block."""

    def __init__(
        self,
        folder: Path,
        superblock: Superblock,
        io: FileIo,
        budget: SegmentBudget,
        *,
        read_only: bool = False,
    ) -> None:
        """Open what is there; `budget` has counted the files already.

        A file that is missing or shorter than it should be is completed where the disk allows it;
        otherwise its segment is retired. `read_only` changes nothing on the disk.

        Raises:
            TierUnavailableError: the folder cannot be read.
        """
        self._folder = folder
        self._superblock = superblock
        self._slot_bytes = superblock.slot_bytes
        self._slots_per_segment = superblock.slots_per_segment
        self._io = io
        self._budget = budget
        self._read_only = read_only
        self._files: list[FileHandle | None] = []
        self._sync_locks: list[threading.Lock] = []
        self._retired: set[int] = set()
        self._grow_lock = threading.Lock()
        self._full_at_free_bytes = -1
        """Free disk when a segment last found no room; -1 when it found some."""
        try:
            numbers = segment_numbers(folder)
        except OSError as error:
            raise TierUnavailableError(f"cannot read {folder}: {error}") from error
        for number in range(numbers[-1] + 1 if numbers else 0):
            self._append(self._open_existing(number))

    @property
    def num_segments(self) -> int:
        """Segments that have slot numbers, retired ones included."""
        return len(self._files)

    @property
    def num_slots(self) -> int:
        """Slots in all segments."""
        return self.num_segments * self._superblock.slots_per_segment

    @property
    def retired(self) -> frozenset[int]:
        """Segments that are out of use."""
        return frozenset(self._retired)

    @property
    def disk_is_full(self) -> bool:
        """Whether the last segment that the budget allowed found no room on the disk."""
        return self._full_at_free_bytes >= 0

    def growable_slots(self) -> int:
        """Slots that `grow` could add by the budget; 0 while the disk is known to be full.

        A full disk is believed to have room again once a whole segment more of it is free.
        """
        full_at, size_bytes = self._full_at_free_bytes, self._superblock.segment_bytes
        if full_at >= 0 and _free_bytes(self._folder) < full_at + size_bytes:
            return 0
        room = self._budget.remaining_bytes // self._superblock.segment_bytes
        return min(room, MAX_SEGMENTS - self.num_segments) * self._superblock.slots_per_segment

    def segment_of(self, slot: SlotId) -> int:
        """Which segment a slot lies in."""
        return slot // self._slots_per_segment

    def slots_of(self, segment: int) -> range:
        """The slot numbers of a segment."""
        count = self._superblock.slots_per_segment
        return range(segment * count, (segment + 1) * count)

    def locate(self, slot: SlotId) -> tuple[FileHandle, int] | None:
        """File and byte offset of a slot's header; None when retired, or when there is no such."""
        segment, index = divmod(slot, self._slots_per_segment)
        if not 0 <= segment < len(self._files):
            return None
        file = self._files[segment]
        if file is None or segment in self._retired:
            return None
        return file, index * self._slot_bytes

    def are_there(self, slots: NDArray[np.int64]) -> bool:
        """Whether `locate` would find every one of `slots`."""
        lost = [n for n, file in enumerate(self._files) if file is None or n in self._retired]
        if not len(slots):
            return True
        is_lost = bool(np.isin(slots // self._slots_per_segment, lost).any())
        return int(slots.min()) >= 0 and int(slots.max()) < self.num_slots and not is_lost

    def grow(self) -> int:
        """Create and preallocate one more segment.

        Returns:
            The number of new slots at the end; 0 when the budget or the disk has no room.
        """
        size_bytes = self._superblock.segment_bytes
        with self._grow_lock:
            number = self.num_segments
            if number >= MAX_SEGMENTS or not self._budget.reserve(size_bytes):
                return 0
            file = self._create(number)
            if file is None:
                self._full_at_free_bytes = _free_bytes(self._folder)
                self._budget.release(size_bytes)
                return 0
            self._full_at_free_bytes = -1
            self._append(file)
            return self._superblock.slots_per_segment

    def sync(self, segments: Iterable[int]) -> set[int]:
        """Make writes to `segments` durable; one that fails is retired, not tried again.

        Returns:
            Those that are retired now: what was written to them must not be committed.
        """
        failed = set()
        for segment in sorted(set(segments)):
            file = self._files[segment]
            with self._sync_locks[segment]:
                if file is None or segment in self._retired:
                    failed.add(segment)
                    continue
                try:
                    self._io.fdatasync(file)
                except OSError as error:
                    log.error("segment %04d: fdatasync failed, retired: %s", segment, error)  # noqa: TRY400  the errno says it all
                    self._retired.add(segment)
                    failed.add(segment)
        return failed

    def retire(self, segment: int) -> None:
        """Take a segment out of use: nothing in it is read or written any more."""
        self._retired.add(segment)

    def close(self) -> None:
        """Close the files. Idempotent."""
        for number, file in enumerate(self._files):
            if file is not None:
                with contextlib.suppress(OSError):  # nothing is buffered: all was synced
                    self._io.close_file(file)
            self._files[number] = None

    def _append(self, file: FileHandle | None) -> None:
        if file is None:
            self._retired.add(len(self._files))
        self._files.append(file)
        self._sync_locks.append(threading.Lock())

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:04d}.seg"

    def _open_existing(self, number: int) -> FileHandle | None:
        path = self._path(number)
        create = not self._read_only and not path.exists()
        try:
            file = self._io.open(path, create=create, writable=not self._read_only)
        except OSError as error:
            log.warning("segment %s cannot be opened, its blocks are missing: %s", path, error)
            return None
        if create:
            self._budget.count_existing(self._superblock.segment_bytes)
        try:
            if not self._read_only and self._io.size(file) < self._superblock.segment_bytes:
                log.warning("segment %s is too short: completing it", path)
                self._io.preallocate(file, self._superblock.segment_bytes)
        except OSError as error:
            log.warning("segment %s cannot be completed, its blocks are missing: %s", path, error)
            self._io.close_file(file)
            return None
        return file

    def _create(self, number: int) -> FileHandle | None:
        path = self._path(number)
        file: FileHandle | None = None
        try:
            file = self._io.open(path, create=True, writable=True)
            self._io.preallocate(file, self._superblock.segment_bytes)
            self._io.fdatasync(file)
            self._io.sync_folder(self._folder)
        except OSError as error:
            level = logging.INFO if error.errno in NO_SPACE_ERRNOS else logging.WARNING
            log.log(level, "segment %s cannot be created: %s", path, error)
            self._discard(path, file)
            return None
        return file

    def _discard(self, path: Path, file: FileHandle | None) -> None:
        if file is not None:
            self._io.close_file(file)
        with contextlib.suppress(OSError):  # an empty leftover is completed at the next opening
            path.unlink(missing_ok=True)
