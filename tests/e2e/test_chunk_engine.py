"""Engines that share chunks through a real cache: what is stored, and what is not.

Under a chunk's key lie the bytes that its chunk has behind the sink prefix, under a prompt's those
of its exact prefill, whatever was blended in between; what was blended lies nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ucm.api import CacheApi
from ucm.client import connect
from ucm.connectors.circuit_breaker import BreakerOptions
from ucm.connectors.reference import ReferenceConnector, namespace_spec
from ucm.connectors.session import CacheSession, SessionOptions
from ucm.embedded import EmbeddedCache
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.hook import LoadRequest
from ucm.engine.loading import LoadedModel, load_model
from ucm.engine.model import ForwardItem
from ucm.engine.request import RequestResult
from ucm.engine.sampling import SamplingParams
from ucm.errors import InvalidArgumentError
from ucm.hashing import Encodable, NamespaceSpec
from ucm.layout import KvDtype
from ucm.load_decision import LoadKind, forced
from ucm.manager import Manager
from ucm.reuse import Chunk, Segment, SegmentedPrompt, Text
from ucm.reuse.options import BlendOptions, RecomputePolicy, ReuseOptions
from ucm.testing.daemon import running_daemon, short_folder, small_config
from ucm.testing.models import write_tiny_model

BLOCK_TOKENS = 8
SINK = (5, 6, 7, 8, 9)
PREFIX = (*SINK, *range(40, 50))
"""One full block and a part of the next."""
QUERY = (60, 61, 62, 63, 64, 65)
PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)
NONE = BlendOptions(policy=RecomputePolicy.NONE)
SOME = BlendOptions(budget=0.4)
FULL = BlendOptions(policy=RecomputePolicy.FULL)


def text_of(seed: int, count: int) -> tuple[int, ...]:
    return tuple(3 + (seed * 31 + i * i + 7 * i) % 90 for i in range(count))


A, B = text_of(1, 32), text_of(2, 21)
NUM_CHUNK_BLOCKS = len(A) // BLOCK_TOKENS + len(B) // BLOCK_TOKENS
NUM_CHUNK_TOKENS = NUM_CHUNK_BLOCKS * BLOCK_TOKENS
NUM_PREFIX_BLOCKS = len(PREFIX) // BLOCK_TOKENS

OpenSession = Callable[[], CacheSession]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("tiny")), torch.float32)


@pytest.fixture(scope="module")
def spec(loaded: LoadedModel) -> NamespaceSpec:
    return namespace_spec(
        loaded.config,
        weights_digest=loaded.weights_digest,
        dtype=KvDtype.FLOAT32,
        block_tokens=BLOCK_TOKENS,
    )


@pytest.fixture(params=["embedded", "daemon"])
def open_session(request: pytest.FixtureRequest, spec: NamespaceSpec) -> Iterator[OpenSession]:
    """Opens sessions with one store, one after the other."""
    with short_folder() as folder, _connections(request.param, folder) as connection:
        options = SessionOptions(
            deadline_s=10.0,
            decide=forced(LoadKind.LOAD_ALL),
            breaker=BreakerOptions(backoff_s=3600.0),
        )

        def make() -> CacheSession:
            session = CacheSession(connection, spec, options)
            session.connect(20.0)
            return session

        yield make


@contextmanager
def _connections(kind: str, folder: Path) -> Iterator[Callable[[], CacheApi]]:
    config = small_config(folder)
    if kind == "embedded":
        yield lambda: EmbeddedCache(Manager(config))  # closed with its session
    else:
        with running_daemon(config):
            yield lambda: connect(config.service.socket_path, timeout_s=5.0)


@contextmanager
def engine_of(
    loaded: LoadedModel,
    session: CacheSession | None,
    blend: BlendOptions | None = NONE,
    sink: tuple[int, ...] = SINK,
) -> Iterator[Engine]:
    reuse = None if blend is None else ReuseOptions(sink_tokens=sink, blend=blend)
    options = EngineOptions(num_blocks=96, block_tokens=BLOCK_TOKENS, reuse=reuse)
    hook = None if session is None else ReferenceConnector(session)
    with Engine(loaded.model, None, options, hook) as engine:
        yield engine
        assert not engine.check_integrity()
        assert engine.hook_stats.errors == 0


def prompt_of(engine: Engine, *chunks: Sequence[int]) -> SegmentedPrompt:
    middle: list[Segment] = [engine.chunk(tokens) for tokens in chunks]
    return SegmentedPrompt([Text(PREFIX), *middle, Text(QUERY)])


def answer(engine: Engine, prompt: SegmentedPrompt | Sequence[int]) -> RequestResult:
    (result,) = engine.generate_all([prompt], PARAMS)
    return result


def encoded(loaded: LoadedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """KV of tokens computed from position 0 on: [L, 2, G, T, D]."""
    config = loaded.config
    shape = (config.num_layers, 1, 2, config.num_kv_heads, len(token_ids), config.head_dim)
    pool = torch.zeros(shape)
    loaded.model.forward([ForwardItem(token_ids, 0, [0])], pool)
    return pool[:, 0]


def stored(
    session: CacheSession, token_ids: Sequence[int], extra_keys: tuple[Encodable, ...] = ()
) -> torch.Tensor:
    """What the cache has under the keys of a chain: [L, 2, G, T, D]."""
    layout = session.spec.layout
    pool = torch.zeros(layout.num_layers, 32, *layout.slab_shape)
    reader = ReferenceConnector(session)
    reader.attach(pool)
    num_blocks = reader.match(token_ids, 0, extra_keys) // BLOCK_TOKENS
    if num_blocks:
        request = LoadRequest(
            request_id="audit",
            token_ids=token_ids,
            first_block=0,
            block_ids=range(num_blocks),
            hold=_no_hold,
            extra_keys=extra_keys,
            whole=True,
        )
        assert reader.start_load(request).num_blocks == num_blocks
        for layer in range(layout.num_layers):
            reader.wait_layer(layer, ["audit"])
        assert reader.end_load("audit") == num_blocks
        reader.finish("audit")
    return pool[:, :num_blocks].permute(0, 2, 3, 1, 4, 5).flatten(3, 4)


def _no_hold(_block_ids: Sequence[int]) -> Callable[[], None]:
    raise AssertionError("no read hangs here")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("blend", [NONE, SOME, FULL], ids=["none", "progressive", "full"])
def test_what_was_blended_is_stored_under_no_key(
    open_session: OpenSession, loaded: LoadedModel, blend: BlendOptions
) -> None:
    with open_session() as session:
        with engine_of(loaded, session, blend) as engine:
            prompt = prompt_of(engine, A, B)
            result = answer(engine, prompt)
            assert result.reuse is not None
            assert result.reuse.fallback is None
            assert result.reuse.num_encoded_tokens == NUM_CHUNK_TOKENS
            assert session.flush(20.0)
        stats = session.stats()
        assert stats.stored_chunk_blocks == NUM_CHUNK_BLOCKS
        assert stats.stored_blocks == NUM_CHUNK_BLOCKS + NUM_PREFIX_BLOCKS
        exact = stored(session, prompt.token_ids)
        assert exact.shape[3] == NUM_PREFIX_BLOCKS * BLOCK_TOKENS
        torch.testing.assert_close(exact, encoded(loaded, PREFIX)[:, :, :, : exact.shape[3]])
        for span in prompt.spans:
            rows = stored(session, span.chunk.token_ids, span.chunk.space.extra_keys)
            want = encoded(loaded, [*SINK, *span.chunk.token_ids])[:, :, :, len(SINK) :]
            assert rows.shape[3] == span.chunk.num_cached_tokens
            torch.testing.assert_close(rows, want[:, :, :, : rows.shape[3]])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("blend", [NONE, SOME, FULL], ids=["none", "progressive", "full"])
def test_another_engine_reuses_them_in_another_order(
    open_session: OpenSession, loaded: LoadedModel, blend: BlendOptions
) -> None:
    with engine_of(loaded, None, blend) as alone:
        expected = answer(alone, prompt_of(alone, B, A)).outputs[0].token_ids
    with engine_of(loaded, None, None) as plain:
        exact = answer(plain, [*PREFIX, *B, *A, *QUERY]).outputs[0].token_ids
    with open_session() as session, engine_of(loaded, session, blend) as first:
        answer(first, prompt_of(first, A, B))
        assert session.flush(20.0)
    with open_session() as session, engine_of(loaded, session, blend) as second:
        result = answer(second, prompt_of(second, B, A))
        assert result.reuse is not None
        assert result.reuse.num_loaded_tokens == NUM_CHUNK_TOKENS
        assert result.reuse.num_encoded_tokens == 0
        assert result.outputs[0].token_ids == expected
        if blend is FULL:
            assert result.outputs[0].token_ids == exact
        assert session.flush(20.0)
        stats = session.stats()
        assert stats.loaded_chunk_blocks == NUM_CHUNK_BLOCKS
        assert stats.stored_blocks == 0, "all was known, and what was blended has no name"


@pytest.mark.timeout(60)
def test_prompts_of_the_same_tokens_stay_exact(
    open_session: OpenSession, loaded: LoadedModel
) -> None:
    """In the engine that has the chunks in its pool, and in one that only shares the store."""
    flat = [*PREFIX, *A, *B, *QUERY]
    with engine_of(loaded, None, None) as plain:
        expected = [answer(plain, prompt).outputs[0] for prompt in (flat, A, [*SINK, *A])]
    with open_session() as session:
        with engine_of(loaded, session) as engine:
            answer(engine, prompt_of(engine, A, B))
            assert session.flush(20.0)
            for prompt, output in zip((flat, A, [*SINK, *A]), expected, strict=True):
                assert answer(engine, prompt).outputs[0] == output
            assert session.flush(20.0)
        with engine_of(loaded, session, None) as other:
            for prompt, output in zip((flat, A, [*SINK, *A]), expected, strict=True):
                assert answer(other, prompt).outputs[0] == output


@pytest.mark.timeout(60)
def test_a_prompts_blocks_are_not_taken_for_a_chunks(
    open_session: OpenSession, loaded: LoadedModel
) -> None:
    """The reverse: prompts of just these tokens came first, into the pool and into the store."""
    with engine_of(loaded, None) as alone:
        expected = answer(alone, prompt_of(alone, A, B)).outputs[0]
    with open_session() as session:
        with engine_of(loaded, session) as engine:
            for prompt in (A, B, [*SINK, *A], [*SINK, *B]):
                answer(engine, prompt)
            assert session.flush(20.0)
            result = answer(engine, prompt_of(engine, B, A))
            assert result.reuse is not None
            assert result.reuse.num_encoded_tokens == NUM_CHUNK_TOKENS
            assert (result.reuse.num_found_tokens, result.reuse.num_loaded_tokens) == (0, 0)
        with engine_of(loaded, session) as other:
            assert session.flush(20.0)
            result = answer(other, prompt_of(other, A, B))
            assert result.reuse is not None
            assert result.reuse.num_loaded_tokens == NUM_CHUNK_TOKENS
            assert result.outputs[0] == expected


@pytest.mark.timeout(60)
def test_behind_another_sink_nothing_is_found(
    open_session: OpenSession, loaded: LoadedModel
) -> None:
    with open_session() as session:
        with engine_of(loaded, session) as engine:
            known = engine.chunk(A)
            answer(engine, prompt_of(engine, A, B))
            assert session.flush(20.0)
        with engine_of(loaded, session, sink=(*SINK, 40)) as other:
            result = answer(other, prompt_of(other, A, B))
            assert result.reuse is not None
            assert (result.reuse.num_loaded_tokens, result.reuse.num_found_tokens) == (0, 0)
            foreign: Chunk = other.chunk(A)
            assert not set(foreign.keys(session.spec.fingerprint())) & set(
                known.keys(session.spec.fingerprint())
            )
            with pytest.raises(InvalidArgumentError, match="another sink prefix"):
                other.add_request(SegmentedPrompt([Text(PREFIX), known, Text(QUERY)]))
