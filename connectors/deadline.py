"""Calls that come back in time, whatever the callee does.

A call runs on a worker thread and the caller waits for it, at most until the deadline. A worker
that is still busy then is *abandoned*: it ends by itself when its call returns, and the next call
gets a fresh one. Handing a call over costs 50 to 100 us.

Invariant: at most `max_stuck` abandoned workers exist; beyond that a call is refused at once.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from ucm.errors import TierUnavailableError

T = TypeVar("T")

Work = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What a call came to: a value, or the reason why there is none."""

    value: T | None = None
    error: BaseException | None = None
    timed_out: bool = False


class _Worker:
    """One daemon thread with an inbox."""

    def __init__(self, name: str) -> None:
        self._inbox: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (work := self._inbox.get()) is not None:
            work()

    def put(self, work: Work | None) -> None:
        self._inbox.put(work)

    def is_alive(self) -> bool:
        return self._thread.is_alive()


class DeadlineCaller:
    """Makes one call at a time under a deadline; one owner thread uses it."""

    def __init__(self, name: str, max_stuck: int = 4) -> None:
        self._name = name
        self._max_stuck = max_stuck
        self._worker: _Worker | None = None
        self._stuck: list[_Worker] = []

    def attempt(
        self,
        function: Callable[[], T],
        timeout_s: float,
        on_late: Callable[[T], None] | None = None,
    ) -> Outcome[T]:
        """Run `function` on the worker and wait for it, at most `timeout_s`.

        Never raises: whatever `function` raised is in the outcome.

        Args:
            function: the call.
            timeout_s: how long the caller waits.
            on_late: gets the value of a call that succeeded after the caller had left, on the
                worker's thread; to give back what nobody took.
        """
        if self.num_stuck >= self._max_stuck:
            return Outcome(error=TierUnavailableError(f"{self._name}: {self.num_stuck} calls hang"))
        if self._worker is None:
            self._worker = _Worker(self._name)
        future: Future[T] = Future()
        self._worker.put(lambda: _settle(future, function))
        try:
            error = future.exception(timeout=max(0.0, timeout_s))
        except TimeoutError:
            return self._abandon(future, timeout_s, on_late)
        return Outcome(error=error) if error is not None else Outcome(value=future.result())

    def _abandon(
        self, future: Future[T], timeout_s: float, on_late: Callable[[T], None] | None
    ) -> Outcome[T]:
        assert self._worker is not None
        if on_late is not None:
            # Behind the call on its own worker: a done-callback would run on the owner's thread,
            # and may block it, if the call returned just now.
            self._worker.put(lambda: _settle(Future(), lambda: on_late(future.result())))
        self._worker.put(None)
        self._stuck.append(self._worker)
        self._worker = None
        message = f"{self._name}: no answer within {timeout_s:.3f} s"
        return Outcome(error=TierUnavailableError(message), timed_out=True)

    @property
    def num_stuck(self) -> int:
        """Abandoned calls that have not returned yet."""
        self._stuck = [worker for worker in self._stuck if worker.is_alive()]
        return len(self._stuck)

    def close(self) -> None:
        """Let the worker end; does not wait for it."""
        if self._worker is not None:
            self._worker.put(None)
            self._worker = None


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    """Move the function's result, or whatever it raised, to the future."""
    try:
        future.set_result(function())
    except BaseException as error:  # noqa: BLE001  a thread's outermost frame; the owner sees it
        future.set_exception(error)
