"""Chunks of a real decoder through a whole cache, in this process and behind a daemon's door.

One engine encodes a chunk behind its sink prefix and stores it; others, on other connections and
after a restart, place it elsewhere. What comes back is bit for bit what was stored, under no other
name, and its keys can be moved to where the new prompt has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ucm.api import CacheApi
from ucm.checksum import checksum
from ucm.client import connect
from ucm.config import MIB, MemoryConfig
from ucm.connectors.circuit_breaker import BreakerOptions
from ucm.connectors.reference import ReferenceConnector, namespace_spec
from ucm.connectors.session import CacheSession, SessionOptions
from ucm.embedded import EmbeddedCache
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.hook import LoadRequest, StoreRequest
from ucm.engine.layer_clock import LayerClock
from ucm.engine.loading import LoadedModel, load_model
from ucm.engine.model import ForwardItem
from ucm.engine.sampling import SamplingParams
from ucm.hashing import Encodable, NamespaceSpec
from ucm.kernels.rotate import rotate_keys
from ucm.kernels.summary_record import decode_summary
from ucm.layout import KvDtype
from ucm.load_decision import LoadKind, forced
from ucm.manager import Manager
from ucm.reuse import Chunk, ChunkSpace
from ucm.storage.fsck import check_store
from ucm.testing.daemon import running_daemon, short_folder, small_config
from ucm.testing.models import write_tiny_model
from ucm.types import SummaryKind, TierKind

BLOCK_TOKENS = 16
SINK = tuple(range(3, 19))
"""A block of it, so that a chunk's rows fill whole blocks of the pool they are computed in."""
OTHER_SINK = (*SINK[:-1], 99)
CHUNK_TOKENS = tuple(100 + 7 * i % 90 for i in range(70))
NUM_BLOCKS = len(CHUNK_TOKENS) // BLOCK_TOKENS
OPTIONS = SessionOptions(
    deadline_s=10.0,
    decide=forced(LoadKind.LOAD_ALL),
    breaker=BreakerOptions(backoff_s=3600.0),
    summary=SummaryKind.GSA_K4,
)
NO_EXTRA: tuple[Encodable, ...] = ()

