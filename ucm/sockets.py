"""Unix socket files: one daemon a path, in a folder that only its user and group can enter.

    <socket>         gRPC for engines                  0660
    <socket>.door    sessions and descriptors          0660
    <socket>.admin   gRPC for operators                0600
    <socket>.lock    held by the daemon that serves     0600

The lock is what makes "stale" certain: who holds it may remove what a dead daemon left behind.
It is never deleted, because deleting a lock file lets two processes hold "the" lock.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import Final
from urllib.parse import quote

from .errors import ConfigError
from .path_errors import path_error, reachable

MAX_PATH_BYTES: Final = 107
"""Longest Unix socket address of Linux: `sun_path` less its final zero."""

FOLDER_MODE: Final = 0o750
SOCKET_MODE: Final = 0o660
ADMIN_MODE: Final = 0o600

_DOOR_SUFFIX: Final = ".door"
_ADMIN_SUFFIX: Final = ".admin"
_LOCK_SUFFIX: Final = ".lock"


def door_path(socket_path: Path) -> Path:
    """The door beside a gRPC socket."""
    return socket_path.with_name(socket_path.name + _DOOR_SUFFIX)


def admin_path(socket_path: Path) -> Path:
    """The operators' socket beside a gRPC socket."""
    return socket_path.with_name(socket_path.name + _ADMIN_SUFFIX)


def grpc_target(path: Path) -> str:
    """The name that gRPC gives a Unix socket; special characters are escaped as in a URI."""
    return "unix:" + quote(str(path.absolute()))


def check_socket_path(socket_path: Path) -> None:
    """Refuse what can be no daemon's socket: a folder, a name beside one, a path without room.

    Raises:
        ConfigError: it is one of these.
        PermissionDeniedError: others may not look at it.
    """
    if socket_path.suffix in (_DOOR_SUFFIX, _ADMIN_SUFFIX, _LOCK_SUFFIX):
        raise ConfigError(
            f"{socket_path} lies beside a daemon's socket: name the socket itself: "
            f"{socket_path.with_suffix('')}"
        )
    _check_length(socket_path)
    with reachable(socket_path, "ask as the daemon's user, or name your own socket"):
        is_folder = socket_path.is_dir()
    if is_folder:
        raise ConfigError(
            f"{socket_path} is a folder, not a socket: name the socket, such as "
            f"{socket_path / 'ucm.sock'}"
        )


def _check_length(socket_path: Path) -> None:
    """The path leaves room for the longest name beside it."""
    longest = len(os.fsencode(admin_path(socket_path.absolute())))
    if longest > MAX_PATH_BYTES:
        allowed = MAX_PATH_BYTES - len(_ADMIN_SUFFIX)
        raise ConfigError(
            f"socket path {socket_path} has {longest - len(_ADMIN_SUFFIX)} bytes, the system "
            f"allows {allowed} (with the names beside it); choose a shorter one with --socket"
        )


class SocketFolder:
    """The right to serve at one socket path; held until `close`."""

    def __init__(self, socket_path: Path) -> None:
        """Create and check the folder, take the lock, remove what a dead daemon left.

        Raises:
            ConfigError: the path is too long, in use, no socket, or its folder is not ours.
            CapacityError, TierUnavailableError: the disk has no room, or does not answer.
        """
        check_socket_path(socket_path)
        self._path = socket_path.absolute()
        _make_folder(self._path.parent)
        self._lock_fd = _take_lock(self._path)
        try:
            for path in self._paths():
                _remove_stale(path)
        except ConfigError:
            self.close()
            raise

    def _paths(self) -> tuple[Path, Path, Path]:
        return self._path, door_path(self._path), admin_path(self._path)

    def close(self) -> None:
        """Remove the sockets, then give the path up. Idempotent."""
        if self._lock_fd < 0:
            return
        for path in self._paths():
            if path.is_socket() and not _answers(path):
                path.unlink(missing_ok=True)
        os.close(self._lock_fd)
        self._lock_fd = -1


def _make_folder(folder: Path) -> None:
    try:
        if not os.path.lexists(folder):
            folder.mkdir(mode=FOLDER_MODE, parents=True)
            folder.chmod(FOLDER_MODE)  # whatever the umask is
        info = folder.lstat()
    except OSError as error:
        what = f"cannot create the socket's folder {folder}"
        raise path_error(error, what, "choose another with --socket") from error
    if not stat.S_ISDIR(info.st_mode):
        raise ConfigError(f"{folder} is not a folder; choose another with --socket")
    sticky = bool(info.st_mode & stat.S_ISVTX)
    if info.st_uid != os.geteuid() and not sticky:
        raise ConfigError(
            f"the socket's folder {folder} belongs to user {info.st_uid}, not to the daemon's "
            f"user {os.geteuid()}; choose another with --socket"
        )
    if info.st_mode & stat.S_IWOTH and not sticky:
        raise ConfigError(
            f"the socket's folder {folder} can be written by everybody: chmod 0750 {folder}"
        )


def _take_lock(socket_path: Path) -> int:
    path = socket_path.with_name(socket_path.name + _LOCK_SUFFIX)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        lock_fd = os.open(path, flags, 0o600)
    except OSError as error:
        raise path_error(error, f"cannot open {path}", "choose another with --socket") from error
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock_fd)
        raise _in_use(socket_path) from error
    return lock_fd


def _in_use(path: Path) -> ConfigError:
    return ConfigError(
        f"socket {path} is in use: a daemon answers there; stop it, or choose another with --socket"
    )


def _remove_stale(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_socket():
        raise ConfigError(f"{path} exists and is not a socket; remove it or choose another path")
    if _answers(path):
        raise _in_use(path)
    path.unlink(missing_ok=True)


def _answers(path: Path) -> bool:
    # A door is SOCK_SEQPACKET; connecting with the wrong type fails with EPROTOTYPE, which
    # still says that somebody listens.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True
