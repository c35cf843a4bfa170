"""The real model serves a context that is larger than the engine's pool."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence

import pytest

from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.loading import LoadedModel, load_model
from ucm.engine.sampling import SamplingParams
from ucm.engine.scheduler import SchedulerOptions
from ucm.kernels.block_scores import Budget
from ucm.sparse.mode_policy import SparseMode
from ucm.sparse.options import SparseOptions
from ucm.sparse.slab_source import HostSlabSource
from ucm.testing.models import require_real_model

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(300)]

B = 32
EVERYTHING = Budget(ratio=1.0)
TEXT = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(require_real_model())


@pytest.fixture(scope="module")
def prompt(loaded: LoadedModel) -> list[int]:
    return loaded.tokenizer.encode(TEXT[:60_000])


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


def check(
    loaded: LoadedModel, prompt: Sequence[int], num_new: int, pool_tokens: int, *budgets: Budget
) -> None:
    """Dense in a pool for everything, then in one of `pool_tokens` with each of the budgets."""
    roomy = EngineOptions(num_blocks=(len(prompt) + num_new) // B + 1)
    with Engine(loaded.model, None, roomy) as engine:
        expected = generate(engine, prompt, num_new)
    slabs = engine.pool.layout.slab_bytes * loaded.config.num_layers
    source = HostSlabSource((len(prompt) // B + 2) * slabs)
    for budget in budgets:
        options = EngineOptions(
            num_blocks=pool_tokens // B,
            scheduler=SchedulerOptions(prefill_chunk_tokens=512),
            sparse=SparseOptions(
                mode=SparseMode.LATENCY, budget=budget, resident_blocks=pool_tokens // B
            ),
        )
        with Engine(loaded.model, None, options, source=source) as engine:
            tokens = generate(engine, prompt, num_new)
            assert engine.pool.tensor.shape[1] * B == pool_tokens < len(prompt)
            assert engine.offloads.stats.sequences == 1
            assert engine.offloads.stats.recomputed == 0
            stats = engine.sparse_stats
        assert source.kept_bytes == 0
        assert stats is not None
        if budget.ratio == 0.3:
            assert len(tokens) == num_new
            assert 0 < stats.blocks_read < 0.45 * stats.blocks_dense
        else:
            assert tokens == expected
            assert stats.blocks_read == stats.blocks_dense
    assert source.read_bytes > 0
    source.close()


def test_1500_tokens_with_a_pool_for_512(loaded: LoadedModel, prompt: list[int]) -> None:
    # Five of the new tokens fill a block, the next one begins another.
    check(loaded, prompt[:1500], 10, 512, EVERYTHING)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_8k_tokens_with_a_pool_for_2k(loaded: LoadedModel, prompt: list[int]) -> None:
    num_new = 40
    length = loaded.config.max_context_tokens - num_new
    assert length > 8000
    # A budget of so many tokens chooses everything, block by block; a ratio of 1.0 need not choose.
    chosen = Budget(tokens=length + num_new)
    check(loaded, prompt[:length], num_new, 2048, EVERYTHING, chosen, Budget(ratio=0.3))
