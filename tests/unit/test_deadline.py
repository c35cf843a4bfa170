"""A caller that comes back in time, whatever the callee does."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import pytest

from ucm.connectors.deadline import DeadlineCaller
from ucm.errors import TierUnavailableError


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


def test_a_value_comes_back() -> None:
    caller = DeadlineCaller("test")
    assert caller.attempt(lambda: 7, 5.0).value == 7
    caller.close()


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("no"), SystemExit(3)])
def test_an_error_is_a_value_too(error: BaseException) -> None:
    def call() -> None:
        raise error

    caller = DeadlineCaller("test")
    outcome = caller.attempt(call, 5.0)
    assert outcome.error is error
    assert not outcome.timed_out
    assert caller.attempt(lambda: "still works", 5.0).value == "still works"
    caller.close()


def test_a_call_that_hangs_is_left_behind(gate: threading.Event) -> None:
    caller = DeadlineCaller("test")
    late: list[int] = []
    arrived = threading.Event()

    def hang() -> int:
        gate.wait(10.0)
        return 5

    def on_late(value: int) -> None:
        late.append(value)
        arrived.set()

    started_s = time.monotonic()
    outcome = caller.attempt(hang, 0.05, on_late)
    assert time.monotonic() - started_s < 1.0
    assert outcome.timed_out
    assert isinstance(outcome.error, TierUnavailableError)
    assert caller.num_stuck == 1
    assert caller.attempt(lambda: "next", 5.0).value == "next"
    gate.set()
    assert arrived.wait(5.0)
    assert late == [5]
    caller.close()


def test_a_late_error_is_dropped(gate: threading.Event) -> None:
    caller = DeadlineCaller("test")

    def hang() -> None:
        gate.wait(10.0)
        raise RuntimeError("too late")

    def never(_value: None) -> None:
        raise AssertionError

    assert caller.attempt(hang, 0.01, never).timed_out
    (stuck,) = caller._stuck
    gate.set()
    stuck._thread.join(5.0)
    assert not stuck.is_alive()
    caller.close()


def test_calls_that_hang_are_bounded(gate: threading.Event) -> None:
    caller = DeadlineCaller("test", max_stuck=2)
    calls: list[int] = []

    def hang() -> None:
        calls.append(1)
        gate.wait(10.0)

    for _ in range(5):
        outcome = caller.attempt(hang, 0.01)
        assert isinstance(outcome.error, TierUnavailableError)
    assert len(calls) == 2
    gate.set()
    for worker in list(caller._stuck):
        worker._thread.join(5.0)
    assert caller.attempt(lambda: "again", 5.0).value == "again"
    caller.close()


def test_what_is_late_is_never_given_back_on_the_owners_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when the call returns just after the owner gave up: giving back may block."""
    caller = DeadlineCaller("test")
    threads: list[threading.Thread] = []
    settled, arrived = threading.Event(), threading.Event()

    def call() -> int:
        return 5

    def wait_too_short(future: Future[int], timeout: float | None = None) -> None:
        future.add_done_callback(lambda _: settled.set())
        assert settled.wait(5.0)
        raise TimeoutError

    def on_late(_value: int) -> None:
        threads.append(threading.current_thread())
        arrived.set()

    with monkeypatch.context() as patch:
        patch.setattr(Future, "exception", wait_too_short)
        assert caller.attempt(call, 0.01, on_late).timed_out
    assert arrived.wait(5.0)
    assert threads != [threading.current_thread()]
    caller.close()
