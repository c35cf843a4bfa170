"""Chunks that begin alike, that find no room, and whose loads hang beside busy requests."""

from __future__ import annotations

import pytest
import torch

from ucm.clock import SimClock
from ucm.engine.model import LlamaModel
from ucm.engine.reuse_report import FallbackReason
from ucm.engine.sampling import SamplingParams
from ucm.engine.scheduler import SchedulerOptions
from ucm.errors import InvalidArgumentError
from ucm.reuse.dense_rows import encode_chunk
from ucm.testing.blend_engines import (
    GREEDY,
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

LONG = text_of(1, 40)


def test_chunks_that_begin_alike_share_their_first_blocks(model: LlamaModel) -> None:
    """What the pool has of a chunk is kept; the rest is computed behind it, and is the rest."""
    hook = DictHook()
    engine = new_engine(model, hook=hook)
    for number, count in enumerate((8, 18, 40)):
        prompt = prompt_of(engine, LONG[:count], prefix=text_of(number + 5, 9))
        result = ask(engine, prompt)
        assert tokens_of(result) == [blended_tokens(model, prompt)]
        hook.settle()
    assert result.reuse is not None
    assert (result.reuse.num_found_tokens, result.reuse.num_encoded_tokens) == (16, 24)
    chunk = prompt.spans[0].chunk
    keys = hook._keys(chunk.token_ids, chunk.space.extra_keys)
    rows = torch.stack([hook.blocks[key] for key in keys], dim=3).flatten(3, 4)
    torch.testing.assert_close(rows, encode_chunk(model, chunk), atol=2e-5, rtol=2e-5)


def test_the_rest_of_a_chunk_is_loaded_behind_what_the_pool_has(model: LlamaModel) -> None:
    hook = DictHook()
    first = new_engine(model, hook=hook)
    computed = ask(first, prompt_of(first, LONG)).reuse
    hook.settle()
    second = new_engine(model, hook=DictHook(blocks=hook.blocks))
    ask(second, prompt_of(second, LONG[:16]))
    prompt = prompt_of(second, LONG, prefix=text_of(6, 9))
    result = ask(second, prompt)
    assert tokens_of(result) == [blended_tokens(model, prompt)]
    assert result.reuse is not None
    assert (result.reuse.num_found_tokens, result.reuse.num_loaded_tokens) == (16, 24)
    assert computed is not None
    assert [outcome.num_encoded_tokens for outcome in computed.chunks] == [len(LONG)]
    (last,) = result.reuse.chunks
    assert last.token_ids == LONG
    assert (last.num_found_tokens, last.num_loaded_tokens, last.is_ready) == (16, 24, True)


def test_no_request_has_the_name_of_a_chunk(model: LlamaModel) -> None:
    hook = DictHook()
    engine = new_engine(model, hook=hook)
    asked = engine.add_request(prompt_of(engine, LONG), GREEDY)
    finish(engine, asked)
    names = {request.request_id for request in hook.stored} | set(hook.finished)
    derived = names - {asked}
    assert len(derived) > 1, "a chunk's, and that of the sequence that computes it"
    assert all(name.startswith(f"{asked}#") for name in derived)
    for name in (*derived, f"{asked}#1"):
        with pytest.raises(InvalidArgumentError, match="has a #"):
            engine.add_request(text_of(2, 9), GREEDY, request_id=name)


def test_a_chunk_without_room_keeps_nothing_of_what_was_found(model: LlamaModel) -> None:
    engine = new_engine(model, num_blocks=40)
    ask(engine, prompt_of(engine, LONG[:16]))
    blends = engine._runner.blends
    assert blends is not None
    pool = engine.pool.blocks
    taken = pool.allocate(pool.num_available - 4 - 2)
    assert blends._shelf.open(LONG, "somebody", (9, 0)) is None
    assert engine.pool.check_integrity([taken]) == []


def test_a_chunk_that_is_no_numbers_is_not_kept(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(kv_pool: torch.Tensor, _source: object, _first: int, target: list[int]) -> None:
        kv_pool[:, target] = torch.nan

    hook = DictHook()
    engine = new_engine(model, hook=hook)
    plain = new_engine(model)
    prompt = prompt_of(engine, LONG)
    with monkeypatch.context() as spoiled:
        spoiled.setattr("ucm.engine.chunk_shelf.copy_rows", spoil)
        result = ask(engine, prompt)
    hook.settle()
    assert result.reuse is not None
    assert result.reuse.fallback is FallbackReason.NO_ROOM
    assert tokens_of(result) == tokens_of(plain.generate_all([prompt.token_ids], GREEDY)[0])
    assert not any(blocks.isnan().any() for blocks in hook.blocks.values())
    again = ask(engine, prompt_of(engine, LONG, prefix=text_of(9, 9))).reuse
    assert again is not None
    assert (again.num_found_tokens, again.num_encoded_tokens) == (0, 40)


def test_a_load_that_hangs_beside_busy_requests_is_given_up(model: LlamaModel) -> None:
    """Nobody waits for it, because there is always something to do; its time ends all the same."""
    clock = SimClock()
    stored = FakeLoadingHook(clock)
    first = new_engine(model, hook=stored, clock=clock)
    ask(first, prompt_of(first, LONG))
    stored.tick()
    hook = FakeLoadingHook(clock, script_source([LoadScript(hung_slab=3)]))
    hook.blocks = dict(stored.blocks)
    scheduler = SchedulerOptions(prefill_chunk_tokens=16, max_load_s=0.05)
    engine = new_engine(model, hook=hook, clock=clock, scheduler=scheduler)
    busy = engine.add_request(text_of(8, 9), SamplingParams(max_tokens=100, ignore_eos=True))
    prompt = prompt_of(engine, LONG, prefix=text_of(6, 9))
    late = engine.add_request(prompt, GREEDY)
    for _ in range(60):
        clock.advance_us(2_000)
        events = engine.step()
        assert engine.check_integrity() == []
        if any(event.result for event in events):
            break
    assert [event.request_id for event in events if event.result] == [late]
    (result,) = [event.result for event in events if event.result]
    assert tokens_of(result) == [blended_tokens(model, prompt)]
    assert result.reuse is not None
    assert result.reuse.num_encoded_tokens == len(LONG)
    finish(engine, busy)
    assert hook.faults == []
