"""The engine over a model whose logits depend on every KV row that it reads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from ucm.clock import SimClock
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.model import ForwardItem
from ucm.engine.request import FinishReason, RequestResult, TokenEvent
from ucm.engine.sampling import SamplingParams
from ucm.engine.scheduler import SchedulerOptions
from ucm.errors import CapacityError, ConfigError, CorruptionError, InvalidArgumentError
from ucm.testing.fake_hook import DictHook
from ucm.testing.fake_model import FakeConfig, FakeModel, FakeTokenizer, reference_tokens

PROMPT = list(range(3, 21))  # 18 tokens: 4 full blocks of 4, and a half
MODEL = FakeModel()


def new_engine(
    *, num_blocks: int = 64, hook: DictHook | None = None, chunk: int = 8, **settings: Any
) -> Engine:
    scheduler = SchedulerOptions(
        max_sequences=settings.pop("max_sequences", 8),
        max_step_tokens=settings.pop("max_step_tokens", 16),
        prefill_chunk_tokens=chunk,
    )
    options = EngineOptions(
        num_blocks=num_blocks,
        block_tokens=4,
        scheduler=scheduler,
        **{key: settings.pop(key) for key in list(settings) if key in EngineOptions.__slots__},
    )
    return Engine(settings.pop("model", FakeModel()), FakeTokenizer(), options, hook, **settings)


def greedy(max_tokens: int = 6, **settings: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **settings)


def run_one(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> RequestResult:
    (result,) = engine.generate_all([prompt], params)
    assert engine.check_integrity() == []
    return result


def expect(prompt: Sequence[int], params: SamplingParams) -> list[tuple[int, ...]]:
    return [reference_tokens(MODEL, prompt, params, index) for index in range(params.n)]


def tokens_of(result: RequestResult) -> list[tuple[int, ...]]:
    return [output.token_ids for output in result.outputs]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 18])
def test_output_equals_the_reference(length: int) -> None:
    params = greedy(9)
    result = run_one(new_engine(), PROMPT[:length], params)
    assert tokens_of(result) == expect(PROMPT[:length], params)
    assert result.outputs[0].finish_reason is FinishReason.LENGTH
    assert result.prompt_token_ids == tuple(PROMPT[:length])


def test_a_repeated_prompt_comes_from_the_pool_and_always_computes_its_last_token() -> None:
    engine = new_engine()
    first = run_one(engine, PROMPT[:16], greedy())
    again = run_one(engine, PROMPT[:16], greedy())
    assert tokens_of(again) == tokens_of(first)
    assert first.timings.num_local_tokens == 0
    assert again.timings.num_local_tokens == 12, "a fully matched prompt recomputes a block"
    assert again.timings.num_computed_tokens == 4
    longer = run_one(engine, PROMPT, greedy())
    assert longer.timings.num_local_tokens == 16
    assert tokens_of(longer) == expect(PROMPT, greedy())


def test_decoded_blocks_are_shared_too() -> None:
    engine = new_engine()
    first = run_one(engine, PROMPT, greedy(9))
    follow_up = [*PROMPT, *first.outputs[0].token_ids, 5]
    result = run_one(engine, follow_up, greedy())
    assert result.timings.num_local_tokens == 24, "26 tokens have KV, 6 blocks are full"
    assert tokens_of(result) == expect(follow_up, greedy())


def test_reset_cache_empties_the_pool() -> None:
    engine = new_engine()
    run_one(engine, PROMPT, greedy())
    assert engine.reset_cache() == 5
    assert run_one(engine, PROMPT, greedy()).timings.num_local_tokens == 0


@pytest.mark.parametrize("length", [16, 18])
def test_parallel_samples_share_the_prompt_and_copy_on_write(length: int) -> None:
    engine = new_engine()
    params = greedy(9, temperature=0.8, seed=5, n=4)
    result = run_one(engine, PROMPT[:length], params)
    assert tokens_of(result) == expect(PROMPT[:length], params)
    assert len(set(tokens_of(result))) == 4
    assert engine.stats.computed_tokens == length + 4 * 8, "the prompt is computed once"
    assert engine.stats.copied_blocks == (3 if length == 18 else 0)


def test_preemption_recomputes_to_the_same_tokens() -> None:
    engine = new_engine(num_blocks=9)
    prompts = [PROMPT, PROMPT[::-1], PROMPT[2:9]]
    params = [greedy(14, temperature=0.7, seed=i) for i in range(3)]
    results = engine.generate_all(prompts, params)
    assert engine.stats.preemptions > 0
    for result, prompt, one in zip(results, prompts, params, strict=True):
        assert tokens_of(result) == expect(prompt, one)
    assert sum(result.timings.num_preemptions for result in results) == engine.stats.preemptions
    assert engine.check_integrity() == []


def test_samples_of_one_request_can_preempt_each_other() -> None:
    engine = new_engine(num_blocks=8)
    params = greedy(12, temperature=1.0, seed=3, n=3)
    result = run_one(engine, PROMPT, params)
    assert engine.stats.preemptions > 0
    assert tokens_of(result) == expect(PROMPT, params)


def test_a_pool_that_just_fits_is_enough() -> None:
    params = greedy(11)
    assert tokens_of(run_one(new_engine(num_blocks=7), PROMPT, params)) == expect(PROMPT, params)


def test_no_step_exceeds_its_budget() -> None:
    model = FakeModel()
    engine = new_engine(model=model, max_step_tokens=10, chunk=6)
    engine.generate_all([PROMPT, PROMPT[3:], PROMPT[::-1]], greedy())
    assert max(model.batch_sizes) <= 10


def test_stop_tokens_end_a_sample_without_text() -> None:
    engine = new_engine()
    (free,) = expect(PROMPT, greedy(8))
    stop = greedy(8, stop_token_ids=(free[3],))
    result = run_one(engine, PROMPT, stop)
    assert result.outputs[0].token_ids == free[: free.index(free[3]) + 1]
    assert result.outputs[0].finish_reason is FinishReason.STOP
    assert result.outputs[0].text == FakeTokenizer().decode(free[: free.index(free[3])])


def test_the_tokenizers_end_tokens_count_unless_ignored() -> None:
    (free,) = expect(PROMPT, greedy(8))
    tokenizer = FakeTokenizer(eos_ids=frozenset({free[2]}))
    engine = Engine(FakeModel(), tokenizer, EngineOptions(num_blocks=16, block_tokens=4))
    stopped = run_one(engine, PROMPT, SamplingParams(max_tokens=8))
    assert stopped.outputs[0].finish_reason is FinishReason.STOP
    assert run_one(engine, PROMPT, greedy(8)).outputs[0].token_ids == free


def test_generation_ends_at_the_models_last_position() -> None:
    model = FakeModel(FakeConfig(max_context_tokens=20))
    result = run_one(new_engine(model=model), PROMPT, greedy(100))
    assert len(result.outputs[0].token_ids) == 2
    assert result.outputs[0].finish_reason is FinishReason.LENGTH


def test_generate_streams_text_while_others_advance() -> None:
    engine = new_engine()
    one = engine.generate("hello there", greedy(5))
    two = engine.generate("general", greedy(7))
    events = [next(one), next(two), *two, *one]
    texts = {0: "", 1: ""}
    for event in events:
        texts[int(event.request_id[-1])] += event.text
    results = {event.request_id: event.result for event in events if event.result}
    assert len(results) == 2
    for request_id, result in results.items():
        assert result.outputs[0].text == texts[int(request_id[-1])]
    assert [event.finish_reason for event in events].count(FinishReason.LENGTH) == 2
    assert not engine.has_work


def test_closing_a_stream_aborts_its_request() -> None:
    hook = DictHook()
    engine = new_engine(hook=hook)
    stream = engine.generate(PROMPT, greedy(50, n=2, temperature=1.0))
    next(stream)
    assert engine.has_work
    stream.close()  # type: ignore[attr-defined]
    assert not engine.has_work
    assert engine.step() == []
    assert engine.pool.blocks.num_available == 64
    assert sorted(hook.finished) == ["request-0", "request-0#1"]
    assert engine.check_integrity() == []


def test_abort_returns_what_there_is() -> None:
    engine = new_engine()
    waiting = engine.add_request(PROMPT, greedy())
    assert engine.abort("unknown") is None
    result = engine.abort(waiting)
    assert result is not None
    assert 0.0 <= result.timings.total_s < 60.0
    assert result.outputs[0].finish_reason is FinishReason.ABORTED
    assert result.outputs[0].token_ids == ()
    running = engine.add_request(PROMPT, greedy(20))
    events: list[TokenEvent] = []
    while len(events) < 3:
        events += engine.step()
    result = engine.abort(running)
    assert result is not None
    assert result.outputs[0].token_ids == expect(PROMPT, greedy(20))[0][:3]
    engine.close()
    assert engine.check_integrity() == []


def test_timings_come_from_the_clock() -> None:
    clock = SimClock()

    class SlowModel(FakeModel):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            clock.advance_us(250_000)
            return FakeModel.forward(self, *args, **kwargs)

    engine = new_engine(model=SlowModel(), clock=clock)
    timings = run_one(engine, PROMPT, greedy(5)).timings
    assert timings.ttft_s == pytest.approx(0.75), "chunks of 8, 8 and 2"
    assert timings.tpot_s == pytest.approx(0.25)
    assert timings.total_s == pytest.approx(1.75)
    assert (timings.num_prompt_tokens, timings.num_computed_tokens) == (18, 18)


def test_an_error_of_the_model_leaves_the_step_repeatable() -> None:
    @dataclass(slots=True)
    class FlakyModel(FakeModel):
        failures: list[int] = field(default_factory=lambda: [2, 5])
        calls: int = 0

        def forward(self, items: Sequence[ForwardItem], *args: Any, **kwargs: Any) -> torch.Tensor:
            self.calls += 1
            logits = FakeModel.forward(self, items, *args, **kwargs)
            return torch.full_like(logits, torch.nan) if self.calls in self.failures else logits

    engine = new_engine(model=FlakyModel())
    engine.add_request(PROMPT, params := greedy(6, n=2, temperature=1.0))
    num_errors = 0
    results: list[RequestResult] = []
    while engine.has_work:
        try:
            results += [event.result for event in engine.step() if event.result]
        except CorruptionError:
            num_errors += 1
        assert engine.check_integrity() == []
    assert num_errors == 1, "the NaN of a prompt's inner chunk is never looked at"
    assert tokens_of(results[0]) == expect(PROMPT, params)


# Bad input


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", greedy(), "prompt is empty"),
        ([], greedy(), "prompt is empty"),
        ([1, -1], greedy(), "token ids must be 0 to 96"),
        ([97], greedy(), "token ids must be 0 to 96"),
        ([1] * 60, greedy(), "the model takes 60"),
        ([1] * 50, greedy(), "14 KV blocks, the pool has 8"),
        ([1], greedy(40), "the pool has 8"),
        ([1], greedy(n=9), "n is 9, the batch holds 8"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(
    prompt: str | list[int], params: SamplingParams, message: str
) -> None:
    engine = new_engine(model=FakeModel(FakeConfig(max_context_tokens=60)), num_blocks=8)
    with pytest.raises(InvalidArgumentError, match=message):
        engine.generate(prompt, params)
    with pytest.raises(InvalidArgumentError, match=message):
        engine.generate_all([PROMPT, prompt], [greedy(1), params])
    assert not engine.has_work, "none of a batch is left behind"


def test_other_bad_calls() -> None:
    engine = new_engine()
    engine.add_request([1], request_id="same")
    with pytest.raises(InvalidArgumentError, match="'same' is in use"):
        engine.add_request([1], request_id="same")
    with pytest.raises(InvalidArgumentError, match="2 prompts, 1 parameters"):
        engine.generate_all([[1], [2]], [greedy()])
    with pytest.raises(InvalidArgumentError, match="no tokenizer"):
        Engine(FakeModel(), None, EngineOptions(num_blocks=1)).add_request("text")
    with pytest.raises(ConfigError, match="num_blocks is 0"):
        EngineOptions(num_blocks=0)
    with pytest.raises(ConfigError, match="max_pinned_share is 0"):
        EngineOptions(max_pinned_share=0.0)
    with pytest.raises(ConfigError, match="float64"):
        Engine(FakeModel(dtype=torch.float64), None)


# The hook


def test_what_one_engine_stored_another_loads() -> None:
    hook = DictHook()
    first = run_one(new_engine(hook=hook), PROMPT, greedy(9))
    assert len(hook.blocks) == 6, "4 of the prompt, 2 filled while decoding"
    hook.pool = None
    hook.stored.clear()
    engine = new_engine(hook=hook)
    result = run_one(engine, PROMPT, greedy(9))
    assert tokens_of(result) == tokens_of(first)
    assert (result.timings.num_hook_tokens, result.timings.num_computed_tokens) == (16, 2)
    assert engine.hook_stats.loaded_tokens == 16
    assert [request.first_block for request in hook.stored] == [4, 5], "no loaded block"
    again = run_one(engine, PROMPT, greedy(9))
    assert again.timings.num_local_tokens == 16, "loaded blocks entered the pool's own cache"


def test_stores_cover_each_block_once_and_carry_the_whole_chain() -> None:
    hook = DictHook()
    engine = new_engine(hook=hook)
    result = run_one(engine, PROMPT, greedy(9))
    tokens = [*PROMPT, *result.outputs[0].token_ids]
    covered: list[int] = []
    for request in hook.stored:
        last = request.first_block + len(request.block_ids)
        covered += range(request.first_block, last)
        assert list(request.token_ids) == tokens[: last * 4]
    assert covered == list(range(6))
    assert hook.finished == ["request-0"]


def test_forks_store_only_their_own_blocks() -> None:
    hook = DictHook()
    engine = new_engine(hook=hook)
    run_one(engine, PROMPT, greedy(8, n=2, temperature=1.0))
    firsts = {(request.request_id, request.first_block) for request in hook.stored}
    assert ("request-0#1", 4) in firsts
    assert not any(name == "request-0#1" and first < 4 for name, first in firsts)
    assert sorted(hook.finished) == ["request-0", "request-0#1"]


def test_local_blocks_are_not_loaded_again() -> None:
    hook = DictHook()
    engine = new_engine(hook=hook)
    run_one(engine, PROMPT, greedy())
    hook.blocks.clear()
    result = run_one(engine, [*PROMPT, 1, 2, 3, 4, 5], greedy())
    assert result.timings.num_local_tokens == 16
    assert "load" not in hook.calls, "not even when the hook knows less than the pool"
    assert engine.hook_stats.matched_tokens == 0


def test_loaded_blocks_are_shared_within_the_step() -> None:
    hook = DictHook()
    run_one(new_engine(hook=hook), PROMPT, greedy())
    hook.pool = None
    engine = new_engine(hook=hook)
    first, second = engine.generate_all([PROMPT, PROMPT], greedy())
    assert (first.timings.num_hook_tokens, second.timings.num_local_tokens) == (16, 16)
    assert tokens_of(first) == tokens_of(second) == expect(PROMPT, greedy())


def test_a_preempted_sequence_finishes_and_loads_its_own_output_back() -> None:
    hook = DictHook()
    engine = new_engine(num_blocks=9, hook=hook)
    prompts = [PROMPT[:14], PROMPT[:3:-1]]
    results = engine.generate_all(prompts, greedy(14))
    assert engine.stats.preemptions > 0
    assert len(hook.finished) == 2 + engine.stats.preemptions
    for result, prompt in zip(results, prompts, strict=True):
        assert tokens_of(result) == expect(prompt, greedy(14))


def test_a_short_load_is_computed_on_and_leaves_no_nan() -> None:
    hook = DictHook()
    run_one(new_engine(hook=hook), PROMPT, greedy())
    hook.pool, hook.max_loaded_blocks = None, 2
    engine = new_engine(hook=hook)
    result = run_one(engine, PROMPT, greedy())
    assert tokens_of(result) == expect(PROMPT, greedy())
    assert (result.timings.num_hook_tokens, result.timings.num_computed_tokens) == (8, 10)
    assert engine.pool.tensor.isfinite().all()


@pytest.mark.parametrize("method", ["attach", "match", "load", "store", "finish"])
def test_no_failure_of_a_hook_reaches_the_caller(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    hook = DictHook()
    run_one(new_engine(hook=hook), PROMPT, greedy())
    hook.pool, hook.failing = None, frozenset({method})
    engine = new_engine(hook=hook)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            result = run_one(engine, [*PROMPT, 7], greedy())
            assert tokens_of(result) == expect([*PROMPT, 7], greedy())
    assert engine.hook_stats.errors >= 1
    assert len(caplog.records) == 1, "one line, not one a block"
    engine.pool.drain()
    assert engine.pool.blocks.num_available == 64
    if method == "attach":
        assert hook.calls.count("match") == 1, "an unattached hook is not called"


@pytest.mark.parametrize("answer", [-5, 3, 17, 10_000])
def test_a_hooks_numbers_are_clamped(answer: int) -> None:
    class LyingHook(DictHook):
        def match(self, *_asked: Any, **_more: Any) -> int:
            return answer

        def load(self, request: Any) -> int:
            return 0 if answer < 0 else -1

    engine = new_engine(hook=LyingHook())
    assert tokens_of(run_one(engine, PROMPT, greedy())) == expect(PROMPT, greedy())


def test_pinned_blocks_are_not_reused_until_released() -> None:
    hook = DictHook(defer_release=True)
    engine = new_engine(hook=hook, num_blocks=16, max_pinned_share=1.0)
    run_one(engine, PROMPT, greedy(3))
    pinned = [block_id for request in hook.stored for block_id in request.block_ids]
    before = engine.pool.tensor[:, pinned].clone()
    engine.reset_cache()
    assert tokens_of(run_one(engine, PROMPT[::-1], greedy(3))) == expect(PROMPT[::-1], greedy(3))
    assert torch.equal(engine.pool.tensor[:, pinned], before)
    hook.release_all()
    engine.pool.drain()
    assert engine.pool.blocks.num_available == 16


def test_a_slow_store_is_offered_less() -> None:
    hook = DictHook(defer_release=True)
    engine = new_engine(hook=hook, num_blocks=8, max_pinned_share=0.25)
    run_one(engine, PROMPT, greedy(3))
    assert engine.hook_stats.offered_blocks == 2
    hook.release_all()
    hook.defer_release = False
    run_one(engine, [*PROMPT[:16], 50, 51, 52, 53, 54], greedy(3))
    assert engine.hook_stats.offered_blocks == 2 + 5, "all of them, once there is room again"


def offered_by(hook: DictHook, request_id: str) -> list[int]:
    """Indexes of the blocks of a request's chain that the hook was offered."""
    return [
        request.first_block + offset
        for request in hook.stored
        if request.request_id == request_id
        for offset in range(len(request.block_ids))
    ]


