"""The real model serves a context that is larger than the engine's pool.

dense    in a pool for everything: the reference
all      in a small pool, every block chosen: the same answer, logits equal within rounding
sparse   in a small pool, 0.3 of the blocks, led through the reference's answer: its loss
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.interfaces import ModelShape
from ucm.engine.loading import LoadedModel, load_model
from ucm.engine.model import ForwardItem
from ucm.engine.sampling import SamplingParams
from ucm.kernels.block_scores import Budget
from ucm.sparse.decoding import SparseStats
from ucm.sparse.mode_policy import SparseMode
from ucm.sparse.options import SparseOptions
from ucm.sparse.slab_source import HostSlabSource
from ucm.testing.models import require_real_model

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(300)]

B = 32
TEXT = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(require_real_model())


@pytest.fixture(scope="module")
def prompt(loaded: LoadedModel) -> list[int]:
    return loaded.tokenizer.encode(TEXT[:60_000])


@dataclass
class Watched:
    """The model, and its logits behind the prompt; says what it is told to, if it is."""

    loaded: LoadedModel
    num_prompt: int
    answer: Sequence[int] | None = None
    """Tokens that the engine is led through; the model's own choice when None."""
    logits: list[Tensor] = field(default_factory=list)
    """[vocab_size] of each token of the answer."""

    @property
    def config(self) -> ModelShape:
        return self.loaded.config

    @property
    def dtype(self) -> torch.dtype:
        return self.loaded.model.dtype

    def forward(
        self,
        items: Sequence[ForwardItem],
        kv_pool: Tensor,
        *,
        wait_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        logits = self.loaded.model.forward(items, kv_pool, wait_layer=wait_layer)
        (item,) = items
        if item.start + len(item.token_ids) < self.num_prompt:
            return logits
        self.logits.append(logits[0])
        if self.answer is None:
            return logits
        told = torch.zeros_like(logits)
        told[0, self.answer[len(self.logits) - 1]] = 1.0
        return told

    def nll(self, answer: Sequence[int]) -> Tensor:
        """[len(answer)]"""
        rows = torch.stack(self.logits).double().log_softmax(-1)
        return -rows[torch.arange(len(answer)), torch.tensor(answer)]


def generate(engine: Engine, prompt: Sequence[int], num_new: int) -> list[int]:
    """The answer's tokens; the engine is sound at each step, and idle after it."""
    engine.add_request(prompt, SamplingParams(max_tokens=num_new, ignore_eos=True))
    tokens = []
    while engine.has_work:
        events = engine.step()
        assert engine.check_integrity() == []
        tokens += [event.token_id for event in events]
    assert engine.pool.blocks.num_available == engine.options.num_blocks
    return tokens


@dataclass
class Case:
    """A prompt, its answer in a pool for everything, and a pool that is too small."""

    loaded: LoadedModel
    prompt: Sequence[int]
    num_new: int
    pool_tokens: int

    def __post_init__(self) -> None:
        options = EngineOptions(num_blocks=(len(self.prompt) + self.num_new) // B + 1)
        self.dense = Watched(self.loaded, len(self.prompt))
        with Engine(self.dense, None, options) as engine:
            self.answer = generate(engine, self.prompt, self.num_new)
            slabs = engine.pool.layout.slab_bytes * self.loaded.config.num_layers
        self.capacity_bytes = (len(self.prompt) // B + 2) * slabs

    def run(self, budget: Budget, answer: list[int] | None = None) -> tuple[Watched, SparseStats]:
        """In the small pool; the answer must be the reference's."""
        watched = Watched(self.loaded, len(self.prompt), answer)
        options = EngineOptions(
            num_blocks=self.pool_tokens // B,
            sparse=SparseOptions(
                mode=SparseMode.LATENCY, budget=budget, resident_blocks=self.pool_tokens // B
            ),
        )
        source = HostSlabSource(self.capacity_bytes)
        with Engine(watched, None, options, source=source) as engine:
            assert generate(engine, self.prompt, self.num_new) == self.answer
            assert engine.pool.tensor.shape[1] * B == self.pool_tokens < len(self.prompt)
            assert engine.offloads.stats.sequences == 1
            assert engine.offloads.stats.recomputed == 0
            stats = engine.sparse_stats
        assert source.kept_bytes == 0
        assert source.read_bytes > 0
        source.close()
        assert stats is not None
        return watched, stats

    def check_exact(self, budget: Budget) -> None:
        """Everything is read: nothing changes but the order in which sums are made."""
        watched, stats = self.run(budget)
        assert stats.blocks_read == stats.blocks_dense
        torch.testing.assert_close(
            torch.stack(watched.logits), torch.stack(self.dense.logits), atol=2e-3, rtol=0
        )

    def check_sparse(self, max_loss: float) -> None:
        """A part is read: the reference's answer loses little of its likelihood."""
        watched, stats = self.run(Budget(ratio=0.3), self.answer)
        assert 0 < stats.blocks_read < 0.45 * stats.blocks_dense
        loss = float((watched.nll(self.answer) - self.dense.nll(self.answer)).mean())
        print(f"loss {loss:+.4f} nats a token, {stats.blocks_read / stats.blocks_dense:.2f} read")
        assert abs(loss) < max_loss


def test_1084_tokens_with_a_pool_for_512(loaded: LoadedModel, prompt: list[int]) -> None:
    # Five of the new tokens fill a block, the next one begins another.
    Case(loaded, prompt[:1084], 10, 512).check_exact(Budget(ratio=1.0))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_8k_tokens_with_a_pool_for_2k(loaded: LoadedModel, prompt: list[int]) -> None:
    num_new = 40
    length = loaded.config.max_context_tokens - num_new
    assert length > 8000
    case = Case(loaded, prompt[:length], num_new, 2048)
    # A budget of so many tokens chooses everything, block by block; a ratio of 1.0 need not choose.
    case.check_exact(Budget(tokens=length + num_new))
    case.check_sparse(max_loss=0.05)
