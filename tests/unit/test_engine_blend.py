"""An engine that reuses chunks at any position, on a real tiny decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import pytest
import torch

import ucm.engine.blend_desk
from ucm.engine.blend_span import span_of
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.model import LlamaModel
from ucm.engine.reuse_report import FallbackReason
from ucm.engine.sampling import SamplingParams
from ucm.engine.scheduler import SchedulerOptions
from ucm.errors import ConfigError, InvalidArgumentError
from ucm.kernels.block_scores import Budget
from ucm.reuse.blending import blend
from ucm.reuse.budget import BlendWork
from ucm.reuse.dense_rows import encode_chunk
from ucm.reuse.options import BlendOptions, ReuseOptions, ReuseTarget
from ucm.reuse.protocols import BlendOutcome, BlendPlan, BlendStep, KvRows, LayerwiseModel
from ucm.reuse.segments import Chunk, SegmentedPrompt, Text
from ucm.sparse.offload import OffloadOptions
from ucm.sparse.options import SparseOptions
from ucm.sparse.slab_source import HostSlabSource
from ucm.testing.blend_engines import (
    BLOCK_TOKENS,
    FULL,
    GREEDY,
    NONE,
    PREFIX,
    SINK,
    ask,
    blended_tokens,
    finish,
    new_engine,
    prompt_of,
    text_of,
    tokens_of,
)
from ucm.testing.fake_model import FakeModel

A, B, C = text_of(1, 16), text_of(2, 22), text_of(3, 12)
BETWEEN = (33, 34, 35)


def pool_rows(engine: Engine, chunk: Chunk) -> torch.Tensor:
    """[layers, 2, heads, rows, head size] of a chunk's original in the pool."""
    blends = engine._runner.blends
    assert blends is not None
    links = blends._shelf._links(chunk.token_ids[: chunk.num_cached_tokens])
    found = engine.pool.blocks.find(links)
    assert len(found) == chunk.num_blocks
    return engine.pool.tensor[:, found].permute(0, 2, 3, 1, 4, 5).flatten(3, 4)


@pytest.mark.parametrize("options", [NONE, BlendOptions(budget=0.3, slice_tokens=8), FULL])
def test_an_engine_gives_what_blending_gives(model: LlamaModel, options: BlendOptions) -> None:
    engine = new_engine(model, options)
    prompt = prompt_of(engine, A, B, C, between=BETWEEN)
    result = ask(engine, prompt)
    assert tokens_of(result) == [blended_tokens(model, prompt, options)]
    report = result.reuse
    assert report is not None
    assert report.fallback is None
    assert (report.num_chunk_tokens, report.num_fresh_tokens) == (16 + 20 + 12, 3 + 2)
    assert (report.num_encoded_tokens, report.num_found_tokens) == (48, 0)
    assert result.timings.num_reused_tokens == 48
    assert result.timings.num_computed_tokens == len(prompt) - 48


def test_the_second_request_finds_the_chunks_in_another_order(model: LlamaModel) -> None:
    engine = new_engine(model)
    ask(engine, prompt_of(engine, A, B, C))
    second = prompt_of(engine, C, A, prefix=(*PREFIX, 50))
    result = ask(engine, second)
    assert tokens_of(result) == [blended_tokens(model, second)]
    assert result.reuse is not None
    assert (result.reuse.num_found_tokens, result.reuse.num_encoded_tokens) == (28, 0)
    assert engine.stats.reuse.blended == 2
    assert engine.stats.reuse.encoded_tokens == 48


def test_full_recompute_is_a_full_prefill(model: LlamaModel) -> None:
    engine, plain = new_engine(model, FULL), new_engine(model, None)
    prompt = prompt_of(engine, A, B, C, between=BETWEEN)
    assert tokens_of(ask(engine, prompt)) == tokens_of(ask(plain, list(prompt.token_ids)))


def test_originals_are_what_encoding_gives_and_stay_so(model: LlamaModel) -> None:
    engine = new_engine(model, BlendOptions(budget=0.5))
    prompt = prompt_of(engine, A, B)
    ask(engine, prompt)
    chunks = [span.chunk for span in prompt.spans]
    before = [pool_rows(engine, chunk).clone() for chunk in chunks]
    for chunk, rows in zip(chunks, before, strict=True):
        torch.testing.assert_close(rows, encode_chunk(model, chunk), atol=2e-5, rtol=2e-5)
    ask(engine, prompt_of(engine, B, A, prefix=(*PREFIX, 1, 2)))
    for chunk, rows in zip(chunks, before, strict=True):
        assert torch.equal(rows, pool_rows(engine, chunk))


