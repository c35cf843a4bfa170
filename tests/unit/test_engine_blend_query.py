"""What comes behind a prompt's chunks: computed with their repair, or in a pass of its own."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ucm.engine.blend_job import MAX_QUERY_ROWS
from ucm.engine.loading import load_model
from ucm.engine.model import LlamaModel
from ucm.reuse.options import BlendOptions
from ucm.testing.blend_engines import (
    BLOCK_TOKENS,
    GREEDY,
    PREFIX,
    ask,
    blended_tokens,
    new_engine,
    prompt_of,
    text_of,
    tokens_of,
)
from ucm.testing.models import write_tiny_model

A, C = text_of(1, 16), text_of(3, 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), num_hidden_layers=4)
    return load_model(folder, torch.float32).model


@pytest.mark.parametrize(
    ("num_query", "num_behind"),
    [(1, 1), (5, 1), (MAX_QUERY_ROWS + 1, 1), (MAX_QUERY_ROWS + 2, MAX_QUERY_ROWS + 2)],
)
def test_a_short_query_is_computed_with_the_repair(
    model: LlamaModel, num_query: int, num_behind: int
) -> None:
    options = BlendOptions(budget=0.3)
    engine = new_engine(model, options)
    ask(engine, prompt_of(engine, A, C))
    num_before = engine.stats.computed_tokens
    prompt = prompt_of(engine, C, A, query=text_of(7, num_query))
    result = ask(engine, prompt, dataclasses.replace(GREEDY, max_tokens=1))
    assert engine.stats.computed_tokens - num_before == num_behind
    assert tokens_of(result) == [blended_tokens(model, prompt, options)[:1]]
    assert result.reuse is not None
    assert result.reuse.num_fresh_tokens == len(PREFIX) % BLOCK_TOKENS
