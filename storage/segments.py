"""The segment files of one namespace: where a slot lies, how the files grow, which are retired.

    slot number    0 1 2 ... s-1 | s ... 2s-1 | ...      s = slots_per_segment
    file           0000.seg      | 0001.seg   | ...

A namespace with a codec has segments of two classes: compact ones (`0001.compact.seg`) with slots
for encoded blocks, and full ones for blocks that do not fit those. Both take s numbers; the last
ones of a full segment stand for nothing (`storage.format`).

A segment's disk space is reserved when it is created, so that a full disk shows then and not in
the middle of a write; `budget.py` says whether there may be one more. A file that is not there is
a segment that has *left* (see `shrink.py`): its numbers are kept for it, and it comes back, empty,
before new numbers are begun. A segment whose
fsync failed once is *retired*: nothing in it is read or written again until `fsck --repair`.
Syncs of one segment are serialised with its retirement: of two threads that sync it, the kernel
tells only one of a failure, and the other must learn of it before it commits.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import re
import threading
from typing import TYPE_CHECKING

import numpy as np

from ucm.errors import TierUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from .budget import TenantBudget
    from .file_io import FileHandle, FileIo
    from .format import Superblock
    from .tier import SlotId

log = logging.getLogger(__name__)

MAX_SEGMENTS = 10_000
"""Four digits in the file name."""

NO_SPACE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_NAME = re.compile(r"(\d{4})(\.compact)?\.seg")


def _free_bytes(folder: Path) -> int:
    """What the disk still has for this user; 0 when it does not say."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return 0
    return disk.f_bavail * disk.f_frsize


def segment_numbers(folder: Path) -> list[int]:
    """Numbers of the segment files in `folder`, ascending; empty when there is no such folder."""
    return sorted(segment_files(folder))


def segment_files(folder: Path) -> dict[int, Path]:
    """The segment files in `folder` by number; empty when there is no such folder.

    Of two files with one number, which no crash leaves behind, the compact one counts.
    """
    if not folder.is_dir():
        return {}
    names = sorted(entry.name for entry in folder.iterdir() if _NAME.fullmatch(entry.name))
    return {int(name[:4]): folder / name for name in reversed(names)}


def segment_path(folder: Path, number: int, *, is_compact: bool) -> Path:
    """Where a segment's file lies."""
    return folder / f"{number:04d}{'.compact' if is_compact else ''}.seg"


