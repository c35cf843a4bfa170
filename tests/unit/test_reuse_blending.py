"""Blending of chunks on a tiny model: what is recomputed, what it costs, what it gives."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch

from ucm.engine.loading import load_model
from ucm.errors import ConfigError
from ucm.reuse.blending import blend
from ucm.reuse.dense_rows import (
    DenseRows,
    assemble,
    compute,
    compute_branches,
    encode_chunk,
    run_to_end,
)
from ucm.reuse.options import BlendOptions, RecomputePolicy, ReuseOptions, ReuseTarget
from ucm.reuse.protocols import BlendOutcome
from ucm.reuse.segments import Chunk, ChunkSpace, SegmentedPrompt, Text
from ucm.testing.blend_setup import BlendSetup, blend_setup
from ucm.testing.models import require_real_model

POLICIES = tuple(RecomputePolicy)
BUDGETS = (0.0, 0.05, 0.1, 0.18, 0.3, 0.6, 1.0)
NUM_LAYERS = 6

setup_of = functools.cache(blend_setup)


@pytest.fixture
def setup() -> BlendSetup:
    return setup_of()


def blend_copy(setup: BlendSetup, options: BlendOptions) -> tuple[DenseRows, BlendOutcome]:
    rows = setup.rows.copy()
    return rows, run_to_end(blend(setup.model, rows, setup.plan, options))


def test_branches_are_what_each_of_them_is_alone(setup: BlendSetup) -> None:
    plan, context = setup.plan, setup.plan.token_ids[: setup.plan.stop]
    branches = [plan.token_ids[plan.stop :], (5, 6, 7), (9,)]
    together = compute_branches(setup.model, setup.full.copy(), branches, plan.stop)
    for branch, found in zip(branches, together, strict=True):
        alone = compute(setup.model, setup.full.copy(), (*context, *branch), plan.stop)
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_what_is_reported_and_spent_never_exceeds_the_budget(
    setup: BlendSetup, policy: RecomputePolicy, budget: float
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


@pytest.mark.parametrize("importance_layers", [None, 1])
@pytest.mark.parametrize("policy", [RecomputePolicy.PROGRESSIVE, RecomputePolicy.QUERY])
def test_rows_in_front_of_the_chunks_are_exact(
    setup: BlendSetup, policy: RecomputePolicy, importance_layers: int | None
) -> None:
    """The stage that looks for what matters computes them, and its queries see them."""
    options = BlendOptions(policy=policy, budget=0.18, importance_layers=importance_layers)
    rows, _ = blend_copy(setup, options)
    front = slice(setup.plan.start - 3, setup.plan.start)
    plan = dataclasses.replace(setup.plan, start=front.start)
    late = setup.rows.copy()
    late.kv_L2GTD[:, :, :, front] = 7.0  # arbitrary: nobody has computed them
    outcome = run_to_end(blend(setup.model, late, plan, options))
    assert outcome.num_fresh == 3 + 3 + 3
    torch.testing.assert_close(late.kv_L2GTD, rows.kv_L2GTD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", [p for p in POLICIES if p is not RecomputePolicy.NONE])
@pytest.mark.parametrize("guard_tokens", [0, 8])
def test_the_whole_budget_equals_a_full_prefill(
    setup: BlendSetup, policy: RecomputePolicy, guard_tokens: int
) -> None:
    options = BlendOptions(policy=policy, budget=1.0, guard_tokens=guard_tokens, guard_limit=0.0)
    rows, outcome = blend_copy(setup, options)
    assert outcome.drifted == (), "no row was kept that could have drifted"
    stop = setup.plan.stop
    torch.testing.assert_close(
        rows.kv_L2GTD[:, :, :, :stop], setup.full.kv_L2GTD[:, :, :, :stop], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(setup.query_logits(rows), setup.full_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", [p for p in POLICIES if p is not RecomputePolicy.FULL])
def test_no_budget_leaves_every_chunk_row_bit_for_bit(
    setup: BlendSetup, policy: RecomputePolicy
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


def test_a_policy_goes_by_its_name(setup: BlendSetup) -> None:
    _, outcome = blend_copy(setup, BlendOptions(policy="none", budget=0.5))  # type: ignore[arg-type]
    assert outcome.cost == 0.0
    assert ReuseOptions(sink_tokens=(1,), target="latency").target is ReuseTarget.LATENCY  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="one of none, cacheblend"):
        BlendOptions(policy="best")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"budget": 1.5}, "share"),
        ({"budget": math.nan}, "share"),
        ({"theta": math.nan}, "theta"),
        ({"guard_limit": -1.0}, "guard_limit"),
        ({"decay": math.inf}, "decay"),
        ({"narrow_share": -0.1}, "narrow_share"),
        ({"num_queries": 0}, "num_queries"),
        ({"importance_layers": 0}, "importance_layers"),
        ({"guard_tokens": -1}, "guard_tokens"),
        ({"slice_tokens": 0}, "slice_tokens"),
    ],
)
def test_options_that_no_blend_can_have(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BlendOptions(**setting)


def test_what_does_not_drift_leaves_and_is_not_paid_for(setup: BlendSetup) -> None:
    exact = setup.full.copy()
    options = BlendOptions(budget=0.5, theta=0.02)
    outcome = run_to_end(blend(setup.model, exact, setup.plan, options))
    assert outcome.rows_per_layer[0] > 0
    assert sum(outcome.rows_per_layer[1:]) == 0
    assert outcome.cost < 0.3


def test_more_budget_brings_the_query_closer_to_a_full_prefill(setup: BlendSetup) -> None:
    def distance(budget: float) -> float:
        rows, _ = blend_copy(setup, BlendOptions(budget=budget))
        return float((setup.query_logits(rows) - setup.full_logits).abs().mean())

    far, near, nearer = distance(0.0), distance(0.4), distance(0.8)
    assert far > near > nearer > 1e-3


@pytest.mark.parametrize("policy", [RecomputePolicy.PROGRESSIVE, RecomputePolicy.QUERY])
def test_only_progressive_leaves_out_what_was_not_chosen(
    setup: BlendSetup, policy: RecomputePolicy
) -> None:
    """A share above 1 makes every layer narrow."""
    wide, narrow = (
        blend_copy(setup, BlendOptions(policy=policy, budget=0.3, narrow_share=share, theta=0.0))
        for share in (0.0, 2.0)
    )
    is_same = policy is RecomputePolicy.QUERY
    assert torch.equal(wide[0].kv_L2GTD, narrow[0].kv_L2GTD) is is_same
    assert narrow[1].cost <= 0.3


def test_nothing_is_narrow_where_the_query_looks_at_everything(setup: BlendSetup) -> None:
    """The tiny model's attention is nearly even."""
    wide, narrow = (
        blend_copy(setup, BlendOptions(budget=0.3, narrow_share=share))[0] for share in (0.0, 0.015)
    )
    assert torch.equal(wide.kv_L2GTD, narrow.kv_L2GTD)


