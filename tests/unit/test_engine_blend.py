"""An engine that reuses chunks at any position, on a real tiny decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.loading import load_model
from ucm.engine.model import LlamaModel
from ucm.engine.request import RequestResult
from ucm.engine.sampling import SamplingParams
from ucm.engine.scheduler import SchedulerOptions
from ucm.reuse.blending import blend
from ucm.reuse.dense_rows import assemble, compute, run_to_end
from ucm.reuse.options import BlendOptions, RecomputePolicy, ReuseOptions
from ucm.reuse.segments import Chunk, SegmentedPrompt, Text
from ucm.testing.models import write_tiny_model

BLOCK_TOKENS = 4
SINK = (5, 6, 7, 8, 9)
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
NONE = BlendOptions(policy=RecomputePolicy.NONE)
FULL = BlendOptions(policy=RecomputePolicy.FULL)
PREFIX = (*SINK, 40, 41)
QUERY = (60, 61, 62, 63, 64)


def text_of(seed: int, count: int) -> tuple[int, ...]:
    return tuple(3 + (seed * 31 + i * i + 7 * i) % 90 for i in range(count))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), num_hidden_layers=4)
    return load_model(folder, torch.float32).model


MakeEngine = Callable[..., Engine]


@pytest.fixture
def new_engine(model: LlamaModel) -> MakeEngine:
    def make(blend_options: BlendOptions | None = NONE, **settings: object) -> Engine:
        reuse = None
        if blend_options is not None:
            reuse = ReuseOptions(sink_tokens=SINK, blend=blend_options)
        scheduler = settings.pop("scheduler", SchedulerOptions(prefill_chunk_tokens=16))
        chosen = {"num_blocks": 128, "reuse": reuse, "scheduler": scheduler, **settings}
        hook, source = chosen.pop("hook", None), chosen.pop("source", None)
        options = EngineOptions(block_tokens=BLOCK_TOKENS, **chosen)  # type: ignore[arg-type]
        return Engine(model, None, options, hook, source=source)  # type: ignore[arg-type]

    return make


def prompt_of(
    engine: Engine, *chunks: Sequence[int], between: Sequence[int] = ()
) -> SegmentedPrompt:
    segments: list[Text | Chunk] = [Text(PREFIX)]
    for number, tokens in enumerate(chunks):
        if between and number == 1:
            segments.append(Text(tuple(between)))
        segments.append(engine.chunk(tokens))
    return SegmentedPrompt((*segments, Text(QUERY)))


def run(
    engine: Engine, prompt: SegmentedPrompt | Sequence[int], params: SamplingParams = GREEDY
) -> RequestResult:
    request_id = engine.add_request(prompt, params)
    for _ in range(2000):
        for event in engine.step():
            if event.result is not None and event.request_id == request_id:
                assert engine.check_integrity() == []
                return event.result
        assert engine.check_integrity() == []
    raise AssertionError("the request does not end")


def dense_tokens(
    model: LlamaModel, prompt: SegmentedPrompt, options: BlendOptions
) -> tuple[int, ...]:
    """What reuse must give, computed without an engine."""
    rows, plan = assemble(model, model.config.rope, prompt)
    run_to_end(blend(model, rows, plan, options))
    tokens = list(prompt.token_ids)
    grown = torch.zeros(*rows.kv_L2GTD.shape[:3], len(tokens) + GREEDY.max_tokens, 16)
    grown[:, :, :, : len(tokens)] = rows.kv_L2GTD
    rows.kv_L2GTD = grown
    start = plan.stop
    for _ in range(GREEDY.max_tokens):
        hidden = compute(model, rows, tokens, start)
        start = len(tokens)
        tokens.append(int(model.logits(hidden[-1:]).argmax()))
    return tuple(tokens[len(prompt.token_ids) :])


A, B, C = text_of(1, 16), text_of(2, 22), text_of(3, 12)


@pytest.mark.parametrize("options", [NONE, BlendOptions(budget=0.3, slice_tokens=8), FULL])
def test_engine_gives_what_blending_gives(
    model: LlamaModel, new_engine: MakeEngine, options: BlendOptions
) -> None:
    engine = new_engine(options)
    prompt = prompt_of(engine, A, B, C, between=(33, 34, 35))
    result = run(engine, prompt)
    assert result.outputs[0].token_ids == dense_tokens(model, prompt, options)
    assert result.reuse is not None
    assert result.reuse.fallback is None
    assert result.reuse.num_chunk_tokens == 16 + 20 + 12
    assert result.reuse.num_fresh_tokens == 3 + 2
    again = run(engine, prompt_of(engine, C, A))
    assert again.reuse is not None
    assert again.reuse.num_found_tokens == 28


def test_full_recompute_is_a_full_prefill(new_engine: MakeEngine) -> None:
    engine, plain = new_engine(FULL), new_engine(None)
    prompt = prompt_of(engine, A, B, C, between=(33, 34, 35))
    expected = run(plain, list(prompt.token_ids)).outputs
    assert run(engine, prompt).outputs == expected
