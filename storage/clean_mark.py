"""What a clean end leaves beside LMDB, so that the next opening need not look at every record.

    file `clean`     "UCMCLEA2" | size of data.mdb (8) | its xxh3_64 (8)
                     | size of `snapshot` (8) | its xxh3_64 (8) | xxh3_64 of the 40 bytes
    file `snapshot`  the blocks in columns, see `entry_table.py`; size 0 in the mark: there is none

The mark is a file because it must be read *before* LMDB's map is made: a truncated or garbled
`data.mdb` can kill the process that maps it. It is written last and removed first, so a crash at
any time leaves none, and a snapshot without a mark is nothing. Records that need more than reading
(an orphan, two in one slot, a damaged one) are not snapshotted: the opening reads the index then.

Functions raise `OSError`; the caller translates.
"""

from __future__ import annotations

import logging
import struct
from typing import TYPE_CHECKING

import xxhash

from ucm.checksum import CHECKSUM_SEED, checksum

from .entry_table import decode_table, encode_table
from .file_io import replace_file

if TYPE_CHECKING:
    from pathlib import Path

    from .entry_table import EntryTable

log = logging.getLogger(__name__)

_MAGIC = b"UCMCLEA2"
_MARK = struct.Struct("<8sQQQQQ")
_NUMBER = struct.Struct("<Q")
_READ_BYTES = 4 << 20


def matches(folder: Path) -> bool:
    """Whether there is a mark and it has the digest of `data.mdb`."""
    try:
        mark = _read_mark(folder)
        return mark is not None and mark[0] == _digest_of(folder / "data.mdb")
    except FileNotFoundError:
        return False


def read_snapshot(folder: Path) -> EntryTable | None:
    """The blocks as the last clean end left them; None without, or when the mark says otherwise."""
    try:
        mark = _read_mark(folder)
        if mark is None or not mark[1][0]:
            return None
        data = (folder / "snapshot").read_bytes()
    except FileNotFoundError:
        return None
    if (len(data), checksum(data)) != mark[1]:
        log.warning("the snapshot of the index %s is damaged: reading the index itself", folder)
        return None
    return decode_table(data)


def vouch(folder: Path, table: EntryTable | None) -> None:
    """Write snapshot and mark for the closed, synced `data.mdb` of `folder`."""
    mark = _encode_mark(_digest_of(folder / "data.mdb"), _write_snapshot(folder, table))
    replace_file(folder / "clean", mark)


def remove(folder: Path) -> None:
    """Take mark and snapshot away; the caller makes it durable."""
    (folder / "clean").unlink(missing_ok=True)
    (folder / "snapshot").unlink(missing_ok=True)


def _write_snapshot(folder: Path, table: EntryTable | None) -> tuple[int, int]:
    """Leave the table as a file; its size and checksum, or zeros when there is none."""
    if table is None:
        return 0, 0
    data = encode_table(table)
    try:
        replace_file(folder / "snapshot", data)
    except OSError as error:
        log.warning("the index %s is not snapshotted: %s", folder, error)
        return 0, 0
    return len(data), checksum(data)


def _digest_of(path: Path) -> tuple[int, int]:
    """Size and checksum of a file."""
    digest, size = xxhash.xxh3_64(seed=CHECKSUM_SEED), 0
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
            size += len(part)
    return size, digest.intdigest()


def _encode_mark(data: tuple[int, int], snapshot: tuple[int, int]) -> bytes:
    body = _MARK.pack(_MAGIC, *data, *snapshot, 0)[: -_NUMBER.size]
    return body + _NUMBER.pack(checksum(body))


def _read_mark(folder: Path) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Size and digest of `data.mdb` and of the snapshot; None when it is damaged."""
    mark = (folder / "clean").read_bytes()
    if len(mark) != _MARK.size:
        return None
    _, *numbers, _ = _MARK.unpack(mark)
    data, snapshot = (numbers[0], numbers[1]), (numbers[2], numbers[3])
    return (data, snapshot) if mark == _encode_mark(data, snapshot) else None
