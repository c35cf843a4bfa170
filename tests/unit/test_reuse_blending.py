"""Blending of chunks on a tiny model: what is recomputed, what it costs, what it gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ucm.engine.loading import load_model
from ucm.engine.model import LlamaModel
from ucm.errors import ConfigError
from ucm.reuse.blending import blend
from ucm.reuse.dense_rows import DenseRows, assemble, compute, run_to_end
from ucm.reuse.options import BlendOptions, RecomputePolicy
from ucm.reuse.protocols import BlendPlan
from ucm.reuse.segments import Chunk, ChunkSpace, SegmentedPrompt, Text
from ucm.testing.models import write_tiny_model

POLICIES = tuple(RecomputePolicy)
BLOCK_TOKENS = 8
BUDGETS = (0.0, 0.05, 0.1, 0.18, 0.3, 0.6, 1.0)


@dataclasses.dataclass
class Setup:
    """One request over the tiny model, its chunks placed, and what a full prefill gives."""

    model: LlamaModel
    rows: DenseRows
    plan: BlendPlan
    full: DenseRows
    full_logits: Tensor

    def query_logits(self, rows: DenseRows) -> Tensor:
        plan = self.plan
        return self.model.logits(compute(self.model, rows, plan.token_ids, plan.stop))


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder: Path = tmp_path_factory.mktemp("model")
    loaded = load_model(write_tiny_model(folder, num_hidden_layers=6))
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> tuple[int, ...]:
        drawn = torch.randint(3, loaded.config.vocab_size, (count,), generator=generator)
        return tuple(drawn.tolist())

    sink = draw(8)
    space = ChunkSpace(b"tiny", sink, BLOCK_TOKENS)
    # A chunk with a tail that fills no block, and text between two chunks: both are fresh.
    chunks = [Chunk(draw(count), space) for count in (48, 35, 64)]
    prompt = SegmentedPrompt(
        (Text(sink + draw(3)), chunks[0], chunks[1], Text(draw(3)), chunks[2], Text(draw(20)))
    )
    rows, plan = assemble(loaded.model, loaded.config.rope, prompt)
    full = DenseRows(torch.zeros_like(rows.kv_L2GTD), plan.stop)
    hidden = compute(loaded.model, full, plan.token_ids, 0)
    full_logits = loaded.model.logits(hidden[plan.stop :])
    return Setup(loaded.model, rows, plan, full, full_logits)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_what_is_reported_and_spent_never_exceeds_the_budget(
    setup: Setup, policy: RecomputePolicy, budget: float
) -> None:
    options = BlendOptions(policy=policy, budget=budget, slice_tokens=16)
    steps = []
    blending = blend(setup.model, setup.rows.copy(), setup.plan, options)
    while True:
        try:
            steps.append(next(blending))
        except StopIteration as end:
            outcome = end.value
            break
    if policy is not RecomputePolicy.FULL:
        assert outcome.cost <= budget + 1e-9
    num_candidates = 48 + 32 + 64
    fresh_cost = outcome.num_fresh * (5 + setup.model.projection_share)
    spent = outcome.cost * 6 * num_candidates + fresh_cost
    assert sum(step.token_layers for step in steps) == pytest.approx(spent)
    assert [step.next_layer for step in steps] == sorted(step.next_layer for step in steps)
    assert outcome.num_fresh == 3 + 3


@pytest.mark.parametrize("policy", [p for p in POLICIES if p is not RecomputePolicy.NONE])
def test_the_whole_budget_equals_a_full_prefill(setup: Setup, policy: RecomputePolicy) -> None:
    rows = setup.rows.copy()
    run_to_end(blend(setup.model, rows, setup.plan, BlendOptions(policy=policy, budget=1.0)))
    stop = setup.plan.stop
    torch.testing.assert_close(
        rows.kv_L2GTD[:, :, :, :stop], setup.full.kv_L2GTD[:, :, :, :stop], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(setup.query_logits(rows), setup.full_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", [p for p in POLICIES if p is not RecomputePolicy.FULL])
def test_no_budget_leaves_every_chunk_row_bit_for_bit(
    setup: Setup, policy: RecomputePolicy
) -> None:
    rows = setup.rows.copy()
    outcome = run_to_end(
        blend(setup.model, rows, setup.plan, BlendOptions(policy=policy, budget=0.0))
    )
    assert outcome.cost == 0.0
    for span in setup.plan.spans:
        assert torch.equal(
            rows.kv_L2GTD[:, :, :, span.start : span.stop],
            setup.rows.kv_L2GTD[:, :, :, span.start : span.stop],
        )


def test_a_budget_that_is_no_share_is_refused(setup: Setup) -> None:
    with pytest.raises(ConfigError, match="share"):
        run_to_end(blend(setup.model, setup.rows, setup.plan, BlendOptions(budget=1.5)))
