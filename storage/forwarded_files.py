"""`ForwardedFiles`: what a `FileIo` does to whole files and folders, done by another one.

For those that differ only in how they transfer: they add `open`, the batches and the closing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from .file_io import FileHandle, FileIo


class ForwardedFiles:
    """See the module, and `FileIo` for every method."""

    def __init__(self, files: FileIo) -> None:
        """Hand calls on to `files`; who made it closes it."""
        self._forwarded = files

    def size(self, file: FileHandle) -> int:
        """See `FileIo.size`."""
        return self._forwarded.size(file)

    def preallocate(self, file: FileHandle, size_bytes: int) -> None:
        """See `FileIo.preallocate`."""
        self._forwarded.preallocate(file, size_bytes)

    def fdatasync(self, file: FileHandle) -> None:
        """See `FileIo.fdatasync`."""
        self._forwarded.fdatasync(file)

    def sync_folder(self, path: Path) -> None:
        """See `FileIo.sync_folder`."""
        self._forwarded.sync_folder(path)

    def replace_file(self, path: Path, data: bytes) -> None:
        """See `FileIo.replace_file`."""
        self._forwarded.replace_file(path, data)

    def punch_hole(self, file: FileHandle, offset: int, length: int) -> None:
        """See `FileIo.punch_hole`."""
        self._forwarded.punch_hole(file, offset, length)
