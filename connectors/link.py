"""A session's connection to the cache: made, judged, dropped and made again.

Every call goes through `Link.attempt`, under a deadline. What fails is counted and fed to the
circuit breaker; nothing is raised. Connecting happens in `Link.probe`, on the background thread
only. A call that says "busy" or "too late" is an answer, not a failure of the connection; after
"busy", `takes_calls` says no for as long as the cache asked for, or `takes_loads` if it was a load:
in a crowd that loads, stores still fill the cache. What gives something back is sent all the same.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ucm.api import CacheApi, NamespaceHandle
from ucm.clock import Clock
from ucm.errors import (
    CapacityError,
    ConfigError,
    LayoutMismatchError,
    LeaseExpiredError,
    PermissionDeniedError,
    UcmError,
)
from ucm.hashing import NamespaceSpec
from ucm.types import SummaryKind

from .circuit_breaker import BreakerOptions, CircuitBreaker
from .deadline import DeadlineCaller, Outcome
from .session_stats import StatsCounter

log = logging.getLogger(__name__)

T = TypeVar("T")

CacheFactory = Callable[[], CacheApi]
"""Makes a new connection, or raises a `UcmError`."""

ANSWERS_OF_A_LIVING_CACHE = (CapacityError, LeaseExpiredError)

MISTAKES = (ConfigError, LayoutMismatchError, PermissionDeniedError)
"""Connecting failed for a reason that waiting does not mend."""


class CallKind(enum.Enum):
    """What a call says of the cache beside its answer."""

    LOOKUP = "lookup"
    LOAD = "load"
    """Of a load, from its beginning to its end. Refused for want of capacity, it says nothing about
    other calls than loads."""
    OTHER = "other"
    """Its answer shows that the connection works. Those of the others do not: they may go another
    way, at which nobody waits, while all that does fails."""


@dataclass(frozen=True, slots=True)
class Connection:
    """One open cache and the session's namespace in it."""

    cache: CacheApi
    namespace: NamespaceHandle


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """How to connect and when to stop trying for a while."""

    factory: CacheFactory
    spec: NamespaceSpec
    connect_timeout_s: float
    """For connecting: opening a store may take as long as its recovery."""
    call_timeout_s: float
    """For checking and closing a connection."""
    breaker: BreakerOptions
    summary: SummaryKind | None = None
    """Summaries to open the namespace with."""


