"""Chunks through the reference connector: kept apart from prompts, loaded whole or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch

from ucm.connectors.circuit_breaker import BreakerOptions
from ucm.connectors.reference import ReferenceConnector
from ucm.connectors.session import CacheSession, SessionOptions
from ucm.cost_model import CostModel
from ucm.engine.hook import LoadRequest, StoreRequest
from ucm.engine.layer_clock import LayerClock
from ucm.hashing import Encodable, NamespaceSpec, chain_keys
from ucm.layout import KvDtype, KvLayout
from ucm.load_decision import Decide, LoadKind, decide, forced
from ucm.reuse import Chunk, ChunkSpace
from ucm.testing.fake_cache import FakeCache
from ucm.types import BlockKey, LoadOrder, TierKind

LAYOUT = KvLayout(num_layers=3, num_kv_heads=2, head_dim=6, block_tokens=4, dtype=KvDtype.FLOAT32)
SPEC = NamespaceSpec(layout=LAYOUT, model_id="m", weights_digest="d")
SPACE = ChunkSpace(model=bytes(32), sink_tokens=(1, 2, 3, 4), block_tokens=4)
OTHER = ChunkSpace(model=bytes(32), sink_tokens=(1, 2, 3, 5), block_tokens=4)
CHUNK = Chunk(tuple(range(10, 24)), SPACE)  # three blocks and two tokens
NUM_BLOCKS = CHUNK.num_blocks
NEVER = BreakerOptions(backoff_s=3600.0)
ALL = forced(LoadKind.LOAD_ALL)
NO_EXTRA: tuple[Encodable, ...] = ()


def random_pool(seed: int) -> torch.Tensor:
    shape = (LAYOUT.num_layers, 16, *LAYOUT.slab_shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(slots=True)
class Side:
    """One engine's pool and connector."""

    pool: torch.Tensor
    hook: ReferenceConnector

    def store(
        self,
        block_ids: list[int],
        extra_keys: tuple[Encodable, ...],
    ) -> None:
        self.offer(block_ids, extra_keys, lambda: None)
        assert self.hook.session.flush(5.0)

    def offer(
        self,
        block_ids: list[int],
        extra_keys: tuple[Encodable, ...],
        release: Callable[[], None],
    ) -> None:
        request = StoreRequest(
            request_id="s",
            token_ids=CHUNK.token_ids[: len(block_ids) * 4],
            first_block=0,
            block_ids=block_ids,
            release=release,
            layers=LayerClock.finished(LAYOUT.num_layers),
            extra_keys=extra_keys,
        )
        self.hook.store(request)

    def load(self, block_ids: list[int], extra_keys: tuple[Encodable, ...]) -> int:
        """Match and load as a blend does; good blocks."""
        tokens = CHUNK.token_ids
        if self.hook.match(tokens, 0, extra_keys) < 4:
            return 0
        request = LoadRequest(
            request_id="r/chunk0",
            token_ids=tokens,
            first_block=0,
            block_ids=block_ids,
            hold=no_hold,
            extra_keys=extra_keys,
            whole=bool(extra_keys),
        )
        start = self.hook.start_load(request)
        if not start.num_blocks:
            return 0
        assert start.order is LoadOrder.LAYERS
        for layer in range(LAYOUT.num_layers):
            (num_good,) = self.hook.wait_layer(layer, ["r/chunk0"])
        assert self.hook.end_load("r/chunk0") == num_good
        return num_good


def no_hold(_block_ids: Sequence[int]) -> Callable[[], None]:
    raise AssertionError("no read hangs here")


@pytest.fixture
def cache() -> Iterator[FakeCache]:
    fake = FakeCache()
    yield fake
    fake.hang.set()


@pytest.fixture
def make_side(cache: FakeCache) -> Iterator[Callable[..., Side]]:
    sides: list[Side] = []

    def make(decide: Decide = ALL, model: CostModel | None = None) -> Side:
        options = SessionOptions(decide=decide, deadline_s=0.5, breaker=NEVER)
        session = CacheSession(lambda: cache, SPEC, options, model=model)
        session.connect(5.0)
        side = Side(random_pool(len(sides)), ReferenceConnector(session))
        side.hook.attach(side.pool)
        sides.append(side)
        return side

    yield make
    for side in sides:
        side.hook.session.close()


def test_a_chunk_comes_back_into_other_places(make_side: Callable[..., Side]) -> None:
    writer, reader = make_side(), make_side()
    writer.store([3, 9, 0], SPACE.extra_keys)
    assert reader.load([7, 1, 5], SPACE.extra_keys) == NUM_BLOCKS
    assert torch.equal(reader.pool[:, [7, 1, 5]], writer.pool[:, [3, 9, 0]])
    assert writer.hook.session.stats().stored_chunk_blocks == NUM_BLOCKS
    stats = reader.hook.session.stats()
    assert stats.loaded_chunk_blocks == stats.loaded_blocks == NUM_BLOCKS


def test_a_chunk_waits_for_nothing_that_could_continue_it(
    make_side: Callable[..., Side], cache: FakeCache
) -> None:
    """A few blocks of a decode wait seconds for the next ones; a chunk is all there."""
    side = make_side()
    release = threading.Event()
    side.offer([3, 9, 0], SPACE.extra_keys, release=release.set)
    assert release.wait(4.0), "the delay is 5 s"
    assert len(cache.blocks) == NUM_BLOCKS


