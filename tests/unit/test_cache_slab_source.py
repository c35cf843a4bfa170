"""A cache as the tier below the pool: round trips, and everything that can go wrong on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ucm.config import MemoryConfig
from ucm.connectors.slab_shelf import CacheShelf
from ucm.connectors.slab_source import CacheSlabSource, SlabSourceOptions
from ucm.embedded import EmbeddedCache
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.loading import load_model
from ucm.engine.model import LlamaModel
from ucm.engine.request import FinishReason
from ucm.engine.sampling import SamplingParams
from ucm.errors import TierUnavailableError
from ucm.hashing import NamespaceSpec
from ucm.layout import KvDtype, KvLayout
from ucm.load_plan import LoadPlan
from ucm.manager import Manager
from ucm.sparse.offload import OffloadOptions
from ucm.sparse.slab_queue import SlabLostError
from ucm.testing.blocks import tiny_spec
from ucm.testing.fake_cache import FakeCache
from ucm.testing.gated_store import gated_config
from ucm.testing.models import write_tiny_model
from ucm.testing.nvme import quick_folder
from ucm.types import LoadStatus, SourceKind

LAYOUT = KvLayout(num_layers=3, num_kv_heads=2, head_dim=16, block_tokens=4, dtype=KvDtype.FLOAT32)
SPEC = replace(tiny_spec(layout=LAYOUT))
QUICK = SlabSourceOptions(deadline_s=5.0, run_blocks=8, retry_s=0.01)
TOKENS = list(range(1000))


@pytest.fixture
def cache() -> FakeCache:
    return FakeCache()


@pytest.fixture
def source(cache: FakeCache) -> Iterator[CacheSlabSource]:
    made = CacheSlabSource(lambda: cache, SPEC, QUICK)
    yield made
    cache.hang.set()
    made.close()


def some_slabs(num_blocks: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYOUT.num_layers, num_blocks, *LAYOUT.slab_shape, generator=generator)


def fill(shelf: CacheShelf, slabs: Tensor, *, num_exact: int = 1000) -> None:
    first, count = len(shelf.keys), slabs.shape[1]
    shelf.put(TOKENS[: (first + count) * 4], slabs.clone(), num_exact=num_exact)
    shelf.wait_kept(first + count)


def read(shelf: CacheShelf, layer: int, blocks: list[int]) -> Tensor:
    into = torch.full((len(blocks), *LAYOUT.slab_shape), float("nan"))
    shelf.read(layer, blocks, list(into)).wait(len(blocks))
    return into


def test_what_is_put_comes_back(source: CacheSlabSource) -> None:
    slabs = some_slabs(21)
    shelf = source.open("a")
    fill(shelf, slabs[:, :5])
    fill(shelf, slabs[:, 5:])
    assert shelf.num_kept == 21
    for layer, blocks in ((0, [3]), (2, [20, 0, 7, 8]), (1, list(range(21)))):
        assert torch.equal(read(shelf, layer, blocks), slabs[layer, blocks])


def test_what_is_exact_is_found_by_its_tokens_and_the_rest_is_not(
    source: CacheSlabSource, cache: FakeCache
) -> None:
    slabs = some_slabs(6)
    shelves = [source.open(name) for name in "ab"]
    for shelf in shelves:
        fill(shelf, slabs, num_exact=4)
    first, second = (shelf.keys for shelf in shelves)
    assert first[:4] == second[:4]
    assert not set(first[4:]) & set(second[4:])
    assert len(cache.blocks) == 8


def test_a_damaged_slab_is_reported_and_lost(source: CacheSlabSource, cache: FakeCache) -> None:
    shelf = source.open("a")
    fill(shelf, some_slabs(6))
    cache.damage(shelf.keys[4], 1)
    assert torch.equal(read(shelf, 0, [4]), some_slabs(6)[0, [4]])
    with pytest.raises(SlabLostError) as lost:
        read(shelf, 1, [2, 4])
    assert lost.value.block == 4
    assert shelf.keys[4] in cache.corrupt_reports


def test_an_evicted_block_is_lost(source: CacheSlabSource, cache: FakeCache) -> None:
    shelf = source.open("a")
    fill(shelf, some_slabs(6))
    del cache.blocks[shelf.keys[5]]
    with pytest.raises(SlabLostError, match="miss"):
        read(shelf, 0, [0, 5])


def test_a_cache_that_dies_loses_slabs_and_comes_back(
    source: CacheSlabSource, cache: FakeCache
) -> None:
    slabs = some_slabs(6)
    shelf = source.open("a")
    fill(shelf, slabs)
    cache.fail["begin_load"] = TierUnavailableError("gone")
    with pytest.raises(SlabLostError, match="gone"):
        read(shelf, 0, [1])
    with pytest.raises(SlabLostError, match="gone"):
        read(shelf, 0, [1])
    cache.fail.clear()
    assert torch.equal(read(shelf, 0, [1]), slabs[0, [1]])
    cache.fail["prepare_store"] = TierUnavailableError("gone again")
    with pytest.raises(SlabLostError, match="gone again"):
        fill(shelf, some_slabs(2, 1))
    cache.fail.clear()
    shelf.truncate(6)
    fill(shelf, some_slabs(2, 1))
    assert torch.equal(read(shelf, 2, [7]), some_slabs(2, 1)[2, [1]])


def test_a_cache_that_hangs_is_waited_for_only_so_long(cache: FakeCache) -> None:
    source = CacheSlabSource(lambda: cache, SPEC, replace(QUICK, deadline_s=0.2))
    shelf = source.open("a")
    fill(shelf, some_slabs(6))
    cache.hang.clear()
    into = torch.zeros(LAYOUT.slab_shape)
    under_way = shelf.read(0, [1], [into])
    with pytest.raises(SlabLostError, match="not in"):
        under_way.wait(1)
    under_way.cancel()
    cache.hang.set()
    assert torch.equal(read(shelf, 1, [1]), some_slabs(6)[1, [1]])
    assert not into.any()
    source.close()


def test_a_shelf_that_shrinks_under_a_cancelled_read_stops_nobody(cache: FakeCache) -> None:
    source = CacheSlabSource(lambda: cache, SPEC, replace(QUICK, deadline_s=0.2))
    shelf, other = source.open("a"), source.open("b")
    for each in (shelf, other):
        fill(each, some_slabs(6))
    read(shelf, 0, [1])
    cache.hang.clear()
    shelf.runs[0].renew_s = 0.0
    under_way = shelf.read(1, [5], [torch.zeros(LAYOUT.slab_shape)])
    with pytest.raises(SlabLostError, match="not in"):
        under_way.wait(1)
    under_way.cancel()
    shelf.truncate(0)
    cache.hang.set()
    assert torch.equal(read(other, 1, [1]), some_slabs(6)[1, [1]])
    source.close()


class StuckPromotion:
    """A `LoadProgress` that never gets on; it says how long it was waited for."""

    num_blocks = 1

    def __init__(self) -> None:
        self.waited_s: list[float] = []

    def wait(self, _num_slabs: int, timeout_s: float) -> bool:
        self.waited_s.append(timeout_s)
        return False

    def num_done(self) -> int:
        return 0

    def num_usable(self) -> int:
        return 1

    def checksums(self, _index: int) -> tuple[int, ...]:
        return ()

    def close(self) -> None: ...


def test_a_promotion_that_hangs_holds_the_source_no_longer_than_a_read(
    source: CacheSlabSource, cache: FakeCache
) -> None:
    shelf = source.open("a")
    fill(shelf, some_slabs(1))
    stuck, begin_load = StuckPromotion(), cache.begin_load

    def promoting(*args: object, **details: object) -> LoadPlan:
        plan = begin_load(*args, **details)  # type: ignore[arg-type]
        blocks = tuple(replace(block, source=SourceKind.PROMOTING) for block in plan.blocks)
        return replace(plan, blocks=blocks, progress=stuck)

    cache.begin_load = promoting  # type: ignore[method-assign]
    with pytest.raises(SlabLostError, match="not promoted"):
        read(shelf, 0, [0])
    assert stuck.waited_s == [QUICK.deadline_s] * 2


def test_a_lease_is_renewed(source: CacheSlabSource, cache: FakeCache) -> None:
    shelf = source.open("a")
    fill(shelf, some_slabs(6))
    read(shelf, 0, [1, 2])
    read(shelf, 1, [1, 2])
    assert cache.calls.count("begin_load") == 1
    shelf.runs[0].renew_s = 0.0
    read(shelf, 2, [1])
    assert cache.calls.count("begin_load") == 2
    assert cache.calls.count("complete_load") == 1


def test_the_end_gives_every_lease_back(cache: FakeCache) -> None:
    source = CacheSlabSource(lambda: cache, SPEC, QUICK)
    shelves = [source.open(name) for name in "ab"]
    for shelf in shelves:
        fill(shelf, some_slabs(20))
        read(shelf, 0, [0, 19])
    assert len(cache.leases) == 4
    shelves[0].close()
    source.close()
    assert not cache.leases
    with pytest.raises(SlabLostError, match="closed"):
        shelves[1].read(0, [0], [torch.zeros(LAYOUT.slab_shape)]).wait(1)


def small_store(path: Path) -> EmbeddedCache:
    """Memory for 24 blocks, NVMe for 240."""
    memory = MemoryConfig(capacity_bytes=24 * LAYOUT.block_bytes, prefault_bytes=0)
    return EmbeddedCache(Manager(replace(gated_config(path, LAYOUT), memory=memory)))


def test_a_store_whose_memory_holds_less_than_the_shelf() -> None:
    slabs = some_slabs(100)
    with quick_folder() as folder:
        store = small_store(folder / "store")
        source = CacheSlabSource(lambda: store, SPEC, replace(QUICK, deadline_s=15.0))
        shelf = source.open("a")
        for first in range(0, 100, 20):
            fill(shelf, slabs[:, first : first + 20])
            assert torch.equal(read(shelf, 1, [first, 3]), slabs[1, [first, 3]])
        for layer in (2, 0, 1):
            assert torch.equal(read(shelf, layer, list(range(100))), slabs[layer])
        sources = {block.source for run in shelf.runs.values() for block in run.plan.blocks}
        assert SourceKind.EXTENT in sources
        statuses = {block.status for run in shelf.runs.values() for block in run.plan.blocks}
        assert statuses == {LoadStatus.READY}
        source.close()


# The engine

PROMPT = [3 + (i * i + 7 * i) % 90 for i in range(150)]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
SHARE = OffloadOptions(resident_blocks=8, wave_blocks=3, num_waves=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("tiny")), torch.float32).model


@pytest.fixture(scope="module")
def expected(model: LlamaModel) -> list[int]:
    with Engine(model, None, EngineOptions(num_blocks=60, block_tokens=4)) as engine:
        (result,) = engine.generate_all([PROMPT], GREEDY)
    return list(result.outputs[0].token_ids)


def long_engine(model: LlamaModel, source: CacheSlabSource, num_blocks: int = 10) -> Engine:
    options = EngineOptions(num_blocks=num_blocks, block_tokens=4, offload=SHARE)
    return Engine(model, None, options, source=source)


def spec_of(model: LlamaModel) -> NamespaceSpec:
    c = model.config
    layout = KvLayout(
        num_layers=c.num_layers,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        block_tokens=4,
        dtype=KvDtype.FLOAT32,
    )
    return tiny_spec(layout=layout)


def test_an_engine_beyond_its_pool(model: LlamaModel, expected: list[int]) -> None:
    with quick_folder() as folder:
        store = small_store(folder / "store")
        source = CacheSlabSource(lambda: store, spec_of(model), replace(QUICK, deadline_s=15.0))
        with long_engine(model, source) as engine:
            (result,) = engine.generate_all([PROMPT], GREEDY)
            assert engine.check_integrity() == []
        assert list(result.outputs[0].token_ids) == expected
        source.close()


def kill(cache: FakeCache) -> None:
    """Nothing can be had of it any more, and what it has is wrong."""
    for call in ("begin_load", "prepare_store", "open_namespace"):
        cache.fail[call] = TierUnavailableError("gone")
    for key in list(cache.blocks):
        cache.damage(key, 0)


@pytest.mark.parametrize("num_blocks", [10, 60])
def test_a_cache_that_dies_under_an_engine(
    model: LlamaModel, expected: list[int], cache: FakeCache, num_blocks: int
) -> None:
    source = CacheSlabSource(lambda: cache, spec_of(model), QUICK)
    with long_engine(model, source, num_blocks) as engine:
        engine.add_request(PROMPT, GREEDY)
        events = [event for _ in range(10) for event in engine.step()]
        kill(cache)
        while engine.has_work:
            events += engine.step()
            assert engine.check_integrity() == []
        assert engine.pool.blocks.num_available == num_blocks
    source.close()
    result = events[-1].result
    assert result is not None
    tokens = list(result.outputs[0].token_ids)
    if num_blocks == 60:
        assert tokens == expected
    else:
        assert result.outputs[0].finish_reason is FinishReason.FAILED
        assert "lost" in (result.error or "")
        assert tokens == expected[: len(tokens)]
