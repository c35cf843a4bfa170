"""Progress of long work: a bar on a terminal, a line now and then elsewhere.

Both go to standard error, so that standard output carries results only.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from .console import format_bytes

LINE_INTERVAL_S = 5.0


class ByteProgress:
    """Shows `update(what, done_bytes, total_bytes)`; one bar, or one series of lines, a `what`."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._next_line_s: dict[str, float] = {}
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Show how far `what` is; a total of 0 is unknown."""
        if self._bar is None:
            self._print_line(what, done_bytes, total_bytes)
            return
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total_bytes or None)
        self._bar.update(self._tasks[what], completed=done_bytes)

    def _print_line(self, what: str, done_bytes: int, total_bytes: int) -> None:
        now_s = time.monotonic()
        is_last = done_bytes == total_bytes
        if now_s < self._next_line_s.get(what, 0.0) and not is_last:
            return
        self._next_line_s[what] = float("inf") if is_last else now_s + LINE_INTERVAL_S
        of_total = f" of {format_bytes(total_bytes)}" if total_bytes else ""
        self._console.print(f"{what}: {format_bytes(done_bytes)}{of_total}", highlight=False)
