"""A daemon that dies or hangs while chunks are looked up, loaded or stored costs no token.

What the cache does not give is computed behind the sink prefix, as if it had never been stored.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from ucm.client import connect
from ucm.connectors.circuit_breaker import BreakerOptions
from ucm.connectors.reference import ReferenceConnector, namespace_spec
from ucm.connectors.session import CacheSession, SessionOptions
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.hook import KvHook, LoadRequest, LoadStart, LoadState, StoreRequest
from ucm.engine.hook_proxy import HookProxy
from ucm.engine.loading import LoadedModel, load_model
from ucm.engine.request import RequestResult
from ucm.engine.sampling import SamplingParams
from ucm.hashing import Encodable
from ucm.layout import KvDtype
from ucm.load_decision import LoadKind, forced
from ucm.reuse import SegmentedPrompt, Text
from ucm.reuse.options import BlendOptions, ReuseOptions
from ucm.testing.daemon import SpawnedDaemon, short_folder, small_settings, spawned_daemon
from ucm.testing.models import write_tiny_model

BLOCK_TOKENS = 8
DEADLINE_S = 0.5
SLACK_S = 1.0
"""For a busy machine; a wait without a bound takes far longer."""
SINK = (5, 6, 7, 8, 9)
QUERY = (60, 61, 62, 63, 64, 65)
PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)
REUSE = ReuseOptions(sink_tokens=SINK, blend=BlendOptions(budget=0.3))


def text_of(seed: int, count: int) -> tuple[int, ...]:
    return tuple(3 + (seed * 31 + i * i + 7 * i) % 90 for i in range(count))


KNOWN, NEW = [text_of(1, 32), text_of(2, 21)], [text_of(3, 32), text_of(4, 24)]


class StrikingHook(HookProxy):
    """The connector, with something happening just before one of a chunk's calls, once."""

    def __init__(self, inner: KvHook) -> None:
        super().__init__(inner)
        self.strikes: dict[str, Callable[[], None]] = {}
        self.waited_s = 0.0

    def _strike(self, point: str) -> None:
        strike = self.strikes.pop(point, None)
        if strike is not None:
            strike()

    def match(
        self, token_ids: Sequence[int], num_local_tokens: int, extra_keys: Sequence[Encodable] = ()
    ) -> int:
        if extra_keys:
            self._strike("match")
        started_s = time.monotonic()
        num_tokens = self.inner.match(token_ids, num_local_tokens, extra_keys)
        self.waited_s += time.monotonic() - started_s
        return num_tokens

    def start_load(self, request: LoadRequest) -> LoadStart:
        if request.whole:
            self._strike("start_load")
        return self.inner.start_load(request)

    def load_state(self, request_id: str) -> LoadState:
        self._strike("load_state")
        return self.inner.load_state(request_id)

    def wait_layer(self, layer: int, request_ids: Sequence[str], /) -> Sequence[int]:
        started_s = time.monotonic()
        counts = self.inner.wait_layer(layer, request_ids)
        self.waited_s += time.monotonic() - started_s
        return counts

    def store(self, request: StoreRequest) -> None:
        if request.extra_keys:
            self._strike("store")
        self.inner.store(request)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("tiny")), torch.float32)


@pytest.fixture
def daemon() -> Iterator[SpawnedDaemon]:
    with short_folder() as folder, spawned_daemon(small_settings(folder), folder / "log") as found:
        yield found


@pytest.fixture
def hook(loaded: LoadedModel, daemon: SpawnedDaemon) -> Iterator[StrikingHook]:
    spec = namespace_spec(
        loaded.config,
        weights_digest=loaded.weights_digest,
        dtype=KvDtype.FLOAT32,
        block_tokens=BLOCK_TOKENS,
    )
    options = SessionOptions(
        deadline_s=DEADLINE_S,
        decide=forced(LoadKind.LOAD_ALL),
        breaker=BreakerOptions(backoff_s=0.05, max_backoff_s=0.2),
    )
    factory = lambda: connect(daemon.socket_path, timeout_s=DEADLINE_S)  # noqa: E731
    with CacheSession(factory, spec, options) as session:
        session.connect(20.0)
        yield StrikingHook(ReferenceConnector(session))


def answer(
    loaded: LoadedModel,
    chunks: Sequence[Sequence[int]],
    hook: KvHook | None = None,
    *,
    is_exact: bool = False,
) -> RequestResult:
    """Of a fresh engine, with empty pool."""
    options = EngineOptions(
        num_blocks=96, block_tokens=BLOCK_TOKENS, reuse=None if is_exact else REUSE
    )
    with Engine(loaded.model, None, options, hook) as engine:
        prompt: SegmentedPrompt | list[int] = [*SINK, 1, *(t for c in chunks for t in c), *QUERY]
        if not is_exact:
            made = [engine.chunk(tokens) for tokens in chunks]
            prompt = SegmentedPrompt([Text((*SINK, 1)), *made, Text(QUERY)])
        (result,) = engine.generate_all([prompt], PARAMS)
        assert not engine.check_integrity()
        assert engine.hook_stats.errors == 0
    return result


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("how", "point"),
    [
        (signal.SIGKILL, "match"),
        (signal.SIGKILL, "load_state"),
        (signal.SIGKILL, "store"),
        (signal.SIGSTOP, "start_load"),
    ],
    ids=lambda item: item.name if isinstance(item, signal.Signals) else item,
)
def test_a_daemon_that_goes_away_costs_no_token(
    loaded: LoadedModel,
    daemon: SpawnedDaemon,
    hook: StrikingHook,
    how: signal.Signals,
    point: str,
) -> None:
    session = hook.inner.session  # type: ignore[attr-defined]
    answer(loaded, KNOWN, hook)
    assert session.flush(20.0)
    chunks = NEW if point == "store" else KNOWN[::-1]
    hook.strikes[point] = lambda: daemon.process.send_signal(how)
    hook.waited_s = 0.0
    try:
        result = answer(loaded, chunks, hook)
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert not hook.strikes, "it did not strike"
    assert result.reuse is not None
    alone = answer(loaded, chunks, is_exact=result.reuse.fallback is not None)
    assert result.outputs[0].token_ids == alone.outputs[0].token_ids
    assert hook.waited_s <= len(chunks) * DEADLINE_S + SLACK_S
    assert session.stats().wrong_bytes == 0