@pytest.mark.parametrize("options", [NONE, FULL])
def test_blended_rows_are_found_by_nobody(model: LlamaModel, options: BlendOptions) -> None:
    engine, plain = new_engine(model, options), new_engine(model, None)
    prompt = prompt_of(engine, A, B, prefix=text_of(9, 13))
    ask(engine, prompt)
    result = ask(engine, list(prompt.token_ids))
    assert result.timings.num_local_tokens == 12  # the prefix's full blocks
    assert tokens_of(result) == tokens_of(ask(plain, list(prompt.token_ids)))


def test_a_prompt_without_chunks_is_served_as_ever(model: LlamaModel) -> None:
    engine, plain = new_engine(model), new_engine(model, None)
    prompt = list(text_of(4, 30))
    assert tokens_of(ask(engine, prompt)) == tokens_of(ask(plain, prompt))
    segmented = SegmentedPrompt((Text(tuple(prompt)),))
    result = ask(engine, segmented)
    assert tokens_of(result) == tokens_of(ask(plain, prompt))
    assert result.reuse is None
    assert engine.stats.reuse.requests == 0
    assert plain._runner.blends is None


def test_a_chunk_where_it_was_encoded_is_exact(model: LlamaModel) -> None:
    engine, plain = new_engine(model), new_engine(model, None)
    prompt = prompt_of(engine, A, prefix=SINK)
    result = ask(engine, prompt)
    assert result.reuse is not None
    assert result.reuse.num_exact_tokens == 16
    assert result.reuse.num_recomputed_tokens == 0
    assert tokens_of(result) == tokens_of(ask(plain, list(prompt.token_ids)))


def test_a_chunk_that_stands_twice_is_kept_once(model: LlamaModel) -> None:
    engine = new_engine(model)
    prompt = prompt_of(engine, A, B, A)
    result = ask(engine, prompt)
    assert tokens_of(result) == [blended_tokens(model, prompt)]
    assert result.reuse is not None
    assert result.reuse.num_encoded_tokens == 36
    assert result.reuse.num_chunk_tokens == 52


def test_a_chunk_of_less_than_a_block_is_text(model: LlamaModel) -> None:
    engine, plain = new_engine(model), new_engine(model, None)
    prompt = prompt_of(engine, A[:3])
    result = ask(engine, prompt)
    assert result.reuse is None
    assert tokens_of(result) == tokens_of(ask(plain, list(prompt.token_ids)))


def test_exact_prefixes_go_before_chunks(model: LlamaModel) -> None:
    engine = new_engine(model)
    prompt = prompt_of(engine, A, B)
    ask(engine, list(prompt.token_ids)[: len(PREFIX) + 16 + 9])  # exact as far as that
    result = ask(engine, prompt)
    assert result.timings.num_local_tokens == 32
    assert result.reuse is not None
    assert result.reuse.num_chunk_tokens == len(PREFIX) + 16 + 20 - 32
    again = ask(engine, list(prompt.token_ids))
    assert again.timings.num_local_tokens == 32


def test_a_prompt_that_is_cached_to_its_end_needs_no_chunk(model: LlamaModel) -> None:
    engine, plain = new_engine(model), new_engine(model, None)
    prompt = prompt_of(engine, A)
    expected = tokens_of(ask(plain, list(prompt.token_ids)))
    ask(engine, list(prompt.token_ids))
    result = ask(engine, prompt)
    assert tokens_of(result) == expected
    assert result.reuse is None or result.reuse.num_chunk_tokens <= BLOCK_TOKENS


def test_others_are_not_disturbed(model: LlamaModel) -> None:
    engine, plain = new_engine(model, BlendOptions(budget=0.3)), new_engine(model, None)
    texts = [list(text_of(20 + i, 15 + i)) for i in range(3)]
    expected = [tokens_of(ask(plain, text)) for text in texts]
    ids = [engine.add_request(texts[0], GREEDY)]
    for _ in range(3):
        engine.step()
    ids.append(engine.add_request(prompt_of(engine, A, B, C), GREEDY))
    ids.append(engine.add_request(texts[1], GREEDY))
    ids.append(engine.add_request(prompt_of(engine, C, B), GREEDY))
    ids.append(engine.add_request(texts[2], GREEDY))
    results = finish(engine, *ids)
    assert [tokens_of(results[i]) for i in (0, 2, 4)] == expected
    assert tokens_of(results[3]) == [
        blended_tokens(model, prompt_of(engine, C, B), BlendOptions(budget=0.3))
    ]


