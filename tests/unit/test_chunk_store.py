"""Chunks are computed and stored ahead of the first prompt that holds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ucm
from ucm.connectors.cached_engine import CachedEngine, CachedEngineOptions, open_engine
from ucm.connectors.chunk_store import is_stored, store_chunks
from ucm.connectors.session import SessionOptions
from ucm.embedded import EmbeddedCache
from ucm.engine.chunk_prompts import ChunkPrompts
from ucm.engine.engine import EngineOptions
from ucm.engine.loading import LoadedModel, load_model
from ucm.engine.sampling import SamplingParams
from ucm.errors import ConfigError, InvalidArgumentError, TierUnavailableError
from ucm.reuse.options import ReuseOptions
from ucm.testing.models import write_tiny_model

TEXT = "the cache and the block of the layer " * 60


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@contextmanager
def opened(
    loaded: LoadedModel, folder: Path | None, **session: float
) -> Iterator[tuple[CachedEngine, ChunkPrompts]]:
    prompts = ChunkPrompts(loaded.tokenizer)
    options = CachedEngineOptions(
        engine=EngineOptions(num_blocks=128, reuse=ReuseOptions(sink_tokens=prompts.sink_tokens)),
        session=SessionOptions(deadline_s=10.0, **session),  # type: ignore[arg-type]
    )
    factory = None if folder is None else lambda: ucm.open(folder)
    with open_engine(loaded, factory, options) as cached:
        yield cached, prompts


def test_what_was_stored_ahead_is_loaded(loaded: LoadedModel, tmp_path: Path) -> None:
    done: list[int] = []
    with opened(loaded, tmp_path / "store") as (cached, prompts):
        chunks = prompts.chunks_of(TEXT, cached.engine.chunk_space)
        assert len(chunks) > 1
        stored = store_chunks(cached, [*chunks, chunks[0]], done.append)
        assert (stored.num_known, stored.num_computed, stored.num_unstored) == (0, len(chunks), 0)
        assert sum(done) == sum(map(len, chunks))
    with opened(loaded, tmp_path / "store") as (cached, prompts):
        chunks = prompts.chunks_of(TEXT, cached.engine.chunk_space)
        assert store_chunks(cached, chunks).num_known == len(chunks)
        prompt = prompts.prompt(chunks[::-1], "which block?")
        (result,) = cached.engine.generate_all([prompt], SamplingParams(max_tokens=2))
        assert result.reuse is not None
        assert result.reuse.num_encoded_tokens == 0
        assert result.reuse.num_loaded_tokens == stored.num_computed_tokens


def test_what_the_cache_does_not_take_is_counted(loaded: LoadedModel, tmp_path: Path) -> None:
    with opened(loaded, tmp_path / "store", max_queued_blocks=1) as (cached, prompts):
        chunks = prompts.chunks_of(TEXT, cached.engine.chunk_space)
        stored = store_chunks(cached, chunks)
        assert stored.num_unstored == stored.num_computed == len(chunks)
        assert not any(is_stored(cached, chunk) for chunk in chunks)


def test_a_store_that_lags_behind_is_waited_for(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the pool may be pinned, and is, until somebody waits for the stores."""
    with opened(loaded, tmp_path / "store") as (cached, prompts):
        pool = cached.engine.pool
        blocks = pool.blocks.allocate(60)
        release, flush = pool.pin(blocks), cached.flush
        pool.blocks.release(blocks)

        def flush_all(timeout_s: float) -> bool:
            release()
            return flush(timeout_s)

        monkeypatch.setattr(cached, "flush", flush_all)
        stored = store_chunks(cached, prompts.chunks_of(TEXT, cached.engine.chunk_space))
        assert stored.num_unstored == 0


def test_a_chunk_of_other_weights_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    other = load_model(write_tiny_model(tmp_path / "other", seed=1))
    with opened(loaded, None) as (cached, prompts), opened(other, None) as (foreign, _):
        chunks = prompts.chunks_of(TEXT, foreign.engine.chunk_space)
        with pytest.raises(InvalidArgumentError, match="of another model"):
            cached.engine.generate_all([prompts.prompt(chunks, "why?")])


def test_without_a_cache_nothing_can_be_stored(loaded: LoadedModel) -> None:
    with opened(loaded, None) as (cached, prompts):
        chunks = prompts.chunks_of(TEXT, cached.engine.chunk_space)
        with pytest.raises(ConfigError, match="no cache"):
            store_chunks(cached, chunks)
        assert cached.flush(1.0)


def test_a_cache_that_cannot_be_reached_is_an_error_when_the_engine_is_opened(
    loaded: LoadedModel,
) -> None:
    def refuse() -> EmbeddedCache:
        raise TierUnavailableError("nobody is there")

    options = CachedEngineOptions(connect_timeout_s=0.2)
    with pytest.raises(TierUnavailableError):
        open_engine(loaded, refuse, options)
