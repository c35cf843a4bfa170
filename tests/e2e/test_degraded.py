"""A daemon that dies, freezes, dawdles or lies, at every point of a generation.

The engine's tokens must be those it gives without a cache, and no request may lose more than the
deadline to the cache.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import ucm
from ucm.api import CacheApi
from ucm.client import connect
from ucm.connectors.circuit_breaker import BreakerOptions
from ucm.connectors.reference import ReferenceConnector, kv_dtype, namespace_spec
from ucm.connectors.session import CacheSession, SessionOptions
from ucm.embedded import EmbeddedCache
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.hook import LoadRequest, LoadStart, StoreRequest
from ucm.engine.hook_proxy import HookProxy
from ucm.engine.loading import LoadedModel, load_model
from ucm.engine.sampling import SamplingParams
from ucm.hashing import Encodable
from ucm.load_decision import LoadKind, forced
from ucm.storage.tier import SlotId
from ucm.testing.daemon import SpawnedDaemon, short_folder, small_settings, spawned_daemon
from ucm.testing.models import write_tiny_model

pytestmark = pytest.mark.timeout(120)

DEADLINE_S = 0.5
SLACK_S = 0.4
"""Scheduling on a busy machine; the deadline itself is what is tested."""

BLOCK_TOKENS = 32
NUM_PROMPT_TOKENS = 300
NUM_PROMPT_BLOCKS = NUM_PROMPT_TOKENS // BLOCK_TOKENS
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)
POINTS = ("before", "match", "load", "layer 0", "layer 1", "end", "store", "decode")


def prompt_of(seed: int, vocab_size: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(token) for token in rng.integers(3, vocab_size, NUM_PROMPT_TOKENS)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


class StrikingHook(HookProxy):
    """The connector, with something happening just before one of its calls, once."""

    def __init__(self, inner: ReferenceConnector) -> None:
        super().__init__(inner)
        self.strikes: dict[str, Callable[[], None]] = {}
        self.waited_s = 0.0

    def _at(self, point: str) -> None:
        strike = self.strikes.pop(point, None)
        if strike is not None:
            strike()

    @contextmanager
    def _call(self, point: str) -> Iterator[None]:
        self._at(point)
        started_s = time.monotonic()
        yield
        self.waited_s += time.monotonic() - started_s

    def match(
        self, token_ids: Sequence[int], num_local_tokens: int, extra_keys: Sequence[Encodable] = ()
    ) -> int:
        with self._call("match"):
            return self.inner.match(token_ids, num_local_tokens, extra_keys)

    def start_load(self, request: LoadRequest) -> LoadStart:
        with self._call("load"):
            return self.inner.start_load(request)

    def wait_layer(self, layer: int, request_ids: Sequence[str], /) -> Sequence[int]:
        with self._call(f"layer {layer}"):
            return self.inner.wait_layer(layer, request_ids)

    def end_load(self, request_id: str) -> int:
        with self._call("end"):
            return self.inner.end_load(request_id)

    def store(self, request: StoreRequest) -> None:
        with self._call("store"):
            self.inner.store(request)

    def finish(self, request_id: str) -> None:
        with self._call("finish"):
            self.inner.finish(request_id)


class Bench:
    """A fresh engine for every answer, over one session."""

    def __init__(self, loaded: LoadedModel, factory: Callable[[], CacheApi]) -> None:
        self.loaded = loaded
        spec = namespace_spec(
            loaded.config,
            weights_digest=loaded.weights_digest,
            dtype=kv_dtype("fp32"),
            block_tokens=BLOCK_TOKENS,
        )
        breaker = BreakerOptions(backoff_s=0.05, max_backoff_s=0.2)
        decide = forced(LoadKind.LOAD_ALL)  # a tiny model computes about as fast
        options = SessionOptions(deadline_s=DEADLINE_S, breaker=breaker, decide=decide)
        self.session = CacheSession(factory, spec, options)
        self.session.connect(20.0)
        self.hook = StrikingHook(ReferenceConnector(self.session))

    def answer(
        self, seed: int, *, is_cached: bool = True, at_token: Callable[[int], None] | None = None
    ) -> tuple[tuple[int, ...], int]:
        """Token ids, and how many prompt tokens came from the cache."""
        options = EngineOptions(num_blocks=64, block_tokens=BLOCK_TOKENS)
        hook = self.hook if is_cached else None
        prompt = prompt_of(seed, self.loaded.config.vocab_size)
        with Engine(self.loaded.model, None, options, hook) as engine:
            result = None
            for number, event in enumerate(engine.generate(prompt, PARAMS)):
                result = event.result
                if at_token is not None:
                    at_token(number)
            assert engine.hook_stats.errors == 0
        assert result is not None
        return result.outputs[0].token_ids, result.timings.num_hook_tokens

    def fill(self, seed: int) -> None:
        """Store a prompt's blocks."""
        assert self.answer(seed)[1] == 0
        assert self.session.flush(20.0)
        assert self.answer(seed)[1] == NUM_PROMPT_BLOCKS * BLOCK_TOKENS


@pytest.fixture
def daemon() -> Iterator[SpawnedDaemon]:
    with short_folder() as folder, spawned_daemon(small_settings(folder), folder / "log") as found:
        yield found