def test_samples_of_one_prompt_share_its_blend(model: LlamaModel) -> None:
    engine = new_engine(model)
    prompt = prompt_of(engine, A, B)
    params = SamplingParams(max_tokens=6, ignore_eos=True, n=3)
    assert tokens_of(ask(engine, prompt, params)) == [blended_tokens(model, prompt)] * 3
    assert engine.stats.reuse.blended == 1


def test_a_blend_is_repeated_after_a_preemption(model: LlamaModel) -> None:
    """Decodes of older requests take the blocks of the younger one, which has its answer begun."""
    params = SamplingParams(max_tokens=70, ignore_eos=True)
    short = SamplingParams(max_tokens=40, ignore_eos=True)
    engine = new_engine(model, num_blocks=44)
    plain = new_engine(model, None, num_blocks=200)
    texts = [list(text_of(20 + i, 9)) for i in range(2)]
    prompt = prompt_of(engine, A, B)
    ids = [engine.add_request(text, params) for text in texts]
    ids.append(engine.add_request(prompt, short))
    results = finish(engine, *ids)
    assert results[2].timings.num_preemptions > 0
    assert [tokens_of(result) for result in results[:2]] == [
        tokens_of(ask(plain, text, params)) for text in texts
    ]
    roomy = new_engine(model, num_blocks=200)
    assert tokens_of(results[2]) == tokens_of(ask(roomy, prompt_of(roomy, A, B), short))


@pytest.mark.parametrize("num_steps", range(12))
def test_a_request_may_go_at_any_time(model: LlamaModel, num_steps: int) -> None:
    options = BlendOptions(budget=0.4, slice_tokens=4)
    scheduler = SchedulerOptions(prefill_chunk_tokens=4, max_step_tokens=16)
    engine = new_engine(model, options, scheduler=scheduler)
    gone = engine.add_request(prompt_of(engine, A, B), GREEDY)
    stays = engine.add_request(prompt_of(engine, B, C), GREEDY)
    for _ in range(num_steps):
        engine.step()
    assert engine.abort(gone) is not None
    assert engine.check_integrity() == []
    prompt = prompt_of(engine, B, C)
    assert tokens_of(finish(engine, stays)[0]) == [blended_tokens(model, prompt, options)]
    engine.close()
    assert engine.pool.blocks.num_available == engine.options.num_blocks
    assert engine.check_integrity() == []


def test_several_blends_at_once_encode_a_chunk_once(model: LlamaModel) -> None:
    engine = new_engine(model, num_blocks=256)
    prompts = [prompt_of(engine, *order) for order in ((A, B), (B, A), (A, C, B))]
    results = finish(engine, *(engine.add_request(prompt, GREEDY) for prompt in prompts))
    for prompt, result in zip(prompts, results, strict=True):
        assert tokens_of(result) == [blended_tokens(model, prompt)]
    assert engine.stats.reuse.encoded_tokens == 48


@pytest.mark.parametrize("num_blocks", [14, 17, 20, 22, 24])
def test_a_small_pool_serves_without_reuse_or_with(model: LlamaModel, num_blocks: int) -> None:
    engine, plain = new_engine(model, FULL, num_blocks=num_blocks), new_engine(model, None)
    prompt = prompt_of(engine, A, B)
    result = ask(engine, prompt)
    assert tokens_of(result) == tokens_of(ask(plain, list(prompt.token_ids)))
    assert result.reuse is not None
    fell_back = result.reuse.fallback is FallbackReason.NO_ROOM
    assert fell_back is (num_blocks < 27)
    assert engine.stats.reuse.fallbacks[FallbackReason.NO_ROOM] == int(fell_back)


def test_blends_that_block_each_other_give_in(model: LlamaModel) -> None:
    """Each fits alone; together they leave no block to compute a chunk in."""
    engine, plain = new_engine(model, FULL, num_blocks=40), new_engine(model, None)
    prompts = [prompt_of(engine, text_of(30 + i, 16), text_of(40 + i, 16)) for i in range(6)]
    results = finish(engine, *(engine.add_request(prompt, GREEDY) for prompt in prompts))
    for prompt, result in zip(prompts, results, strict=True):
        assert tokens_of(result) == tokens_of(ask(plain, list(prompt.token_ids)))