def test_a_hook_that_lost_everything_is_offered_the_shared_prefix_again() -> None:
    hook = DictHook()
    engine = new_engine(hook=hook, num_blocks=16)
    run_one(engine, PROMPT, greedy(3))
    hook.blocks.clear()
    engine.add_request([*PROMPT[:16], 50, 51, 52, 53, 54], greedy(3), request_id="second")
    while engine.has_work:
        engine.step()
    offered = sorted(offered_by(hook, "second"))
    assert offered == list(range(5)), "or the blocks behind the shared ones would be orphans"


def test_the_engine_waits_for_pinned_blocks_and_goes_on() -> None:
    hook = DictHook(defer_release=True)
    engine = new_engine(hook=hook, num_blocks=6, max_pinned_share=1.0)
    run_one(engine, PROMPT, greedy(3))
    engine.reset_cache()
    engine.add_request(PROMPT[::-1], greedy(3), request_id="late")
    assert engine.step() == []
    thread = threading.Thread(target=hook.release_all)
    thread.start()
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step()
    thread.join()
    assert tuple(event.token_id for event in events) == expect(PROMPT[::-1], greedy(3))[0]


def test_a_hook_that_never_releases_is_named_in_an_error() -> None:
    clock = SimClock()
    hook = DictHook(defer_release=True)
    engine = new_engine(hook=hook, num_blocks=6, max_pinned_share=1.0, clock=clock)
    run_one(engine, PROMPT, greedy(3))
    engine.reset_cache()
    engine.add_request(PROMPT[::-1], greedy(3))
    assert engine.step() == []
    clock.advance_us(31_000_000)
    with pytest.raises(CapacityError, match="holds 5 of 6 blocks"):
        engine.step()
    engine.close()
    assert engine.check_integrity() == []
