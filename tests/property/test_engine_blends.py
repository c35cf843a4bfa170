"""Whatever happens around them, blends give what they should, and nobody else notices.

A state machine of prompts with and without chunks, aborts, cache resets and pauses over a small
pool, on a tiny decoder; loads follow random scripts (late, damaged, hung, unstoppable). With the
policy `full` every answer is that of a full prefill, whichever way it came about; plain prompts
always get theirs. Reference counts, and that no blended row can be found, are checked after every
step; what was stored, at the end.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from ucm.clock import SimClock
from ucm.engine.loading import load_model
from ucm.engine.model import LlamaModel
from ucm.engine.sampling import SamplingParams
from ucm.engine.scheduler import SchedulerOptions
from ucm.reuse.dense_rows import encode_chunk
from ucm.reuse.options import BlendOptions, RecomputePolicy, ReuseOptions
from ucm.reuse.segments import Chunk, SegmentedPrompt
from ucm.testing.blend_engines import (
    BLOCK_TOKENS,
    SINK,
    ask,
    new_engine,
    prompt_of,
    text_of,
    tokens_of,
)
from ucm.testing.fake_loading_hook import FakeLoadingHook, LoadScript
from ucm.testing.models import write_tiny_model
from ucm.types import LoadOrder

CHUNKS = (text_of(1, 8), text_of(2, 14), text_of(3, 20))
SINKS = (SINK, (*SINK, *text_of(9, 13)))
"""The second holds full blocks, which its chunks and prompts that begin with it share."""
PREFIXES = (text_of(7, 6), text_of(8, 9), *SINKS)
QUERIES = (text_of(9, 3), text_of(10, 5))
PARAMS = tuple(
    SamplingParams(max_tokens=count, n=n, ignore_eos=True) for count, n in ((3, 1), (9, 1), (4, 2))
)


def mostly(usual: Any, unusual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 2).flatmap(lambda dice: unusual if dice == 0 else st.just(usual))


scripts = st.builds(
    LoadScript,
    order=mostly(LoadOrder.LAYERS, st.just(LoadOrder.BLOCKS_FROM_BACK)),
    slab_us=st.lists(st.sampled_from([0, 100, 2_000]), min_size=1, max_size=3).map(tuple),
    bad_slabs=mostly(frozenset(), st.frozensets(st.integers(0, 11), max_size=3)),
    hung_slab=mostly(None, st.integers(0, 11)),
    dropped_blocks=st.sampled_from([0, 0, 0, 1]),
    write_us=st.sampled_from([0, 500, 20_000]),
    failing=mostly(frozenset(), st.sampled_from(["wait_layer", "load_state"]).map(set)).map(
        frozenset
    ),
)


@dataclass(frozen=True)
class Drawn:
    """A request."""

    prefix: tuple[int, ...]
    chunks: tuple[tuple[int, ...], ...]
    query: tuple[int, ...]
    params: SamplingParams


prompts = st.builds(
    Drawn,
    prefix=st.sampled_from(PREFIXES),
    chunks=st.lists(st.sampled_from(CHUNKS), min_size=0, max_size=3).map(tuple),
    query=st.sampled_from(QUERIES),
    params=st.sampled_from(PARAMS),
)


@functools.cache
def tiny_model() -> LlamaModel:
    with tempfile.TemporaryDirectory() as folder:
        written = write_tiny_model(Path(folder), num_hidden_layers=2)
        return load_model(written, torch.float32).model


@functools.cache
def exact_tokens(prompt: tuple[int, ...], params: SamplingParams) -> tuple[tuple[int, ...], ...]:
    engine = new_engine(tiny_model(), None)
    return tuple(tokens_of(ask(engine, prompt, params)))


@functools.cache
def encoded(chunk: Chunk) -> torch.Tensor:
    return encode_chunk(tiny_model(), chunk)


class Blends(RuleBasedStateMachine):
    """See the module."""

    @initialize(
        num_blocks=st.integers(20, 90),
        policy=st.sampled_from([RecomputePolicy.FULL, RecomputePolicy.PROGRESSIVE]),
        chunk=st.sampled_from([3, 8, 40]),
        sink=st.sampled_from(SINKS),
    )
    def start(
        self, num_blocks: int, policy: RecomputePolicy, chunk: int, sink: tuple[int, ...]
    ) -> None:
        self.clock = SimClock()
        self.scripts: list[LoadScript] = []
        self.hook = FakeLoadingHook(self.clock, self.next_script, deadline_us=50_000)
        self.policy = policy
        self.engine = new_engine(
            tiny_model(),
            reuse=ReuseOptions(
                sink_tokens=sink, blend=BlendOptions(policy=policy, budget=0.3, slice_tokens=6)
            ),
            hook=self.hook,
            clock=self.clock,
            num_blocks=num_blocks,
            scheduler=SchedulerOptions(
                max_sequences=4,
                max_step_tokens=48,
                prefill_chunk_tokens=chunk,
                max_load_s=0.2,
            ),
        )
        self.requests: dict[str, tuple[SegmentedPrompt | tuple[int, ...], SamplingParams]] = {}
        self.warm()

    def next_script(self) -> LoadScript:
        return self.scripts.pop() if self.scripts else LoadScript()

    @rule(
        added=st.lists(st.tuples(prompts, scripts), min_size=1, max_size=3), is_cold=st.booleans()
    )
    def add(self, added: list[tuple[Drawn, LoadScript]], is_cold: bool) -> None:
        """Requests arrive, half of them in an engine that remembers nothing itself."""
        if is_cold:
            self.engine.reset_cache()
        for drawn, script in added:
            prompt = prompt_of(self.engine, *drawn.chunks, prefix=drawn.prefix, query=drawn.query)
            given: SegmentedPrompt | tuple[int, ...] = prompt if drawn.chunks else prompt.token_ids
            if (
                -(-(len(prompt) + drawn.params.max_tokens) // BLOCK_TOKENS)
                > self.engine.options.num_blocks
            ):
                continue
            self.scripts.insert(0, script)
            self.requests[self.engine.add_request(given, drawn.params)] = (given, drawn.params)

    @rule()
    def warm(self) -> None:
        """The cache has chunks that this engine did not compute."""
        for chunk in (self.engine.chunk(tokens) for tokens in CHUNKS):
            keys = self.hook._keys(chunk.token_ids, chunk.space.extra_keys)
            for index, key in enumerate(keys):
                rows = encoded(chunk)[:, :, :, index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
                self.hook.blocks[key] = rows.clone()

    @rule(count=st.sampled_from([1, 2, 5, 20]))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.one_step()

    @rule(delta_us=st.sampled_from([10, 3_000, 60_000]))
    def wait(self, delta_us: int) -> None:
        self.clock.advance_us(delta_us)
        self.hook.tick()

    @rule()
    def forget(self) -> None:
        self.engine.reset_cache()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        del self.requests[name]
        assert self.engine.abort(name) is not None
        self.check()

    @precondition(lambda self: not self.hook.loads)
    @rule()
    def lose_the_cache(self) -> None:
        self.hook.blocks.clear()

    def one_step(self) -> None:
        for event in self.engine.step():
            if event.result is None:
                continue
            prompt, params = self.requests.pop(event.request_id)
            got = tuple(tokens_of(event.result))
            tokens = prompt.token_ids if isinstance(prompt, SegmentedPrompt) else prompt
            is_exact = not isinstance(prompt, SegmentedPrompt)
            if is_exact or self.policy is RecomputePolicy.FULL:
                assert got == exact_tokens(tuple(tokens), params)
            if isinstance(prompt, SegmentedPrompt):
                report = event.result.reuse
                assert report is None or report.cost <= 1.0 + 1e-6
        self.check()

    def check(self) -> None:
        assert self.engine.check_integrity() == []
        assert self.hook.faults == []

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(3000):
            if not self.engine.has_work:
                break
            self.one_step()
            self.clock.advance_us(100)
            self.hook.tick()
        assert not self.engine.has_work, "a request is lost"
        assert self.hook.loads == {}, "a load was not ended"
        self.engine.close()
        self.clock.advance_us(10**9)
        self.hook.tick()
        self.engine.pool.drain()
        assert self.engine.pool.blocks.num_available == self.engine.options.num_blocks
        self.check()
        self.check_stored()

    def check_stored(self) -> None:
        """A stored block is that of a chunk behind its sink, or of an exact prompt."""
        chunks = [self.engine.chunk(tokens) for tokens in CHUNKS]
        for tokens, block in self.hook.stored_chains:
            sources = [chunk for chunk in chunks if chunk.token_ids[: len(tokens)] == tuple(tokens)]
            if not sources:
                continue  # a prompt's: the answers of those that load it are exact
            rows = encoded(sources[0])[:, :, :, len(tokens) - BLOCK_TOKENS : len(tokens)]
            torch.testing.assert_close(block, rows, atol=1e-4, rtol=1e-4)


Blends.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestBlends = pytest.mark.timeout(180)(Blends.TestCase)
