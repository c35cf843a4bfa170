"""What comes behind a prompt's chunks: computed with their repair, or in a pass of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch

from ucm.engine.blend_job import MAX_QUERY_ROWS
from ucm.engine.engine import Engine
from ucm.engine.model import ForwardItem, LlamaModel
from ucm.reuse.options import BlendOptions
from ucm.reuse.segments import SegmentedPrompt
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

A, C = text_of(1, 16), text_of(3, 12)


@pytest.mark.parametrize(
    ("num_query", "num_behind"),
    [(1, 1), (5, 1), (MAX_QUERY_ROWS + 1, 1), (MAX_QUERY_ROWS + 2, MAX_QUERY_ROWS + 2)],
)
def test_a_short_query_is_computed_with_the_repair(
    model: LlamaModel, num_query: int, num_behind: int
) -> None:
    options = BlendOptions(budget=0.3)
    engine = _warm_engine(model, options)
    num_before = engine.stats.computed_tokens
    prompt = prompt_of(engine, C, A, query=text_of(7, num_query))
    result = ask(engine, prompt, dataclasses.replace(GREEDY, max_tokens=1))
    assert engine.stats.computed_tokens - num_before == num_behind
    assert tokens_of(result) == [blended_tokens(model, prompt, options)[:1]]
    assert result.reuse is not None
    assert result.reuse.num_fresh_tokens == len(PREFIX) % BLOCK_TOKENS


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("budget", [0.0, 0.3, 1.0])
def test_the_last_token_of_a_short_query_takes_no_pass(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch, num_samples: int, budget: float
) -> None:
    options = BlendOptions(budget=budget)
    engine = _warm_engine(model, options)
    passes = _count_passes(model, monkeypatch)
    prompt = prompt_of(engine, C, A, query=text_of(7, 5))
    result = ask(engine, prompt, dataclasses.replace(GREEDY, max_tokens=3, n=num_samples))
    assert passes == [num_samples] * 2  # for the second token and the third
    assert tokens_of(result) == [blended_tokens(model, prompt, options)[:3]] * num_samples
    assert not engine.check_integrity()


def test_logits_that_are_known_and_those_of_a_pass_come_in_one_batch(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BlendOptions(budget=0.3)
    engine = _warm_engine(model, options)
    chunks = [prompt_of(engine, C, A, query=text_of(seed, 5)) for seed in (7, 8)]
    texts = [text_of(seed, 9) for seed in (9, 10)]
    wanted = [blended_tokens(model, prompt, options)[:4] for prompt in chunks]
    params = dataclasses.replace(GREEDY, max_tokens=4)
    wanted += [tokens_of(ask(new_engine(model, None), text, params))[0] for text in texts]
    passes = _count_passes(model, monkeypatch)
    prompts: list[SegmentedPrompt | tuple[int, ...]] = [texts[0], chunks[0], texts[1], chunks[1]]
    found = [tokens_of(result)[0] for result in engine.generate_all(prompts, params)]
    assert found == [wanted[2], wanted[0], wanted[3], wanted[1]]
    assert sum(passes) == 2 * 4 + 2 * 3


def test_known_logits_that_are_not_finite_are_computed_by_a_pass(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BlendOptions(budget=0.3)
    engine = _warm_engine(model, options)
    prompt = prompt_of(engine, C, A, query=text_of(7, 5))
    wanted = blended_tokens(model, prompt, options)[:3]
    logits, calls = model.logits, []

    def damaged_once(*args: torch.Tensor) -> torch.Tensor:
        calls.append(args)
        return logits(*args) * (math.nan if len(calls) == 1 else 1.0)

    monkeypatch.setattr(model, "logits", damaged_once)
    result = ask(engine, prompt, dataclasses.replace(GREEDY, max_tokens=3))
    assert calls, "the blend asks for them"
    assert tokens_of(result) == [wanted]


def _warm_engine(model: LlamaModel, options: BlendOptions) -> Engine:
    """One that has the chunks."""
    engine = new_engine(model, options)
    ask(engine, prompt_of(engine, A, C))
    return engine


def _count_passes(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of sequences of each pass."""
    passes, forward = [], model.forward

    def counted(items: Sequence[ForwardItem], *args: object, **options: object) -> torch.Tensor:
        passes.append(len(items))
        return forward(items, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "forward", counted)
    return passes
