"""The reference connector between a real pool tensor and a cache that fails on demand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from ucm.connectors.circuit_breaker import BreakerOptions
from ucm.connectors.reference import ReferenceConnector, kv_dtype, namespace_spec, pool_bytes
from ucm.connectors.session import CacheSession, SessionOptions
from ucm.engine.config import ModelConfig
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.hook import LoadRequest, StoreRequest
from ucm.engine.layer_clock import LayerClock
from ucm.engine.pool import TORCH_DTYPES
from ucm.engine.sampling import SamplingParams
from ucm.errors import ConfigError, LayoutMismatchError, TierUnavailableError
from ucm.hashing import NamespaceSpec
from ucm.kernels.rope import RopeScaling
from ucm.layout import KvDtype, KvLayout
from ucm.load_decision import LoadKind, forced
from ucm.testing.fake_cache import FakeCache
from ucm.testing.fake_model import FakeModel, reference_tokens

CONFIG = ModelConfig(
    name="tiny",
    vocab_size=64,
    hidden_size=24,
    intermediate_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_context_tokens=512,
    rms_norm_eps=1e-5,
    rope_base=1e4,
)
BLOCK_TOKENS = 4
NUM_POOL_BLOCKS = 16
TOKENS = list(range(10, 34))
NEVER = BreakerOptions(backoff_s=3600.0)
ALL = forced(LoadKind.LOAD_ALL)


def spec_of(dtype: KvDtype) -> NamespaceSpec:
    return namespace_spec(CONFIG, weights_digest="d", dtype=dtype, block_tokens=BLOCK_TOKENS)


def random_pool(dtype: KvDtype, seed: int) -> torch.Tensor:
    shape = (CONFIG.num_layers, NUM_POOL_BLOCKS, *spec_of(dtype).layout.slab_shape)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(TORCH_DTYPES[dtype])


@pytest.fixture
def cache() -> Iterator[FakeCache]:
    fake = FakeCache()
    yield fake
    fake.hang.set()


def connector_to(cache: FakeCache, dtype: KvDtype = KvDtype.FLOAT32) -> ReferenceConnector:
    options = SessionOptions(decide=ALL, deadline_s=0.3, breaker=NEVER)
    session = CacheSession(lambda: cache, spec_of(dtype), options)
    session.connect(5.0)
    return ReferenceConnector(session)


def store(connector: ReferenceConnector, block_ids: list[int]) -> list[str]:
    released: list[str] = []
    connector.store(
        StoreRequest(
            request_id="s",
            token_ids=TOKENS[: len(block_ids) * BLOCK_TOKENS],
            first_block=0,
            block_ids=block_ids,
            release=lambda: released.append("once"),
            layers=LayerClock.finished(CONFIG.num_layers),
        )
    )
    assert connector.session.flush(5.0)
    return released


def load(connector: ReferenceConnector, first_block: int, block_ids: list[int]) -> int:
    """Load as the engine does; -1 when nothing is."""
    connector.match(TOKENS, first_block * BLOCK_TOKENS)
    start = connector.start_load(
        LoadRequest(
            request_id="l",
            token_ids=TOKENS,
            first_block=first_block,
            block_ids=block_ids,
            hold=no_hold,
        )
    )
    if not start.num_blocks:
        return 0
    for layer in range(CONFIG.num_layers):
        (num_good,) = connector.wait_layer(layer, ["l"])
    assert connector.end_load("l") == num_good
    return num_good


def no_hold(_block_ids: Sequence[int]) -> Callable[[], None]:
    raise AssertionError("no read hangs here")


@pytest.mark.parametrize("dtype", list(KvDtype))
def test_blocks_move_bit_by_bit_to_other_places(cache: FakeCache, dtype: KvDtype) -> None:
    source, target = random_pool(dtype, 1), random_pool(dtype, 2)
    untouched = target.clone()
    writer, reader = connector_to(cache, dtype), connector_to(cache, dtype)
    writer.attach(source)
    reader.attach(target)
    assert store(writer, [3, 9, 0, 7]) == ["once"]
    assert reader.match(TOKENS, 0) == 4 * BLOCK_TOKENS
    assert load(reader, 1, [15, 2, 8]) == 3
    for from_id, to_id in ((9, 15), (0, 2), (7, 8)):
        bits = [
            pool[:, block].view(torch.uint8) for pool, block in ((source, from_id), (target, to_id))
        ]
        assert torch.equal(*bits)
    others = [index for index in range(NUM_POOL_BLOCKS) if index not in (15, 2, 8)]
    assert torch.equal(target[:, others].view(torch.uint8), untouched[:, others].view(torch.uint8))
    for connector in (writer, reader):
        connector.session.close()


def test_a_damaged_block_is_not_reported_as_loaded(cache: FakeCache) -> None:
    connector = connector_to(cache)
    connector.attach(random_pool(KvDtype.FLOAT32, 1))
    store(connector, [0, 1, 2])
    cache.damage(list(cache.blocks)[1], layer=2)
    assert load(connector, 0, [10, 11, 12]) == 1
    stats = connector.session.stats()
    assert (stats.wrong_slabs, stats.corrupt_blocks) == (1, 1)
    connector.session.close()


def test_before_attach_nothing_happens(cache: FakeCache) -> None:
    connector = connector_to(cache)
    assert load(connector, 0, [1, 2]) == 0
    assert store(connector, [1]) == ["once"]
    assert not cache.blocks
    connector.session.close()


def test_a_pool_of_another_shape_or_place_is_refused() -> None:
    layout = spec_of(KvDtype.FLOAT32).layout
    good = random_pool(KvDtype.FLOAT32, 0)
    assert pool_bytes(good, layout).shape == (3, NUM_POOL_BLOCKS, layout.slab_bytes)
    for bad in (good[:2], good.to(torch.bfloat16), good.transpose(3, 4), good[..., :5]):
        with pytest.raises(LayoutMismatchError):
            pool_bytes(bad, layout)
    with pytest.raises(ConfigError, match="host memory"):
        pool_bytes(torch.empty(good.shape, device="meta"), layout)


def test_the_fingerprint_covers_what_changes_the_kv() -> None:
    base = spec_of(KvDtype.FLOAT32)
    scaling = RopeScaling(kind="linear", factor=2.0)
    arguments = {"weights_digest": "d", "dtype": KvDtype.FLOAT32, "block_tokens": BLOCK_TOKENS}
    others = [
        spec_of(KvDtype.BFLOAT16),
        namespace_spec(CONFIG, **{**arguments, "weights_digest": "e"}),  # type: ignore[arg-type]
        namespace_spec(CONFIG, **{**arguments, "block_tokens": 8}),  # type: ignore[arg-type]
        namespace_spec(CONFIG, **arguments, tenant="t"),  # type: ignore[arg-type]
        namespace_spec(CONFIG, **arguments, salt="s"),  # type: ignore[arg-type]
        *(
            namespace_spec(dataclasses.replace(CONFIG, **change), **arguments)  # type: ignore[arg-type]
            for change in (
                {"rope_base": 5e5},
                {"rope_scaling": scaling},
                {"num_kv_heads": 4},
                {"name": "other"},
                {"num_layers": 4},
                {"rms_norm_eps": 0.125},
            )
        ),
    ]
    prints = {spec.fingerprint() for spec in (base, *others)}
    assert len(prints) == 1 + len(others)
    assert spec_of(KvDtype.FLOAT32).fingerprint() == base.fingerprint()


def test_dtype_names() -> None:
    assert kv_dtype("bf16") is KvDtype.BFLOAT16
    with pytest.raises(ConfigError, match="int3"):
        kv_dtype("int3")


# The engine on top: a model whose tokens depend on every row of the pool that it reads

MODEL = FakeModel()
PARAMS = SamplingParams(max_tokens=9)
PROMPT = [(7 * i) % MODEL.config.vocab_size for i in range(50)]
EXPECTED = reference_tokens(MODEL, PROMPT, PARAMS)
NUM_FULL_BLOCKS = len(PROMPT) // BLOCK_TOKENS


def engine_session(cache: FakeCache) -> CacheSession:
    config = MODEL.config
    layout = KvLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_tokens=BLOCK_TOKENS,
        dtype=KvDtype.FLOAT32,
    )
    spec = NamespaceSpec(layout=layout, model_id="fake", weights_digest="0")
    session = CacheSession(
        lambda: cache, spec, SessionOptions(decide=ALL, deadline_s=0.3, breaker=NEVER)
    )
    session.connect(5.0)
    return session


def answer(session: CacheSession) -> tuple[tuple[int, ...], int]:
    """A fresh engine's tokens, and how many prompt tokens came from the cache."""
    options = EngineOptions(num_blocks=64, block_tokens=BLOCK_TOKENS)
    with Engine(FakeModel(), None, options, ReferenceConnector(session)) as engine:
        (result,) = engine.generate_all([PROMPT], PARAMS)
        session.flush(5.0)
        assert engine.hook_stats.errors == 0
        assert not engine.check_integrity()
    return result.outputs[0].token_ids, result.timings.num_hook_tokens


