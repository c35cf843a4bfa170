"""Chunks that an engine's hook loads: layer by layer, late, short, damaged, or not at all."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ucm.clock import SimClock
from ucm.engine.hook import LoadRequest, LoadStart
from ucm.engine.model import LlamaModel
from ucm.engine.reuse_report import FallbackReason
from ucm.reuse.dense_rows import encode_chunk
from ucm.reuse.options import BlendOptions, RecomputePolicy
from ucm.reuse.segments import SegmentedPrompt
from ucm.testing.blend_engines import (
    BLOCK_TOKENS,
    FULL,
    GREEDY,
    NONE,
    PREFIX,
    ask,
    blended_tokens,
    finish,
    new_engine,
    prompt_of,
    text_of,
    tokens_of,
)
from ucm.testing.fake_hook import DictHook
from ucm.testing.fake_loading_hook import FakeLoadingHook, LoadScript, script_source
from ucm.types import LoadOrder

A, B = text_of(1, 16), text_of(2, 24)
NUM_LAYERS = 4
LATE_SLAB_OF_A = 3 * 4 + 1
"""In the last layer of the first chunk's load, which has 4 blocks a layer."""


class Served:
    """An engine whose hook loads by scripts what another engine stored."""

    def __init__(
        self, model: LlamaModel, *scripts: LoadScript, options: BlendOptions = NONE
    ) -> None:
        self.clock = SimClock()
        first = FakeLoadingHook(self.clock)
        engine = new_engine(model, options, hook=first, clock=self.clock)
        ask(engine, prompt_of(engine, A, B))
        first.tick()
        self.stored = first.blocks
        source = script_source(scripts)
        self.hook = FakeLoadingHook(self.clock, source, deadline_us=50_000)
        self.hook.blocks = dict(first.blocks)
        self.engine = new_engine(model, options, hook=self.hook, clock=self.clock)

    def prompt(self) -> SegmentedPrompt:
        """The chunks in the reverse order, behind another prefix: no block of it is known."""
        return prompt_of(self.engine, B, A, prefix=text_of(7, 9))

    def close(self) -> None:
        self.engine.close()
        self.clock.advance_us(10**9)
        self.hook.tick()
        self.engine.pool.drain()
        assert self.hook.faults == []
        assert self.hook.loads == {}
        assert self.engine.check_integrity() == []
        blocks = self.engine.pool.blocks
        assert blocks.num_available == blocks.num_blocks - self.hook.num_given_away


def test_another_engine_loads_them(model: LlamaModel) -> None:
    hook = DictHook()
    first = new_engine(model, hook=hook)
    prompt = prompt_of(first, A, B)
    ask(first, prompt)
    hook.settle()
    assert len(hook.blocks) == 4 + 6 + 1, "two chunks, the prefix, nothing blended"
    second_hook = DictHook(blocks=hook.blocks)
    second = new_engine(model, hook=second_hook)
    prompt = prompt_of(second, B, A, prefix=text_of(7, 9))
    result = ask(second, prompt)
    assert tokens_of(result) == [blended_tokens(model, prompt)]
    report = result.reuse
    assert report is not None
    assert (report.num_loaded_tokens, report.num_encoded_tokens) == (40, 0)
    slab_bytes = second.pool.layout.slab_bytes
    assert report.loaded_bytes == 10 * NUM_LAYERS * slab_bytes
    assert second.stats.reuse.loaded_bytes == report.loaded_bytes
    assert not [request for request in second_hook.stored if request.extra_keys]
    again = ask(second, prompt_of(second, A, B))
    assert again.reuse is not None
    assert again.reuse.num_found_tokens == 40


