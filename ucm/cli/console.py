"""What commands share: exit codes, one JSON object, one line of error."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ucm.errors import (
    CapacityError,
    ConfigError,
    InvalidArgumentError,
    LayoutMismatchError,
    PermissionDeniedError,
    TierUnavailableError,
    UcmError,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Result = TypeVar("Result", bound=Mapping[str, Any])

MAX_LINE: Final = 1 << 16
"""Characters in a row of a table that goes to a file or another program."""


class ExitCode(enum.IntEnum):
    """How a command ends."""

    DONE = 0
    CHECK_FAILED = 1
    WRONG_USE = 2
    UNAVAILABLE = 3


_EXIT_CODES: Final[Mapping[type[UcmError], ExitCode]] = {
    ConfigError: ExitCode.WRONG_USE,
    InvalidArgumentError: ExitCode.WRONG_USE,
    LayoutMismatchError: ExitCode.WRONG_USE,
    TierUnavailableError: ExitCode.UNAVAILABLE,
    PermissionDeniedError: ExitCode.UNAVAILABLE,
    CapacityError: ExitCode.UNAVAILABLE,
}


def fail(error: UcmError, *, as_json: bool) -> ExitCode:
    """Report `error` and return the exit code of its kind."""
    if as_json:
        print_json({"error": type(error).__name__, "message": str(error)})
    print(f"ucm: {' '.join(str(error).split())}", file=sys.stderr)
    return _EXIT_CODES.get(type(error), ExitCode.CHECK_FAILED)


def print_json(value: Mapping[str, object]) -> None:
    """One object on one line of standard output, paths as text."""
    print(json.dumps(value, default=_plain), flush=True)


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"no JSON for a {type(value).__name__}")


def say(line: str) -> None:
    """A line for who watches a long command, at once, on standard error."""
    print(line, file=sys.stderr, flush=True)


def show_result(
    result: Result, render: Callable[[Result], RenderableType], *, as_json: bool
) -> None:
    """What a benchmark found: one JSON object, or what `render` makes of it."""
    if as_json:
        print_json(result)
        return
    from rich.console import Console

    Console(highlight=False).print(render(result))


def table_console() -> Console:
    """For tables: fitted to a terminal; elsewhere each row is one line, however long."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = MAX_LINE
    return console


def format_bytes(size: int) -> str:
    """`size` for people: `1.5 GiB`."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def split_settings(settings: list[str]) -> dict[str, str]:
    """`section.field=value` texts as a mapping.

    Raises:
        ConfigError: one has no `=` or no section.
    """
    found: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or "." not in name:
            raise ConfigError(f"--set {setting}: write it as section.field=value")
        found[name.strip()] = value.strip()
    return found
