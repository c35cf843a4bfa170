"""The `FileIo` with which clients read extents themselves."""

from __future__ import annotations

from ucm.storage.file_io import FileIo, PosixFileIo


def open_reader_io() -> FileIo:
    """Plain reads on the thread that asks, for host memory; one serves all readers of a process.

    The caller closes it, after its readers. What the cache lets its clients read a second is in
    the plan (`LoadPlan.read_limit`), and readers keep to it.
    """
    return PosixFileIo(io_threads=1)