Cache = Callable[[], AbstractContextManager[Callable[[], CacheApi]]]
"""Opens the same store again and again; gives what connects to it."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("tiny")), torch.float32)


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as found:
        yield found


@pytest.fixture(params=["embedded", "daemon"])
def cache(request: pytest.FixtureRequest, folder: Path) -> Cache:
    config = small_config(folder)

    @contextmanager
    def embedded() -> Iterator[Callable[[], CacheApi]]:
        manager = Manager(config)
        yield lambda: EmbeddedCache(manager)
        manager.close()

    @contextmanager
    def daemon() -> Iterator[Callable[[], CacheApi]]:
        with running_daemon(config):
            yield lambda: connect(config.service.socket_path, timeout_s=5.0)

    return embedded if request.param == "embedded" else daemon


@pytest.fixture
def spec(loaded: LoadedModel) -> NamespaceSpec:
    return namespace_spec(
        loaded.config,
        weights_digest=loaded.weights_digest,
        dtype=KvDtype.FLOAT32,
        block_tokens=BLOCK_TOKENS,
    )


def space(sink: tuple[int, ...] = SINK) -> ChunkSpace:
    return ChunkSpace(model=bytes(32), sink_tokens=sink, block_tokens=BLOCK_TOKENS)


@dataclass(slots=True)
class Node:
    """One engine's pool, and its connection to the cache."""

    loaded: LoadedModel
    pool: torch.Tensor
    hook: ReferenceConnector

    def beside(self) -> Node:
        """Another pool over the same connection."""
        twin = Node(self.loaded, torch.zeros_like(self.pool), ReferenceConnector(self.hook.session))
        twin.hook.attach(twin.pool)
        return twin

    def encode(self, token_ids: Sequence[int]) -> None:
        """Compute tokens from position 0 into the pool's blocks 0, 1, ..."""
        block_ids = list(range(-(-len(token_ids) // BLOCK_TOKENS)))
        self.loaded.model.forward([ForwardItem(token_ids, 0, block_ids)], self.pool)

    def store(
        self, token_ids: Sequence[int], block_ids: list[int], extra_keys: tuple[Encodable, ...]
    ) -> None:
        self.hook.store(
            StoreRequest(
                request_id="writer",
                token_ids=token_ids[: len(block_ids) * BLOCK_TOKENS],
                first_block=0,
                block_ids=block_ids,
                release=lambda: None,
                layers=LayerClock.finished(self.loaded.config.num_layers),
                extra_keys=extra_keys,
            )
        )
        self.hook.finish("writer")
        assert self.hook.session.flush(20.0)

    def load(
        self, token_ids: Sequence[int], block_ids: list[int], extra_keys: tuple[Encodable, ...]
    ) -> int:
        if self.hook.match(token_ids, 0, extra_keys) < len(block_ids) * BLOCK_TOKENS:
            return 0
        request = LoadRequest(
            request_id="reader/chunk3",
            token_ids=token_ids,
            first_block=0,
            block_ids=block_ids,
            hold=no_hold,
            extra_keys=extra_keys,
            whole=True,
        )
        if not self.hook.start_load(request).num_blocks:
            return 0
        for layer in range(self.loaded.config.num_layers):
            self.hook.wait_layer(layer, ["reader/chunk3"])
        num_good = self.hook.end_load("reader/chunk3")
        self.hook.finish("reader/chunk3")
        return num_good


def no_hold(_block_ids: Sequence[int]) -> Callable[[], None]:
    raise AssertionError("no read hangs here")


@contextmanager
def node(
    loaded: LoadedModel, spec: NamespaceSpec, connection: Callable[[], CacheApi]
) -> Iterator[Node]:
    config = loaded.config
    shape = (config.num_layers, 16, *spec.layout.slab_shape)
    with CacheSession(connection, spec, OPTIONS) as session:
        session.connect(20.0)
        made = Node(loaded, torch.zeros(shape), ReferenceConnector(session))
        made.hook.attach(made.pool)
        yield made


@pytest.mark.timeout(60)
def test_a_chunk_is_found_by_others_and_by_nothing_else(
    cache: Cache, loaded: LoadedModel, spec: NamespaceSpec, folder: Path
) -> None:
    chunk = Chunk(CHUNK_TOKENS, space())
    extra_keys = chunk.space.extra_keys
    with cache() as connection, node(loaded, spec, connection) as writer:
        writer.encode([*SINK, *CHUNK_TOKENS])
        original = writer.pool[:, 1 : 1 + NUM_BLOCKS].clone()
        writer.store(CHUNK_TOKENS, list(range(1, 1 + NUM_BLOCKS)), extra_keys)
        stats = writer.hook.session.stats()
        assert stats.stored_chunk_blocks == stats.summarised_blocks == NUM_BLOCKS
    with cache() as connection, node(loaded, spec, connection) as reader:
        places = [9, 4, 11, 6]
        assert reader.hook.match(CHUNK_TOKENS, 0) == 0, "a prompt with the same tokens"
        assert reader.hook.match([*SINK, *CHUNK_TOKENS], 0) == 0, "a prompt as it was encoded"
        assert reader.load(CHUNK_TOKENS, places, space(OTHER_SINK).extra_keys) == 0
        assert not reader.pool.any()
        assert reader.load(CHUNK_TOKENS, places, extra_keys) == NUM_BLOCKS
        assert torch.equal(reader.pool[:, places], original)
        stats = reader.hook.session.stats()
        assert (stats.loaded_chunk_blocks, stats.wrong_bytes, stats.failures) == (NUM_BLOCKS, 0, 0)
        assert stats.hit_tokens_by_tier == {TierKind.NVME: NUM_BLOCKS * BLOCK_TOKENS}
        summaries = reader.hook.session.summaries(CHUNK_TOKENS, extra_keys)
        assert len(summaries) == NUM_BLOCKS
        assert None not in summaries
        assert reader.hook.session.summaries(CHUNK_TOKENS) == [None] * NUM_BLOCKS
    assert not check_store(folder / "store", repair=False).findings


@pytest.mark.timeout(60)
def test_a_prompt_never_comes_back_as_a_chunk(
    cache: Cache, loaded: LoadedModel, spec: NamespaceSpec
) -> None:
    """Prompt and chunk of the same tokens, in one store: each load gives its own bytes."""
    extra_keys = space().extra_keys
    with cache() as connection, node(loaded, spec, connection) as writer:
        writer.encode(CHUNK_TOKENS)
        prompt = writer.pool[:, :NUM_BLOCKS].clone()
        writer.store(CHUNK_TOKENS, list(range(NUM_BLOCKS)), NO_EXTRA)
        reader = writer.beside()
        assert reader.load(CHUNK_TOKENS, [5, 6, 7, 8], extra_keys) == 0
        assert not reader.pool.any()
        writer.encode([*SINK, *CHUNK_TOKENS])
        chunk = writer.pool[:, 1 : 1 + NUM_BLOCKS].clone()
        writer.store(CHUNK_TOKENS, list(range(1, 1 + NUM_BLOCKS)), extra_keys)
        assert not torch.equal(prompt, chunk)
        assert reader.load(CHUNK_TOKENS, [5, 6, 7, 8], extra_keys) == NUM_BLOCKS
        assert reader.load(CHUNK_TOKENS, [1, 2, 3, 4], NO_EXTRA) == NUM_BLOCKS
        assert torch.equal(reader.pool[:, 5:9], chunk)
        assert torch.equal(reader.pool[:, 1:5], prompt)


def test_an_engines_prompt_is_not_served_from_chunks(
    cache: Cache, loaded: LoadedModel, spec: NamespaceSpec
) -> None:
    """The engine's own path, over a store that holds a chunk of just its prompt's tokens."""
    prompt, params = list(CHUNK_TOKENS), SamplingParams(max_tokens=6, ignore_eos=True)
    options = EngineOptions(num_blocks=32, block_tokens=BLOCK_TOKENS)
    with Engine(loaded.model, None, options) as engine:
        (cold,) = engine.generate_all([prompt], params)
    with cache() as connection, node(loaded, spec, connection) as writer:
        writer.encode([*SINK, *CHUNK_TOKENS])
        writer.store(CHUNK_TOKENS, list(range(1, 1 + NUM_BLOCKS)), space().extra_keys)
        with Engine(loaded.model, None, options, writer.hook) as engine:
            (result,) = engine.generate_all([prompt], params)
            assert result.outputs[0].token_ids == cold.outputs[0].token_ids
            assert result.timings.num_hook_tokens == 0
            assert writer.hook.session.flush(20.0)


def test_keys_move_from_where_the_identity_says_they_are(
    loaded: LoadedModel, spec: NamespaceSpec, folder: Path
) -> None:
    """Layer 0 knows nothing but tokens and positions: moved keys are those computed there."""
    chunk, at = Chunk(CHUNK_TOKENS, space()), 37
    manager = Manager(small_config(folder, nvme=False))
    with node(loaded, spec, lambda: EmbeddedCache(manager)) as one:
        one.encode([*SINK, *CHUNK_TOKENS])
        one.store(CHUNK_TOKENS, list(range(1, 1 + NUM_BLOCKS)), chunk.space.extra_keys)
        assert one.load(CHUNK_TOKENS, [10, 11, 12, 13], chunk.space.extra_keys) == NUM_BLOCKS
        keys, values = one.pool[0, 10:14].permute(1, 2, 0, 3, 4).flatten(2, 3)  # [G, T, D] each
    shift = at - chunk.space.base_position
    positions = torch.arange(at, at + chunk.num_cached_tokens)
    hidden = loaded.model.embed(CHUNK_TOKENS[: chunk.num_cached_tokens])
    _, (want_keys, want_values) = loaded.model.project(0, hidden, positions)
    moved = rotate_keys(keys, loaded.config.rope, shift)
    assert float((moved - want_keys).norm() / want_keys.norm()) < 2e-6
    assert float((values - want_values).norm() / want_values.norm()) < 2e-6
    manager.close()


def test_summaries_of_a_chunk_speak_for_its_bytes(
    loaded: LoadedModel, spec: NamespaceSpec, folder: Path
) -> None:
    manager = Manager(small_config(folder))
    extra_keys = space().extra_keys
    with node(loaded, spec, lambda: EmbeddedCache(manager)) as one:
        one.encode([*SINK, *CHUNK_TOKENS])
        one.store(CHUNK_TOKENS, list(range(1, 1 + NUM_BLOCKS)), extra_keys)
        found = one.hook.session.summaries(CHUNK_TOKENS, extra_keys)
        for block_id, summary in enumerate(found, 1):
            slabs = one.pool[:, block_id].contiguous().numpy()
            sums = [checksum(slab.data.cast("B")) for slab in slabs]
            assert summary is not None
            assert decode_summary(spec.layout, summary, sums) is not None
    manager.close()


@pytest.mark.timeout(60)
def test_chunks_are_evicted_like_any_block_and_never_replaced_by_another(
    loaded: LoadedModel, spec: NamespaceSpec, folder: Path
) -> None:
    """In a store too small for them, what is found of a chunk is a beginning of it, unchanged."""
    config = dataclasses.replace(
        small_config(folder, nvme=False), memory=MemoryConfig(capacity_bytes=MIB)
    )
    manager = Manager(config)
    extra_keys = space().extra_keys
    with node(loaded, spec, lambda: EmbeddedCache(manager)) as one:
        places, contents = [12, 13, 14, 15], {}
        for number in range(30):
            tokens = tuple(1 + (token + number) % 250 for token in CHUNK_TOKENS)
            one.pool[:, :NUM_BLOCKS] = torch.randn(
                one.pool[:, :NUM_BLOCKS].shape, generator=torch.Generator().manual_seed(number)
            )
            contents[tokens] = one.pool[:, :NUM_BLOCKS].clone()
            one.store(tokens, list(range(NUM_BLOCKS)), extra_keys)
        found = []
        for tokens, content in contents.items():
            count = one.hook.match(tokens, 0, extra_keys) // BLOCK_TOKENS
            count = one.load(tokens, places[:count], extra_keys) if count else 0
            assert torch.equal(one.pool[:, places[:count]], content[:, :count])
            found.append(count)
        assert found[-1] == NUM_BLOCKS
        assert 0 in found
        assert not manager.check_integrity()
    manager.close()


@pytest.mark.timeout(60)
def test_a_damaged_chunk_is_a_miss_that_fsck_explains(
    loaded: LoadedModel, spec: NamespaceSpec, folder: Path
) -> None:
    config, extra_keys = small_config(folder), space().extra_keys
    with node(loaded, spec, lambda: EmbeddedCache(Manager(config))) as one:
        one.encode([*SINK, *CHUNK_TOKENS])
        slab = one.pool[1, 2].contiguous().numpy().tobytes()  # of the chunk's second block
        one.store(CHUNK_TOKENS, list(range(1, 1 + NUM_BLOCKS)), extra_keys)
    (segment,) = (folder / "store").rglob("*.seg")
    content = segment.read_bytes()
    assert content.count(slab) == 1
    with segment.open("r+b") as file:
        file.seek(content.index(slab) + 100)
        file.write(b"\xff\xee\xdd")
    (finding,) = check_store(folder / "store", repair=False).findings
    assert finding.is_damage
    with node(loaded, spec, lambda: EmbeddedCache(Manager(config))) as one:
        for _ in range(2):
            assert one.load(CHUNK_TOKENS, [9, 10, 11, 12], extra_keys) <= 1
        assert one.hook.session.stats().corrupt_blocks
