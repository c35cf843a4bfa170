"""The `Clock` seam: decisions take `now_us`, tests turn time by hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock."""

    def now_us(self) -> int:
        """Microseconds since an arbitrary origin; never goes back."""


class SystemClock:
    """The machine's monotonic clock."""

    def now_us(self) -> int:
        """See `Clock.now_us`."""
        return time.monotonic_ns() // 1000


class SimClock:
    """A clock that moves only when told to; for tests and simulations."""

    def __init__(self, now_us: int = 0) -> None:
        self._now_us = now_us

    def now_us(self) -> int:
        """See `Clock.now_us`."""
        return self._now_us

    def advance_us(self, delta_us: int) -> None:
        """Move forward by `delta_us` (not negative)."""
        if delta_us < 0:
            raise ValueError(f"a monotonic clock cannot go back by {-delta_us} us")
        self._now_us += delta_us
