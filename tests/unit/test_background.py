"""The session's background thread: what it stores together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ucm.api import SlabChecksums, StoreLease
from ucm.checksum import block_checksums
from ucm.connectors.session import CacheSession, SessionOptions, StoreOffer
from ucm.hashing import NamespaceSpec
from ucm.layout import KvDtype, KvLayout
from ucm.testing.fake_cache import FakeCache
from ucm.types import BlockKey, NamespaceId

LAYOUT = KvLayout(num_layers=3, num_kv_heads=1, head_dim=8, block_tokens=4, dtype=KvDtype.FLOAT32)
SPEC = NamespaceSpec(layout=LAYOUT, model_id="m", weights_digest="d")
TOKENS = list(range(100, 132))
OPTIONS = SessionOptions(store_delay_s=3600.0, store_run_blocks=8)


class CountingCache(FakeCache):
    """Notes how many blocks each store has."""

    def __init__(self) -> None:
        super().__init__()
        self.stores: list[int] = []

    def prepare_store(
        self, namespace: NamespaceId, parent: BlockKey, keys: Sequence[BlockKey]
    ) -> StoreLease:
        self.stores.append(len(keys))
        return super().prepare_store(namespace, parent, keys)


class Decode:
    """Offers its blocks one by one, each full of its own number."""

    def __init__(self, session: CacheSession) -> None:
        self.session = session
        self.num_offered = 0
        self.released = 0
        self.fails_at: int | None = None

    def seal(self) -> None:
        index = self.num_offered
        self.num_offered += 1

        def fill(_indexes: Sequence[int], slots: Sequence[memoryview]) -> list[SlabChecksums]:
            if index == self.fails_at:
                raise RuntimeError("the pass failed")
            np.frombuffer(slots[0], np.uint8)[:] = index + 1
            return [block_checksums(LAYOUT, slots[0])]

        def release() -> None:
            self.released += 1

        tokens = TOKENS[: (index + 1) * LAYOUT.block_tokens]
        self.session.store(
            StoreOffer(
                request_id="decode",
                token_ids=tokens,
                blocks=range(index, index + 1),
                fill=fill,
                release=release,
            )
        )


def test_blocks_of_one_decode_share_a_store() -> None:
    cache = CountingCache()
    with CacheSession(lambda: cache, SPEC, OPTIONS) as session:
        session.connect(5.0)
        decode = Decode(session)
        for _ in range(3):
            decode.seal()
        assert not cache.stores
        session.finish("another request")
        assert not cache.stores
        session.finish("decode")
        assert session.flush(5.0)
        assert cache.stores == [3]
        decode.seal()
        assert session.flush(5.0), "a flush waits for nothing"
        stats = session.stats()
    assert cache.stores == [3, 1]
    assert decode.released == 4
    assert (stats.stored_blocks, stats.dropped_blocks) == (4, 0)
    stored = [bytes(block.data[:1]) for block in cache.blocks.values()]
    assert stored == [bytes([number]) for number in (1, 2, 3, 4)]


def test_a_block_that_fails_costs_none_before_it() -> None:
    cache = CountingCache()
    with CacheSession(lambda: cache, SPEC, OPTIONS) as session:
        session.connect(5.0)
        decode = Decode(session)
        decode.fails_at = 2
        for _ in range(4):
            decode.seal()
        assert session.flush(5.0)
        stats = session.stats()
    assert decode.released == 4
    assert (stats.stored_blocks, stats.dropped_blocks, stats.failures) == (2, 2, 1)
    assert not cache.leases


def test_what_waits_at_the_end_of_the_session_is_released() -> None:
    cache = CountingCache()
    with CacheSession(lambda: cache, SPEC, OPTIONS) as session:
        session.connect(5.0)
        decode = Decode(session)
        decode.seal()
    assert decode.released == 1
    assert session.stats().dropped_blocks == 1