def test_a_long_sequence_is_prefilled(model: LlamaModel) -> None:
    source = HostSlabSource(64 << 20)
    share = OffloadOptions(resident_blocks=8, wave_blocks=3, num_waves=2)
    reuse = ReuseOptions(sink_tokens=SINK, blend=NONE)
    options = EngineOptions(
        num_blocks=64,
        block_tokens=BLOCK_TOKENS,
        offload=share,
        reuse=reuse,
        scheduler=SchedulerOptions(max_step_tokens=40, prefill_chunk_tokens=32),
    )
    engine, plain = Engine(model, None, options, source=source), new_engine(model, None)
    prompt = prompt_of(engine, A, B)
    result = ask(engine, prompt)
    assert result.reuse is not None
    assert result.reuse.fallback is FallbackReason.OFFLOADED
    assert tokens_of(result) == tokens_of(ask(plain, list(prompt.token_ids)))
    engine.close()
    source.close()


def test_sparse_decodes_go_on_behind_a_blend(model: LlamaModel) -> None:
    sparse = SparseOptions(
        min_context_tokens=16, budget=Budget(ratio=0.2), recent_blocks=1, stride=1
    )
    engine = new_engine(model, NONE, sparse=sparse)
    prompt = prompt_of(engine, A, B, C)
    result = ask(engine, prompt, SamplingParams(max_tokens=20, ignore_eos=True))
    assert len(result.outputs[0].token_ids) == 20
    assert result.reuse is not None
    assert result.reuse.fallback is None
    stats = engine.sparse_stats
    assert stats is not None
    assert stats.sparse_steps > 0


# The quality guard


def test_drift_above_the_limit_means_full_compute(model: LlamaModel) -> None:
    options = BlendOptions(budget=0.4, guard_tokens=2, guard_limit=0.0)
    engine, plain = new_engine(model, options), new_engine(model, None)
    prompt = prompt_of(engine, A, B)
    result = ask(engine, prompt)
    assert result.reuse is not None
    assert result.reuse.fallback is FallbackReason.DRIFTED
    assert tokens_of(result) == tokens_of(ask(plain, list(prompt.token_ids)))
    assert engine.stats.reuse.fallbacks == {FallbackReason.DRIFTED: 1}
    assert result.reuse.drift is not None
    assert result.reuse.num_saved_tokens <= 0.0


