"""Chunks behind a sink prefix of many blocks, which no prompt begins with."""

from __future__ import annotations

from ucm.engine.model import LlamaModel
from ucm.engine.scheduler import SchedulerOptions
from ucm.reuse.options import ReuseOptions
from ucm.testing.blend_engines import (
    BLOCK_TOKENS,
    NONE,
    SINK,
    ask,
    blended_tokens,
    new_engine,
    prompt_of,
    text_of,
    tokens_of,
)

A, B, C = text_of(1, 16), text_of(2, 22), text_of(3, 12)


def test_the_context_of_chunks_is_computed_once(model: LlamaModel) -> None:
    sink = (*SINK, *text_of(7, 21))
    engine = new_engine(
        model,
        num_blocks=96,
        reuse=ReuseOptions(sink_tokens=sink, blend=NONE),
        scheduler=SchedulerOptions(prefill_chunk_tokens=8),
    )
    num_shared = len(sink) // BLOCK_TOKENS * BLOCK_TOKENS
    ask(engine, prompt_of(engine, A, C))
    before, prompt = engine.stats.computed_tokens, prompt_of(engine, B)
    result = ask(engine, prompt)
    num_encoded = engine.stats.computed_tokens - before - result.timings.num_computed_tokens
    assert 0 < num_encoded <= len(sink) - num_shared + prompt.spans[0].chunk.num_cached_tokens
    assert tokens_of(result) == [blended_tokens(model, prompt)]
    # A prompt that begins with it finds them too, and is answered as if it had computed them.
    plain, result = new_engine(model, None), ask(engine, [*sink, 5, 6])
    assert result.timings.num_local_tokens == num_shared
    assert tokens_of(result) == tokens_of(ask(plain, [*sink, 5, 6]))
