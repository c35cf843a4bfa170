"""The session's summaries: written behind stored blocks, fetched for a prefix, never in the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from ucm.api import SlabChecksums
from ucm.checksum import block_checksums
from ucm.config import MIB, Config, NvmeConfig
from ucm.connectors import block_summaries
from ucm.connectors.circuit_breaker import BreakerOptions
from ucm.connectors.session import CacheSession, SessionOptions, StoreOffer
from ucm.embedded import EmbeddedCache
from ucm.errors import TierUnavailableError
from ucm.hashing import NamespaceSpec, chain_keys
from ucm.kernels.summarize import summarize_blocks
from ucm.kernels.summary_record import decode_summary
from ucm.layout import KvDtype, KvLayout
from ucm.manager import Manager
from ucm.testing.fake_cache import FakeCache
from ucm.types import SummaryKind, TierKind

LAYOUT = KvLayout(num_layers=3, num_kv_heads=1, head_dim=8, block_tokens=4, dtype=KvDtype.FLOAT32)
SPEC = NamespaceSpec(layout=LAYOUT, model_id="m", weights_digest="d")
TOKENS = list(range(100, 118))  # 4 full blocks and 2 tokens
NUM_BLOCKS = 4
KEYS = chain_keys(SPEC.fingerprint(), TOKENS, LAYOUT.block_tokens)
KIND = SummaryKind.GSA_K4
OPTIONS = SessionOptions(
    deadline_s=5.0,
    store_batch_blocks=2,
    breaker=BreakerOptions(failures_to_open=3, backoff_s=3600.0),
    summary=KIND,
)


@pytest.fixture
def cache() -> Iterator[FakeCache]:
    fake = FakeCache()
    yield fake
    fake.hang.set()


@pytest.fixture
def session(cache: FakeCache) -> Iterator[CacheSession]:
    with CacheSession(lambda: cache, SPEC, OPTIONS) as opened:
        opened.connect(5.0)
        yield opened


def block_of(index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Keys and values that a model could have computed."""
    values = np.random.default_rng(index).normal(size=LAYOUT.block_bytes // 4)
    return values.astype(np.float32).view(np.uint8)


def fill(indexes: Sequence[int], slots: Sequence[memoryview]) -> list[SlabChecksums]:
    for index, slot in zip(indexes, slots, strict=True):
        np.frombuffer(slot, np.uint8)[:] = block_of(index)
    return [block_checksums(LAYOUT, block_of(index).data) for index in indexes]


def store(session: CacheSession) -> None:
    session.store(
        StoreOffer(
            request_id="r",
            token_ids=TOKENS,
            blocks=range(NUM_BLOCKS),
            fill=fill,
            release=lambda: None,
        )
    )
    assert session.flush(5.0)


def test_stored_blocks_bring_their_summaries(session: CacheSession, cache: FakeCache) -> None:
    store(session)
    assert session.stats().stored_blocks == session.stats().summarised_blocks == NUM_BLOCKS
    for index, key in enumerate(KEYS):
        stored = cache.blocks[key]
        decoded = decode_summary(LAYOUT, stored.summary, stored.checksums)
        assert decoded is not None
        expected = summarize_blocks(LAYOUT, KIND, [block_of(index).data])[0]
        assert decoded.records.tobytes() == expected.tobytes()


def test_summaries_of_a_prefix_are_fetched_in_order(
    session: CacheSession, cache: FakeCache
) -> None:
    store(session)
    del cache.blocks[KEYS[3]]
    found = session.summaries(TOKENS)
    assert found == [*[cache.blocks[key].summary for key in KEYS[:3]], None]
    assert not cache.leases


def test_a_session_without_summaries_asks_for_none(cache: FakeCache) -> None:
    options = SessionOptions(deadline_s=5.0, breaker=OPTIONS.breaker)
    with CacheSession(lambda: cache, SPEC, options) as session:
        session.connect(5.0)
        store(session)
        assert session.summaries(TOKENS) == [None] * NUM_BLOCKS
    assert session.stats().summarised_blocks == 0
    assert "map_summaries" not in cache.calls
    assert not any(stored.summary for stored in cache.blocks.values())


def test_a_summary_that_cannot_be_made_costs_no_block(
    session: CacheSession, cache: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise ValueError("an engine's numbers")

    monkeypatch.setattr(block_summaries, "summarize_blocks", fail)
    store(session)
    assert session.stats().stored_blocks == NUM_BLOCKS
    assert session.stats().summarised_blocks == 0
    assert session.stats().failures == 0
    assert session.summaries(TOKENS) == [None] * NUM_BLOCKS


def test_a_damaged_summary_is_none(session: CacheSession, cache: FakeCache) -> None:
    store(session)
    stored = cache.blocks[KEYS[1]]
    stored.summary = stored.summary[:-1] + bytes([stored.summary[-1] ^ 1])
    found = session.summaries(TOKENS)
    assert [data is None for data in found] == [False, True, False, False]


def test_the_summary_of_another_content_is_none(session: CacheSession, cache: FakeCache) -> None:
    store(session)
    cache.blocks[KEYS[1]].summary = cache.blocks[KEYS[2]].summary
    assert session.summaries(TOKENS)[1] is None


@pytest.mark.parametrize("call", ["map_summaries", "release"])
def test_a_cache_that_fails_has_no_summaries(
    session: CacheSession, cache: FakeCache, call: str
) -> None:
    store(session)
    cache.fail[call] = TierUnavailableError("gone")
    assert session.summaries(TOKENS) == [None] * NUM_BLOCKS
    assert session.stats().failures > 0


def test_a_cache_that_hangs_costs_one_deadline(cache: FakeCache) -> None:
    options = SessionOptions(deadline_s=0.2, breaker=OPTIONS.breaker, summary=KIND)
    with CacheSession(lambda: cache, SPEC, options) as session:
        session.connect(5.0)
        cache.hang.clear()
        assert session.summaries(TOKENS) == [None] * NUM_BLOCKS
        assert session.summaries(TOKENS) == [None] * NUM_BLOCKS  # the breaker is open
        assert session.stats().timeouts == 1
        cache.hang.set()


def test_summaries_outlive_the_store_that_took_them(tmp_path: Path) -> None:
    """Through a real store and its disk; its next opening reads them without their blocks."""
    stored = EmbeddedCache(Manager(Config(nvme=small_nvme(tmp_path))))
    with CacheSession(lambda: stored, SPEC, OPTIONS) as session:
        session.connect(20.0)
        store(session)
        before = session.summaries(TOKENS)
    assert None not in before
    stored.manager.close()
    again = EmbeddedCache(Manager(Config(nvme=small_nvme(tmp_path))))
    with CacheSession(lambda: again, SPEC, OPTIONS) as session:
        session.connect(20.0)
        assert session.summaries(TOKENS) == before
        assert set(again.lookup(SPEC.fingerprint(), KEYS).tiers) == {TierKind.NVME}
    again.manager.close()


def small_nvme(folder: Path) -> NvmeConfig:
    return NvmeConfig(
        path=folder / "store",
        capacity_bytes=4 * MIB,
        segment_bytes=2 * MIB,
        io_threads=2,
        index_map_bytes=16 * MIB,
    )