def test_what_is_stored_of_a_chunk_is_what_encoding_gives(model: LlamaModel) -> None:
    hook = DictHook()
    engine = new_engine(model, FULL, hook=hook)
    prompt = prompt_of(engine, A)
    ask(engine, prompt)
    hook.settle()
    (request,) = [request for request in hook.stored if request.extra_keys]
    assert list(request.token_ids) == list(A)
    keys = hook._keys(A, request.extra_keys)
    rows = torch.stack([hook.blocks[key] for key in keys], dim=3).flatten(3, 4)
    torch.testing.assert_close(rows, encode_chunk(model, prompt.spans[0].chunk))


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_a_load_that_comes_short_is_computed(model: LlamaModel, blocks: int) -> None:
    hook = DictHook()
    first = new_engine(model, hook=hook)
    ask(first, prompt_of(first, A, B))
    hook.settle()
    second = new_engine(model, hook=DictHook(blocks=hook.blocks, max_loaded_blocks=blocks))
    prompt = prompt_of(second, B, A, prefix=text_of(7, 9))
    result = ask(second, prompt)
    assert tokens_of(result) == [blended_tokens(model, prompt)]
    assert result.reuse is not None
    assert result.reuse.num_encoded_tokens == 40


@pytest.mark.parametrize("method", ["match", "load", "store", "finish"])
def test_a_hook_that_fails_costs_nothing_but_work(model: LlamaModel, method: str) -> None:
    hook = DictHook()
    first = new_engine(model, hook=hook)
    ask(first, prompt_of(first, A, B))
    hook.settle()
    second = new_engine(model, hook=DictHook(blocks=hook.blocks, failing=frozenset({method})))
    prompt = prompt_of(second, B, A, prefix=text_of(7, 9))
    assert tokens_of(ask(second, prompt)) == [blended_tokens(model, prompt)]


def test_a_slow_store_holds_nobody_up(model: LlamaModel) -> None:
    hook = DictHook(defer_release=True)
    engine = new_engine(model, hook=hook, num_blocks=64)
    for number in range(4):
        prompt = prompt_of(engine, text_of(40 + number, 24), A)
        assert tokens_of(ask(engine, prompt)) == [blended_tokens(model, prompt)]
    hook.release_all()
    engine.pool.drain()
    assert engine.check_integrity() == []


def test_a_chunk_without_room_beside_what_stores_hold_is_text(model: LlamaModel) -> None:
    """The request alone has room: it must not wait for a cache that hangs."""
    hook = DictHook(defer_release=True)
    engine, plain = new_engine(model, hook=hook, num_blocks=40), new_engine(model, None)
    ask(engine, text_of(50, 60))
    assert engine.pool.num_pinned > 10
    prompt = prompt_of(engine, A, B)
    result = ask(engine, prompt)
    assert result.reuse is not None
    assert result.reuse.fallback is FallbackReason.NO_ROOM
    assert tokens_of(result) == tokens_of(ask(plain, list(prompt.token_ids)))


def test_repair_begins_while_chunks_are_loaded(model: LlamaModel) -> None:
    """A slab takes a millisecond; the second layer comes while the first is repaired."""
    options = BlendOptions(policy=RecomputePolicy.CACHEBLEND, budget=0.5)
    served = Served(model, *[LoadScript(slab_us=(1_000,))] * 2, options=options)
    prompt = served.prompt()
    request_id = served.engine.add_request(prompt, GREEDY)
    seen: set[int] = set()
    while served.engine.has_work and not seen & {1, 2}:
        served.engine.step()
        blends = served.engine._runner.blends
        assert blends is not None
        seen |= {job._next_layer for job in blends._jobs.values() if served.hook.loads}
    (result,) = finish(served.engine, request_id)
    assert tokens_of(result) == [blended_tokens(model, prompt, options)]
    assert result.reuse is not None
    assert result.reuse.num_loaded_tokens == 40
    served.close()


def test_a_layer_that_is_lost_makes_the_repair_begin_anew(model: LlamaModel) -> None:
    scripts = (LoadScript(), LoadScript(slab_us=(500,), bad_slabs=frozenset({LATE_SLAB_OF_A})))
    served = Served(model, *scripts)
    prompt = served.prompt()
    result = ask(served.engine, prompt)
    assert tokens_of(result) == [blended_tokens(model, prompt)]
    report = result.reuse
    assert report is not None
    assert report.fallback is None
    assert (report.num_restarts, report.num_loaded_tokens) == (1, 24)
    assert report.num_encoded_tokens == 16
    served.close()


