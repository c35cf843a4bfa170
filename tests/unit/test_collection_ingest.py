"""Documents into a collection: what is new is computed, what is known is not, nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ucm
from ucm.connectors.cached_engine import CachedEngine, CachedEngineOptions, open_engine
from ucm.connectors.chunk_store import is_stored, store_chunks
from ucm.connectors.collection_ingest import CollectionIngest, IngestOutcome
from ucm.connectors.session import SessionOptions
from ucm.embedded import EmbeddedCache
from ucm.engine.chunk_prompts import ChunkPrompts
from ucm.engine.engine import EngineOptions
from ucm.engine.loading import LoadedModel, load_model
from ucm.errors import ConfigError, InvalidArgumentError
from ucm.reuse.options import ReuseOptions
from ucm.testing.models import write_tiny_model

TEXT = "the cache and the block of the layer " * 40
OTHER = "a query and a token and another token " * 30


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@contextmanager
def opened(
    loaded: LoadedModel, store: EmbeddedCache | None
) -> Iterator[tuple[CachedEngine, ChunkPrompts]]:
    prompts = ChunkPrompts(loaded.tokenizer)
    options = CachedEngineOptions(
        engine=EngineOptions(num_blocks=64, reuse=ReuseOptions(sink_tokens=prompts.sink_tokens)),
        session=SessionOptions(deadline_s=10.0, store_delay_s=0.0),
    )
    factory = None
    if store is not None:
        manager = store.manager
        factory = lambda: EmbeddedCache(manager, owns_manager=False)  # noqa: E731
    with open_engine(loaded, factory, options) as cached:
        yield cached, prompts


def test_only_what_is_new_is_computed(loaded: LoadedModel, tmp_path: Path) -> None:
    with ucm.open(tmp_path / "store") as store:
        with opened(loaded, store) as (cached, prompts):
            ingest = CollectionIngest(cached, store.collections, "c", prompts)
            first = ingest.add("a", TEXT)
            again = ingest.add("a", TEXT)
            same_text = ingest.add("b", TEXT)
            changed = ingest.add("a", TEXT + OTHER)
        assert first.outcome is IngestOutcome.NEW
        assert first.num_chunks == first.stored.num_computed == 2
        assert first.num_tokens == first.stored.num_computed_tokens + first.num_tail_tokens
        assert again.outcome is IngestOutcome.KNOWN
        assert (again.stored.num_known, again.stored.num_computed) == (2, 0)
        assert same_text.outcome is IngestOutcome.NEW
        assert same_text.stored.num_computed == 0
        assert changed.outcome is IngestOutcome.REPLACED
        assert changed.version > first.version
        assert changed.stored.num_unstored == 0
        assert {info.id for info in store.collections.list_documents("c")} == {"a", "b"}
        with opened(loaded, store) as (cached, prompts):  # another process, so to say
            ingest = CollectionIngest(cached, store.collections, "c", prompts)
            assert ingest.add("a", TEXT + OTHER).stored.num_computed == 0


def test_an_interrupted_document_is_completed(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TEXT + OTHER

    def stop(_num_tokens: int) -> None:
        raise KeyboardInterrupt

    with ucm.open(tmp_path / "store") as store:
        with opened(loaded, store) as (cached, prompts), pytest.raises(KeyboardInterrupt):
            CollectionIngest(cached, store.collections, "c", prompts).add("a", text, stop)
        (info,) = store.collections.list_documents("c")
        assert info.id == "a", "registered before its blocks are stored"
        with opened(loaded, store) as (cached, prompts):
            done = CollectionIngest(cached, store.collections, "c", prompts).add("a", text)
            assert done.outcome is IngestOutcome.KNOWN
            assert done.stored.num_known + done.stored.num_computed == done.num_chunks
            assert done.stored.num_computed > 0
            chunks = prompts.chunks_of(text, cached.engine.chunk_space)
            assert all(is_stored(cached, chunk) for chunk in chunks)


def test_what_the_store_does_not_keep_is_counted(loaded: LoadedModel, tmp_path: Path) -> None:
    with ucm.open(tmp_path / "store") as store, opened(loaded, store) as (cached, prompts):
        assert cached.session is not None
        cached.session.store = lambda *args: args[-1]()  # type: ignore[method-assign]
        done = CollectionIngest(cached, store.collections, "c", prompts).add("a", TEXT)
    assert done.stored.num_unstored == done.stored.num_computed == 2


def test_a_document_below_a_block_has_nothing_to_keep(loaded: LoadedModel, tmp_path: Path) -> None:
    with ucm.open(tmp_path / "store") as store, opened(loaded, store) as (cached, prompts):
        done = CollectionIngest(cached, store.collections, "c", prompts).add("a", "short")
        assert done.outcome is IngestOutcome.NEW
        assert done.num_tail_tokens == done.num_tokens
        assert done.stored.num_computed == 0


def test_a_document_that_cannot_be_registered_is_skipped(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    with ucm.open(tmp_path / "store") as store, opened(loaded, store) as (cached, prompts):
        ingest = CollectionIngest(cached, store.collections, "c", prompts)
        assert ingest.add("two\nlines", TEXT).outcome is IngestOutcome.SKIPPED
        assert store.collections.list_collections() == ()
        with pytest.raises(InvalidArgumentError, match="empty"):
            ingest.add("a", "")


def test_without_a_cache_there_is_no_collection(loaded: LoadedModel, tmp_path: Path) -> None:
    with ucm.open(tmp_path / "store") as store, opened(loaded, None) as (cached, prompts):
        with pytest.raises(ConfigError, match="needs a cache"):
            CollectionIngest(cached, store.collections, "c", prompts)
        chunks = prompts.chunks_of(TEXT, cached.engine.chunk_space)
        with pytest.raises(ConfigError, match="no cache"):
            store_chunks(cached, chunks)
        assert cached.flush(1.0)


def test_no_block_of_a_document_outlives_it(loaded: LoadedModel, tmp_path: Path) -> None:
    """Nor under the keys of the prompts that it was computed with."""
    with ucm.open(tmp_path / "store") as store:
        with opened(loaded, store) as (cached, prompts):
            ingest = CollectionIngest(cached, store.collections, "c", prompts)
            added = ingest.add("a", TEXT)
            assert added.stored.num_unstored == 0
            assert cached.session is not None
            namespace = cached.session.spec.fingerprint()
            found = store.manager._state.namespaces.get_locked(namespace)
            assert found is not None
            num_opening = len(prompts.sink_tokens) // found.layout.block_tokens
            assert len(found.index) > num_opening
        assert store.collections.remove("c").deletion.num_waiting == 0
        assert len(found.index) <= num_opening, "what all prompts begin with"