@pytest.fixture
def bench(loaded: LoadedModel, daemon: SpawnedDaemon) -> Iterator[Bench]:
    made = Bench(loaded, lambda: connect(daemon.socket_path, timeout_s=DEADLINE_S))
    with made.session:
        yield made


def strike_at(bench: Bench, point: str, strike: Callable[[], None]) -> tuple[int, ...]:
    """Generate with `strike` at `point`; a known prompt for loads, a new one for stores."""
    seed = 1 if point in ("before", "match", "load", "layer 0", "layer 1", "end") else 2
    expected, _ = bench.answer(seed, is_cached=False)
    bench.hook.waited_s = 0.0
    at_token = None
    if point == "before":
        strike()
    elif point == "decode":

        def at_token(number: int) -> None:
            if number == 10:
                strike()
    else:
        bench.hook.strikes[point] = strike
    tokens, _ = bench.answer(seed, at_token=at_token)
    assert tokens == expected
    assert not bench.hook.strikes, "it did not strike"
    assert bench.hook.waited_s <= DEADLINE_S + SLACK_S
    return tokens


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_daemon_costs_no_token(bench: Bench, daemon: SpawnedDaemon, point: str) -> None:
    bench.fill(1)
    strike_at(bench, point, daemon.kill)
    strike_at(bench, "before", lambda: None)
    assert bench.session.stats().wrong_bytes == 0


@pytest.mark.parametrize("point", POINTS)
def test_a_frozen_daemon_costs_one_deadline(
    bench: Bench, daemon: SpawnedDaemon, point: str
) -> None:
    bench.fill(1)
    try:
        strike_at(bench, point, lambda: daemon.process.send_signal(signal.SIGSTOP))
        bench.hook.waited_s = 0.0
        assert bench.answer(3)[0] == bench.answer(3, is_cached=False)[0]
        assert bench.hook.waited_s <= DEADLINE_S + SLACK_S
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert bench.session.ensure_connected(20.0)
    assert bench.answer(1)[1] == NUM_PROMPT_BLOCKS * BLOCK_TOKENS, "it serves again"
    assert bench.session.stats().wrong_bytes == 0


class SlowCache:
    """A cache that takes its time with every call."""

    def __init__(self, inner: CacheApi) -> None:
        self._inner = inner
        self.delay_s = 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)

        def slow(*arguments: Any, **named: Any) -> Any:
            threading.Event().wait(self.delay_s)
            return method(*arguments, **named)

        return slow


@pytest.mark.parametrize("share", [0.6, 0.9, 3.0])
def test_a_slow_daemon_costs_at_most_the_deadline(
    loaded: LoadedModel, daemon: SpawnedDaemon, share: float
) -> None:
    """Each call alone would be in time (but for the last case); match and load together are not."""
    made: list[SlowCache] = []

    def factory() -> CacheApi:
        made.append(SlowCache(connect(daemon.socket_path, timeout_s=DEADLINE_S)))
        return cast(CacheApi, made[-1])

    bench = Bench(loaded, factory)
    with bench.session:
        bench.fill(1)
        made[-1].delay_s = share * DEADLINE_S
        for seed in (1, 4):
            strike_at(bench, "before", lambda: None)
            bench.hook.waited_s = 0.0
            expected, _ = bench.answer(seed, is_cached=False)
            assert bench.answer(seed)[0] == expected
            assert bench.hook.waited_s <= DEADLINE_S + SLACK_S


@pytest.mark.parametrize("block", [0, 4, NUM_PROMPT_BLOCKS - 1])
def test_a_flipped_bit_in_the_arena_is_found_and_recomputed(
    loaded: LoadedModel, tmp_path: Path, block: int
) -> None:
    cache = ucm.open(tmp_path / "store")
    bench = Bench(loaded, lambda: cache)
    with bench.session:
        expected, _ = bench.answer(1, is_cached=False)
        bench.fill(1)
        flip_bit(cache, bench, block)
        tokens, num_hook_tokens = bench.answer(1)
        assert tokens == expected
        assert num_hook_tokens == block * BLOCK_TOKENS, "what precedes the bad block is used"
        stats = bench.session.stats()
        assert stats.wrong_slabs == 1
        assert stats.wrong_bytes == bench.session.spec.layout.slab_bytes
        assert bench.session.flush(20.0)
        assert bench.answer(1)[0] == expected
        assert bench.session.stats().wrong_slabs == 1, "the bad copy is not served again"


def flip_bit(cache: EmbeddedCache, bench: Bench, block: int) -> None:
    """Change one bit of the block's copy in host memory."""
    prompt = prompt_of(1, bench.loaded.config.vocab_size)
    namespace = bench.session.spec.fingerprint()
    keys = bench.session._chains.prompt_keys(prompt)
    lease = cache.prepare_load(namespace, [keys[block]], timeout_s=5.0)
    view = lease.blocks[0].data
    assert view is not None
    wanted = np.frombuffer(view, np.uint8)
    arena = cache._arenas[namespace]
    for slot in range(64):
        candidate = np.frombuffer(arena.view(SlotId(slot)), np.uint8)
        if np.shares_memory(candidate, wanted):
            candidate[bench.session.spec.layout.slab_slice(1).start + 77] ^= 0x10
            break
    else:
        pytest.fail("the block's slot was not found")
    cache.complete_load(lease.id)