def test_the_second_loss_means_a_full_prefill(model: LlamaModel) -> None:
    """The first chunk is late and then hangs, the second is damaged before."""
    scripts = (
        LoadScript(slab_us=(500,), hung_slab=3 * 6),
        LoadScript(slab_us=(500,), bad_slabs=frozenset({2 * 4 + 1})),
    )
    served, plain = Served(model, *scripts), new_engine(model, None)
    prompt = served.prompt()
    result = ask(served.engine, prompt)
    assert result.reuse is not None
    assert result.reuse.fallback is FallbackReason.LOST
    assert tokens_of(result) == tokens_of(ask(plain, list(prompt.token_ids)))
    assert served.engine.stats.reuse.fallbacks == {FallbackReason.LOST: 1}
    served.close()


@pytest.mark.parametrize(
    "script",
    [
        LoadScript(hung_slab=7),
        LoadScript(slab_us=(500,), hung_slab=7, write_us=20_000),
        LoadScript(slab_us=(500,), hung_slab=9, failing=frozenset({"end_load"})),
        LoadScript(slab_us=(500,), failing=frozenset({"wait_layer"})),
        LoadScript(slab_us=(500,), failing=frozenset({"load_state"})),
        LoadScript(failing=frozenset({"start_load"})),
        LoadScript(dropped_blocks=1),
        LoadScript(order=LoadOrder.BLOCKS_FROM_BACK, slab_us=(300,)),
        LoadScript(order=LoadOrder.BLOCKS_FROM_BACK, slab_us=(300,), bad_slabs=frozenset({5})),
    ],
    ids=lambda script: f"{script.order}-{script.hung_slab}-{script.write_us}-{set(script.failing)}",
)
def test_whatever_a_load_does(model: LlamaModel, script: LoadScript) -> None:
    served = Served(model, script)
    prompt = served.prompt()
    plain = new_engine(model, None)
    result = ask(served.engine, prompt)
    assert result.reuse is not None
    if result.reuse.fallback is None:
        assert tokens_of(result) == [blended_tokens(model, prompt)]
    else:
        assert tokens_of(result) == tokens_of(ask(plain, list(prompt.token_ids)))
    other = prompt_of(served.engine, A, B, prefix=text_of(8, 11))
    if not served.hook.lost:
        assert tokens_of(ask(served.engine, other)) == [blended_tokens(model, other)]
    served.close()


def test_an_answer_that_does_not_fit_the_question_loads_nothing(model: LlamaModel) -> None:
    """A load that says that it begins elsewhere: nobody knows what it wrote where."""

    class Shifted(DictHook):
        def start_load(self, request: LoadRequest) -> LoadStart:
            start = super().start_load(request)
            assert self.pool is not None
            self.pool[:, list(request.block_ids)] = 1.0
            return dataclasses.replace(start, first_block=start.first_block + 1)

    hook = DictHook()
    first = new_engine(model, hook=hook)
    ask(first, prompt_of(first, A, B))
    hook.settle()
    second = new_engine(model, hook=Shifted(blocks=hook.blocks))
    prompt = prompt_of(second, B, A, prefix=text_of(7, 9))
    result = ask(second, prompt)
    assert tokens_of(result) == [blended_tokens(model, prompt)]
    assert result.reuse is not None
    assert (result.reuse.num_loaded_tokens, result.reuse.num_encoded_tokens) == (0, 40)


