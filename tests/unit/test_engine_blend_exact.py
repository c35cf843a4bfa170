"""Rows of chunks that are exact where they stand: kept, shared, and counted as such."""

from __future__ import annotations

import pytest
import torch

from ucm.engine.loading import load_model
from ucm.engine.model import LlamaModel
from ucm.testing.blend_engines import (
    BLOCK_TOKENS,
    FULL,
    SINK,
    ask,
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


def test_rows_of_exact_chunks_are_not_counted_as_recomputed(model: LlamaModel) -> None:
    engine = new_engine(model, FULL)
    result = ask(engine, prompt_of(engine, A, C, prefix=SINK))
    assert result.reuse is not None
    assert result.reuse.num_recomputed_tokens == pytest.approx(
        12 * (3 + model.projection_share) / 4
    )


def test_what_an_exact_prefix_leaves_of_a_chunks_tail_stays_exact(model: LlamaModel) -> None:
    """Every block of the chunk is found as prefix: its tail is an ordinary prompt's."""
    engine, plain = new_engine(model), new_engine(model, None)
    prompt = prompt_of(engine, A[:15], prefix=(*SINK, 40, 41, 42))
    expected = tokens_of(ask(plain, list(prompt.token_ids)))
    ask(engine, list(prompt.token_ids[:21]))
    result = ask(engine, prompt)
    assert tokens_of(result) == expected
    assert result.timings.num_local_tokens == 20
    assert engine.stats.reuse.blended == 0
    again = ask(engine, list(prompt.token_ids))
    assert again.timings.num_local_tokens == (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
