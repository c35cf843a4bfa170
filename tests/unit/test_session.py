"""The session against a cache that fails on demand: everything is a miss, nothing raises."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from ucm.api import CacheApi, SlabChecksums
from ucm.clock import SimClock
from ucm.connectors.circuit_breaker import BreakerState
from ucm.connectors.session import CacheSession, SessionOptions
from ucm.errors import CapacityError, ConfigError, LayoutMismatchError, TierUnavailableError
from ucm.hashing import NamespaceSpec
from ucm.layout import KvDtype, KvLayout
from ucm.testing.fake_cache import FakeCache
from ucm.testing.session_blocks import (
    ALL,
    KEYS,
    LAYOUT,
    NEVER,
    NUM_BLOCKS,
    OPTIONS,
    SPEC,
    TOKENS,
    Pool,
    load,
    load_all,
    offer,
    open_session,
    store_all,
)
from ucm.types import TierKind


@pytest.fixture
def cache() -> Iterator[FakeCache]:
    fake = FakeCache()
    yield fake
    fake.hang.set()


def test_what_was_stored_comes_back(cache: FakeCache) -> None:
    source, target = Pool(1), Pool(2)
    with open_session(lambda: cache) as session:
        store_all(session, source)
        assert source.released == 1
        assert session.match(TOKENS, 0) == NUM_BLOCKS
        cache.tier = TierKind.NVME
        assert load_all(session, target) == NUM_BLOCKS
        assert np.array_equal(source.blocks, target.blocks)
        stats = session.stats()
    block_bytes = LAYOUT.num_layers * LAYOUT.slab_bytes
    assert (stats.stored_blocks, stats.dropped_blocks) == (NUM_BLOCKS, 0)
    assert (stats.loaded_blocks, stats.loaded_bytes) == (NUM_BLOCKS, NUM_BLOCKS * block_bytes)
    assert stats.hit_tokens_by_tier == {TierKind.NVME: NUM_BLOCKS * LAYOUT.block_tokens}
    assert (stats.wrong_bytes, stats.failures) == (0, 0)
    assert cache.is_closed
    assert not cache.leases


def test_keys_are_the_chain_of_the_token_ids(cache: FakeCache) -> None:
    with open_session(lambda: cache) as session:
        store_all(session, Pool())
    assert list(cache.blocks) == KEYS


def test_a_local_prefix_is_not_asked_for(cache: FakeCache) -> None:
    with open_session(lambda: cache) as session:
        store_all(session, Pool())
        assert session.match(TOKENS, 4) == NUM_BLOCKS
        assert session.match(TOKENS, NUM_BLOCKS) == NUM_BLOCKS
        target = Pool(3)
        assert load_all(session, target, first=2) == NUM_BLOCKS - 2
        assert np.array_equal(target.blocks[: NUM_BLOCKS - 2], Pool().blocks[2:])


def test_a_missing_block_ends_the_prefix(cache: FakeCache) -> None:
    with open_session(lambda: cache) as session:
        store_all(session, Pool())
        del cache.blocks[KEYS[2]]
        assert session.match(TOKENS, 0) == 2
        assert load_all(session, Pool(1)) == 2


def test_stores_behind_a_present_prefix_only_send_the_rest(cache: FakeCache) -> None:
    with open_session(lambda: cache) as session:
        session.store(offer("a", TOKENS[:8], range(2), Pool().fill, Pool().release))
        store_all(session, Pool())
        stats = session.stats()
    assert (stats.stored_blocks, stats.present_blocks, stats.dropped_blocks) == (6, 2, 0)
    assert list(cache.blocks) == KEYS


def test_a_store_that_does_not_fit_the_queue_is_dropped_and_released(cache: FakeCache) -> None:
    pool = Pool()
    with open_session(
        lambda: cache, SessionOptions(decide=ALL, deadline_s=5.0, max_queued_blocks=8)
    ) as session:
        cache.hang.clear()
        for _ in range(4):
            session.store(offer("r", TOKENS, range(NUM_BLOCKS), pool.fill, pool.release))
        assert pool.released >= 2
        cache.hang.set()
        assert session.flush(5.0)
        assert pool.released == 4
        stats = session.stats()
    assert stats.dropped_blocks == (4 - stats.stored_blocks // NUM_BLOCKS) * NUM_BLOCKS - (
        stats.present_blocks
    )


def test_a_cache_with_little_staging_memory_gets_the_chain_in_more_calls() -> None:
    cache, pool = FakeCache(staging_blocks=1), Pool()
    with open_session(lambda: cache) as session:
        store_all(session, pool)
        stats = session.stats()
    assert (stats.stored_blocks, stats.dropped_blocks) == (NUM_BLOCKS, 0)
    assert cache.calls.count("prepare_store") == NUM_BLOCKS
    assert pool.released == 1


def test_a_full_cache_drops_the_chain_at_once() -> None:
    cache, pool = FakeCache(staging_blocks=0), Pool()
    with open_session(lambda: cache) as session:
        store_all(session, pool)
        stats = session.stats()
    assert (stats.stored_blocks, stats.dropped_blocks) == (0, NUM_BLOCKS)
    assert cache.calls.count("prepare_store") == 1
    assert pool.released == 1


def test_a_batch_is_bounded_in_bytes(cache: FakeCache) -> None:
    options = SessionOptions(store_batch_bytes=LAYOUT.block_bytes * 2)
    with open_session(lambda: cache, options) as session:
        store_all(session, Pool())
    assert cache.calls.count("prepare_store") == NUM_BLOCKS // 2


def test_a_fill_that_fails_gives_the_lease_and_the_blocks_back(cache: FakeCache) -> None:
    pool = Pool()

    def broken(indexes: Sequence[int], slots: Sequence[memoryview]) -> list[SlabChecksums]:
        raise RuntimeError("pool went away")

    with open_session(lambda: cache) as session:
        session.store(offer("r", TOKENS, range(NUM_BLOCKS), broken, pool.release))
        assert session.flush(5.0)
        assert pool.released == 1
        assert not cache.leases
        assert session.stats().dropped_blocks == NUM_BLOCKS
        store_all(session, pool)
    assert len(cache.blocks) == NUM_BLOCKS


def test_places_that_cannot_be_written_are_a_miss(
    cache: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Pool, layer: int, index: int) -> memoryview:
        raise ValueError("no such place")

    with open_session(lambda: cache) as session:
        store_all(session, Pool())
        monkeypatch.setattr(Pool, "view", broken)
        assert load_all(session, Pool(1)) == 0
        assert session.flush(5.0)
    assert not cache.leases


@pytest.mark.parametrize("call", ["lookup", "begin_load"])
def test_an_error_is_a_miss(cache: FakeCache, call: str) -> None:
    options = SessionOptions(decide=ALL, deadline_s=0.3, breaker=NEVER)
    with open_session(lambda: cache, options) as session:
        store_all(session, Pool())
        cache.fail[call] = TierUnavailableError("gone")
        assert load_all(session, Pool(1)) == 0
        assert session.stats().failures >= 1


@pytest.mark.parametrize("call", ["prepare_store", "complete_store"])
def test_an_error_while_storing_drops_and_releases(cache: FakeCache, call: str) -> None:
    pool = Pool()
    with open_session(lambda: cache) as session:
        cache.fail[call] = TierUnavailableError("gone")
        session.store(offer("r", TOKENS, range(NUM_BLOCKS), pool.fill, pool.release))
        session.flush(1.0)
        assert session.stats().dropped_blocks == NUM_BLOCKS
    assert pool.released == 1


def test_a_cache_that_hangs_costs_one_deadline_and_then_nothing(cache: FakeCache) -> None:
    options = SessionOptions(decide=ALL, deadline_s=0.2, breaker=NEVER)
    with open_session(lambda: cache, options) as session:
        store_all(session, Pool())
        cache.hang.clear()
        started_s = time.monotonic()
        assert session.match(TOKENS, 0) == 0
        first_s = time.monotonic() - started_s
        assert session.breaker_state is BreakerState.OPEN
        for _ in range(100):
            assert load_all(session, Pool(1)) == 0
        rest_s = time.monotonic() - started_s - first_s
        assert first_s < 0.4
        assert rest_s < 0.2
        assert session.stats().timeouts == 1
        cache.hang.set()


def test_match_and_load_share_one_deadline(cache: FakeCache) -> None:
    """A slow look-up leaves the load less time: 0.3 s of match, at most 0.2 s of load."""
    slow_s, deadline_s = 0.3, 0.5

    class SlowLookup(FakeCache):
        def _enter(self, call: str) -> None:
            if call == "lookup":
                threading.Event().wait(slow_s)
            super()._enter(call)

    slow = SlowLookup()
    with open_session(
        lambda: slow, SessionOptions(decide=ALL, deadline_s=deadline_s, breaker=NEVER)
    ) as session:
        store_all(session, Pool())
        started_s = time.monotonic()
        assert session.match(TOKENS, 0) == NUM_BLOCKS
        slow.hang.clear()
        assert load(session, Pool(1), range(NUM_BLOCKS)) == 0
        assert time.monotonic() - started_s < deadline_s + 0.15
        slow.hang.set()
        stall_s = session.stats().stall_s_max
    assert slow_s < stall_s < deadline_s + 0.15


def test_a_late_load_lease_is_given_back(cache: FakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    options = SessionOptions(decide=ALL, deadline_s=0.1, breaker=NEVER)
    with open_session(lambda: cache, options) as session:
        store_all(session, Pool())
        assert session.match(TOKENS, 0) == NUM_BLOCKS
        cache.hang.clear()
        assert load(session, Pool(1), range(NUM_BLOCKS)) == 0
        given_back = threading.Event()
        for name in ("release", "complete_load"):  # which one depends on who is late
            method = getattr(cache, name)

            def give_back(
                *arguments: object, call: Callable[..., None] = method, **named: object
            ) -> None:
                call(*arguments, **named)
                given_back.set()

            monkeypatch.setattr(cache, name, give_back)
        cache.hang.set()
        assert given_back.wait(5.0)
        assert not cache.leases


def test_reconnects_in_the_background_after_failures() -> None:
    caches = [FakeCache(), FakeCache()]
    made: list[FakeCache] = []

    def factory() -> CacheApi:
        made.append(caches[len(made)])
        return made[-1]

    with open_session(factory) as session:
        store_all(session, Pool())
        caches[0].fail["*"] = TierUnavailableError("killed")
        assert session.match(TOKENS, 0) == 0
        assert session.ensure_connected(5.0)
        assert session.match(TOKENS, 0) == 0, "the new cache is empty"
        store_all(session, Pool())
        assert session.match(TOKENS, 0) == NUM_BLOCKS
        assert session.stats().reconnects == 1
    assert len(caches[1].blocks) == NUM_BLOCKS


def test_one_failed_call_is_checked_and_the_connection_kept(cache: FakeCache) -> None:
    with open_session(lambda: cache) as session:
        store_all(session, Pool())
        cache.fail["begin_load"] = TierUnavailableError("once")
        assert load_all(session, Pool(1)) == 0
        cache.fail.clear()
        assert session.ensure_connected(5.0)
        assert load_all(session, Pool(1)) == NUM_BLOCKS
        assert session.stats().reconnects == 0


def test_an_answer_such_as_busy_does_not_open_the_breaker(cache: FakeCache) -> None:
    with open_session(lambda: cache) as session:
        cache.fail["begin_load"] = CapacityError("too many leases")
        store_all(session, Pool())
        for _ in range(10):
            assert load_all(session, Pool(1)) == 0
        assert session.breaker_state is BreakerState.CLOSED


def test_connect_says_why_there_is_no_cache() -> None:
    def factory() -> CacheApi:
        raise TierUnavailableError("no daemon at /nowhere")

    with CacheSession(factory, SPEC, OPTIONS) as session:
        with pytest.raises(TierUnavailableError, match="no daemon at /nowhere"):
            session.connect(0.2)
        assert session.match(TOKENS, 0) == 0
        assert load_all(session, Pool()) == 0


def test_a_mistake_is_said_at_once_and_not_waited_for() -> None:
    def factory() -> CacheApi:
        raise ConfigError("the data folder is in use by process 7")

    with CacheSession(factory, SPEC, OPTIONS) as session:
        started_s = time.monotonic()
        with pytest.raises(ConfigError, match="process 7"):
            session.connect(60.0)
        assert time.monotonic() - started_s < 5.0


def test_another_layout_is_refused() -> None:
    class OtherLayout(FakeCache):
        def open_namespace(self, spec: NamespaceSpec, **options):  # type: ignore[no-untyped-def]
            handle = super().open_namespace(spec, **options)
            wrong = KvLayout(
                num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=4, dtype=KvDtype.FLOAT16
            )
            return type(handle)(handle.id, wrong)

    cache = OtherLayout()
    with CacheSession(lambda: cache, SPEC, OPTIONS) as session, pytest.raises(LayoutMismatchError):
        session.connect(0.2)
    assert cache.is_closed


def test_a_connector_that_ends_leaves_no_lease_and_no_thread(cache: FakeCache) -> None:
    before = set(threading.enumerate())
    with open_session(lambda: cache) as session:
        store_all(session, Pool())
        load_all(session, Pool(1))
    for thread in set(threading.enumerate()) - before:
        thread.join(5.0)
        assert not thread.is_alive(), thread.name
    assert not cache.leases


def test_stores_after_close_are_released(cache: FakeCache) -> None:
    pool = Pool()
    session = open_session(lambda: cache)
    session.close()
    session.store(offer("r", TOKENS, range(NUM_BLOCKS), pool.fill, pool.release))
    assert pool.released == 1
    session.close()


def test_orphans_are_dropped(cache: FakeCache) -> None:
    """The first blocks are not in the cache: the tail alone would never be found."""
    pool = Pool()
    with open_session(lambda: cache) as session:
        session.store(offer("r", TOKENS, range(2, NUM_BLOCKS), pool.fill, pool.release))
        assert session.flush(5.0)
        assert session.stats().dropped_blocks == NUM_BLOCKS - 2
    assert not cache.blocks


def test_a_store_that_takes_long_to_open_is_waited_for(cache: FakeCache) -> None:
    opened: list[int] = []

    def factory() -> CacheApi:
        opened.append(1)
        time.sleep(2 * OPTIONS.deadline_s)  # its recovery
        return cache

    with open_session(factory) as session:
        store_all(session, Pool())
        assert load_all(session, Pool(1)) == NUM_BLOCKS
    assert len(opened) == 1


def test_a_cache_that_cannot_be_had_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    attempts: list[int] = []
    enough = threading.Event()

    def factory() -> CacheApi:
        attempts.append(1)
        if len(attempts) == 4:
            enough.set()
        raise ConfigError("the memory tier has no room for one block")

    with caplog.at_level(logging.WARNING), CacheSession(factory, SPEC, OPTIONS):
        assert enough.wait(5.0)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "no room for one block" in messages[0]


def test_a_busy_cache_is_a_miss_and_is_left_alone_for_as_long_as_it_asked(
    cache: FakeCache,
) -> None:
    clock = SimClock()
    with CacheSession(lambda: cache, SPEC, OPTIONS, clock) as session:
        session.connect(5.0)
        store_all(session, Pool())
        cache.fail["lookup"] = CapacityError("busy", retry_after_s=2.0)
        assert session.match(TOKENS, 0) == 0
        del cache.fail["lookup"]
        assert session.match(TOKENS, 0) == 0  # not asked
        pool = Pool()
        session.store(offer("late", TOKENS, range(NUM_BLOCKS), pool.fill, pool.release))
        assert pool.released == 1  # dropped, not queued
        assert session.breaker_state is BreakerState.CLOSED
        clock.advance_us(2_000_000)
        assert session.match(TOKENS, 0) == NUM_BLOCKS