def test_others_decode_while_a_chunk_is_loaded(model: LlamaModel) -> None:
    """A load that takes 40 ms a slab holds up its own request only."""
    served, plain = Served(model, *[LoadScript(slab_us=(200_000,))] * 2), new_engine(model, None)
    text = list(text_of(30, 10))
    late = served.engine.add_request(served.prompt(), GREEDY)
    quick = served.engine.add_request(text, GREEDY)
    started_us = served.clock.now_us()
    (result,) = finish(served.engine, quick)
    assert tokens_of(result) == tokens_of(ask(plain, text))
    assert served.clock.now_us() - started_us < 200_000
    served.engine.abort(late)
    served.close()


def test_the_prefix_is_loaded_beside_the_chunks(model: LlamaModel) -> None:
    hook = DictHook()
    first = new_engine(model, hook=hook)
    prefix = text_of(7, 18)
    ask(first, prompt_of(first, A, prefix=prefix))
    hook.settle()
    second = new_engine(model, hook=DictHook(blocks=hook.blocks))
    prompt = prompt_of(second, A, prefix=(*prefix, 3))
    result = ask(second, prompt)
    assert tokens_of(result) == [blended_tokens(model, prompt)]
    assert result.timings.num_hook_tokens == 16
    assert result.reuse is not None
    assert result.reuse.num_loaded_tokens == 16


@pytest.mark.parametrize("order", list(LoadOrder))
@pytest.mark.parametrize("bad_slabs", [frozenset(), frozenset({3})])
def test_an_exact_prefix_may_reach_into_the_chunks(
    model: LlamaModel, order: LoadOrder, bad_slabs: frozenset[int]
) -> None:
    clock = SimClock()
    first_hook = FakeLoadingHook(clock)
    plain = new_engine(model, None, hook=first_hook, clock=clock)
    prompt = prompt_of(new_engine(model), A, B)
    expected = tokens_of(ask(plain, list(prompt.token_ids)[:34]))
    first_hook.tick()
    assert expected
    script = LoadScript(order=order, slab_us=(700,), bad_slabs=bad_slabs)
    hook = FakeLoadingHook(clock, script_source([script]), deadline_us=50_000)
    hook.blocks = dict(first_hook.blocks)
    engine = new_engine(model, FULL, hook=hook, clock=clock)
    result = ask(engine, prompt)
    assert tokens_of(result) == tokens_of(ask(new_engine(model, None), list(prompt.token_ids)))
    if not bad_slabs and order is LoadOrder.LAYERS:  # the other leaves a gap: it is blended
        assert result.reuse is not None
        assert result.reuse.num_chunk_tokens == len(PREFIX) + 40 - 32
    assert hook.faults == []


def test_a_chunk_is_stored_when_there_is_room_to_pin_it(model: LlamaModel) -> None:
    hook = DictHook(defer_release=True)
    engine = new_engine(model, hook=hook, num_blocks=64, max_pinned_share=0.1)
    prompt = prompt_of(engine, A)
    result = ask(engine, prompt)
    assert tokens_of(result) == [blended_tokens(model, prompt)]
    assert engine.pool.num_pinned <= 6
    hook.release_all()
    engine.pool.drain()
    assert BLOCK_TOKENS * engine.stats.reuse.blended == BLOCK_TOKENS
    ask(engine, prompt_of(engine, A, prefix=text_of(3, 8)))
    assert [request for request in hook.stored if request.extra_keys]


def test_an_engine_is_closed_in_the_middle(model: LlamaModel) -> None:
    served = Served(model, *[LoadScript(slab_us=(1_000,))] * 2)
    served.engine.add_request(served.prompt(), GREEDY)
    for _ in range(3):
        served.engine.step()
    served.close()


