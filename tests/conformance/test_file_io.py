"""`PosixFileIo` passes the suite of all `FileIo`s; the GPU's runs in test_gds_doubles.py."""

from __future__ import annotations

from ucm.clock import SystemClock
from ucm.storage.file_io import FileIo, PosixFileIo
from ucm.storage.throttled_io import ThrottledIo, bucket_of
from ucm.testing.file_io_conformance import FileIoTests


class TestPosixFileIo(FileIoTests):
    def make_io(self) -> FileIo:
        return PosixFileIo(3)


class TestThrottledIo(FileIoTests):
    def make_io(self) -> FileIo:
        return ThrottledIo(PosixFileIo(3), bucket_of(1 << 30, SystemClock()))
