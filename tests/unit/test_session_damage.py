"""The session and blocks that are bad: counted, reported, and stored again behind the report."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from ucm.connectors import background
from ucm.connectors.session import CacheSession, SessionOptions
from ucm.testing.fake_cache import FakeCache
from ucm.testing.session_blocks import (
    ALL,
    KEYS,
    LAYOUT,
    NEVER,
    NUM_BLOCKS,
    TOKENS,
    Pool,
    begin_load,
    load_all,
    offer,
    open_session,
    store_all,
)


@pytest.fixture
def cache() -> Iterator[FakeCache]:
    fake = FakeCache()
    yield fake
    fake.hang.set()


def test_a_flipped_bit_is_found_after_the_copy_counted_and_reported(cache: FakeCache) -> None:
    with open_session(lambda: cache) as session:
        store_all(session, Pool())
        cache.damage(KEYS[3], layer=1)
        assert load_all(session, Pool(5)) == 3, "only what precedes the bad block is used"
        assert session.flush(5.0)
        stats = session.stats()
    assert cache.corrupt_reports == [KEYS[3]]
    assert (stats.corrupt_blocks, stats.wrong_slabs) == (1, 1)
    assert stats.wrong_bytes == LAYOUT.slab_bytes
    assert stats.missed_blocks == 3


def offer_again(cache: FakeCache, session: CacheSession, pool: Pool) -> None:
    """As a pass does that finds a block bad: it computes it, and the load has not ended."""
    store_all(session, pool)
    cache.damage(KEYS[3], layer=1)
    assert begin_load(session, Pool(5), range(session.match(TOKENS, 0)))
    assert session.loads.wait_layer(LAYOUT.num_layers - 1, "load") == 3
    session.store(offer("load", TOKENS, range(3, NUM_BLOCKS), pool.fill, pool.release))
    session.finish("load")
    time.sleep(0.1)


def test_a_bad_block_is_reported_before_it_is_stored_again(cache: FakeCache) -> None:
    """A pass that computes it while its load goes on offers it before the load has ended."""
    pool = Pool()
    with open_session(lambda: cache) as session:
        offer_again(cache, session, pool)
        assert session.loads.end("load") == 3
        assert session.flush(5.0)
        assert cache.corrupt_reports == [KEYS[3]]
        assert load_all(session, Pool(6)) == NUM_BLOCKS


def test_a_report_that_does_not_come_holds_stores_up_for_a_while_only(
    cache: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "MAX_REPORT_S", 0.1)
    with open_session(lambda: cache) as session:
        store_all(session, Pool())
        cache.damage(KEYS[3], layer=1)
        assert begin_load(session, Pool(5), range(session.match(TOKENS, 0)))
        assert session.loads.wait_layer(LAYOUT.num_layers - 1, "load") == 3
        store_all(session, Pool())
        assert session.stats().present_blocks == NUM_BLOCKS


def test_who_closes_does_not_wait_for_a_report(cache: FakeCache) -> None:
    pool = Pool()
    with open_session(lambda: cache) as session:
        offer_again(cache, session, pool)
        started_s = time.monotonic()
    assert time.monotonic() - started_s < background.MAX_REPORT_S / 4
    assert pool.released == 2


def test_a_store_that_waits_for_a_report_ends_with_the_connection(cache: FakeCache) -> None:
    """Nothing can be stored then: the engine gets its blocks back, and somebody reconnects."""
    pool = Pool()
    options = SessionOptions(decide=ALL, deadline_s=0.2, breaker=NEVER)
    with open_session(lambda: cache, options) as session:
        offer_again(cache, session, pool)
        cache.hang.clear()
        assert session.match(list(range(500, 526)), 0) == 0
        started_s = time.monotonic()
        while pool.released < 2 and time.monotonic() - started_s < 5.0:
            time.sleep(0.01)
        assert pool.released == 2
        assert session.loads.end("load") == 3
        cache.hang.set()
