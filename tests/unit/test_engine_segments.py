"""Prompts in segments that an engine refuses: with words, and with nothing left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.loading import LoadedModel, load_model
from ucm.engine.sampling import SamplingParams
from ucm.errors import ConfigError, InvalidArgumentError, UcmError
from ucm.reuse import Chunk, ChunkSpace, SegmentedPrompt, Text
from ucm.reuse.options import ReuseOptions
from ucm.testing.fake_model import FakeModel
from ucm.testing.models import write_tiny_model

SINK = (5, 6, 7, 8, 9)
REUSE = ReuseOptions(sink_tokens=SINK, model_digest="weights")
PARAMS = SamplingParams(max_tokens=2, ignore_eos=True)
TOKENS = tuple(range(30, 60))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=96)
    return load_model(folder, torch.float32)


@pytest.fixture
def engine(loaded: LoadedModel) -> Engine:
    return new_engine(loaded)


def new_engine(loaded: LoadedModel, reuse: ReuseOptions | None = REUSE) -> Engine:
    options = EngineOptions(num_blocks=64, block_tokens=8, reuse=reuse)
    return Engine(loaded.model, None, options)


def prompt_with(*chunks: Chunk) -> SegmentedPrompt:
    return SegmentedPrompt([Text(SINK), *chunks, Text((70, 71))])


def of_another(**change: object) -> Callable[[ChunkSpace], ChunkSpace]:
    return lambda space: dataclasses.replace(space, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("foreign", "words"),
    [
        (of_another(model=bytes(32)), "another model"),
        (of_another(sink_tokens=(5, 6, 7, 8, 10)), "another sink prefix"),
        (of_another(sink_tokens=SINK[:4]), "another sink prefix"),
        (of_another(block_tokens=16), "blocks of 16 tokens, not 8"),
    ],
)
def test_chunks_of_another_space(
    engine: Engine, foreign: Callable[[ChunkSpace], ChunkSpace], words: str
) -> None:
    chunk = Chunk(TOKENS, foreign(engine.chunk_space))
    with pytest.raises(InvalidArgumentError, match=words):
        engine.add_request(prompt_with(chunk), PARAMS)
    check_unharmed(engine)


def test_chunks_of_other_weights_or_dtype(loaded: LoadedModel, engine: Engine) -> None:
    other = new_engine(loaded, dataclasses.replace(REUSE, model_digest="others"))
    with pytest.raises(InvalidArgumentError, match="another model"):
        engine.add_request(prompt_with(other.chunk(TOKENS)), PARAMS)
    same = new_engine(loaded)
    engine.add_request(prompt_with(same.chunk(TOKENS)), PARAMS)
    check_unharmed(engine)


def test_more_positions_than_the_model_has(engine: Engine) -> None:
    with pytest.raises(InvalidArgumentError, match=r"leave 91: cut it with .*split_document"):
        engine.chunk([3] * 92)
    long = engine.chunk([3] * 60)
    with pytest.raises(InvalidArgumentError, match="127 tokens; the model has 96 positions"):
        engine.add_request(prompt_with(long, long), PARAMS)
    filling = engine.chunk([3] * 89)
    with pytest.raises(InvalidArgumentError, match="the answer included"):
        engine.add_request(prompt_with(filling), PARAMS)
    check_unharmed(engine)


def test_tokens_that_the_model_does_not_know(engine: Engine) -> None:
    with pytest.raises(InvalidArgumentError, match="token ids must be 0 to"):
        engine.chunk([9999])
    by_hand = Chunk((9999,) * 8, engine.chunk_space)
    with pytest.raises(InvalidArgumentError, match="token ids must be 0 to"):
        engine.add_request(prompt_with(by_hand), PARAMS)
    with pytest.raises(InvalidArgumentError, match="empty"):
        engine.chunk([])
    check_unharmed(engine)


def test_an_engine_that_reuses_nothing_says_how_to_have_it(
    loaded: LoadedModel, engine: Engine
) -> None:
    plain = new_engine(loaded, None)
    with pytest.raises(ConfigError, match=r"EngineOptions\.reuse"):
        plain.chunk(TOKENS)
    with pytest.raises(ConfigError, match=r"EngineOptions\.reuse"):
        plain.add_request(prompt_with(engine.chunk(TOKENS)), PARAMS)
    only_text = SegmentedPrompt([Text(SINK), Text((70, 71))])
    segmented, whole = plain.generate_all([only_text, [*SINK, 70, 71]], PARAMS)
    assert segmented.outputs == whole.outputs
    assert segmented.reuse is None


def test_a_model_without_rope_cannot_reuse() -> None:
    options = EngineOptions(num_blocks=64, block_tokens=8, reuse=REUSE)
    with pytest.raises(ConfigError, match="no rotary position embedding"):
        Engine(FakeModel(), None, options)


@pytest.mark.parametrize("sink", [(), (1, 2, 3), tuple(range(90)), (-1, 2, 3, 4)])
def test_a_sink_prefix_that_cannot_be(loaded: LoadedModel, sink: tuple[int, ...]) -> None:
    with pytest.raises(UcmError, match="sink prefix"):
        new_engine(loaded, ReuseOptions(sink_tokens=sink))


def check_unharmed(engine: Engine) -> None:
    """It serves, and holds nothing of what it refused."""
    chunk = engine.chunk(TOKENS)
    (result,) = engine.generate_all([prompt_with(chunk)], PARAMS)
    assert len(result.outputs[0].token_ids) == PARAMS.max_tokens
    assert not engine.check_integrity()
    assert not engine.has_work
