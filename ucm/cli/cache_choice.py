"""Which cache a command works with: a daemon's socket, or a data folder in this process.

It is reached before a model is loaded: a path that is wrong is told at once.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import ucm
from ucm.errors import CapacityError, ConfigError, TierUnavailableError
from ucm.path_errors import reachable
from ucm.sockets import check_socket_path

if TYPE_CHECKING:
    from ucm.connectors.link import CacheFactory
    from ucm.embedded import EmbeddedCache

CONNECT_TIMEOUT_S = 10.0
"""For a cache that is busy at first. One that is not there is not waited for."""
_SOCKET_SUFFIX = ".sock"


@contextlib.contextmanager
def reached_cache(cache: Path | None, deadline_s: float) -> Iterator[CacheFactory | None]:
    """How to connect to what `--cache` names, after seeing that it can be done; None: no cache.

    Raises:
        TierUnavailableError: it is a socket, and nobody answers there.
        ConfigError: it is neither a socket nor a folder, the folder is somebody's, or another
            process has it open.
    """
    if cache is None:
        yield None
        return
    socket, _ = socket_or_folder(None, cache)
    if socket is not None:
        yield daemon_factory(socket, deadline_s)
        return
    check_folder_is_ours(cache)
    if not cache.exists():
        print(f"--cache {cache}: nothing is there yet, a new store is made", file=sys.stderr)
    with ucm.open(cache) as store:
        yield sessions_of(store)


def daemon_factory(socket: Path, deadline_s: float) -> CacheFactory:
    """How to connect to a daemon, after doing it once.

    Raises:
        TierUnavailableError: none answers.
        PermissionDeniedError: it does not serve this user.
    """
    from ucm.client import connect

    check_socket_path(socket)
    if not socket.exists():
        raise TierUnavailableError(
            f"{socket}: no daemon listens there; start one with `ucm serve --socket {socket}`, or "
            "use a data folder without a daemon: --cache FOLDER"
        )
    with contextlib.suppress(CapacityError):  # busy: the engine's session tries again
        connect(socket, timeout_s=CONNECT_TIMEOUT_S).close()
    return lambda: connect(socket, timeout_s=deadline_s)


def sessions_of(store: EmbeddedCache) -> CacheFactory:
    """How to begin sessions with a store of this process; the caller closes it, after them."""
    from ucm.embedded import EmbeddedCache

    return lambda: EmbeddedCache(store.manager, owns_manager=False)


def socket_or_folder(socket: Path | None, cache: Path | None) -> tuple[Path | None, Path | None]:
    """What `--socket` and `--cache` name: a daemon's socket or a folder, or neither.

    What is not there yet is a socket if it is called like one: a store is not made in its place.

    Raises:
        ConfigError: both are given, or a file that is neither.
        PermissionDeniedError: it is in a folder that this user may not enter.
    """
    if socket is not None and cache is not None:
        raise ConfigError("give either --socket or --cache")
    if cache is None or is_folder(cache):
        return socket, cache
    if cache.exists() or _SOCKET_SUFFIX in cache.suffixes[-2:]:
        check_socket_path(cache)  # a door, or a lock
    if cache.exists() and not cache.is_socket():
        raise ConfigError(f"--cache {cache}: neither a folder nor a daemon's socket")
    return (cache, None) if cache.exists() or cache.suffix == _SOCKET_SUFFIX else (None, cache)


def is_folder(path: Path) -> bool:
    """Whether a folder is there.

    Raises:
        PermissionDeniedError: it is in one that this user may not enter.
        ConfigError: no path can be like this.
    """
    with reachable(path, "use a path of your own, or ask as that user"):
        return path.is_dir()


def check_folder_is_ours(folder: Path) -> None:
    """Refuse to make a store among other things: the folder of documents that was meant elsewhere.

    Raises:
        ConfigError: there is something in it, and no store.
    """
    from ucm.storage.folder import strangers

    foreign = [name for name in strangers(folder) if not name.startswith(".")]
    if foreign:
        others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ConfigError(
            f"--cache {folder}: not a data folder, it holds {foreign[0]}{others}; name an empty "
            "folder or a new one"
        )


def say_loading(model: Path) -> None:
    """Tell who watches why nothing is to be seen yet."""
    if sys.stderr.isatty():
        print(f"loading {model.name} ...", file=sys.stderr)
