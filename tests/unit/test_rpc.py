"""Calls that are made again when they were refused."""

from __future__ import annotations

import time

import pytest

from ucm.errors import CapacityError
from ucm.rpc import MIN_RPC_S, patiently


class Refusals:
    """A daemon that refuses `count` times, and then answers."""

    def __init__(self, count: int, *, retry_after_s: float) -> None:
        self.left_s: list[float] = []
        self._count = count
        self._retry_after_s = retry_after_s

    def __call__(self, left_s: float) -> str:
        self.left_s.append(left_s)
        if len(self.left_s) > self._count:
            return "answered"
        raise CapacityError("come again", retry_after_s=self._retry_after_s)


def test_a_refused_call_is_made_again() -> None:
    daemon = Refusals(3, retry_after_s=0.001)
    assert patiently(daemon, 5.0) == "answered"
    assert len(daemon.left_s) == 4
    assert daemon.left_s == sorted(daemon.left_s, reverse=True)


def test_no_call_begins_that_could_outlast_the_deadline() -> None:
    # Every call may take MIN_RPC_S, however little is left: it would be late, not refused.
    daemon = Refusals(1000, retry_after_s=0.01)
    begin_s = time.monotonic()
    with pytest.raises(CapacityError):
        patiently(daemon, 2 * MIN_RPC_S)
    assert len(daemon.left_s) > 1
    assert min(daemon.left_s) > MIN_RPC_S - 0.1  # between looking at the clock and the call
    assert time.monotonic() - begin_s < 2 * MIN_RPC_S


def test_however_short_the_time_one_call_is_made() -> None:
    daemon = Refusals(1, retry_after_s=0.0)
    with pytest.raises(CapacityError):
        patiently(daemon, 0.0)
    assert daemon.left_s == [0.0]
