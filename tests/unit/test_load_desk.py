"""A session's loads while the cache, its files or the session itself go away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from ucm.checksum import block_checksums
from ucm.connectors.circuit_breaker import BreakerOptions, BreakerState
from ucm.connectors.session import CacheSession, LoadOffer, SessionOptions
from ucm.cost_model import CostModel, CostOptions, TierPrior
from ucm.errors import CapacityError, TierUnavailableError
from ucm.hashing import NamespaceSpec, chain_keys
from ucm.layout import KvDtype, KvLayout
from ucm.load_decision import Decision, LoadKind, LoadShape, forced
from ucm.load_plan import LoadPlan
from ucm.testing.blocks import content
from ucm.testing.extent_files import wait_for
from ucm.testing.fake_cache import FakeCache
from ucm.types import ROOT_KEY, BlockKey, LoadMode, LoadOrder, NamespaceId, TierKind

LAYOUT = KvLayout(num_layers=3, num_kv_heads=1, head_dim=8, block_tokens=4, dtype=KvDtype.FLOAT32)
SPEC = NamespaceSpec(layout=LAYOUT, model_id="m", weights_digest="d")
TOKENS = list(range(100, 126))
NUM_BLOCKS = 6
KEYS = chain_keys(SPEC.fingerprint(), TOKENS, LAYOUT.block_tokens)
LAST = LAYOUT.num_layers - 1
DEADLINE_S = 0.3


class SlowPlans(FakeCache):
    """`begin_load` waits for its own gate; everything else answers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.is_at_gate = threading.Event()
        self.gate.set()

    def begin_load(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        mode: LoadMode,
        timeout_s: float,
    ) -> LoadPlan:
        """See `CacheApi.begin_load`."""
        self.is_at_gate.set()
        self.gate.wait(30.0)
        return super().begin_load(namespace, keys, mode=mode, timeout_s=timeout_s)


class Pool:
    """`SlabTarget` of one request."""

    def __init__(self) -> None:
        self.memory = np.zeros((LAYOUT.num_layers, NUM_BLOCKS, LAYOUT.slab_bytes), np.uint8)

    def view(self, layer: int, index: int) -> memoryview:
        """See `SlabTarget.view`."""
        slab: memoryview = self.memory[layer, index].data
        return slab

    def is_right(self, index: int) -> bool:
        """Whether it holds the block of the chain."""
        block = memoryview(content(KEYS[index], LAYOUT))
        return all(
            bytes(self.view(layer, index)) == bytes(block[LAYOUT.slab_slice(layer)])
            for layer in range(LAYOUT.num_layers)
        )


@pytest.fixture
def cache() -> Iterator[SlowPlans]:
    found = SlowPlans()
    found.open_namespace(SPEC)
    lease = found.prepare_store(SPEC.fingerprint(), ROOT_KEY, KEYS)
    sums = {}
    for slot in lease.slots:
        assert slot.data is not None
        slot.data[:] = content(slot.key, LAYOUT)
        sums[slot.key] = block_checksums(LAYOUT, slot.data)
    found.complete_store(lease.id, sums)
    yield found
    found.gate.set()
    found.hang.set()


def session_to(cache: FakeCache, kind: LoadKind = LoadKind.LOAD_ALL) -> CacheSession:
    options = SessionOptions(
        deadline_s=DEADLINE_S,
        decide=forced(kind, is_from_back=True),
        breaker=BreakerOptions(failures_to_open=3, backoff_s=3600.0),
    )
    session = CacheSession(lambda: cache, SPEC, options)
    session.connect(5.0)
    return session


def no_hold(_places: Sequence[int]) -> Callable[[], None]:
    raise AssertionError("no read hangs here")


def start(session: CacheSession, pool: Pool, request_id: str = "r") -> Decision | None:
    num_matched = session.match(TOKENS, 0)
    offer = LoadOffer(
        request_id=request_id,
        token_ids=TOKENS,
        blocks=range(num_matched),
        target=pool,
        hold=no_hold,
    )
    return session.start_load(offer)


@pytest.mark.parametrize("kind", [LoadKind.LOAD_ALL, LoadKind.HYBRID])
def test_a_session_closed_during_a_load_leaves_an_engine_that_goes_on(
    cache: SlowPlans, kind: LoadKind
) -> None:
    """An engine keeps the blocks of a load whose end raised for ever, and loads no more."""
    session = session_to(cache, kind)
    assert start(session, Pool()) is not None
    session.close()
    state = session.loads.state("r")
    assert (state.is_done, state.num_from_back, state.bytes_left) == (True, 0, 0)
    assert session.loads.wait_layer(LAST, "r") == 0
    assert session.loads.claim("r", 0, 3) == 3
    assert session.loads.end("r") == 0
    assert not cache.leases


def test_a_load_that_is_begun_after_the_close_is_empty_at_once(cache: SlowPlans) -> None:
    session = session_to(cache)
    num_matched = session.match(TOKENS, 0)
    session.loads.close()
    offer = LoadOffer(
        request_id="r",
        token_ids=TOKENS,
        blocks=range(num_matched),
        target=Pool(),
        hold=no_hold,
    )
    assert session.start_load(offer) is not None
    assert session.loads.state("r").is_done
    assert session.loads.end("r") == 0
    session.close()


