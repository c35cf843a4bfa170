"""Work that threads share: who stops whom, and what becomes of turns that nobody takes."""

from __future__ import annotations

import threading

import pytest

from ucm.joint_work import Helpers, JointCalls

WAIT_S = 15.0


class FailingWork:
    """Raises on the caller's thread, and goes on on the others until it is stopped."""

    def __init__(self) -> None:
        self.helper_began = threading.Event()
        self.is_stopped = threading.Event()

    def work_off(self) -> None:
        if threading.current_thread() is threading.main_thread():
            assert self.helper_began.wait(WAIT_S)
            raise OSError("of the caller's")
        self.helper_began.set()
        self.is_stopped.wait(WAIT_S)

    def stop(self) -> None:
        self.is_stopped.set()


@pytest.fixture
def helpers() -> Helpers:
    return Helpers(1, "ucm-test")


def test_who_fails_stops_the_others(helpers: Helpers) -> None:
    work = FailingWork()
    with pytest.raises(OSError, match="of the caller's"):
        helpers.run(work, 1)
    assert work.is_stopped.is_set()


def test_a_helper_that_fails_stops_the_caller(helpers: Helpers) -> None:
    helper_failed = threading.Event()
    done: list[int] = []

    def call(index: int) -> None:
        if threading.current_thread() is threading.main_thread():
            assert helper_failed.wait(WAIT_S)
            done.append(index)
            return
        try:
            raise OSError("of the helper's")
        finally:
            threading.Timer(0.2, helper_failed.set).start()

    with pytest.raises(OSError, match="of the helper's"):
        helpers.run(JointCalls(call, 50), 1)
    assert len(done) <= 1


def test_several_threads_take_each_call_once(helpers: Helpers) -> None:
    calls = JointCalls(lambda index: index, 20_000)
    helpers.run(calls, 1)
    assert calls.results() == list(range(20_000))


def test_closed_they_help_nobody() -> None:
    helpers = Helpers(2, "ucm-test")
    helpers.close()
    calls = JointCalls(lambda _: threading.get_ident(), 100)
    helpers.run(calls, 2)
    assert set(calls.results()) == {threading.get_ident()}