class Segments:
    """Open segment files of one namespace. Thread-safe; growing and syncing block."""

    def __init__(
        self,
        folder: Path,
        superblock: Superblock,
        io: FileIo,
        budget: TenantBudget,
        *,
        read_only: bool = False,
    ) -> None:
        """Open what is there; `budget` has counted the files already.

        A file that is shorter than it should be is completed where the disk allows it; otherwise
        its segment is retired. One that is missing has left. `read_only` changes nothing on the
        disk.

        Raises:
            TierUnavailableError: the folder cannot be read.
        """
        self._folder = folder
        self._superblock = superblock
        self._slot_bytes = superblock.slot_bytes
        self._slots_per_segment = superblock.slots_per_segment
        self._full: list[bool] = []
        """Whether a segment has full slots where slots are compact otherwise."""
        self._io = io
        self._budget = budget
        self._read_only = read_only
        self._files: list[FileHandle | None] = []
        self._file_ids: list[int] = []
        self._next_file_id = itertools.count(1)
        self._sync_locks: list[threading.Lock] = []
        self._retired: set[int] = set()
        self._left: set[int] = set()
        self._grow_lock = threading.Lock()
        self._close_lock = threading.Lock()
        """A file and its id are changed, or a descriptor duplicated; nobody waits inside."""
        self._full_at_free_bytes = -1
        """Free disk when a segment last found no room; -1 when there is some, as far as known."""
        try:
            paths = segment_files(folder)
        except OSError as error:
            raise TierUnavailableError(f"cannot read {folder}: {error}") from error
        for number in range(max(paths, default=-1) + 1):
            path = paths.get(number)
            if path is None:
                self._left.add(number)
            file = None if path is None else self._open_existing(path)
            self._append(file, path or self._path(number))

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
    def left(self) -> frozenset[int]:
        """Segments that have left the disk."""
        return frozenset(self._left)

    @property
    def segment_bytes(self) -> int:
        """Size of each file."""
        return self._superblock.segment_bytes

    @property
    def file_bytes(self) -> int:
        """Disk space of all files."""
        return (self.num_segments - len(self._left)) * self._superblock.segment_bytes

    @property
    def disk_is_full(self) -> bool:
        """Whether the disk had no room for a segment that the budget allowed, when last asked."""
        return self._full_at_free_bytes >= 0

    def look_for_room(self) -> None:
        """Ask a disk that was full whether it has room: a whole segment more of it is free."""
        full_at = self._full_at_free_bytes
        if full_at >= 0 and _free_bytes(self._folder) >= full_at + self._superblock.segment_bytes:
            self._full_at_free_bytes = -1

    def growable_slots(self) -> int:
        """Slots that `grow` could add by the budget; 0 while the disk is known to be full.

        Does not ask the disk, which may hang: callers hold locks. `look_for_room` does.
        """
        if self.disk_is_full:
            return 0
        room = self._budget.remaining_bytes // self._superblock.segment_bytes
        numbers = MAX_SEGMENTS - self.num_segments + len(self._left)
        return min(room, numbers) * self._superblock.slots_per_segment

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
        if not self._full[segment]:
            return file, index * self._slot_bytes
        if index >= self._superblock.full_slots_per_segment:
            return None
        return file, index * self._superblock.full_slot_bytes

    def file_id(self, segment: int) -> int:
        """Which file the segment has now: another number after it left and came back."""
        return self._file_ids[segment]

    @contextlib.contextmanager
    def duplicate(self, segment: int) -> Iterator[tuple[int, int] | None]:
        """The segment's file as a descriptor of the body's own, and its id; None: out of use.

        Waits for no sync and no other call of the disk: the file may be removed meanwhile.

        Raises:
            OSError: the process has no descriptor left.
        """
        with self._close_lock:
            file = self._files[segment] if 0 <= segment < len(self._files) else None
            if file is None or segment in self._retired:
                own = None
            else:
                own = os.dup(file), self._file_ids[segment]
        try:
            yield own
        finally:
            if own is not None:
                os.close(own[0])

    def is_full_slot(self, slot: SlotId) -> bool:
        """Whether the slot holds a block as it is though the namespace's others are encoded."""
        segment = slot // self._slots_per_segment
        return segment < len(self._full) and self._full[segment]

    def holds_plain_blocks(self, slot: SlotId) -> bool:
        """Whether blocks lie in the slot as they are, with or without a codec for others."""
        return not self._superblock.has_compact_slots or self.is_full_slot(slot)

    def num_real_slots(self, segment: int) -> int:
        """Slots of a segment that have a place; its other numbers stand for nothing."""
        if self._full[segment]:
            return self._superblock.full_slots_per_segment
        return self._slots_per_segment

    def are_there(self, slots: NDArray[np.int64]) -> bool:
        """Whether `locate` would find every one of `slots`."""
        if not len(slots):
            return True
        if int(slots.min()) < 0 or int(slots.max()) >= self.num_slots:
            return False
        lost = [n for n, file in enumerate(self._files) if file is None or n in self._retired]
        real = np.array([self.num_real_slots(n) for n in range(self.num_segments)])
        segments, numbers = np.divmod(slots, self._slots_per_segment)
        return not np.isin(segments, lost).any() and bool((numbers < real[segments]).all())

    def grow(self, *, full: bool = False) -> int:
        """Create and preallocate one more segment, behind all others.

        `full` is one with full slots where blocks are encoded otherwise.

        Returns:
            The number of new slots at the end; 0 when the budget or the disk has no room.
        """
        with self._grow_lock:
            number = self.num_segments
            path = self._path(number, full=full)
            file = self._make(path) if number < MAX_SEGMENTS else None
            if file is None:
                return 0
            self._append(file, path)
            return self.num_real_slots(number)

    def bring_back(self, *, full: bool = False) -> int:
        """Create and preallocate the first segment of a class that has left, empty.

        Returns:
            Its number; -1 when none has left, or the budget or the disk has no room.
        """
        with self._grow_lock:
            left = [number for number in self._left if self._full[number] == full]
            number = min(left, default=-1)
            file = self._make(self._path(number, full=full)) if number >= 0 else None
            if file is None:
                return -1
            with self._close_lock:
                self._files[number] = file
                self._file_ids[number] = next(self._next_file_id)
            self._left.discard(number)
            return number

    def remove(self, segment: int) -> bool:
        """Take a segment off the disk and give its bytes back to the budget.

        The caller guarantees that no record names a slot of it, durably, and that nothing reads or
        writes it. A crash in between shows the file, empty, or no file.

        Returns:
            Whether it is gone; False when it is retired, has left, or cannot be deleted.
        """
        with self._sync_locks[segment]:
            file = self._files[segment]
            if file is None or segment in self._retired:
                return False
            # whoever else has the file open must not keep its disk space, nor find blocks in it
            with contextlib.suppress(OSError):  # not every file system can
                self._io.punch_hole(file, 0, self._superblock.segment_bytes)
            try:
                self._path(segment, full=self._full[segment]).unlink()
            except OSError as error:
                log.warning("segment %04d cannot be deleted: %s", segment, error)
                return False
            self._close_file(segment)
            self._left.add(segment)
        try:
            self._io.sync_folder(self._folder)
        except OSError as error:
            log.warning("segment %04d may be back, empty, after a crash: %s", segment, error)
        self._budget.release(self._superblock.segment_bytes)
        return True

    def _make(self, path: Path) -> FileHandle | None:
        """A new file within the budget; None when there is no room."""
        size_bytes = self._superblock.segment_bytes
        if not self._budget.reserve(size_bytes):
            return None
        file = self._create(path)
        if file is None:
            self._full_at_free_bytes = _free_bytes(self._folder)
            self._budget.release(size_bytes)
            return None
        self._full_at_free_bytes = -1
        return file

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
        for number in range(len(self._files)):
            self._close_file(number)

    def _close_file(self, segment: int) -> None:
        with self._close_lock:  # from here on nobody duplicates it
            file, self._files[segment] = self._files[segment], None
        if file is not None:
            with contextlib.suppress(OSError):  # nothing is buffered: all was synced
                self._io.close_file(file)

    def _append(self, file: FileHandle | None, path: Path) -> None:
        if file is None and len(self._files) not in self._left:
            self._retired.add(len(self._files))
        is_compact = path == segment_path(self._folder, len(self._full), is_compact=True)
        self._full.append(self._superblock.has_compact_slots and not is_compact)
        self._sync_locks.append(threading.Lock())
        with self._close_lock:
            self._file_ids.append(next(self._next_file_id))
            self._files.append(file)

    def _path(self, number: int, *, full: bool = False) -> Path:
        is_compact = self._superblock.has_compact_slots and not full
        return segment_path(self._folder, number, is_compact=is_compact)

    def _open_existing(self, path: Path) -> FileHandle | None:
        try:
            file = self._io.open(path, create=False, writable=not self._read_only)
        except OSError as error:
            log.warning("segment %s cannot be opened, its blocks are missing: %s", path, error)
            return None
        try:
            if not self._read_only and self._io.size(file) < self._superblock.segment_bytes:
                log.warning("segment %s is too short: completing it", path)
                self._io.preallocate(file, self._superblock.segment_bytes)
        except OSError as error:
            log.warning("segment %s cannot be completed, its blocks are missing: %s", path, error)
            self._io.close_file(file)
            return None
        return file

    def _create(self, path: Path) -> FileHandle | None:
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
