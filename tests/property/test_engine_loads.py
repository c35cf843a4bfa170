"""Whatever loads and stores do, an engine produces what it would without them.

A state machine of random arrivals, aborts, cache resets and pauses over a small pool; every load
follows a random script: its order, the time of each slab, damage, hangs, writes that cannot be
stopped, methods that raise. `FakeModel` reads every row layer by layer and `FakeLoadingHook` fills
what has not arrived with NaN, so a slab read too early, a block reused too soon or KV under the
wrong name changes a token. Reference counts are checked after every step.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)

from ucm.clock import SimClock
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.request import FinishReason
from ucm.engine.sampling import SamplingParams
from ucm.engine.scheduler import SchedulerOptions
from ucm.engine.sequence import POOL_NAMESPACE
from ucm.hashing import chain_keys
from ucm.testing.fake_loading_hook import FakeLoadingHook, LoadScript
from ucm.testing.fake_model import FakeConfig, FakeModel, reference_tokens
from ucm.types import LoadOrder

MODEL = FakeModel(FakeConfig(num_layers=3))
BLOCK_TOKENS = 3
STEP_US = 1_000
DEADLINE_US = 50_000


def mostly(usual: Any, unusual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """`usual` three times in four: most loads must get somewhere."""
    return st.integers(0, 3).flatmap(lambda dice: unusual if dice == 0 else st.just(usual))


scripts = st.builds(
    LoadScript,
    order=st.sampled_from(LoadOrder),
    slab_us=st.lists(st.sampled_from([0, 100, 500, 2_000]), min_size=1, max_size=5).map(tuple),
    bad_slabs=mostly(frozenset(), st.frozensets(st.integers(0, 17), max_size=3)),
    hung_slab=mostly(None, st.integers(0, 17)),
    skipped_blocks=st.sampled_from([0, 0, 1]),
    dropped_blocks=st.sampled_from([0, 0, 1]),
    write_us=st.sampled_from([0, 500, 20_000]),
    optimism=st.sampled_from([0.0, 1.0, 3.0]),
    failing=mostly(
        frozenset(), st.sampled_from(["wait_layer", "claim", "load_state"]).map(set)
    ).map(frozenset),
)
params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 9),
    temperature=st.sampled_from([0.0, 0.9]),
    seed=st.integers(0, 2),
    n=st.sampled_from([1, 1, 2, 3]),
    ignore_eos=st.just(True),
)
# Few beginnings, so that prompts share blocks with each other and with what is stored.
BASES = tuple([base, 8, 7, 6, 5] * 4 for base in (1, 2))
prompts = st.builds(
    lambda base, length, own: [*base[:length], *own],
    st.sampled_from(BASES),
    st.sampled_from([4, 9, 12, 15, 18, 20]),
    st.lists(st.integers(0, 96), min_size=1, max_size=4),
)


class TimedModel(FakeModel):
    """A pass takes a millisecond of virtual time; now and then it fails at its end."""

    def __init__(self, clock: SimClock) -> None:
        super().__init__(config=MODEL.config)
        self._clock = clock
        self.num_failures = 0

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = FakeModel.forward(self, *args, **kwargs)
        self._clock.advance_us(STEP_US)
        if self.num_failures:
            self.num_failures -= 1
            raise MemoryError
        return logits


class Loads(RuleBasedStateMachine):
    """See the module."""

    @initialize(
        num_blocks=st.integers(11, 30),
        max_loading=st.integers(1, 4),
        chunk=st.integers(1, 12),
        max_stall_us=st.sampled_from([0, 2_000, 10**9]),
        may_fail_to_end=mostly(False, st.just(True)),
    )
    def start(
        self,
        num_blocks: int,
        max_loading: int,
        chunk: int,
        max_stall_us: int,
        may_fail_to_end: bool,
    ) -> None:
        self.may_fail_to_end = may_fail_to_end
        self.clock = SimClock()
        self.scripts: list[LoadScript] = []
        self.hook = FakeLoadingHook(self.clock, self.next_script, deadline_us=DEADLINE_US)
        self.model = TimedModel(self.clock)
        options = EngineOptions(
            num_blocks=num_blocks,
            block_tokens=BLOCK_TOKENS,
            scheduler=SchedulerOptions(
                max_sequences=5,
                max_step_tokens=16,
                prefill_chunk_tokens=chunk,
                max_loading=max_loading,
                max_load_stall_s=max_stall_us / 1e6,
                max_load_s=0.2,
            ),
        )
        self.engine = Engine(self.model, None, options, self.hook, self.clock)
        self.requests: dict[str, tuple[list[int], SamplingParams]] = {}
        self.warm()

    def next_script(self) -> LoadScript:
        return self.scripts.pop() if self.scripts else LoadScript()

    @rule(
        added=st.lists(st.tuples(prompts, params, scripts), min_size=1, max_size=3),
        is_cold=mostly(True, st.just(False)),
    )
    def add(self, added: list[tuple[list[int], SamplingParams, LoadScript]], is_cold: bool) -> None:
        """Requests arrive, mostly in an engine that remembers nothing itself."""
        if is_cold:
            self.engine.reset_cache()
        for prompt, one, script in added:
            self.scripts.insert(0, script)
            self.requests[self.engine.add_request(prompt, one)] = (prompt, one)

    @rule()
    def warm(self) -> None:
        """The cache has blocks that this engine did not compute."""
        for base in BASES:
            rows = MODEL.rows_for(base)
            keys = chain_keys(POOL_NAMESPACE, base, BLOCK_TOKENS)
            for index, key in enumerate(keys):
                block = torch.zeros(self.hook.pool[:, 0].shape)
                span = slice(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
                block[..., :3] = rows[:, None, None, span]
                self.hook.blocks[key] = block

    @rule(count=st.sampled_from([1, 2, 3, 20]))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.take(self.one_step())

    @rule(delta_us=st.sampled_from([10, 3_000, 60_000]))
    def wait(self, delta_us: int) -> None:
        self.clock.advance_us(delta_us)
        self.hook.tick()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        prompt, one = self.requests.pop(name)
        result = self.engine.abort(name)
        assert result is not None
        for index, output in enumerate(result.outputs):
            expected = reference_tokens(MODEL, prompt, one, index)
            assert output.token_ids == expected[: len(output.token_ids)]
        self.check()

    @precondition(lambda self: not self.hook.loads)
    @rule()
    def lose_the_cache(self) -> None:
        self.hook.blocks.clear()

    @rule()
    def fail_a_pass(self) -> None:
        self.model.num_failures = 1

    @precondition(lambda self: self.may_fail_to_end)
    @rule()
    def fail_an_end(self) -> None:
        """From here on the hook gets no load any more, and what it wrote to is given up."""
        self.may_fail_to_end = False
        script = LoadScript(slab_us=(900,), hung_slab=7, failing=frozenset({"end_load"}))
        self.scripts.append(script)

    def one_step(self) -> list[Any]:
        try:
            return self.engine.step()
        except MemoryError:
            return []
        finally:
            self.check()

    def take(self, events: list[Any]) -> None:
        for event in events:
            if event.result is None:
                continue
            prompt, one = self.requests.pop(event.request_id)
            outputs = [output.token_ids for output in event.result.outputs]
            assert outputs == [reference_tokens(MODEL, prompt, one, i) for i in range(one.n)]
            assert event.finish_reason is FinishReason.LENGTH
            assert event.result.timings.num_computed_tokens >= 1

    def check(self) -> None:
        assert self.engine.check_integrity() == []
        assert self.hook.faults == []

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(4000):
            if not self.engine.has_work or self.hook.lost:
                break
            self.take(self.one_step())
            self.clock.advance_us(100)
            self.hook.tick()
        if self.hook.lost:  # the pool may be too small for what is left
            self.engine.close()
        assert not self.engine.has_work, "a request is lost"
        assert self.hook.loads == {}, "a load was not ended"
        self.engine.close()
        self.clock.advance_us(10**9)
        self.hook.tick()
        self.engine.pool.drain()
        blocks = self.engine.pool.blocks
        assert blocks.num_available == blocks.num_blocks - self.hook.num_given_away
        self.check()
        self.check_stored()

    def check_stored(self) -> None:
        """Every block that was stored holds what was computed for its chain."""
        for tokens, block in self.hook.stored_chains:
            rows = MODEL.rows_for(tokens)[:, -BLOCK_TOKENS:]
            assert torch.equal(block[..., :3], rows[:, None, None].expand(block[..., :3].shape))


Loads.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestLoads = pytest.mark.timeout(120)(Loads.TestCase)
