"""What a medium does to data without anybody being told, for `FaultyFileIo`.

    misdirected write   the bytes land elsewhere in the file; where they belong, the old ones stay
    misdirected read    another place's bytes come back, once
    latent error        some sectors cannot be read (EIO) until they are written again
    rot                 a bit of what was durable flips

It knows every sector that it made doubtful until that is written again, so that a test can tell an
excused miss from a lost block. It outlives the `FaultyFileIo`s of one disk. A seed replays it.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from ucm.storage.file_io import FileHandle

SECTOR_BYTES = 512
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaRates:
    """Probabilities, each for one call."""

    misdirected_write: float = 0.0
    misdirected_read: float = 0.0
    latent_error: float = 0.0
    """After a sync of the file."""
    rot: float = 0.0
    """After a sync of the file."""


class FaultyMedia:
    """The sectors of one disk and what is wrong with them."""

    def __init__(self, seed: int, rates: MediaRates) -> None:
        self.num_faults = 0
        self.rates = rates
        """May be changed at any time."""
        self._random = random.Random(seed)
        self._doubtful: set[tuple[str, int]] = set()
        self._unreadable: set[tuple[str, int]] = set()

    def is_doubtful(self, path: Path, offset: int, length: int) -> bool:
        """Whether a fault has touched the range since it was last written."""
        return any(each in self._doubtful for each in _sectors(path, offset, length))

    def is_unreadable(self, path: Path, offset: int, length: int) -> bool:
        """Whether a read of the range ends in EIO."""
        return any(each in self._unreadable for each in _sectors(path, offset, length))

    def doubt(self, path: Path, offset: int, length: int) -> None:
        """Excuse the range: whoever calls has damaged it."""
        self.num_faults += 1
        self._doubtful.update(_sectors(path, offset, length))

    def place_write(self, path: Path, offset: int, length: int, file_bytes: int) -> int:
        """Where a write to `offset` really goes."""
        actual = self._elsewhere(self.rates.misdirected_write, offset, length, file_bytes)
        if actual == offset:
            written = _sectors(path, offset, length)
            self._doubtful.difference_update(written)
            self._unreadable.difference_update(written)
        else:
            self.doubt(path, offset, length)
            self.doubt(path, actual, length)
            self._unreadable.difference_update(_sectors(path, actual, length))
        return actual

    def place_read(self, path: Path, offset: int, length: int, file_bytes: int) -> int:
        """Where a read of `offset` really comes from."""
        actual = self._elsewhere(self.rates.misdirected_read, offset, length, file_bytes)
        if actual != offset:  # whoever asked may conclude that the place is damaged
            self.doubt(path, offset, length)
        return actual

    def age(self, path: Path, file: FileHandle) -> None:
        """A sync has ended: let the medium do its worst."""
        file_bytes = os.fstat(file).st_size
        if file_bytes and self._random.random() < self.rates.latent_error:
            start = self._random.randrange(file_bytes // SECTOR_BYTES) * SECTOR_BYTES
            length = SECTOR_BYTES * self._random.randint(1, 8)
            self.doubt(path, start, length)
            self._unreadable.update(_sectors(path, start, length))
        if file_bytes and self._random.random() < self.rates.rot:
            offset = self._random.randrange(file_bytes)
            (byte,) = os.pread(file, 1, offset)
            os.pwrite(file, bytes([byte ^ (1 << self._random.randrange(8))]), offset)
            self.doubt(path, offset, 1)

    def _elsewhere(self, rate: float, offset: int, length: int, file_bytes: int) -> int:
        places = (file_bytes - length) // PAGE_BYTES
        if places < 1 or self._random.random() >= rate:
            return offset
        return self._random.randint(0, places) * PAGE_BYTES


def _sectors(path: Path, offset: int, length: int) -> set[tuple[str, int]]:
    first, last = offset // SECTOR_BYTES, (offset + length - 1) // SECTOR_BYTES
    return {(str(path), sector) for sector in range(first, last + 1)}
