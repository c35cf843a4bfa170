"""The `FileIo` with which clients read extents themselves."""

from __future__ import annotations

from ucm.storage.file_io import FileIo, PosixFileIo
from ucm.storage.throttled_io import ThrottledIo, bucket_of

from .clock import SystemClock


def open_reader_io(max_read_bytes_per_s: int = 0) -> FileIo:
    """Plain reads on the thread that asks, for host memory; one serves all readers of a process.

    The caller closes it, after its readers.

    Args:
        max_read_bytes_per_s: what all readers together may read a second, as the cache says in
            `NamespaceHandle.max_read_bytes_per_s`; 0 is no limit.
    """
    io: FileIo = PosixFileIo(io_threads=1)
    if max_read_bytes_per_s:
        return ThrottledIo(io, bucket_of(max_read_bytes_per_s, SystemClock()))
    return io
