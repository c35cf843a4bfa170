"""What a request produces depends on its prompt and parameters alone.

Not on batch composition, chunk size, pool size (so preemption), number of parallel samples, the
prefix cache's state, nor on a hook that loads, fails, or keeps blocks for a while.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.sampling import SamplingParams
from ucm.engine.scheduler import SchedulerOptions
from ucm.testing.fake_hook import DictHook
from ucm.testing.fake_model import FakeModel, FakeTokenizer, reference_tokens

MODEL = FakeModel()

params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 10),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    seed=st.integers(0, 3),
    n=st.integers(1, 3),
    stop_token_ids=st.sampled_from([(), (1, 2, 3, 4, 5, 6, 7)]),
    ignore_eos=st.just(True),
)
# Few distinct tokens at the start, so that prompts share prefixes.
prompts = st.builds(
    lambda shared, own: [*([9, 8, 7, 6] * 3)[:shared], *own],
    st.integers(0, 12),
    st.lists(st.integers(0, 96), min_size=1, max_size=8),
)


@dataclass(frozen=True)
class Setting:
    """How the engine happens to be run."""

    num_blocks: int
    block_tokens: int
    chunk: int
    max_sequences: int
    budget: int
    hook: str

    def engine(self) -> tuple[Engine, DictHook | None]:
        hook = None
        if self.hook != "none":
            hook = DictHook(
                defer_release=self.hook == "slow",
                failing=frozenset({"load"}) if self.hook == "failing" else frozenset(),
                max_loaded_blocks=1 if self.hook == "short" else None,
            )
        options = EngineOptions(
            num_blocks=self.num_blocks,
            block_tokens=self.block_tokens,
            scheduler=SchedulerOptions(
                max_sequences=self.max_sequences,
                max_step_tokens=max(self.budget, self.max_sequences),
                prefill_chunk_tokens=self.chunk,
            ),
        )
        return Engine(FakeModel(), FakeTokenizer(), options, hook), hook


engine_settings = st.builds(
    Setting,
    num_blocks=st.integers(15, 30),  # 30 tokens in blocks of 2 at the least
    block_tokens=st.sampled_from([2, 3, 4]),
    chunk=st.integers(1, 12),
    max_sequences=st.integers(3, 9),
    budget=st.integers(3, 24),
    hook=st.sampled_from(["none", "good", "slow", "short", "failing"]),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    setting=engine_settings,
    requests=st.lists(st.tuples(prompts, params, st.integers(0, 4)), min_size=1, max_size=5),
)
@pytest.mark.timeout(60)
def test_output_depends_on_the_request_alone(
    setting: Setting, requests: list[tuple[list[int], SamplingParams, int]]
) -> None:
    engine, hook = setting.engine()
    results = {}
    names = []
    for prompt, one, num_steps_between in requests:
        names.append(engine.add_request(prompt, one))
        for _ in range(num_steps_between):
            results.update({e.request_id: e.result for e in engine.step() if e.result})
            assert engine.check_integrity() == []
    while engine.has_work:
        results.update({e.request_id: e.result for e in engine.step() if e.result})
        assert engine.check_integrity() == []
        if hook is not None:
            hook.release_all()
    for name, (prompt, one, _) in zip(names, requests, strict=True):
        outputs = [output.token_ids for output in results[name].outputs]
        assert outputs == [reference_tokens(MODEL, prompt, one, i) for i in range(one.n)]
    if hook is not None:
        hook.release_all()
    engine.close()
    assert engine.pool.blocks.num_available == setting.num_blocks
