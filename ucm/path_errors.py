"""What system calls on a path that a user named may raise, in errors of ours.

the path is wrong              ConfigError             name another
nobody has room left           CapacityError           free some, or name another
anything else, such as EIO     TierUnavailableError    the disk is to blame, not the user
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from .errors import (
    CapacityError,
    ConfigError,
    PermissionDeniedError,
    TierUnavailableError,
    UcmError,
)

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE})
_WRONG_PATH: Final = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.EINVAL,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ENXIO,
        errno.EPERM,
        errno.EROFS,
    }
)


def path_error(error: OSError, what: str, advice: str) -> UcmError:
    """The error of ours that says the same, and what to do.

    Args:
        error: what a system call on the path raised.
        what: what failed, with the path: "cannot create /a/b".
        advice: what to do when the path is to blame: "choose another with --socket".
    """
    reason = error.strerror or str(error)
    if error.errno in _WRONG_PATH:
        return ConfigError(f"{what}: {reason}; {advice}")
    if error.errno in _NO_ROOM:
        return CapacityError(f"{what}: {reason}; free some, or {advice}")
    return TierUnavailableError(
        f"{what}: {reason}; the system's log (`dmesg`) may say why: mend that, or {advice}"
    )


@contextlib.contextmanager
def reachable(
    path: Path, advice: str, refusal: type[UcmError] = PermissionDeniedError
) -> Iterator[None]:
    """Translate what the system calls in the body raise.

    Args:
        path: what they look at.
        advice: what to do instead where this user may not look, for the message.
        refusal: what that is refused with.

    Raises:
        UcmError: a `refusal`: a folder on the way belongs to somebody else.
        ConfigError: no path can be like this.
        CapacityError: the disk, or the process's table of open files, is full.
        TierUnavailableError: the file system does not answer.
    """
    try:
        yield
    except PermissionError as error:
        raise refusal(
            f"{path} is another user's, or in a folder of another user: {advice}"
        ) from error
    except OSError as error:
        raise path_error(error, f"cannot look at {path}", "name another path") from error