def test_a_plan_that_comes_after_the_end_is_given_back(cache: SlowPlans) -> None:
    session, pool = session_to(cache), Pool()
    cache.gate.clear()
    assert start(session, pool) is not None
    assert cache.is_at_gate.wait(5.0)
    assert session.loads.end("r") == 0
    cache.gate.set()
    assert wait_for(lambda: "complete_load" in cache.calls)
    assert not cache.leases
    assert not pool.memory.any()
    session.close()


def test_a_plan_that_comes_after_the_deadline_is_given_back(cache: SlowPlans) -> None:
    session, pool = session_to(cache), Pool()
    cache.gate.clear()
    assert start(session, pool) is not None
    assert session.loads.wait_layer(0, "r") == 0
    assert session.loads.end("r") == 0
    assert wait_for(lambda: session.stats().timeouts == 1)
    cache.gate.set()
    assert wait_for(lambda: "release" in cache.calls)
    assert not cache.leases
    assert not pool.memory.any()
    session.close()


def test_little_patience_does_not_switch_a_sound_cache_off(cache: SlowPlans) -> None:
    """A look-up that took nearly all of a request's time leaves none for `begin_load`."""
    session = session_to(cache)
    session.match(TOKENS, 0)
    (match,) = session._matches.values()
    session._matches[KEYS[0]] = replace(match, spent_s=DEADLINE_S)
    offer = LoadOffer(
        request_id="r", token_ids=TOKENS, blocks=range(NUM_BLOCKS), target=Pool(), hold=no_hold
    )
    assert session.start_load(offer) is not None
    assert session.loads.state("r").is_done
    session.loads.end("r")
    assert wait_for(lambda: "complete_load" in cache.calls)
    assert session.breaker_state is BreakerState.CLOSED
    assert session.stats().failures == 0
    session.close()


@pytest.mark.parametrize("error", [CapacityError("busy"), TierUnavailableError("gone")])
def test_a_refused_load_is_done_and_empty(cache: SlowPlans, error: Exception) -> None:
    session = session_to(cache)
    assert isinstance(error, CapacityError | TierUnavailableError)
    cache.fail["begin_load"] = error
    assert start(session, Pool()) is not None
    assert session.loads.wait_layer(LAST, "r") == 0
    assert session.loads.state("r").is_done
    assert session.loads.end("r") == 0
    assert session.stats().missed_blocks == NUM_BLOCKS
    session.close()


def test_a_decision_that_no_reader_takes_fails_its_load_only(cache: SlowPlans) -> None:
    session, pool = session_to(cache), Pool()
    sound = forced(LoadKind.LOAD_ALL)

    def unsound(model: CostModel, shape: LoadShape) -> Decision:
        return replace(sound(model, shape), read_ahead_layers=0)

    session.loads._options = replace(session.loads._options, decide=unsound)
    assert start(session, pool, "bad") is not None
    assert wait_for(lambda: session.loads.state("bad").is_done)
    assert session.loads.end("bad") == 0
    session.loads._options = replace(session.loads._options, decide=sound)
    assert start(session, pool, "good") is not None
    assert session.loads.wait_layer(LAST, "good") == NUM_BLOCKS
    assert session.loads.end("good") == NUM_BLOCKS
    assert all(map(pool.is_right, range(NUM_BLOCKS)))
    assert wait_for(lambda: not cache.leases), "both plans were completed"
    session.close()


def test_many_loads_at_once_end_in_any_order(cache: SlowPlans) -> None:
    session = session_to(cache)
    pools = {str(number): Pool() for number in range(12)}
    for name, pool in pools.items():
        assert start(session, pool, name) is not None
    for name in sorted(pools, key=lambda name: int(name) * 7 % 12):
        assert session.loads.wait_layer(LAST, name) == NUM_BLOCKS
        assert session.loads.end(name) == NUM_BLOCKS
        assert all(map(pools[name].is_right, range(NUM_BLOCKS)))
    assert wait_for(lambda: not cache.leases)
    session.close()


def test_a_load_that_would_be_cut_off_is_computed_towards(cache: SlowPlans) -> None:
    """Layer by layer it would be quickest, and nothing of it would be good at the deadline."""
    bytes_per_s = NUM_BLOCKS * LAYOUT.block_bytes / (2 * DEADLINE_S)
    nvme = TierPrior(bytes_per_s=bytes_per_s, request_s=1e-6)
    model = CostModel(CostOptions(token_s=1.0, nvme=nvme))
    options = SessionOptions(deadline_s=DEADLINE_S)
    session = CacheSession(lambda: cache, SPEC, options, model=model)
    shape = LoadShape(
        num_tokens=len(TOKENS),
        num_local_tokens=0,
        tiers=(TierKind.NVME,) * NUM_BLOCKS,
        block_tokens=LAYOUT.block_tokens,
        block_bytes=LAYOUT.block_bytes,
        num_layers=LAYOUT.num_layers,
        can_direct=True,
    )
    assert forced(LoadKind.HYBRID)(model, shape).order is LoadOrder.LAYERS
    assert session.loads.choose(shape).order is LoadOrder.BLOCKS_FROM_BACK
    session.close()