def test_the_set_shrinks_with_depth_and_faster_with_more_decay(setup: BlendSetup) -> None:
    for decay in (0.0, 0.5, 2.0):
        _, outcome = blend_copy(setup, BlendOptions(budget=0.3, decay=decay, theta=0.0))
        sizes = outcome.rows_per_layer[:-1]
        assert list(sizes) == sorted(sizes, reverse=True)
        # Layer 0 is wider than the schedule says, for one look at the drift.
        assert sizes[0] > sizes[1]
        if decay == 0.0:
            assert sizes[1] - sizes[-1] <= 1
        else:
            assert sizes[-1] < sizes[1] * 0.8


def test_an_exact_chunk_is_left_alone_by_every_policy() -> None:
    setup = setup_of(is_first_exact=True)
    first = setup.plan.spans[0]
    assert first.is_exact
    for policy in POLICIES:
        rows, outcome = blend_copy(setup, BlendOptions(policy=policy, budget=0.9, guard_tokens=2))
        span = slice(first.start, first.stop)
        assert torch.equal(rows.kv_L2GTD[:, :, :, span], setup.rows.kv_L2GTD[:, :, :, span])
        assert outcome.drift[0] == 0.0


def test_the_guard_names_the_chunk_that_is_wrong(setup: BlendSetup) -> None:
    rows, wrong = setup.full.copy(), setup.plan.spans[2]
    rows.kv_L2GTD[:, :, :, wrong.start : wrong.stop] *= 3
    options = BlendOptions(budget=0.3, guard_tokens=4, guard_limit=0.1, theta=0.0)
    outcome = run_to_end(blend(setup.model, rows, setup.plan, options))
    assert outcome.drifted == (2,)
    assert max(outcome.drift[:2]) < 1e-3
    assert outcome.drift[2] > 0.5
    assert outcome.cost <= 0.3


