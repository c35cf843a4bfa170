"""Engines that reuse chunks, over the tiny model: how tests make, ask and check them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ucm.clock import Clock
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.hook import KvHook
from ucm.engine.model import LlamaModel
from ucm.engine.request import RequestResult
from ucm.engine.sampling import SamplingParams
from ucm.engine.scheduler import SchedulerOptions
from ucm.reuse.blending import blend
from ucm.reuse.dense_rows import DenseRows, assemble, compute, run_to_end
from ucm.reuse.options import BlendOptions, RecomputePolicy, ReuseOptions
from ucm.reuse.segments import Chunk, SegmentedPrompt, Text

BLOCK_TOKENS = 4
SINK = (5, 6, 7, 8, 9)
PREFIX = (*SINK, 40, 41)
QUERY = (60, 61, 62, 63, 64)
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
NONE = BlendOptions(policy=RecomputePolicy.NONE)
FULL = BlendOptions(policy=RecomputePolicy.FULL)
MAX_STEPS = 3000


def text_of(seed: int, count: int) -> tuple[int, ...]:
    """Tokens of a text that is like no other."""
    return tuple(3 + (seed * 31 + i * i + 7 * i) % 90 for i in range(count))


def new_engine(
    model: LlamaModel,
    blend_options: BlendOptions | None = NONE,
    *,
    hook: KvHook | None = None,
    clock: Clock | None = None,
    **settings: object,
) -> Engine:
    """An engine of small blocks that reuses chunks; one that does not for `blend_options` None."""
    reuse = None
    if blend_options is not None:
        reuse = ReuseOptions(sink_tokens=SINK, blend=blend_options)
    chosen: dict[str, object] = {
        "num_blocks": 128,
        "reuse": reuse,
        "scheduler": SchedulerOptions(prefill_chunk_tokens=16),
        **settings,
    }
    options = EngineOptions(block_tokens=BLOCK_TOKENS, **chosen)  # type: ignore[arg-type]
    return Engine(model, None, options, hook, clock)


def prompt_of(
    engine: Engine,
    *contents: Sequence[int],
    between: Sequence[int] = (),
    prefix: Sequence[int] = PREFIX,
    query: Sequence[int] = QUERY,
) -> SegmentedPrompt:
    """A prompt of chunks, with text behind the first of them, if any."""
    segments: list[Text | Chunk] = [Text(tuple(prefix))]
    for number, tokens in enumerate(contents):
        if between and number == 1:
            segments.append(Text(tuple(between)))
        segments.append(engine.chunk(tokens))
    return SegmentedPrompt((*segments, Text(tuple(query))))


def finish(engine: Engine, *request_ids: str) -> list[RequestResult]:
    """Step until requests have ended, checking the engine at every step."""
    results: dict[str, RequestResult] = {}
    for _ in range(MAX_STEPS):
        events = engine.step()
        assert engine.check_integrity() == []
        results.update({event.request_id: event.result for event in events if event.result})
        if results.keys() >= set(request_ids):
            return [results[request_id] for request_id in request_ids]
    raise AssertionError("a request does not end")


def ask(
    engine: Engine,
    prompt: SegmentedPrompt | Sequence[int],
    params: SamplingParams = GREEDY,
) -> RequestResult:
    """Serve one request."""
    return finish(engine, engine.add_request(prompt, params))[0]


def tokens_of(result: RequestResult) -> list[tuple[int, ...]]:
    """What its samples came to."""
    return [output.token_ids for output in result.outputs]


def blended_tokens(
    model: LlamaModel, prompt: SegmentedPrompt, options: BlendOptions = NONE
) -> tuple[int, ...]:
    """What reuse must give under greedy sampling, computed without an engine."""
    rows, plan = assemble(model, model.config.rope, prompt)
    run_to_end(blend(model, rows, plan, options))
    tokens = list(prompt.token_ids)
    grown = torch.zeros(*rows.kv_L2GTD.shape[:3], len(tokens) + GREEDY.max_tokens, 16)
    grown[:, :, :, : len(tokens)] = rows.kv_L2GTD
    grown_rows, start = DenseRows(grown, plan.stop), plan.stop
    for _ in range(GREEDY.max_tokens):
        hidden = compute(model, grown_rows, tokens, start)
        start = len(tokens)
        tokens.append(int(model.logits(hidden[-1:]).argmax()))
    return tuple(tokens[len(prompt.token_ids) :])
