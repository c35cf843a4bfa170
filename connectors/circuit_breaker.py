"""When to stop asking a cache that does not answer, and when to try it again.

    CLOSED --N failures in a row, or one time-out--> OPEN --back-off is over--> HALF_OPEN
       ^                                              ^                            |
       |                                              +------ probe failed --------+
       +------------------------- probe succeeded ---------------------------------+

Only a background thread probes, so the engine's step path pays for at most one time-out and then
for nothing until the cache is back. The back-off doubles with each failed probe, up to a limit.
"""

from __future__ import annotations

import enum
import threading
from dataclasses import dataclass

from ucm.clock import Clock


class BreakerState(enum.StrEnum):
    """Whether calls are made."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    """One probe is on its way; nobody else calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerOptions:
    """When the breaker opens and how long it stays so."""

    failures_to_open: int = 3
    """Consecutive failed calls; a call that ran into its deadline opens at once."""
    backoff_s: float = 0.25
    """Wait before the first probe."""
    max_backoff_s: float = 15.0
    """Longest wait between two probes."""


class CircuitBreaker:
    """Thread-safe; decides by the clock it is given, never sleeps.

    It starts OPEN with its probe due at once: nothing is known to work before the first answer.
    """

    def __init__(self, options: BreakerOptions, clock: Clock) -> None:
        self._options = options
        self._clock = clock
        self._lock = threading.Lock()
        self._state = BreakerState.OPEN
        self._failures_in_a_row = 0
        self._backoff_s = options.backoff_s
        self._probe_at_us = clock.now_us()

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self._state} failures={self._failures_in_a_row}>"

    @property
    def state(self) -> BreakerState:
        """The state now."""
        return self._state

    def allows(self) -> bool:
        """Whether an ordinary call may be made."""
        return self._state is BreakerState.CLOSED

    def record_success(self) -> None:
        """An ordinary call was answered."""
        with self._lock:
            self._failures_in_a_row = 0

    def record_failure(self, *, timed_out: bool = False) -> bool:
        """An ordinary call failed; True if that opened the breaker."""
        with self._lock:
            self._failures_in_a_row += 1
            enough = timed_out or self._failures_in_a_row >= self._options.failures_to_open
            if not enough or self._state is not BreakerState.CLOSED:
                return False
            self._open(self._options.backoff_s)
            return True

    def seconds_to_probe(self) -> float | None:
        """How long until a probe is due (0.0 when it is); None unless OPEN."""
        with self._lock:
            if self._state is not BreakerState.OPEN:
                return None
            return max(0.0, (self._probe_at_us - self._clock.now_us()) / 1e6)

    def begin_probe(self) -> bool:
        """Claim the probe; True for one caller, once the back-off is over."""
        with self._lock:
            due = self._clock.now_us() >= self._probe_at_us
            if self._state is not BreakerState.OPEN or not due:
                return False
            self._state = BreakerState.HALF_OPEN
            return True

    def end_probe(self, *, succeeded: bool) -> None:
        """Report what became of the claimed probe."""
        with self._lock:
            assert self._state is BreakerState.HALF_OPEN, self._state
            if succeeded:
                self._state = BreakerState.CLOSED
                self._failures_in_a_row = 0
                self._backoff_s = self._options.backoff_s
            else:
                self._open(min(2 * self._backoff_s, self._options.max_backoff_s))

    def _open(self, backoff_s: float) -> None:
        self._state = BreakerState.OPEN
        self._backoff_s = backoff_s
        self._probe_at_us = self._clock.now_us() + round(backoff_s * 1e6)