def test_warm_tokens_are_the_cold_ones(cache: FakeCache) -> None:
    with engine_session(cache) as session:
        assert answer(session) == (EXPECTED, 0)
    with engine_session(cache) as session:
        assert answer(session) == (EXPECTED, NUM_FULL_BLOCKS * BLOCK_TOKENS)
        assert session.stats().wrong_bytes == 0


def test_a_request_that_grows_stores_what_it_generated(cache: FakeCache) -> None:
    with engine_session(cache) as session:
        answer(session)
    assert len(cache.blocks) == (len(PROMPT) + PARAMS.max_tokens - 1) // BLOCK_TOKENS


def _fail(call: str) -> Callable[[FakeCache], None]:
    return lambda cache: cache.fail.update({call: TierUnavailableError("gone")})


def _damage(cache: FakeCache) -> None:
    cache.damage(list(cache.blocks)[5], layer=1)


def _forget(cache: FakeCache) -> None:
    del cache.blocks[list(cache.blocks)[3]]


def _hang(cache: FakeCache) -> None:
    cache.hang.clear()


@pytest.mark.parametrize(
    ("trouble", "most_hits"),
    [
        (_fail("lookup"), 0),
        (_fail("begin_load"), 0),
        (_fail("complete_load"), NUM_FULL_BLOCKS),
        (_fail("prepare_store"), NUM_FULL_BLOCKS),
        (_fail("complete_store"), NUM_FULL_BLOCKS),
        (_fail("*"), 0),
        (_damage, 5),
        (_forget, 3),
        (_hang, 0),
    ],
    ids=[
        *("lookup", "begin_load", "complete_load", "prepare_store", "complete_store"),
        *("every call", "a flipped bit", "a block gone", "a hang"),
    ],
)
def test_trouble_costs_hits_and_never_a_token(
    cache: FakeCache, trouble: Callable[[FakeCache], None], most_hits: int
) -> None:
    with engine_session(cache) as session:
        answer(session)
    with engine_session(cache) as session:
        trouble(cache)
        tokens, num_hook_tokens = answer(session)
        stall_s = session.stats().stall_s_max
        cache.hang.set()
        cache.fail.clear()
    assert tokens == EXPECTED
    assert num_hook_tokens <= most_hits * BLOCK_TOKENS
    assert stall_s < 0.3 + 0.2