def test_one_drifted_chunk_is_computed_in_full(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three: its rows are as if it were text, the others' stay."""
    plans: list[BlendPlan] = []

    def drifting(
        model: LayerwiseModel, rows: KvRows, plan: BlendPlan, options: BlendOptions
    ) -> Generator[BlendStep, None, BlendOutcome]:
        plans.append(plan)
        outcome = yield from blend(model, rows, plan, options)
        return dataclasses.replace(outcome, drifted=(1,) if len(plans) == 1 else ())

    monkeypatch.setattr(ucm.engine.blend_desk, "blend", drifting)
    engine = new_engine(model)
    prompt = prompt_of(engine, A, B, C)
    result = ask(engine, prompt)
    as_text = SegmentedPrompt(
        tuple(Text(part.token_ids) if part.token_ids == B else part for part in prompt.segments)
    )
    assert tokens_of(result) == [blended_tokens(model, as_text)]
    assert result.reuse is not None
    assert result.reuse.num_guarded == 1
    assert plans[1].start == len(PREFIX) + len(A)
    every_layer = (3 + model.projection_share) / 4
    assert result.reuse.cost == pytest.approx(20 / 48 * every_layer)
    assert result.reuse.num_recomputed_tokens == pytest.approx(20 * every_layer)


# What fails


class Failing:
    """Delegates to a model whose layers fail at will."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self.calls_left = 10**9

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def project(self, layer: int, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise MemoryError
        return self._model.project(layer, *args)


def test_a_failure_of_the_model_leaves_the_step_to_be_repeated(model: LlamaModel) -> None:
    options = BlendOptions(budget=0.5)
    failing = Failing(model)
    engine = new_engine(failing, options)  # type: ignore[arg-type]
    prompt = prompt_of(engine, A, B)
    request_id = engine.add_request(prompt, GREEDY)
    failing.calls_left = 6
    with pytest.raises(MemoryError):
        finish(engine, request_id)
    assert engine.check_integrity() == []
    (result,) = finish(engine, request_id)
    assert tokens_of(result) == [blended_tokens(model, prompt, options)]


# What is refused


def test_chunks_of_another_sink_are_refused(model: LlamaModel) -> None:
    engine = new_engine(model)
    other = Engine(
        model, None, EngineOptions(block_tokens=4, reuse=ReuseOptions(sink_tokens=(1, 2, 3, 4)))
    )
    with pytest.raises(InvalidArgumentError, match="sink prefix"):
        engine.add_request(prompt_of(other, A), GREEDY)
    assert not engine.has_work


def test_chunks_of_another_model_are_refused(model: LlamaModel) -> None:
    engine = new_engine(model)
    reuse = ReuseOptions(sink_tokens=SINK, model_digest="another")
    other = Engine(model, None, EngineOptions(block_tokens=BLOCK_TOKENS, reuse=reuse))
    with pytest.raises(InvalidArgumentError, match="another model"):
        engine.add_request(prompt_of(other, A), GREEDY)


def test_an_engine_without_reuse_refuses_chunks(model: LlamaModel) -> None:
    engine, plain = new_engine(model), new_engine(model, None)
    with pytest.raises(ConfigError, match=r"EngineOptions\.reuse"):
        plain.add_request(prompt_of(engine, A), GREEDY)
    with pytest.raises(ConfigError, match=r"EngineOptions\.reuse"):
        plain.chunk(A)
    with pytest.raises(InvalidArgumentError, match="token ids"):
        engine.chunk((1, 10**6))


def test_a_model_without_rope_is_refused() -> None:
    options = EngineOptions(reuse=ReuseOptions(sink_tokens=SINK))
    with pytest.raises(ConfigError, match="RoPE"):
        Engine(FakeModel(), None, options)


def test_a_sink_prefix_outside_the_vocabulary_is_refused(model: LlamaModel) -> None:
    reuse = ReuseOptions(sink_tokens=(1, 2, 3, model.config.vocab_size))
    with pytest.raises(InvalidArgumentError, match="vocabulary"):
        Engine(model, None, EngineOptions(block_tokens=BLOCK_TOKENS, reuse=reuse))


def test_options_of_another_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="ReuseOptions"):
        EngineOptions(reuse="progressive")  # type: ignore[arg-type]


def test_spans_tell_what_they_need(model: LlamaModel) -> None:
    engine = new_engine(model)
    span = span_of(prompt_of(engine, A, B, A), BLOCK_TOKENS, SINK)
    assert span is not None
    assert (span.start, span.stop) == (len(PREFIX), len(PREFIX) + 16 + 22 + 16)
    assert span.num_extra_blocks == -(-(16 + 20 + len(SINK) + 20) // BLOCK_TOKENS)


# Budgets


def test_a_budget_is_chosen_for_the_target(model: LlamaModel) -> None:
    """Nothing to spend, or nothing to gain: the smallest; the other way round the largest."""
    targets = (
        (ReuseTarget.LATENCY, {"max_blend_s": 1e-9}, 0.1),
        (ReuseTarget.LATENCY, {"max_blend_s": 1e6}, 0.6),
        (ReuseTarget.QUALITY, {"max_drift": 1e9}, 0.1),
        (ReuseTarget.QUALITY, {"max_drift": 1e-9}, 0.6),
    )
    for target, aim, budget in targets:
        reuse = ReuseOptions(
            sink_tokens=SINK,
            target=target,
            blend=BlendOptions(guard_limit=1e9),
            min_budget=0.1,
            max_budget=0.6,
            **aim,  # type: ignore[arg-type]
        )
        options = EngineOptions(num_blocks=128, block_tokens=BLOCK_TOKENS, reuse=reuse)
        engine = Engine(model, None, options)
        result = ask(engine, prompt_of(engine, A, B, C))
        assert result.reuse is not None
        assert result.reuse.budget == pytest.approx(budget)
        assert result.reuse.cost <= budget + 1e-6


def test_what_a_blend_took_is_learnt(model: LlamaModel) -> None:
    engine = new_engine(model, BlendOptions(budget=0.4, guard_tokens=1, guard_limit=1e9))
    blends = engine._runner.blends
    assert blends is not None
    budgets = blends.parts.budgets
    work = BlendWork(num_layers=4, num_rows=48, num_fresh=2)
    believed_s = budgets.expected_seconds(work, 0.4)
    for number in range(3):
        ask(engine, prompt_of(engine, A, B, C, prefix=text_of(30 + number, 9)))
    assert 0 < budgets.expected_seconds(work, 0.4) != believed_s
    assert sum(budgets._num_own) == 3, "what was left of the drift, as the probes saw it"
