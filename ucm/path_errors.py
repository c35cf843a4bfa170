"""What looking at a path that a user named may raise, in errors of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from .errors import ConfigError, PermissionDeniedError, UcmError


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
    """
    try:
        yield
    except PermissionError as error:
        raise refusal(
            f"{path} is another user's, or in a folder of another user: {advice}"
        ) from error
    except OSError as error:  # a name that is too long
        raise ConfigError(f"{path}: {error.strerror}") from error
