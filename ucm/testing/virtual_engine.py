"""An engine in virtual time over a `FakeLoadingHook`, for tests of loads and stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ucm.clock import SimClock
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.request import RequestResult
from ucm.engine.sampling import SamplingParams
from ucm.engine.scheduler import SchedulerOptions
from ucm.types import BlockKey

from .fake_hook import DictHook
from .fake_loading_hook import FakeLoadingHook, LoadScript, script_source
from .fake_model import FakeConfig, FakeModel, FakeTokenizer, reference_tokens

PROMPT = list(range(3, 36))  # 33 tokens: 8 full blocks of 4, and a token
OTHER = [90, *range(40, 72)]
MODEL = FakeModel()
NUM_LAYERS = MODEL.config.num_layers
NUM_SLABS = 8 * NUM_LAYERS
STEP_US = 10_000


@dataclass(slots=True)
class TimedModel(FakeModel):
    """A pass takes 10 ms of virtual time."""

    clock: SimClock | None = None

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See `FakeModel.forward`."""
        assert self.clock is not None
        logits = FakeModel.forward(self, *args, **kwargs)
        self.clock.advance_us(STEP_US)
        return logits


def greedy(max_tokens: int = 6, **settings: Any) -> SamplingParams:
    """Parameters of a request that only its length ends."""
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **settings)


class VirtualEngine:
    """An engine over a hook that has the blocks of `PROMPT` and `OTHER`."""

    def __init__(
        self,
        *scripts: LoadScript,
        num_blocks: int = 64,
        config: FakeConfig = MODEL.config,
        **limits: Any,
    ) -> None:
        """Let the loads follow `scripts`; `limits` are of `SchedulerOptions`."""
        self.clock = SimClock()
        self.hook = FakeLoadingHook(self.clock, script_source(scripts))
        self.hook.blocks = dict(computed_blocks(config))
        options = EngineOptions(
            num_blocks=num_blocks,
            block_tokens=4,
            scheduler=SchedulerOptions(
                max_sequences=8, max_step_tokens=32, prefill_chunk_tokens=16, **limits
            ),
        )
        self.model = TimedModel(config, clock=self.clock)
        self.engine = Engine(self.model, FakeTokenizer(), options, self.hook, self.clock)
        self.results: dict[str, RequestResult] = {}
        self.num_events: dict[str, int] = {}

    def add(self, prompt: Sequence[int], params: SamplingParams | None = None) -> str:
        """Queue a request; returns its name."""
        return self.engine.add_request(prompt, params or greedy())

    def step(self) -> None:
        """Compute one batch, check everything."""
        for event in self.engine.step():
            self.num_events[event.request_id] = self.num_events.get(event.request_id, 0) + 1
            if event.result:
                self.results[event.request_id] = event.result
        assert self.engine.check_integrity() == []

    def run(self) -> None:
        """Step until nothing is left."""
        for _ in range(2000):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work, "a request is lost"
        assert self.hook.faults == []
        assert self.hook.loads == {}, "a load was not ended"

    def tokens(self, name: str) -> tuple[int, ...]:
        """What a finished request produced."""
        return self.results[name].outputs[0].token_ids


def computed_blocks(config: FakeConfig) -> dict[BlockKey, torch.Tensor]:
    """The blocks of `PROMPT` and `OTHER`, as an engine computes them."""
    hook, options = DictHook(), EngineOptions(num_blocks=64, block_tokens=4)
    engine = Engine(FakeModel(config), FakeTokenizer(), options, hook)
    engine.generate_all([PROMPT, OTHER], greedy(1))
    engine.close()
    return hook.blocks


def expect(prompt: Sequence[int], num_tokens: int = 6) -> tuple[int, ...]:
    """What a request for `num_tokens` must produce."""
    return reference_tokens(MODEL, prompt, greedy(num_tokens))