@pytest.mark.parametrize(
    "script",
    [
        LoadScript(order=LoadOrder.BLOCKS_FROM_BACK, slab_us=(3_000,), bad_slabs=frozenset({9})),
        LoadScript(order=LoadOrder.BLOCKS_FROM_BACK, slab_us=(3_000,), skipped_blocks=1),
        LoadScript(order=LoadOrder.BLOCKS_FROM_BACK, slab_us=(3_000,), dropped_blocks=1),
        LoadScript(dropped_blocks=7),
    ],
    ids=["damaged", "skipped", "dropped", "layers"],
)
@pytest.mark.parametrize("num_prefix", [7, 9, 10])
def test_a_prefix_whose_load_cannot_be_ended_takes_no_block_that_was_computed(
    model: LlamaModel, script: LoadScript, num_prefix: int
) -> None:
    """Its hook may write for ever to what it said that it loads, and to nothing else."""
    clock = SimClock()
    first_hook = FakeLoadingHook(clock)
    first = new_engine(model, None, hook=first_hook, clock=clock)
    prefix = text_of(7, num_prefix)
    prompt = prompt_of(new_engine(model), A, B, prefix=prefix)
    ask(first, list(prompt.token_ids))
    first_hook.tick()
    script = dataclasses.replace(script, failing=frozenset({"end_load"}))
    hook = FakeLoadingHook(clock, script_source([script]), deadline_us=50_000)
    hook.blocks = dict(first_hook.blocks)
    engine = new_engine(model, hook=hook, clock=clock)
    result = ask(engine, prompt)
    assert tokens_of(result) == [blended_tokens(model, prompt)]
    assert hook.faults == []
    engine.close()
    hook.tick()
    engine.pool.drain()
    assert engine.check_integrity() == []
    assert engine.pool.num_pinned == hook.num_given_away


@pytest.mark.parametrize("has_room", [True, False])
def test_a_block_in_front_of_the_chunks_with_another_owner_is_copied(
    model: LlamaModel, has_room: bool
) -> None:
    """Whoever has it: the engine goes on, in a block of its own or without the chunks."""
    engine = new_engine(model)
    prompt = prompt_of(engine, A, prefix=text_of(7, 10))
    request_id = engine.add_request(prompt, GREEDY)
    pool, runner = engine.pool, engine._runner
    while not (runner.running and runner.running[0].num_computed == 10):
        engine.step()
    sequence = runner.running[0]
    assert sequence.blend is not None
    assert not sequence.blend.is_over
    pool.blocks.acquire(sequence.block_ids[2:3])  # as another sequence would own it
    others = [sequence.block_ids[2]]
    if not has_room:
        pool.reset()
        others += pool.blocks.allocate(pool.blocks.num_available)
    for _ in range(100):
        engine.step()
        if sequence.blend.is_over:
            break
    pool.blocks.release(others)
    (result,) = finish(engine, request_id)
    assert result.reuse is not None
    if has_room:
        assert result.reuse.fallback is None
        assert tokens_of(result) == [blended_tokens(model, prompt)]
    else:
        assert result.reuse.fallback is FallbackReason.NO_ROOM
        plain = new_engine(model, None)
        assert tokens_of(result) == tokens_of(ask(plain, list(prompt.token_ids)))


@pytest.mark.parametrize("num_query", [5, 9])
def test_a_pass_behind_a_load_that_comes_short_may_end_inside_the_chunks(
    model: LlamaModel, num_query: int
) -> None:
    """Two tokens behind the load are computed where it ends then: exactly, and blended behind."""
    clock = SimClock()
    first_hook = FakeLoadingHook(clock)
    first = new_engine(model, None, hook=first_hook, clock=clock)
    query = text_of(9, num_query)
    prompt = prompt_of(new_engine(model), A, B, prefix=text_of(7, 9), query=query)
    ask(first, list(prompt.token_ids))
    first_hook.tick()
    num_blocks = (len(prompt.token_ids) - 1) // BLOCK_TOKENS
    script = LoadScript(slab_us=(500,), bad_slabs=frozenset({2 * num_blocks + 3}), optimism=0.0)
    hook = FakeLoadingHook(clock, script_source([script]), deadline_us=50_000)
    hook.blocks = dict(first_hook.blocks)
    engine = new_engine(model, FULL, hook=hook, clock=clock)
    result = ask(engine, prompt)
    assert tokens_of(result) == tokens_of(ask(new_engine(model, None), list(prompt.token_ids)))
    assert hook.faults == []
