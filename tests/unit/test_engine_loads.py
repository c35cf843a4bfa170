"""Loads behind the engine's passes: in virtual time, with a hook that does what it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ucm.engine.hook import LoadRequest, LoadStart
from ucm.testing.fake_loading_hook import LoadScript
from ucm.testing.fake_model import FakeConfig, FakeModel, reference_tokens
from ucm.testing.virtual_engine import (
    NUM_SLABS,
    OTHER,
    PROMPT,
    STEP_US,
    TimedModel,
    VirtualEngine,
    expect,
    greedy,
)
from ucm.types import LoadOrder

SCRIPTS = {
    "at once": (LoadScript(), 32),
    "slowly": (LoadScript(slab_us=(3_000,)), 32),
    "all at the end": (LoadScript(slab_us=(0,) * (NUM_SLABS - 1) + (50_000,)), 32),
    "in part": (LoadScript(dropped_blocks=3, slab_us=(100,)), 20),
    "a bad slab in layer 0": (LoadScript(bad_slabs=frozenset({5}), slab_us=(3_000,)), 20),
    "a bad slab in layer 1": (LoadScript(bad_slabs=frozenset({8 + 3}), slab_us=(3_000,)), 12),
    "the first slab is bad": (LoadScript(bad_slabs=frozenset({0}), slab_us=(3_000,)), 0),
    "a bad slab that comes at once": (LoadScript(bad_slabs=frozenset({8 + 3})), 12),
    "it hangs from the start": (LoadScript(hung_slab=0), 0),
    "it hangs in layer 0": (LoadScript(hung_slab=5, slab_us=(3_000,)), 0),
    "it hangs in layer 1": (LoadScript(hung_slab=8 + 5, slab_us=(3_000,)), 20),
    "it hangs and writes on": (LoadScript(hung_slab=8 + 5, write_us=10**8), 20),
    "it cannot start": (LoadScript(failing=frozenset({"start_load"})), 0),
    "it cannot say how far it is": (LoadScript(slab_us=(9,), failing=frozenset({"load_state"})), 0),
    "it cannot wait": (LoadScript(slab_us=(9_000,), failing=frozenset({"wait_layer"})), 0),
    "it cannot end": (LoadScript(hung_slab=3, failing=frozenset({"end_load"})), 0),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_however_a_load_goes_the_tokens_are_the_same(name: str) -> None:
    script, num_hook_tokens = SCRIPTS[name]
    bench = VirtualEngine(script)
    request = bench.add(PROMPT)
    bench.run()
    assert bench.tokens(request) == expect(PROMPT)
    timings = bench.results[request].timings
    assert timings.num_hook_tokens == num_hook_tokens
    assert timings.num_computed_tokens == 33 - num_hook_tokens
    assert bench.hook.num_started == (name != "it cannot start")
    assert bench.engine.hook_stats.loaded_tokens == num_hook_tokens
    assert (bench.engine.hook_stats.errors > 0) == ("cannot" in name)


@pytest.mark.parametrize(("bad_slabs", "num_good"), [({6, 8 + 4}, 4), ({6, 8 + 4, 16 + 2}, 2)])
def test_of_a_load_that_goes_wrong_again_counts_what_is_good_in_the_end(
    bad_slabs: set[int], num_good: int
) -> None:
    """Whatever of it has not come yet when the second bad slab is found."""
    config = FakeConfig(num_layers=4)
    script = LoadScript(bad_slabs=frozenset(bad_slabs), slab_us=(3_000,))
    bench = VirtualEngine(script, config=config)
    request = bench.add(PROMPT)
    bench.run()
    assert bench.tokens(request) == reference_tokens(FakeModel(config), PROMPT, greedy())
    assert bench.results[request].timings.num_hook_tokens == 4 * num_good


def test_a_load_alone_is_followed_layer_by_layer() -> None:
    bench = VirtualEngine(LoadScript(slab_us=(20_000,)))
    request = bench.add(PROMPT)
    bench.step()
    assert bench.num_events == {request: 1}, "one pass, which waited"
    assert bench.model.batch_sizes == [1]
    assert bench.clock.now_us() == NUM_SLABS * 20_000 + STEP_US
    (report,) = bench.hook.reports
    assert report.stall_s == pytest.approx(NUM_SLABS * 0.02)
    assert report.seconds == pytest.approx(NUM_SLABS * 0.02 + 0.01)
    assert (report.parts, report.num_decodes) == ((), 1)


def test_a_load_that_nobody_runs_beside_is_hidden_by_a_whole_step() -> None:
    """20 tokens are loaded, the 28 behind them are more than a chunk of 16 and less than a step."""
    prompt = [*PROMPT, *range(11, 26)]
    bench = VirtualEngine(LoadScript(slab_us=(20_000,), dropped_blocks=3))
    request = bench.add(prompt)
    bench.step()
    assert bench.model.batch_sizes == [28]
    bench.run()
    assert bench.tokens(request) == expect(prompt)


def test_a_load_beside_others_is_followed_by_a_chunk() -> None:
    prompt = [*PROMPT, *range(11, 26)]
    bench = VirtualEngine(LoadScript(slab_us=(20_000,), dropped_blocks=3), LoadScript())
    decode = bench.add([1, 2, 3], greedy(60))
    bench.step()
    request = bench.add(prompt)
    bench.run()
    assert [size for size in bench.model.batch_sizes if size > 2] == [3, 1 + 16, 1 + 12]
    assert bench.tokens(request) == expect(prompt)
    assert bench.tokens(decode) == expect([1, 2, 3], 60)


def test_a_load_that_somebody_waits_behind_is_followed_by_a_chunk() -> None:
    """The other request starts with the blocks of the first one, and waits for them."""
    prompt = [*PROMPT, *range(11, 26)]
    bench = VirtualEngine(LoadScript(slab_us=(20_000,), dropped_blocks=3))
    first, second = bench.add(prompt), bench.add([*prompt[:40], 7])
    bench.step()
    assert bench.model.batch_sizes == [16]
    bench.run()
    assert bench.tokens(first) == expect(prompt)
    assert bench.tokens(second) == expect([*prompt[:40], 7])


def test_a_pass_looks_whether_all_is_there_and_waits_for_what_is_not() -> None:
    """The last layers come while the pass computes: its end finds nothing wrong."""
    config = FakeConfig(num_layers=6)
    late = LoadScript(slab_us=(0,) * 16 + (STEP_US // 50,) * 32)
    bench = VirtualEngine(late, config=config)
    request = bench.add(PROMPT)
    bench.run()
    assert bench.tokens(request) == reference_tokens(FakeModel(config), PROMPT, greedy())


def test_a_step_is_reported_by_its_parts() -> None:
    bench = VirtualEngine()
    bench.hook.blocks.clear()
    bench.add(PROMPT[:4], greedy(9))
    bench.step()
    bench.step()
    bench.add([1, *PROMPT])
    bench.step()
    reports = bench.hook.reports
    assert [(report.parts, report.num_decodes) for report in reports] == [
        (((0, 4),), 0),
        ((), 1),
        (((0, 16),), 1),
    ]
    assert all((report.stall_s, report.seconds) == (0.0, 0.01) for report in reports)


def test_decodes_go_on_while_a_load_is_slow() -> None:
    bench = VirtualEngine(LoadScript(slab_us=(30_000,)))
    decode = bench.add([1, 2, 3], greedy(100))
    bench.step()
    slow = bench.add(PROMPT)
    while slow not in bench.num_events:
        bench.step()
    load_steps = NUM_SLABS * 30_000 // STEP_US
    assert load_steps - 2 <= bench.num_events[decode] - 1 <= load_steps + 2
    assert max(report.stall_s for report in bench.hook.reports) <= 0.01
    bench.run()
    assert bench.tokens(slow) == expect(PROMPT)
    assert bench.tokens(decode) == expect([1, 2, 3], 100)


def test_a_large_load_holds_up_no_small_one_and_no_other_request() -> None:
    bench = VirtualEngine(
        LoadScript(slab_us=(100_000,)), LoadScript(slab_us=(5_000,)), num_blocks=128
    )
    decode = bench.add([1, 2, 3], greedy(400))
    bench.step()
    large = bench.add(PROMPT)
    small = bench.add(OTHER[:14])
    fresh = bench.add([5, 5, 5])
    bench.run()
    order = list(bench.results)
    assert order.index(large) > order.index(small)
    assert order.index(large) > order.index(fresh)
    ttft = {name: bench.results[name].timings.ttft_s for name in (large, small, fresh)}
    assert ttft[small] <= 6 * 0.005 + 0.03
    assert ttft[fresh] <= 0.03
    assert ttft[large] == pytest.approx(1.6, rel=0.05)
    for name, prompt in ((large, PROMPT), (small, OTHER[:14]), (fresh, [5, 5, 5])):
        assert bench.tokens(name) == expect(prompt)
    assert bench.tokens(decode) == expect([1, 2, 3], 400)


def test_when_nothing_else_can_run_the_smallest_load_is_followed() -> None:
    bench = VirtualEngine(LoadScript(slab_us=(100_000,)), LoadScript(slab_us=(100_000,)))
    large, small = bench.add(PROMPT), bench.add(OTHER[:14])
    bench.run()
    assert list(bench.results) == [small, large]


def test_a_bad_estimate_costs_no_more_than_the_deadline() -> None:
    bench = VirtualEngine(LoadScript(slab_us=(10_000,), hung_slab=3, optimism=0.0))
    decode = bench.add([1, 2, 3], greedy(30))
    bench.step()
    hung = bench.add(PROMPT)
    bench.run()
    assert max(report.seconds for report in bench.hook.reports) <= 1.02
    assert bench.tokens(hung) == expect(PROMPT)
    assert bench.tokens(decode) == expect([1, 2, 3], 30)


def test_a_load_that_never_ends_is_ended() -> None:
    bench = VirtualEngine(LoadScript(hung_slab=3), max_load_s=0.5)
    decode = bench.add([1, 2, 3], greedy(200))
    bench.step()
    hung = bench.add(PROMPT)
    bench.run()
    assert bench.results[hung].timings.ttft_s == pytest.approx(0.5, abs=0.05)
    assert bench.tokens(hung) == expect(PROMPT)
    assert bench.tokens(decode) == expect([1, 2, 3], 200)


@pytest.mark.parametrize("bad_slabs", [frozenset(), frozenset({4})])
def test_a_second_request_waits_for_the_first_ones_load_and_shares_it(
    bad_slabs: frozenset[int],
) -> None:
    bench = VirtualEngine(LoadScript(slab_us=(5_000,), bad_slabs=bad_slabs))
    decode = bench.add([1, 2, 3], greedy(100))
    bench.step()
    first, second = bench.add(PROMPT), bench.add([*PROMPT, 7])
    bench.run()
    assert bench.hook.num_started == 1
    assert bench.results[second].timings.num_local_tokens == 32, "loaded or computed"
    assert bench.tokens(first) == expect(PROMPT)
    assert bench.tokens(second) == expect([*PROMPT, 7])
    assert bench.tokens(decode) == expect([1, 2, 3], 100)


def test_blocks_are_not_findable_before_they_are_verified() -> None:
    bench = VirtualEngine(LoadScript(slab_us=(50_000,)))
    bench.add([1, 2, 3], greedy(100))
    bench.step()
    bench.add(PROMPT)
    (sequence,) = bench.engine._runner.waiting
    while bench.engine._runner.loads.get(sequence) or not sequence.block_ids:
        assert bench.engine.pool.blocks.find(sequence.chain) == []
        bench.step()
    assert len(bench.engine.pool.blocks.find(sequence.chain)) == 8


def test_aborting_a_loading_request_ends_its_load_and_frees_what_is_not_held() -> None:
    bench = VirtualEngine(LoadScript(slab_us=(5_000,), write_us=40_000))
    bench.add([1, 2, 3], greedy(30))
    bench.step()
    slow = bench.add(PROMPT)
    bench.step()
    before = bench.engine.pool.blocks.num_available
    assert bench.engine.abort(slow) is not None
    assert bench.engine.check_integrity() == []
    assert bench.hook.loads == {}
    assert bench.engine.pool.blocks.num_available == before + 1, "eight may still be written to"
    bench.run()
    bench.clock.advance_us(50_000)
    bench.hook.tick()
    bench.engine.pool.drain()
    assert bench.engine.pool.blocks.num_available == 64
    assert bench.engine.pool.tensor.isfinite().all(), "what was written late is gone"


def test_a_loading_request_can_be_preempted() -> None:
    bench = VirtualEngine(LoadScript(slab_us=(50_000,)), num_blocks=13)
    decode = bench.add([1, 2, 3], greedy(40))
    bench.step()
    slow = bench.add(PROMPT)
    bench.run()
    assert bench.results[slow].timings.num_preemptions > 0
    assert bench.tokens(slow) == expect(PROMPT)
    assert bench.tokens(decode) == expect([1, 2, 3], 40)


def test_held_blocks_are_exchanged_or_the_request_waits_for_them() -> None:
    script = LoadScript(hung_slab=8 + 5, slab_us=(10,), write_us=3_000_000)
    bench = VirtualEngine(script, num_blocks=10)
    request = bench.add(PROMPT, greedy(8))
    for _ in range(400):
        if bench.engine.has_work:
            bench.step()
            bench.clock.advance_us(20_000)
            bench.hook.tick()
    assert bench.tokens(request) == expect(PROMPT, 8)
    assert bench.results[request].timings.num_preemptions > 0


def test_an_error_of_the_model_leaves_a_load_joined_to_the_pass_alone() -> None:
    bench = VirtualEngine(LoadScript(slab_us=(1_000,)))
    failures = [True, True]

    class Flaky(TimedModel):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            logits = TimedModel.forward(self, *args, **kwargs)
            if failures:
                failures.pop()
                raise MemoryError
            return logits

    flaky = Flaky(clock=bench.clock)
    bench.engine._runner._pass._model = flaky
    request = bench.add(PROMPT)
    for _ in range(2):
        with pytest.raises(MemoryError):
            bench.step()
        assert bench.engine.check_integrity() == []
    bench.run()
    assert bench.tokens(request) == expect(PROMPT)
    assert bench.results[request].timings.num_hook_tokens == 32


@pytest.mark.parametrize(
    "answer",
    [
        LoadStart(first_block=1, num_blocks=2),
        LoadStart(first_block=0, num_blocks=9),
        LoadStart(first_block=3, num_blocks=7, order=LoadOrder.BLOCKS_FROM_BACK),
    ],
)
def test_a_load_of_blocks_that_were_not_asked_for_is_void(answer: LoadStart) -> None:
    bench = VirtualEngine()
    begin: Callable[[LoadRequest], LoadStart] = bench.hook.start_load

    def lie(request: LoadRequest) -> LoadStart:
        begin(request)
        return answer

    bench.hook.start_load = lie  # type: ignore[method-assign]
    request = bench.add(PROMPT)
    bench.run()
    assert bench.results[request].timings.num_hook_tokens == 0
    assert bench.tokens(request) == expect(PROMPT)


# From the back


BACK = LoadOrder.BLOCKS_FROM_BACK
BACK_SCRIPTS = {
    "at once": LoadScript(order=BACK),
    "they meet": LoadScript(order=BACK, slab_us=(2_500,)),
    "slowly": LoadScript(order=BACK, slab_us=(40_000,)),
    "an inner part": LoadScript(order=BACK, skipped_blocks=2, dropped_blocks=1, slab_us=(900,)),
    "a bad slab": LoadScript(order=BACK, slab_us=(900,), bad_slabs=frozenset({5})),
    "the last block is bad": LoadScript(order=BACK, slab_us=(900,), bad_slabs=frozenset({0})),
    "it hangs": LoadScript(order=BACK, slab_us=(900,), hung_slab=5),
    "it hangs and writes on": LoadScript(order=BACK, slab_us=(900,), hung_slab=5, write_us=10**8),
    "it cannot claim": LoadScript(order=BACK, slab_us=(900,), failing=frozenset({"claim"})),
    "it cannot end": LoadScript(order=BACK, slab_us=(900,), failing=frozenset({"end_load"})),
    "it cannot tell": LoadScript(order=BACK, slab_us=(900,), failing=frozenset({"load_state"})),
}


@pytest.mark.parametrize("chunk", [3, 4, 16])
@pytest.mark.parametrize("name", BACK_SCRIPTS)
def test_computing_from_the_front_meets_a_load_from_the_back(name: str, chunk: int) -> None:
    bench = VirtualEngine(BACK_SCRIPTS[name])
    object.__setattr__(bench.engine.options.scheduler, "prefill_chunk_tokens", chunk)
    request = bench.add(PROMPT)
    bench.run()
    assert bench.tokens(request) == expect(PROMPT)
    timings = bench.results[request].timings
    assert sum(bench.model.batch_sizes) == timings.num_computed_tokens + 5, "each token once"
    if name == "at once":
        assert timings.num_hook_tokens == 32
    if name == "they meet":
        assert 8 <= timings.num_hook_tokens <= 28
    if name == "an inner part":
        assert timings.num_hook_tokens <= 20


def test_a_pass_that_leaves_the_load_nothing_runs_on_behind_it() -> None:
    bench = VirtualEngine(BACK_SCRIPTS["slowly"])
    object.__setattr__(bench.engine.options.scheduler, "prefill_chunk_tokens", 12)
    prompt = [*PROMPT, 5, 6, 7]
    request = bench.add(prompt)
    bench.run()
    assert bench.tokens(request) == expect(prompt)
    passes = [size for size in bench.model.batch_sizes if size > 1]
    assert passes == [12, 12, 12], "as without a cache, though 32 tokens were to be loaded"


def test_others_run_while_a_hybrid_is_under_way() -> None:
    bench = VirtualEngine(LoadScript(order=BACK, slab_us=(4_000,)))
    decode = bench.add([1, 2, 3], greedy(60))
    bench.step()
    hybrid, twin = bench.add(PROMPT), bench.add([*PROMPT, 9])
    bench.run()
    for name, prompt, count in ((decode, [1, 2, 3], 60), (hybrid, PROMPT, 6)):
        assert bench.tokens(name) == expect(prompt, count)
    assert bench.tokens(twin) == expect([*PROMPT, 9])
    assert bench.hook.num_started == 1, "the twin shares what was loaded and what was computed"


def test_aborting_and_preempting_a_hybrid() -> None:
    bench = VirtualEngine(LoadScript(order=BACK, slab_us=(40_000,), write_us=10_000), num_blocks=13)
    decode = bench.add([1, 2, 3], greedy(40))
    bench.step()
    hybrid = bench.add(PROMPT)
    bench.step()
    assert bench.hook.loads
    bench.engine.abort(hybrid)
    assert bench.hook.loads == {}
    bench.run()
    assert bench.tokens(decode) == expect([1, 2, 3], 40)
