"""SIGTERM as Ctrl-C: a command that has children and temporary folders unwinds, and leaves none."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """For the time of a `with` block SIGTERM raises SystemExit in the main thread.

    The exit code is 143, as of a process that the signal ended. A second SIGTERM is ignored, for
    it would end the clean-up that the first began. Only for the main thread.
    """
    before = signal.signal(signal.SIGTERM, _unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _unwind(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)