def test_chunks_leave_nothing_behind_that_grows(make_side: Callable[..., Side]) -> None:
    side = make_side()
    side.store([3, 9, 0], SPACE.extra_keys)
    assert side.load([7, 1, 5], SPACE.extra_keys) == NUM_BLOCKS
    assert not side.hook.session._chains._requests
    assert not side.hook.session.loads._unfinished, "no pass ends where a chunk does"


def test_it_is_stored_under_its_own_keys(make_side: Callable[..., Side], cache: FakeCache) -> None:
    make_side().store([3, 9, 0], SPACE.extra_keys)
    assert list(cache.blocks) == CHUNK.keys(SPEC.fingerprint())


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        (NO_EXTRA, SPACE.extra_keys),
        (SPACE.extra_keys, NO_EXTRA),
        (OTHER.extra_keys, SPACE.extra_keys),
    ],
    ids=["a prompt for a chunk", "a chunk for a prompt", "behind another sink"],
)
def test_the_same_tokens_are_a_miss(
    make_side: Callable[..., Side],
    stored: tuple[Encodable, ...],
    asked: tuple[Encodable, ...],
) -> None:
    side = make_side()
    side.store([3, 9, 0], stored)
    before = side.pool.clone()
    assert side.load([7, 1, 5], asked) == 0
    assert torch.equal(side.pool, before)


def test_both_under_the_same_tokens_each_get_their_own(make_side: Callable[..., Side]) -> None:
    """The order of calls in one session leads no chain into another's keys."""
    side = make_side()
    side.store([0, 1, 2], NO_EXTRA)
    side.store([3, 4, 5], SPACE.extra_keys)
    side.store([6, 7, 8], OTHER.extra_keys)
    for extra_keys, source in (
        (SPACE.extra_keys, [3, 4, 5]),
        (NO_EXTRA, [0, 1, 2]),
        (OTHER.extra_keys, [6, 7, 8]),
    ):
        assert side.load([10, 11, 12], extra_keys) == NUM_BLOCKS
        assert torch.equal(side.pool[:, [10, 11, 12]], side.pool[:, source])
    stats = side.hook.session.stats()
    assert (stats.stored_blocks, stats.stored_chunk_blocks) == (9, 6)
    assert (stats.loaded_blocks, stats.loaded_chunk_blocks) == (9, 6)


def test_bytes_under_a_chunks_key_that_are_not_its_own_are_refused(
    make_side: Callable[..., Side], cache: FakeCache
) -> None:
    """A store that mixes up a prompt's and a chunk's blocks is found by nobody's checksum, so no
    key of one may ever be asked for with the other's."""
    side = make_side()
    side.store([0, 1, 2], NO_EXTRA)
    side.store([3, 4, 5], SPACE.extra_keys)
    prompt = set(chain_keys(SPEC.fingerprint(), CHUNK.token_ids, 4))
    chunk = set(CHUNK.keys(SPEC.fingerprint()))
    assert not prompt & chunk
    assert set(cache.blocks) == prompt | chunk


@pytest.mark.parametrize("kind", [LoadKind.HYBRID, LoadKind.LOAD_PART, LoadKind.LOAD_ALL])
def test_a_chunk_is_loaded_whole_whatever_is_preferred(
    make_side: Callable[..., Side], kind: LoadKind
) -> None:
    side = make_side(forced(kind))
    side.store([3, 9, 0], SPACE.extra_keys)
    assert side.load([7, 1, 5], SPACE.extra_keys) == NUM_BLOCKS


def test_one_that_is_cheaper_to_compute_is_not_loaded(make_side: Callable[..., Side]) -> None:
    side = make_side(forced(LoadKind.COMPUTE))
    side.store([3, 9, 0], SPACE.extra_keys)
    assert side.load([7, 1, 5], SPACE.extra_keys) == 0


def test_one_that_would_outlast_the_deadline_is_not_loaded(
    make_side: Callable[..., Side], cache: FakeCache
) -> None:
    model = CostModel()
    for _ in range(20):
        model.observe_load(TierKind.MEMORY, 1 << 20, 1e4, num_requests=1)
        model.observe_pass(((0, 512),), 1e6)
    side = make_side(decide, model)
    side.store([3, 9, 0], SPACE.extra_keys)
    assert side.load([7, 1, 5], SPACE.extra_keys) == 0
    assert "begin_load" not in cache.calls


def test_what_is_not_all_there_is_not_begun(
    make_side: Callable[..., Side], cache: FakeCache
) -> None:
    side = make_side()
    side.store([3, 9, 0], SPACE.extra_keys)
    last: BlockKey = CHUNK.keys(SPEC.fingerprint())[-1]
    del cache.blocks[last]
    assert side.hook.match(CHUNK.token_ids, 0, SPACE.extra_keys) == 8
    assert side.load([7, 1, 5], SPACE.extra_keys) == 0, "three blocks were asked for"
    assert side.load([7, 1], SPACE.extra_keys) == 2


def test_a_damaged_block_of_a_chunk_is_counted_and_not_used(
    make_side: Callable[..., Side], cache: FakeCache
) -> None:
    side = make_side()
    side.store([3, 9, 0], SPACE.extra_keys)
    cache.damage(CHUNK.keys(SPEC.fingerprint())[1], layer=1)
    assert side.load([7, 1, 5], SPACE.extra_keys) == 1
    assert side.hook.session.stats().wrong_slabs == 1
