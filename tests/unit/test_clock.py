"""Clocks never go back."""

from __future__ import annotations

import pytest

from ucm.clock import Clock, SimClock, SystemClock


def test_the_system_clock_is_monotonic() -> None:
    clock: Clock = SystemClock()
    readings = [clock.now_us() for _ in range(100)]
    assert readings == sorted(readings)


def test_a_simulated_clock_moves_only_when_told_to() -> None:
    clock = SimClock(5)
    assert clock.now_us() == clock.now_us() == 5
    clock.advance_us(7)
    clock.advance_us(0)
    assert clock.now_us() == 12


def test_a_simulated_clock_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="back"):
        SimClock().advance_us(-1)