class Link:
    """The connection, thread-safe; `probe` is for one background thread."""

    def __init__(self, options: LinkOptions, clock: Clock, counter: StatsCounter) -> None:
        self._options = options
        self._counter = counter
        self._connection: Connection | None = None
        self._num_connections = 0
        self._suspect = False
        self._changed = threading.Condition()
        self._clock = clock
        self._busy_until_us = self._no_loads_until_us = 0
        self.breaker = CircuitBreaker(options.breaker, clock)
        self.last_error: BaseException | None = None
        self.on_trouble: Callable[[], None] = lambda: None

    def is_open(self) -> bool:
        """Whether a call would be made now."""
        return self._connection is not None and self.breaker.allows()

    def takes_calls(self) -> bool:
        """Whether an ordinary call should be made: open, and not asked to come again later."""
        return self.is_open() and self._clock.now_us() >= self._busy_until_us

    def takes_loads(self) -> bool:
        """Whether a load should be asked for, and looked for."""
        return self.takes_calls() and self._clock.now_us() >= self._no_loads_until_us

    def attempt(
        self,
        caller: DeadlineCaller,
        call: Callable[[Connection], T],
        timeout_s: float,
        on_late: Callable[[Connection, T], None] | None = None,
        *,
        kind: CallKind = CallKind.OTHER,
    ) -> Outcome[T]:
        """Make one call under a deadline; never raises.

        Args:
            caller: makes it.
            call: the call.
            timeout_s: its deadline.
            on_late: gets the value of a call that was answered after it.
            kind: what it says of the cache.
        """
        connection = self._connection
        if connection is None or not self.breaker.allows():
            return Outcome(error=self.last_error)
        late = None if on_late is None else (lambda value: on_late(connection, value))
        outcome = caller.attempt(lambda: call(connection), timeout_s, late)
        if outcome.error is not None:
            self._count_failure(outcome, kind)
        elif kind is CallKind.OTHER:
            self._suspect = False
            self.breaker.record_success()
        return outcome

    def _count_failure(self, outcome: Outcome[T], kind: CallKind) -> None:
        error = outcome.error
        self._counter.add(failures=1, timeouts=int(outcome.timed_out))
        self.last_error = error
        if not isinstance(error, UcmError):
            log.error("a cache call failed in an unforeseen way", exc_info=error)
        if isinstance(error, ANSWERS_OF_A_LIVING_CACHE) and not outcome.timed_out:
            log.debug("cache call refused: %s", error)
            self._suspect = self._suspect and kind is not CallKind.OTHER
            if isinstance(error, CapacityError):
                self._note_busy(error.retry_after_s, kind)
            return
        self._suspect = True
        if self.breaker.record_failure(timed_out=outcome.timed_out):
            log.warning("cache switched off until it answers again: %s", error)
        self.on_trouble()

    def _note_busy(self, retry_after_s: float, kind: CallKind) -> None:
        until_us = self._clock.now_us() + round(retry_after_s * 1e6)
        if kind is CallKind.LOAD:
            self._no_loads_until_us = until_us
        else:
            self._busy_until_us = until_us

    def needs_check(self) -> bool:
        """Whether the last call failed, but not enough of them to give the connection up."""
        return self._suspect and self.is_open()

    def suspect(self) -> None:
        """Have the background thread find out whether the connection still works."""
        self._suspect = True
        self.on_trouble()

    def check(self, caller: DeadlineCaller) -> None:
        """Make a cheap call that changes nothing; the breaker judges by what becomes of it.

        It goes the way of all calls but those that a daemon may answer without the others.
        """
        self.attempt(
            caller,
            lambda connection: connection.cache.prefetch(connection.namespace.id, ()),
            self._options.call_timeout_s,
        )
        self._notify()

    def probe(self, caller: DeadlineCaller) -> None:
        """Replace the connection; the caller has claimed the breaker's probe. Blocks."""
        self.drop(caller)
        outcome = caller.attempt(self._connect, self._options.connect_timeout_s, _close_late)
        if outcome.error is None:
            self._connection = outcome.value
            self._num_connections += 1
            self._suspect = False
            self._counter.add(reconnects=int(self._num_connections > 1))
            log.info("cache connected")
        else:
            is_news = str(outcome.error) != str(self.last_error)
            self.last_error = outcome.error
            self._counter.add(failures=1, timeouts=int(outcome.timed_out))
            level = logging.WARNING if is_news else logging.DEBUG
            log.log(level, "no cache, going on without it: %s", outcome.error)
        self.breaker.end_probe(succeeded=outcome.error is None)
        self._notify()

    def _connect(self) -> Connection:
        cache = self._options.factory()
        connected = False
        try:
            namespace = cache.open_namespace(self._options.spec, summary=self._options.summary)
            if namespace.layout != self._options.spec.layout:
                raise LayoutMismatchError(
                    f"the cache opened the namespace with {namespace.layout}, "
                    f"asked for {self._options.spec.layout}"
                )
            # As `check`: up to here a door alone may have answered.
            cache.prefetch(namespace.id, ())
            connected = True
            return Connection(cache, namespace)
        finally:
            if not connected:
                cache.close()

    def drop(self, caller: DeadlineCaller) -> None:
        """Close the connection, if there is one, without waiting long for it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            caller.attempt(connection.cache.close, self._options.call_timeout_s)

    def wait_open(self, timeout_s: float) -> bool:
        """Block until the connection is open and not in doubt, or `timeout_s` passed.

        Connecting that failed for one of `MISTAKES` is not waited for, though it goes on.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_sound() or self._is_mistaken(), timeout=timeout_s
            )
            return self._is_sound()

    def _is_sound(self) -> bool:
        return self.is_open() and not self._suspect

    def _is_mistaken(self) -> bool:
        return self._connection is None and isinstance(self.last_error, MISTAKES)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _close_late(connection: Connection) -> None:
    connection.cache.close()
