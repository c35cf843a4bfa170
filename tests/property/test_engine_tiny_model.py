"""The batching property on a real decoder: attention over the pool, RoPE, fp32 arithmetic.

Sums are taken in another order when the shape of a batch changes, so logits differ in their last
bits; the tiny model's logits are far enough apart for the tokens to be identical.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ucm.clock import SimClock
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.loading import LoadedModel, load_model
from ucm.engine.model import ForwardItem, LlamaModel
from ucm.engine.sampling import Draw, SamplingParams, sample
from ucm.engine.scheduler import SchedulerOptions
from ucm.testing.fake_hook import DictHook
from ucm.testing.fake_loading_hook import FakeLoadingHook, LoadScript, script_source
from ucm.testing.models import write_tiny_model
from ucm.types import LoadOrder

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("tiny")), torch.float32)


@pytest.fixture(scope="module")
def model(loaded: LoadedModel) -> LlamaModel:
    return loaded.model


def reference(
    model: LlamaModel, prompt: list[int], params: SamplingParams, index: int
) -> list[int]:
    """One sequence alone in a pool of one block, every prefix computed from scratch."""
    config = model.config
    shape = (config.num_layers, 1, 2, config.num_kv_heads, 96, config.head_dim)
    tokens = list(prompt)
    for _ in range(params.max_tokens):
        logits = model.forward([ForwardItem(tokens, 0, [0])], torch.zeros(shape))
        draw = Draw(row=0, params=params, sample_index=index, position=len(tokens))
        tokens += sample(logits, [draw])
    return tokens[len(prompt) :]


PARAMS = [
    SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True),
    SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, temperature=0.8, top_p=0.9, seed=1, n=3),
    SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, temperature=1.2, top_k=20, seed=2, n=2),
]
PROMPTS = [
    [*range(40, 70), 5, 9, 33],
    [*range(40, 64)],
    [*range(40, 60), 7, 7, 7, 12, 88],
]


@pytest.fixture(scope="module")
def expected(model: LlamaModel) -> list[list[list[int]]]:
    return [
        [reference(model, prompt, params, index) for index in range(params.n)]
        for prompt, params in zip(PROMPTS, PARAMS, strict=True)
    ]


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    options=st.builds(
        lambda num_blocks, chunk, budget: EngineOptions(
            num_blocks=num_blocks,
            block_tokens=4,
            scheduler=SchedulerOptions(
                max_sequences=6, max_step_tokens=budget, prefill_chunk_tokens=chunk
            ),
        ),
        st.integers(12, 40),
        st.integers(3, 40),
        st.integers(6, 64),
    ),
    order=st.permutations([0, 1, 2]),
    with_hook=st.booleans(),
)
@pytest.mark.timeout(120)
def test_tokens_do_not_depend_on_how_they_were_batched(
    model: LlamaModel,
    expected: list[list[list[int]]],
    options: EngineOptions,
    order: list[int],
    with_hook: bool,
) -> None:
    engine = Engine(model, None, options, DictHook() if with_hook else None)
    for _ in range(2):  # the second time from the caches
        results = engine.generate_all([PROMPTS[i] for i in order], [PARAMS[i] for i in order])
        for i, result in zip(order, results, strict=True):
            assert [list(output.token_ids) for output in result.outputs] == expected[i]
        assert engine.check_integrity() == []
    engine.pool.drain()
    assert engine.pool.blocks.num_available == options.num_blocks


loads = st.builds(
    LoadScript,
    order=st.sampled_from(LoadOrder),
    slab_us=st.lists(st.sampled_from([0, 100, 5_000]), min_size=1, max_size=5).map(tuple),
    bad_slabs=st.frozensets(st.integers(0, 20), max_size=3),
    hung_slab=st.none() | st.integers(0, 20),
    dropped_blocks=st.integers(0, 2),
    write_us=st.sampled_from([0, 10_000]),
)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    data=st.data(),
    chunk=st.integers(3, 40),
    max_stall_us=st.sampled_from([0, 10**9]),
)
@pytest.mark.timeout(120)
def test_tokens_do_not_depend_on_how_their_kv_was_loaded(
    model: LlamaModel,
    expected: list[list[list[int]]],
    data: st.DataObject,
    chunk: int,
    max_stall_us: int,
) -> None:
    """Layer by layer, from the back, in part, damaged or hanging: real attention reads it."""
    options = EngineOptions(
        num_blocks=40,
        block_tokens=4,
        scheduler=SchedulerOptions(
            max_sequences=6,
            max_step_tokens=64,
            prefill_chunk_tokens=chunk,
            max_load_stall_s=max_stall_us / 1e6,
        ),
    )
    warm = DictHook()
    Engine(model, None, options, warm).generate_all(PROMPTS, PARAMS)
    clock = SimClock()
    scripts = data.draw(st.lists(loads, min_size=3, max_size=3))
    hook = FakeLoadingHook(clock, script_source(scripts))
    hook.blocks = dict(warm.blocks)
    engine = Engine(model, None, options, hook, clock)
    for i, result in enumerate(engine.generate_all(PROMPTS, PARAMS)):
        assert [list(output.token_ids) for output in result.outputs] == expected[i]
    assert engine.check_integrity() == []
    assert hook.faults == []
    assert hook.num_started > 0


def test_logits_of_the_tiny_model_are_far_apart(model: LlamaModel) -> None:
    """What makes the test above meaningful: not one constant token, and no near ties."""
    shape = (model.config.num_layers, 1, 2, model.config.num_kv_heads, 64, model.config.head_dim)
    tokens = list(PROMPTS[0])
    chosen = set()
    for _ in range(MAX_TOKENS):
        logits = model.forward([ForwardItem(tokens, 0, [0])], torch.zeros(shape))
        top = logits[0].topk(2).values
        assert float(top[0] - top[1]) > 1e-4
        tokens.append(int(logits[0].argmax()))
        chosen.add(tokens[-1])
    assert len(chosen) > 3


def test_text_streams_through_the_real_tokenizer(loaded: LoadedModel) -> None:
    engine = Engine(loaded.model, loaded.tokenizer, EngineOptions(num_blocks=16))
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=3, ignore_eos=True)
    events = list(engine.generate("the cache holds the block and the query", params))
    result = events[-1].result
    assert result is not None
    (output,) = result.outputs
    assert "".join(event.text for event in events) == output.text
    assert output.text == loaded.tokenizer.decode(output.token_ids)
    assert len(output.text) > 0
