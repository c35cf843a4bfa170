"""Stores: offered before the pass that fills the blocks, copied out behind it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.hook import StoreRequest
from ucm.errors import CorruptionError
from ucm.testing.fake_hook import DictHook
from ucm.testing.fake_model import FakeModel, FakeTokenizer
from ucm.testing.virtual_engine import (
    MODEL,
    PROMPT,
    VirtualEngine,
    computed_blocks,
    expect,
    greedy,
)


class CopyingHook(DictHook):
    """Copies on a thread of its own, each layer as soon as it is final."""

    def __init__(self) -> None:
        super().__init__()
        self.copied_during_pass: list[int] = []
        self.failed: list[StoreRequest] = []
        self.threads: list[threading.Thread] = []

    def store(self, request: StoreRequest) -> None:
        thread = threading.Thread(target=self._follow, args=(request,))
        self.threads.append(thread)
        thread.start()

    def _follow(self, request: StoreRequest) -> None:
        pool, layers = self.pool, request.layers
        assert pool is not None
        slabs = []
        for layer in range(layers.num_layers):
            if not layers.wait(layer, 10.0):
                self.failed.append(request)
                request.release()
                return
            slabs.append(pool[layer, list(request.block_ids)].clone())
            if not layers.is_complete:
                self.copied_during_pass.append(layer)
        keys = self._keys(request.token_ids)[request.first_block :]
        for index, key in enumerate(keys):
            self.blocks[key] = torch.stack([slab[index] for slab in slabs])
        request.release()

    def join(self) -> None:
        for thread in self.threads:
            thread.join()


def test_stores_follow_the_pass_and_hold_what_was_computed() -> None:
    hook = CopyingHook()

    class Pausing(FakeModel):
        """Lets the copies catch up between two layers."""

        def forward(self, items: Any, kv_pool: Any, *, wait_layer: Any = None) -> torch.Tensor:
            def pause(layer: int) -> None:
                wait_layer(layer)
                copied = len(hook.copied_during_pass)
                for _ in range(2000):
                    if layer == 0 or len(hook.copied_during_pass) > copied:
                        return
                    threading.Event().wait(0.001)

            return FakeModel.forward(self, items, kv_pool, wait_layer=wait_layer and pause)

    options = EngineOptions(num_blocks=64, block_tokens=4)
    engine = Engine(Pausing(), FakeTokenizer(), options, hook)
    (result,) = engine.generate_all([PROMPT], greedy())
    hook.join()
    assert result.outputs[0].token_ids == expect(PROMPT)
    assert hook.copied_during_pass, "nothing was copied before its pass was over"
    expected = computed_blocks(MODEL.config)
    shared = [key for key in hook.blocks if key in expected]
    assert len(shared) == 8
    for key in shared:
        assert torch.equal(hook.blocks[key], expected[key])
    engine.pool.drain()
    assert engine.pool.blocks.num_available == 64


def test_a_pass_that_fails_drops_its_stores_and_offers_them_again() -> None:
    hook = CopyingHook()
    failures = [True]

    class Flaky(FakeModel):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            logits = FakeModel.forward(self, *args, **kwargs)
            return torch.full_like(logits, torch.nan) if failures and failures.pop() else logits

    engine = Engine(Flaky(), None, EngineOptions(num_blocks=64, block_tokens=4), hook)
    request = engine.add_request(PROMPT, greedy(2))
    with pytest.raises(CorruptionError):
        engine.step()
    hook.join()
    assert [item.first_block for item in hook.failed] == [0]
    assert hook.blocks == {}, "nothing of a pass that failed is published"
    assert engine.check_integrity() == []
    assert engine.pool.num_pinned == 0
    while engine.has_work:
        engine.step()
    hook.join()
    assert len(hook.blocks) == 8
    assert request


@pytest.mark.parametrize("wants_swap", [True, False])
def test_a_preempted_request_goes_out_through_the_store_and_comes_back(wants_swap: bool) -> None:
    bench = VirtualEngine(num_blocks=13)
    bench.hook.blocks.clear()
    bench.hook.wants_swap = wants_swap
    object.__setattr__(bench.engine.options, "max_pinned_share", 1.0)
    offers = bench.engine._runner._offers
    offers._max_pinned = 0  # a store that was behind until now
    old = bench.add([1, 2, 3], greedy(40))
    bench.step()
    young = bench.add(PROMPT, greedy(4))
    for _ in range(3):
        bench.step()
    assert bench.hook.blocks == {}
    offers._max_pinned = 13
    sequence = bench.engine._runner.running[1]
    bench.engine._runner._preempt(sequence, num_wanted=1)
    bench.hook.tick()
    bench.engine.reset_cache()
    assert len(bench.hook.blocks) == (8 if wants_swap else 0)
    bench.run()
    assert bench.hook.num_started == wants_swap
    assert bench.tokens(young) == expect(PROMPT, 4)
    assert bench.tokens(old) == expect([1, 2, 3], 40)


def test_a_swap_leaves_the_blocks_that_are_wanted_at_once() -> None:
    bench = VirtualEngine(num_blocks=9)
    bench.hook.blocks.clear()
    runner = bench.engine._runner
    runner._offers._max_pinned = 0
    bench.add(PROMPT, greedy(4))
    bench.step()
    bench.step()
    bench.step()
    (sequence,) = runner.running
    assert (runner.pool.blocks.num_available, sequence.num_full_blocks) == (0, 8)
    runner._offers._max_pinned = 9
    runner._preempt(sequence, num_wanted=3)
    assert runner.pool.blocks.num_available == 3
    bench.run()
