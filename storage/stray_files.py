"""What lies in a data folder and should not, or is open to others: for `ucm fsck`.

ns/            <hex of a namespace>/   *.tmp: a namespace that was being made or dropped
ns/<hex>/      superblock  tenant  index/  segments/  index.damaged/   *.tmp, index.new/: cut short
.../segments/  NNNN.seg, NNNN.compact.seg
.../index/     data.mdb  lock.mdb  clean  snapshot   *.tmp

Reads no file's contents and follows no link.
"""

from __future__ import annotations

import enum
import re
import shutil
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .folder import current_uid

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NAMESPACE = re.compile(r"[0-9a-f]{64}")
_LEFTOVER = re.compile(r".*\.tmp|index\.new", re.DOTALL)
_KNOWN = {
    "": re.compile(r"superblock|index|index\.damaged|segments|tenant"),
    "segments": re.compile(r"\d{4}(\.compact)?\.seg"),
    "index": re.compile(r"data\.mdb|lock\.mdb|clean|snapshot"),
}
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class StrayKind(enum.StrEnum):
    """What is wrong with a file."""

    FOREIGN = "foreign"
    """Nothing of ours has this name."""
    LEFTOVER = "leftover"
    """A write or an opening that a crash cut short."""
    PERMISSIONS = "permissions"
    """Ours, but others may write to it, or it is another user's."""


@dataclass(frozen=True, slots=True)
class Stray:
    """One file or folder that is not as we leave them."""

    kind: StrayKind
    path: Path
    what: str
    """In words, printable."""
    namespace: str = ""
    """The folder's name, 64 hex digits; empty for what belongs to none."""


def find_strays(root: Path) -> Iterator[Stray]:
    """Look at every name below `root`, the folder of namespaces, and at no contents.

    Raises:
        OSError: a folder cannot be listed.
    """
    yield from _open_to_others(root, "")
    for entry in sorted(root.iterdir()):
        if not _NAMESPACE.fullmatch(entry.name):
            yield _unknown(entry, "")
        elif entry.is_dir():
            yield from _open_to_others(entry, entry.name)
            for below, known in _KNOWN.items():
                yield from _strays_of(entry / below, known, entry.name)


def put_away(stray: Stray, quarantine: Path) -> None:
    """Mend one: remove a leftover, close to others what is ours, move aside what is not.

    Raises:
        OSError: the disk does not allow it; the stray is still there.
    """
    if stray.kind is StrayKind.PERMISSIONS:
        stray.path.chmod(stat.S_IMODE(stray.path.lstat().st_mode) & ~_OTHERS_MAY_WRITE)
    elif stray.kind is StrayKind.FOREIGN:
        move_aside(stray.path, quarantine)
    else:
        remove(stray.path)


def move_aside(path: Path, quarantine: Path) -> None:
    """Move `path` into `quarantine` under a name that is not taken there.

    Raises:
        OSError: the disk does not allow it.
    """
    quarantine.mkdir(mode=0o700, exist_ok=True)
    numbers = (f"{number}-{path.name[:100]}" for number in range(1_000_000))
    free = next(name for name in numbers if not (quarantine / name).exists())
    path.rename(quarantine / free)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing there is fine.

    Raises:
        OSError: the disk does not allow it.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _strays_of(folder: Path, known: re.Pattern[str], namespace: str) -> Iterator[Stray]:
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        if known.fullmatch(entry.name):
            yield from _open_to_others(entry, namespace)
        else:
            yield _unknown(entry, namespace)


def _unknown(path: Path, namespace: str) -> Stray:
    if _LEFTOVER.fullmatch(path.name):
        what = f"{path.name!a} was left by a write that a crash cut short"
        return Stray(StrayKind.LEFTOVER, path, what, namespace)
    what = f"{path.name!a} in {path.parent.name}/ is no file of ours"
    return Stray(StrayKind.FOREIGN, path, what, namespace)


def _open_to_others(path: Path, namespace: str) -> Iterator[Stray]:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return
    if status.st_uid != current_uid():
        what = f"{path.name} belongs to user {status.st_uid}, not to {current_uid()}"
        yield Stray(StrayKind.PERMISSIONS, path, what, namespace)
    elif status.st_mode & _OTHERS_MAY_WRITE:
        mode = stat.S_IMODE(status.st_mode)
        what = f"{path.name} can be written by other users (mode {mode:04o})"
        yield Stray(StrayKind.PERMISSIONS, path, what, namespace)