def test_probes_fall_away_where_the_budget_cannot_pay_for_them(setup: BlendSetup) -> None:
    _, outcome = blend_copy(setup, BlendOptions(budget=0.05, guard_tokens=8))
    assert outcome.drift == ()
    assert outcome.drifted == ()
    assert outcome.residual is None


def test_what_is_left_of_the_drift_falls_with_the_budget(setup: BlendSetup) -> None:
    left = []
    for budget in (0.15, 0.5, 0.9):
        _, outcome = blend_copy(setup, BlendOptions(budget=budget, guard_tokens=2))
        assert outcome.residual is not None
        left.append(outcome.residual)
    assert left == sorted(left, reverse=True)
    assert 0 < left[0] <= 10


def test_without_a_query_chunk_heads_are_recomputed(setup: BlendSetup) -> None:
    plan = dataclasses.replace(setup.plan, token_ids=setup.plan.token_ids[: setup.plan.stop])
    rows, by_heads = setup.rows.copy(), setup.rows.copy()
    run_to_end(blend(setup.model, rows, plan, BlendOptions(budget=0.4)))
    lego = BlendOptions(policy=RecomputePolicy.LEGO, budget=0.4)
    run_to_end(blend(setup.model, by_heads, plan, lego))
    assert torch.equal(rows.kv_L2GTD, by_heads.kv_L2GTD)


def test_a_model_of_one_layer_has_nothing_to_repair() -> None:
    setup = setup_of(num_layers=1)
    for policy in POLICIES:
        rows, _ = blend_copy(setup, BlendOptions(policy=policy, budget=0.1))
        torch.testing.assert_close(setup.query_logits(rows), setup.full_logits)


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_real_model_equals_its_full_prefill() -> None:
    loaded = load_model(require_real_model())
    model = loaded.model
    text = "The cache keeps what attention has computed, so that it need not be computed again. "
    tokens = tuple(loaded.tokenizer.encode(text * 20))
    space = ChunkSpace(b"real", tokens[:8], 32)
    chunks = [Chunk(tokens[at : at + 32], space) for at in (20, 150)]
    prompt = SegmentedPrompt((Text(tokens[:12]), *chunks, Text(tokens[182:190])))
    encoded = {chunk: encode_chunk(model, chunk) for chunk in chunks}
    rows, plan = assemble(model, loaded.config.rope, prompt, encoded)
    full = DenseRows(torch.zeros_like(rows.kv_L2GTD), plan.stop)
    hidden_TC = compute(model, full, plan.token_ids, 0)
    run_to_end(blend(model, rows, plan, BlendOptions(budget=1.0)))
    hidden_QC = compute(model, rows, plan.token_ids, plan.stop)
    torch.testing.assert_close(
        model.logits(hidden_QC), model.logits(hidden_TC[plan.stop :]), rtol=1e-4, atol=1e-4
    )
