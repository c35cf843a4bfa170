"""When the breaker opens, probes and closes; time is turned by hand."""

from __future__ import annotations

import pytest

from ucm.clock import SimClock
from ucm.connectors.circuit_breaker import BreakerOptions, BreakerState, CircuitBreaker

OPTIONS = BreakerOptions(failures_to_open=3, backoff_s=1.0, max_backoff_s=4.0)


@pytest.fixture
def clock() -> SimClock:
    return SimClock(5_000_000)


def closed_breaker(clock: SimClock) -> CircuitBreaker:
    breaker = CircuitBreaker(OPTIONS, clock)
    assert breaker.begin_probe()
    breaker.end_probe(succeeded=True)
    return breaker


def test_starts_open_with_a_probe_due(clock: SimClock) -> None:
    breaker = CircuitBreaker(OPTIONS, clock)
    assert not breaker.allows()
    assert breaker.seconds_to_probe() == 0.0
    assert breaker.begin_probe()
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.allows()


def test_only_one_caller_gets_the_probe(clock: SimClock) -> None:
    breaker = CircuitBreaker(OPTIONS, clock)
    assert breaker.begin_probe()
    assert not breaker.begin_probe()
    assert breaker.seconds_to_probe() is None


def test_opens_after_consecutive_failures(clock: SimClock) -> None:
    breaker = closed_breaker(clock)
    assert not breaker.record_failure()
    assert not breaker.record_failure()
    assert breaker.allows()
    assert breaker.record_failure()
    assert breaker.state is BreakerState.OPEN
    assert not breaker.record_failure(), "it opens once"


def test_a_success_in_between_starts_the_count_again(clock: SimClock) -> None:
    breaker = closed_breaker(clock)
    for _ in range(5):
        breaker.record_failure()
        breaker.record_failure()
        breaker.record_success()
    assert breaker.allows()


def test_a_time_out_opens_at_once(clock: SimClock) -> None:
    breaker = closed_breaker(clock)
    assert breaker.record_failure(timed_out=True)
    assert not breaker.allows()


def test_probe_waits_for_the_back_off(clock: SimClock) -> None:
    breaker = closed_breaker(clock)
    breaker.record_failure(timed_out=True)
    clock.advance_us(999_999)
    assert not breaker.begin_probe()
    assert breaker.seconds_to_probe() == pytest.approx(1e-6)
    clock.advance_us(1)
    assert breaker.begin_probe()


def test_back_off_doubles_up_to_its_limit_and_starts_anew_after_success(clock: SimClock) -> None:
    breaker = closed_breaker(clock)
    breaker.record_failure(timed_out=True)
    waits = []
    for _ in range(4):
        wait_s = breaker.seconds_to_probe()
        assert wait_s is not None
        waits.append(wait_s)
        clock.advance_us(round(wait_s * 1e6))
        assert breaker.begin_probe()
        breaker.end_probe(succeeded=False)
    assert waits == [1.0, 2.0, 4.0, 4.0]
    clock.advance_us(4_000_000)
    assert breaker.begin_probe()
    breaker.end_probe(succeeded=True)
    assert breaker.allows()
    breaker.record_failure(timed_out=True)
    assert breaker.seconds_to_probe() == 1.0


def test_late_answers_of_calls_made_before_do_not_close_it(clock: SimClock) -> None:
    breaker = closed_breaker(clock)
    breaker.record_failure(timed_out=True)
    breaker.record_success()
    assert not breaker.allows()
