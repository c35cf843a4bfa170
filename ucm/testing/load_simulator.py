"""`SimulatedMachine`: an engine and a tier with known rates, played event by event.

What `ucm.load_pipeline` says in closed form is played here layer by layer and block by block, so
that the two can be held against each other. While the tier is read, computing is slowed by
`contention`; the tier's rate stays the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ucm.cost_model import CostModel, CostOptions, TierPrior
from ucm.load_decision import Decision, LoadShape
from ucm.types import LoadOrder, TierKind

Claim = Callable[[int, int, int], int]
"""(first block, end block, bytes before the end that arrived) to how many to compute next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedMachine:
    """True rates; see the module."""

    token_s: float = 4e-3
    attention_tokens: float = 3000.0
    pass_s: float = 0.03
    bytes_per_s: float = 10e6
    memory_bytes_per_s: float = 5e9
    request_s: float = 1e-4
    request_bytes: int = 256 << 10
    contention_s_per_byte: float = 0.0
    chunk_tokens: int = 512
    joined_tokens: int = 2048
    """Of the pass behind the load of a request that is alone."""

    def pass_seconds(self, start: int, stop: int) -> float:
        """One forward pass, alone."""
        pairs = (stop - start) * (start + stop - 1) / 2
        return self.pass_s + self.token_s * (stop - start + pairs / self.attention_tokens)

    def load_seconds(self, tier: TierKind, num_bytes: int) -> float:
        """One read after the other."""
        if tier is TierKind.MEMORY:
            return num_bytes / self.memory_bytes_per_s
        return num_bytes / self.bytes_per_s + num_bytes / self.request_bytes * self.request_s

    def known(self) -> CostModel:
        """A model whose priors are the truth."""
        nvme, memory = (
            TierPrior(bytes_per_s=rate, request_s=wait_s, request_bytes=self.request_bytes)
            for rate, wait_s in (
                (self.bytes_per_s, self.request_s),
                (self.memory_bytes_per_s, 1e-12),
            )
        )
        options = CostOptions(
            token_s=self.token_s,
            attention_tokens=self.attention_tokens,
            pass_tokens=self.pass_s / self.token_s,
            chunk_tokens=self.chunk_tokens,
            joined_tokens=self.joined_tokens,
            nvme=nvme,
            memory=memory,
            contention_s_per_byte=self.contention_s_per_byte or 1e-18,
        )
        return CostModel(options)

    def teach(self, model: CostModel, random_source: random.Random, noise: float) -> None:
        """What a model sees of this machine in a few requests."""

        def noisy(seconds: float) -> float:
            return seconds * random_source.lognormvariate(0.0, noise)

        for step in range(48):
            start, count = random_source.randrange(6000), (512, 64, 256, 512)[step % 4]
            alone_s = self.pass_seconds(start, start + count)
            model.observe_compute(start, count, noisy(alone_s))
            for tier in TierKind:
                size = random_source.randrange(1 << 20, 64 << 20)
                requests = -(-size // self.request_bytes)
                seconds = noisy(self.load_seconds(tier, size))
                model.observe_load(tier, size, seconds, num_requests=requests)
            size = int(alone_s * self.bytes_per_s)
            lost_s = size * self.contention_s_per_byte
            seconds = noisy(alone_s) + lost_s
            model.observe_pass(((start, count),), seconds, loaded_bytes=size)

    def ttft_s(self, decision: Decision, claim: Claim) -> float:
        """Play a decision.

        Args:
            decision: what to do.
            claim: says what a hybrid computes next.
        """
        shape = decision.shape
        if decision.order is LoadOrder.BLOCKS_FROM_BACK:
            now_s, start = self._meet(shape, claim)
            return self._passes(now_s, start, shape.num_tokens)
        start = shape.num_local_tokens + decision.num_blocks * shape.block_tokens
        now_s, start = self._layerwise(shape, decision.num_blocks, start)
        return self._passes(now_s, start, shape.num_tokens)

    def _passes(self, now_s: float, start: int, stop: int) -> float:
        for first in range(start, stop, self.chunk_tokens):
            now_s += self.pass_seconds(first, min(first + self.chunk_tokens, stop))
        return now_s

    def _layerwise(self, shape: LoadShape, num_blocks: int, start: int) -> tuple[float, int]:
        """The first pass behind a load; returns when it ends and where the next one starts."""
        most = self.joined_tokens if num_blocks and shape.is_alone else self.chunk_tokens
        stop = min(start + most, shape.num_tokens)
        layer_work_s = self.pass_seconds(start, stop) / shape.num_layers
        layer_load_s = self._load_s(shape, range(num_blocks)) / shape.num_layers
        load_end_s = layer_load_s * shape.num_layers
        now_s = shape.queue_s
        for layer in range(shape.num_layers):
            now_s = max(now_s, (layer + 1) * layer_load_s)
            now_s = self._compute(now_s, layer_work_s, load_end_s, shape, num_blocks)
        return now_s, stop

    def _meet(self, shape: LoadShape, claim: Claim) -> tuple[float, int]:
        front, back = 0, len(shape.tiers)
        now_s, next_s, load_end_s = shape.queue_s, 0.0, 0.0
        while True:
            # The loader goes on from the back until it is behind the clock.
            while back > front and next_s + self._load_s(shape, range(back - 1, back)) <= now_s:
                back -= 1
                next_s += self._load_s(shape, range(back, back + 1))
            if back <= front:
                return now_s, shape.first_suffix_token
            arrived = (now_s - next_s) / self._load_s(shape, range(back - 1, back))
            partial_bytes = int(arrived * shape.block_bytes)
            count = claim(shape.first_block + front, shape.first_block + back, partial_bytes)
            if count == 0:
                load_end_s = next_s + self._load_s(shape, range(front, back))
                return max(now_s, load_end_s), shape.first_suffix_token
            first = shape.num_local_tokens + front * shape.block_tokens
            stop = first + count * shape.block_tokens
            front += count
            if front == len(shape.tiers):  # nothing was loaded: the pass goes on behind the hits
                stop = min(first + self.chunk_tokens, shape.num_tokens)
                return now_s + self.pass_seconds(first, stop), stop
            work_s = self.pass_seconds(first, stop)
            load_end_s = next_s + self._load_s(shape, range(front, back))
            now_s = self._compute(now_s, work_s, load_end_s, shape, len(shape.tiers))

    def _load_s(self, shape: LoadShape, blocks: range) -> float:
        return sum(self.load_seconds(shape.tiers[index], shape.block_bytes) for index in blocks)

    def _compute(
        self, now_s: float, work_s: float, load_end_s: float, shape: LoadShape, num_blocks: int
    ) -> float:
        """When `work_s` of computation is done; it is slower as long as the load goes on."""
        total_s = self._load_s(shape, range(num_blocks))
        if now_s >= load_end_s or not total_s:
            return now_s + work_s
        rate = shape.block_bytes * num_blocks / total_s
        slow = 1.0 + rate * self.contention_s_per_byte
        beside_s = min(work_s * slow, load_end_s - now_s)
        return now_s + beside_s + (work_s - beside_s / slow)
