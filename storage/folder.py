"""The data folder: who may use it, and that only one daemon does.

PATH/            0700, owned by the daemon's user
    lock         flock, held for as long as the store is open; holds the pid, and a daemon's socket
                 on a second line
    ns/<hex>/    one namespace each; see `format.py`
        tenant   UTF-8, whose quota it counts against; missing for the nameless tenant
    collections/ documents and what was deleted of them; see `registry.py`
    quarantine/  namespaces that `ucm fsck --repair` moved aside
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ucm.errors import (
    CapacityError,
    ConfigError,
    CorruptionError,
    LayoutMismatchError,
    TierUnavailableError,
    UcmError,
)
from ucm.path_errors import path_error
from ucm.types import NamespaceId

from .codecs import codec_of
from .format import SUPERBLOCK_BYTES, decode_superblock, encode_superblock, new_superblock
from .segments import NO_SPACE_ERRNOS, segment_files, segment_numbers

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Iterator
    from pathlib import Path

    from ucm.layout import KvLayout
    from ucm.types import SummaryKind

    from .codec import Codec
    from .file_io import FileIo
    from .format import Superblock

log = logging.getLogger(__name__)

COLLECTIONS_FOLDER = "collections"

MAX_LOCK_BYTES = 256
"""Of a lock file: a pid and a socket's path."""

_NAME = re.compile(r"[0-9a-f]{64}")

_OWN_NAMES = frozenset({"lock", "ns", COLLECTIONS_FOLDER, "quarantine", "lost+found"})


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedNamespace:
    """What a namespace must be, and how it is made if there is none."""

    namespace: NamespaceId
    layout: KvLayout
    codec: Codec
    """Of a new one; an old one keeps its own."""
    segment_bytes: int
    summary: SummaryKind | None = None
    """What a new one has areas for; an old one keeps what it has."""


def current_uid() -> int:
    """The user this process acts as."""
    return os.geteuid()


def check_folder(path: Path) -> None:
    """Create the data folder if it is not there; refuse one that others control.

    A folder that holds other things, and no store yet, is named in a warning: a mistyped path.

    Raises:
        ConfigError: a link, no folder, another owner, or writable by everyone.
        CapacityError, TierUnavailableError: it cannot be created.
    """
    try:
        with contextlib.suppress(FileExistsError):  # a link, or no folder: said below
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        what = f"nvme.path {path} cannot be used"
        raise path_error(error, what, "name another folder") from error
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"nvme.path {path} is a link or a file: give a folder's own path")
    if status.st_uid != current_uid():
        raise ConfigError(
            f"nvme.path {path} belongs to user {status.st_uid}, this process runs as user "
            f"{current_uid()}: use a folder of your own, or change its owner"
        )
    if status.st_mode & stat.S_IWOTH:
        raise ConfigError(
            f"nvme.path {path} can be written by every user: run `chmod o-w` on it first"
        )
    _warn_of_strangers(path)


def strangers(path: Path) -> list[str]:
    """What a folder holds that is no store yet, and that no store put there; sorted.

    Nothing where a store is, or nothing can be listed: that is refused when it is used.
    """
    try:
        names = set(os.listdir(path))
    except OSError:
        return []
    return [] if "ns" in names else sorted(names - _OWN_NAMES)


def _warn_of_strangers(path: Path) -> None:
    foreign = strangers(path)
    if foreign:
        log.warning(
            "nvme.path %s holds %d other things (%s, ...); a new store is made beside them",
            path,
            len(foreign),
            foreign[0],
        )


