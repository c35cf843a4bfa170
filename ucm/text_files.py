"""Text of files and folders that a user names: documents to be cut into chunks.

Invariants: a file is text in the named encoding or it is refused with a reason, never mended; what
cannot be read is reported and the others go on; nothing but regular files is opened (a FIFO would
block); the order is the same in every run.
"""

from __future__ import annotations

import codecs
import enum
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError

DEFAULT_ENCODING = "utf-8"
MAX_TEXT_BYTES = 64 << 20
"""A larger file is no document; about 16 million tokens."""

_HEAD_BYTES = 8192
"""What a binary file is told by."""
_MAX_CONTROL_SHARE = 0.01
_CONTROL_BYTES = bytes(set(range(32)) - set(b"\t\n\f\r\x1b"))
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_KNOWN_BINARIES = (
    (b"%PDF-", "a PDF; extract its text first"),
    (b"PK\x03\x04", "a ZIP archive or an office document; extract its text first"),
    (b"\x1f\x8b", "compressed; unpack it first"),
)


class SkipReason(enum.StrEnum):
    """Why a file gives no text."""

    BINARY = "binary"
    EMPTY = "empty"
    ENCODING = "encoding"
    UNREADABLE = "unreadable"
    TOO_LARGE = "too-large"
    SPECIAL = "special"
    """A device, a socket or a pipe."""


@dataclass(frozen=True, slots=True)
class TextFile:
    """A document."""

    name: str
    """What it is called in a collection; printable, whatever the file system says."""
    text: str
    num_bytes: int
    """Of the file."""


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file or folder that gives no text."""

    name: str
    reason: SkipReason
    detail: str
    """In words, with what to do."""


def find_files(
    paths: Sequence[Path], root: Path | None = None
) -> tuple[list[Path], list[SkippedFile]]:
    """The files that `paths` name, folders with all below them; each once, in order of their name.

    Hidden files and folders below a named one are left out; links to folders are not followed.

    Args:
        paths: files and folders.
        root: what names are relative to; see `name_of`.

    Returns:
        The files, and what could not be listed.

    Raises:
        ConfigError: one of `paths` does not exist, or `root` is no folder.
    """
    statuses = [_status_of(path) for path in paths]
    if root is not None and not root.is_dir():
        raise ConfigError(f"{_printable(root)}: names are to begin there, and it is no folder")
    found: dict[Path, None] = {}
    skipped: list[SkippedFile] = []
    for path, status in zip(paths, statuses, strict=True):
        below = _walk(path, skipped, root) if stat.S_ISDIR(status.st_mode) else iter((path,))
        found.update(dict.fromkeys(each.absolute() for each in below))
    unique = {os.path.realpath(each): each for each in reversed(list(found))}
    return sorted(unique.values()), skipped


def _status_of(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise ConfigError(f"cannot read {_printable(path)}: {error.strerror}") from error


def _walk(folder: Path, skipped: list[SkippedFile], root: Path | None) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        place = Path(os.fsdecode(error.filename)) if error.filename else folder
        detail = f"cannot list it: {error.strerror}"
        skipped.append(SkippedFile(name_of(place, root), SkipReason.UNREADABLE, detail))

    for where, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        yield from (Path(where, each) for each in sorted(files) if not each.startswith("."))


def read_text(
    path: Path, root: Path | None = None, encoding: str = DEFAULT_ENCODING
) -> TextFile | SkippedFile:
    """The text of one file, without a byte order mark; blocks on the disk.

    Args:
        path: the file.
        root: what its name is relative to.
        encoding: of the file; see `check_encoding`.
    """
    name = name_of(path, root)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return SkippedFile(name, SkipReason.SPECIAL, "not a regular file")
        if status.st_size > MAX_TEXT_BYTES:
            detail = f"{status.st_size:,} bytes, at most {MAX_TEXT_BYTES:,} are taken; split it"
            return SkippedFile(name, SkipReason.TOO_LARGE, detail)
        data = path.read_bytes()
    except OSError as error:
        return SkippedFile(name, SkipReason.UNREADABLE, f"cannot read it: {error.strerror}")
    found = _decode(data, encoding)
    if isinstance(found, str):
        return TextFile(name, found, len(data))
    return SkippedFile(name, *found)


def check_encoding(encoding: str) -> str:
    """`encoding` as Python calls it.

    Raises:
        ConfigError: it is unknown, or no encoding of text.
    """
    try:
        info = codecs.lookup(encoding)
        "a".encode(encoding)
    except (LookupError, ValueError) as error:
        message = f"encoding {encoding!r} is not known; for example utf-8, latin-1, cp1252, utf-16"
        raise ConfigError(message) from error
    return info.name


def name_of(path: Path, root: Path | None = None) -> str:
    """What a document is called: its path from `root`, or its absolute path, on one line."""
    absolute = path.absolute()
    if root is not None and absolute.is_relative_to(root.absolute()):
        absolute = absolute.relative_to(root.absolute())
    return _printable(absolute)


def _printable(path: Path) -> str:
    """File names are bytes: what is not UTF-8, or cannot be printed, is spelled out."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _decode(data: bytes, encoding: str) -> str | tuple[SkipReason, str]:
    """The text, or why there is none."""
    if not data:
        return SkipReason.EMPTY, "it is empty"
    is_wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
    if not is_wide:
        refused = _why_not_text(data)
        if refused is not None:
            return refused
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        place = f"byte 0x{data[error.start]:02x} at {error.start:,}"
        return SkipReason.ENCODING, f"it is not {encoding}: {place}; convert it"
    if not text.strip():
        return SkipReason.EMPTY, "it holds nothing but white space"
    return text


def _why_not_text(data: bytes) -> tuple[SkipReason, str] | None:
    for mark, name in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return SkipReason.ENCODING, f"it is {name}; convert it"
    for magic, what in _KNOWN_BINARIES:
        if data.startswith(magic):
            return SkipReason.BINARY, f"it is {what}"
    if b"\0" in data:
        return SkipReason.BINARY, "it is not text: it holds zero bytes"
    head = data[:_HEAD_BYTES]
    num_control = len(head) - len(head.translate(None, _CONTROL_BYTES))
    if num_control > _MAX_CONTROL_SHARE * len(head):
        return SkipReason.BINARY, f"it is not text: {num_control} control characters at its start"
    return None
