"""Rows of chunks that are exact where they stand: kept, shared, and counted as such."""

from __future__ import annotations

import pytest
import torch

from ucm.engine.chunk_rows import gather_rows
from ucm.engine.model import LlamaModel
from ucm.engine.scheduler import SchedulerOptions
from ucm.reuse.dense_rows import DenseRows, assemble, compute
from ucm.reuse.options import BlendOptions
from ucm.testing.blend_engines import (
    BLOCK_TOKENS,
    FULL,
    GREEDY,
    NONE,
    SINK,
    ask,
    finish,
    new_engine,
    prompt_of,
    text_of,
    tokens_of,
)
from ucm.testing.fake_hook import DictHook

A, C = text_of(1, 16), text_of(3, 12)


def test_rows_of_exact_chunks_are_not_counted_as_recomputed(model: LlamaModel) -> None:
    engine = new_engine(model, FULL)
    result = ask(engine, prompt_of(engine, A, C, prefix=SINK))
    assert result.reuse is not None
    assert result.reuse.num_recomputed_tokens == pytest.approx(
        12 * (3 + model.projection_share) / 4
    )


def test_a_prefix_that_ends_inside_a_chunk_leaves_the_chunks_later_rows(model: LlamaModel) -> None:
    engine = new_engine(model)
    prompt = prompt_of(engine, A, C)
    ask(engine, list(prompt.token_ids[:16]))
    engine.add_request(prompt, GREEDY)
    while not engine.step():
        pass
    (sequence,) = engine._runner.running
    assert (sequence.num_local_tokens, sequence.approximate_from) == (16, 16)
    rows, plan = assemble(model, model.config.rope, prompt)
    exact = DenseRows(torch.zeros_like(rows.kv_L2GTD), 16)
    compute(model, exact, plan.token_ids[:16], 0)
    rows.kv_L2GTD[:, :, :, :16] = exact.kv_L2GTD[:, :, :, :16]
    for layer in range(model.num_layers):
        there = torch.empty_like(rows.read(layer))
        gather_rows(engine.pool.tensor[layer], sequence.block_ids, range(plan.stop), there)
        torch.testing.assert_close(there, rows.read(layer), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("options", [NONE, BlendOptions(budget=0.5)])
def test_what_a_blend_computes_in_front_of_chunks_is_stored_exact(
    model: LlamaModel, options: BlendOptions
) -> None:
    """Passes of 3 tokens leave the prefix's last rows, two of a full block, to the blend."""
    hook = DictHook()
    scheduler = SchedulerOptions(prefill_chunk_tokens=3)
    engine = new_engine(model, options, hook=hook, scheduler=scheduler)
    prompt = prompt_of(engine, A, C, prefix=(*SINK, 40, 41, 42, 43))
    ask(engine, prompt)
    hook.settle()
    keys = hook._keys(prompt.token_ids)
    assert [key in hook.blocks for key in keys[:3]] == [True, True, False]
    exact = DenseRows(torch.zeros(model.num_layers, 2, *engine.pool.tensor.shape[3:4], 8, 16), 8)
    compute(model, exact, prompt.token_ids[:8], 0)
    stored = torch.stack([hook.blocks[key] for key in keys[:2]], dim=3).flatten(3, 4)
    torch.testing.assert_close(stored, exact.kv_L2GTD, atol=2e-5, rtol=2e-5)


def test_no_token_is_counted_twice_after_a_preemption(model: LlamaModel) -> None:
    """At first a prefix covers the chunks; when the request comes back they stand in for it."""
    engine = new_engine(model)
    prompt = prompt_of(engine, A, C)
    ask(engine, list(prompt.token_ids[:36]))
    request_id = engine.add_request(prompt, GREEDY)
    while not engine.step():
        pass
    runner = engine._runner
    runner._preempt(runner.running[0])
    engine.reset_cache()
    (result,) = finish(engine, request_id)
    timings = result.timings
    assert (timings.num_local_tokens, timings.num_preemptions) == (36, 1)
    assert result.reuse is not None
    assert result.reuse.num_chunk_tokens == 28
    assert timings.num_computed_tokens == 0
    assert timings.num_reused_tokens == len(prompt) - 36


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
