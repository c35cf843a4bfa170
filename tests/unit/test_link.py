"""The link: which answers speak for the whole connection, and which do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ucm.api import CacheApi
from ucm.client import connect
from ucm.clock import SimClock
from ucm.connectors.circuit_breaker import BreakerOptions, BreakerState
from ucm.connectors.deadline import DeadlineCaller
from ucm.connectors.link import CallKind, Connection, Link, LinkOptions
from ucm.connectors.session import CacheSession, SessionOptions
from ucm.connectors.session_stats import StatsCounter
from ucm.errors import CapacityError, TierUnavailableError
from ucm.testing.blocks import chain, tiny_spec
from ucm.testing.daemon import running_daemon, short_folder, small_config
from ucm.testing.fake_cache import FakeCache
from ucm.types import ROOT_KEY, LoadMode, NamespaceId

KEYS = chain(NamespaceId(bytes(32)), 1)


@contextmanager
def connected(factory: Callable[[], CacheApi]) -> Iterator[tuple[Link, DeadlineCaller]]:
    options = LinkOptions(
        factory=factory,
        spec=tiny_spec(),
        connect_timeout_s=5.0,
        call_timeout_s=5.0,
        breaker=BreakerOptions(failures_to_open=3, backoff_s=3600.0),
    )
    link, caller = Link(options, SimClock(), StatsCounter()), DeadlineCaller("test")
    assert link.breaker.begin_probe()
    link.probe(caller)
    assert link.is_open()
    yield link, caller
    link.drop(caller)
    caller.close()


def look_up(link: Connection) -> int:
    return link.cache.lookup(link.namespace.id, KEYS).num_blocks


def load(link: Connection) -> None:
    link.cache.begin_load(link.namespace.id, KEYS, mode=LoadMode.MAPPED, timeout_s=1.0)


def store(link: Connection) -> None:
    link.cache.prepare_store(link.namespace.id, ROOT_KEY, KEYS)


def test_a_daemon_that_answers_at_its_door_only_is_given_up() -> None:
    """Its door is alive, asked for lookups and loads; all else goes by gRPC, which is gone."""
    with short_folder() as folder, running_daemon(small_config(folder, nvme=False)) as daemon:
        path = daemon.config.service.socket_path
        with connected(lambda: connect(path, timeout_s=2)) as (link, caller):
            daemon._engine.stop(0).wait()
            for _ in range(2):
                found = link.attempt(caller, look_up, 5.0, kind=CallKind.LOOKUP)
                assert found.error is None
                loaded = link.attempt(caller, load, 5.0, kind=CallKind.LOAD)
                assert loaded.error is None
                assert link.attempt(caller, store, 5.0).error is not None
                assert not link.is_open() or link.needs_check()
                link.check(caller)
            assert link.breaker.state is BreakerState.OPEN


@pytest.mark.parametrize("error", [None, CapacityError("busy")])
@pytest.mark.parametrize("kind", [CallKind.LOOKUP, CallKind.LOAD])
def test_an_answer_that_is_no_proof_clears_no_suspicion(
    kind: CallKind, error: CapacityError | None
) -> None:
    name, call = {CallKind.LOOKUP: ("lookup", look_up), CallKind.LOAD: ("begin_load", load)}[kind]
    cache = FakeCache()
    with connected(lambda: cache) as (link, caller):
        for _ in range(3):
            cache.fail["prepare_store"] = TierUnavailableError("gone")
            link.attempt(caller, store, 5.0)
            if error is not None:
                cache.fail[name] = error
            link.attempt(caller, call, 5.0, kind=kind)
            assert not link.is_open() or link.needs_check()
        assert link.breaker.state is BreakerState.OPEN


def test_a_load_that_is_refused_keeps_loads_away_and_nothing_else() -> None:
    cache = FakeCache()
    with connected(lambda: cache) as (link, caller):
        cache.fail["begin_load"] = CapacityError("busy", retry_after_s=2.0)
        link.attempt(caller, load, 5.0, kind=CallKind.LOAD)
        assert (link.takes_calls(), link.takes_loads()) == (True, False)
        assert isinstance(link._clock, SimClock)
        link._clock.advance_us(2_000_000)
        assert link.takes_loads()
        link.attempt(caller, load, 5.0)
        assert (link.takes_calls(), link.takes_loads()) == (False, False)


def test_what_a_session_matches_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, successes = FakeCache(), list[int]()
    options = SessionOptions(deadline_s=5.0)
    with CacheSession(lambda: cache, tiny_spec(), options) as session:
        session.connect(5.0)
        breaker = session._link.breaker
        monkeypatch.setattr(breaker, "record_success", lambda: successes.append(1))
        session.match(list(range(4 * tiny_spec().layout.block_tokens)), 0)
        assert cache.calls.count("lookup") == 1
        assert not successes


def test_a_check_that_is_answered_clears_it_and_changes_nothing() -> None:
    cache = FakeCache()
    with connected(lambda: cache) as (link, caller):
        for _ in range(5):
            cache.fail["begin_load"] = TierUnavailableError("once")
            link.attempt(caller, load, 5.0)
            assert link.needs_check()
            link.check(caller)
            assert not link.needs_check()
        assert link.breaker.state is BreakerState.CLOSED
        assert "lookup" not in cache.calls, "a lookup may go another way than the other calls"
        assert not cache.leases