def note_socket(path: Path, socket: Path) -> None:
    """Write down, for those who find the folder locked, where its store is served.

    The caller holds the lock. A disk that has no room for it is no error: the lock counts.
    """
    with contextlib.suppress(OSError):
        fd = os.open(path / "lock", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.write(fd, os.fsencode(socket) + b"\n")
        finally:
            os.close(fd)


def _holder_text(holder: str, remedy: str) -> str:
    """Who has a lock file of this content, and what to do about it."""
    pid, _, socket = holder.strip().partition("\n")
    pid = pid or "unknown"
    if not socket:
        return f"process {pid}: {remedy or 'stop it, or use another folder'}"
    remedy = remedy or (
        f"stop the daemon (process {pid}), or use another folder; clients of its store name that "
        "socket instead of the folder"
    )
    return f"process {pid}, a daemon that serves at {socket}: {remedy}"


def lock_folder(path: Path, remedy: str = "") -> int:
    """Take the folder's lock.

    Args:
        path: the folder.
        remedy: what to do when it is taken; empty for what holds for everyone.

    Returns:
        A descriptor; closing it, or the end of the process, frees the lock.

    Raises:
        ConfigError: another process holds it.
        CapacityError, TierUnavailableError: the lock file cannot be opened.
    """
    try:
        fd = os.open(
            path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode=0o600
        )
    except OSError as error:
        raise translate_os_error(error, f"cannot open {path / 'lock'}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(OSError):  # a full disk has no room for the pid: the lock counts
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(fd, MAX_LOCK_BYTES, 0).decode("utf-8", "replace")
        os.close(fd)
        raise ConfigError(
            f"the data folder {path} is in use by {_holder_text(holder, remedy)}"
        ) from error
    except OSError as error:
        os.close(fd)
        raise translate_os_error(error, f"cannot lock {path}") from error
    return fd


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Check an existing data folder and hold its lock, for a tool that needs just this one.

    Raises:
        ConfigError, CapacityError, TierUnavailableError: as `check_folder` and `lock_folder`.
    """
    check_folder(path)
    fd = lock_folder(path, remedy="stop it first")
    try:
        yield
    finally:
        os.close(fd)


def translate_os_error(error: OSError, what: str) -> UcmError:
    """The error of ours that says the same."""
    kind = CapacityError if error.errno in NO_SPACE_ERRNOS else TierUnavailableError
    return kind(f"{what}: {error}")


def list_namespaces(root: Path) -> list[NamespaceId]:
    """Ids of the namespaces whose folders are in `root`, sorted; other names are ignored."""
    names = sorted(entry.name for entry in root.iterdir()) if root.is_dir() else []
    return [NamespaceId(bytes.fromhex(name)) for name in names if _NAME.fullmatch(name)]


def read_superblock(folder: Path) -> Superblock:
    """The superblock of a namespace's folder.

    Raises:
        ConfigError: it is of another format version.
        CorruptionError: it is missing or damaged.
        TierUnavailableError: the disk does not answer.
    """
    path = folder / "superblock"
    try:
        with path.open("rb") as file:
            data = file.read(SUPERBLOCK_BYTES + 1)
    except FileNotFoundError as error:
        raise CorruptionError(f"{path} is missing: run `ucm fsck --repair`") from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise CorruptionError(f"{path} is no file: run `ucm fsck --repair`") from error
    except OSError as error:
        raise translate_os_error(error, f"cannot read {path}") from error
    return decode_superblock(data, str(path))


def read_tenant(folder: Path) -> str:
    """Whose namespace it is; the nameless tenant's when the folder does not say."""
    try:
        return (folder / "tenant").read_bytes().decode("utf-8", "surrogatepass")
    except (OSError, UnicodeDecodeError):
        return ""


def adopt(folder: Path, superblock: Superblock, tenant: str, io: FileIo) -> list[tuple[str, int]]:
    """Note that a namespace is `tenant`'s; a folder of an older release names none.

    Returns:
        For each segment that counted as another's until now: whose, and its bytes.
    """
    before = read_tenant(folder)
    if before == tenant:
        return []
    try:
        io.replace_file(folder / "tenant", tenant.encode("utf-8", "surrogatepass"))
    except OSError as error:
        log.warning("%s: its tenant is not noted for the next start: %s", folder, error)
    return [(before, superblock.segment_bytes) for _ in segment_numbers(folder / "segments")]


def survey(root: Path) -> list[tuple[str, int]]:
    """Make `root` if need be, remove half-made namespaces, and list every segment.

    Returns:
        For each segment of each namespace: whose it is, and its bytes.

    Raises:
        ConfigError: a namespace is of another format version.
        CapacityError, TierUnavailableError: the folder cannot be made or read.
    """
    found: list[tuple[str, int]] = []
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        for leftover in root.glob("*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        for namespace in list_namespaces(root):
            folder = root / namespace.hex()
            try:
                size_bytes = read_superblock(folder).segment_bytes
            except (CorruptionError, TierUnavailableError) as error:
                log.warning("%s", error)
                continue
            tenant = read_tenant(folder)
            found += [(tenant, size_bytes) for _ in segment_numbers(folder / "segments")]
    except OSError as error:
        raise translate_os_error(error, f"cannot read the data folder {root}") from error
    return found


def find_or_create(folder: Path, wanted: WantedNamespace, io: FileIo) -> Superblock:
    """The superblock of a namespace that is to be opened; makes the namespace if there is none.

    It keeps its codec whatever is configured by now, which is logged, and its summary areas.

    Raises:
        ConfigError: a block does not fit a segment.
        CapacityError, TierUnavailableError: the disk is full or failing; nothing was made.
        ConfigError, CorruptionError, TierUnavailableError: as `read_superblock`; CorruptionError
            also when it is another namespace's.
        LayoutMismatchError: it has another layout.
    """
    if not folder.exists():
        made = new_superblock(
            wanted.namespace,
            wanted.layout,
            wanted.codec,
            segment_bytes=wanted.segment_bytes,
            summary=wanted.summary,
        )
        create_namespace(folder, made, io)
    found = read_superblock(folder)
    if found.namespace != wanted.namespace:
        raise CorruptionError(f"{folder} has another namespace's superblock: run `ucm fsck`")
    short = found.namespace.hex()[:8]
    if found.layout != wanted.layout:
        raise LayoutMismatchError(
            f"namespace {short} holds blocks of {found.layout}, not of {wanted.layout}"
        )
    if wanted.summary is not None and found.summary is not wanted.summary:
        kept = found.summary.value if found.summary else "no"
        log.info("namespace %s keeps %s summaries on the disk", short, kept)
    if found.codec is not wanted.codec.codec_id:
        log.warning("namespace %s keeps its codec %s", short, codec_of(found.codec).name)
    return found


def create_namespace(folder: Path, superblock: Superblock, io: FileIo) -> None:
    """Make a namespace's folder appear whole and durably, or not at all.

    Raises:
        CapacityError, TierUnavailableError: the disk is full or failing; nothing is there.
    """
    unfinished = folder.with_name(folder.name + ".tmp")
    try:
        for made in (unfinished, unfinished / "segments"):
            made.mkdir(mode=0o700)
        io.replace_file(unfinished / "superblock", encode_superblock(superblock))
        unfinished.rename(folder)
        io.sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise translate_os_error(error, f"cannot create {folder}") from error


def drop_segment(
    root: Path, in_use: Container[NamespaceId], tenants: Collection[str]
) -> tuple[str, int]:
    """Delete the last segment of the namespace that was opened longest ago.

    The blocks in it are missing when it is next opened; with the last one it goes as a whole.

    Args:
        root: the folder of namespaces; its lock is held.
        in_use: namespaces that are open, so not to be touched.
        tenants: whose may go.

    Returns:
        Whose it was and the bytes that are free now; 0 when there is no segment that may go.
    """
    idle = [root / each.hex() for each in list_namespaces(root) if each not in in_use]
    for folder in sorted(idle, key=_last_opening_s):
        tenant = read_tenant(folder)
        if tenant not in tenants:
            continue
        try:
            paths = segment_files(folder / "segments")
            if paths:
                size_bytes = read_superblock(folder).segment_bytes
                _drop_last(folder, paths)
                return tenant, size_bytes
        except (OSError, UcmError) as error:
            log.warning("%s cannot make way: %s", folder, error)
    return "", 0


def _drop_last(folder: Path, paths: dict[int, Path]) -> None:
    last = max(paths)
    log.info("%s: nobody has it open, its segment %04d makes way", folder, last)
    if len(paths) > 1:
        paths[last].unlink()
        return
    unwanted = folder.with_name(folder.name + ".tmp")  # the next opening of the store removes it
    folder.rename(unwanted)
    shutil.rmtree(unwanted)


def _last_opening_s(folder: Path) -> float:
    """When a namespace was last opened or closed: its clean mark came or went then."""
    try:
        return (folder / "index").stat().st_mtime
    except OSError:
        return 0.0
