"""The controller of budgets: always within bounds, ordered by its targets, and it learns."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ucm.errors import ConfigError
from ucm.reuse.budget import BlendWork, BudgetController
from ucm.reuse.options import BlendOptions, ReuseOptions, ReuseTarget
from ucm.reuse.protocols import BlendOutcome, BlendPlan, ChunkSpan

LOW, HIGH = 0.05, 0.5
SINK = (1, 2, 3, 4)
WORK = BlendWork(num_layers=30, num_rows=1024, num_fresh=10)

any_float = st.floats(allow_nan=True, allow_infinity=True)
works = st.builds(BlendWork, st.integers(0, 100), st.integers(0, 10**6), st.integers(0, 10**4))
events = st.tuples(works, st.floats(0, 1), any_float, any_float, st.floats(0, 1))


def controller(target: ReuseTarget, **more: float) -> BudgetController:
    options = ReuseOptions(sink_tokens=SINK, target=target, min_budget=LOW, max_budget=HIGH)
    for name, value in more.items():
        object.__setattr__(options, name, value)
    return BudgetController(options)


def outcome(cost: float, residual: float | None) -> BlendOutcome:
    return BlendOutcome(cost=cost, rows_per_layer=(), num_fresh=0, residual=residual)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(ReuseTarget), st.lists(events, max_size=30), works)
def test_whatever_is_observed_the_budget_stays_within_bounds(
    target: ReuseTarget,
    history: list[tuple[BlendWork, float, float, float, float]],
    work: BlendWork,
) -> None:
    chooser = controller(target)
    for seen, budget, residual, seconds, cost in history:
        chooser.observe(seen, BlendOptions(budget=budget), outcome(cost, residual), seconds)
    chosen = chooser.choose(work).budget
    if target is ReuseTarget.FIXED:
        assert chosen == BlendOptions().budget
    else:
        assert LOW <= chosen <= HIGH + 1e-12


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(LOW, HIGH), st.floats(0, 2)), max_size=30),
    st.floats(0.001, 1),
    st.floats(0.001, 1),
)
def test_a_stricter_quality_never_gets_a_smaller_budget(
    history: list[tuple[float, float]], a: float, b: float
) -> None:
    budgets = []
    for target in (max(a, b), min(a, b)):
        chooser = controller(ReuseTarget.QUALITY, max_drift=target)
        for budget, residual in history:
            chooser.observe(WORK, BlendOptions(budget=budget), outcome(budget, residual), 1.0)
        budgets.append(chooser.choose(WORK).budget)
    assert budgets[0] <= budgets[1]


@settings(max_examples=30, deadline=None)
@given(st.floats(0.02, 1.0), st.floats(0.03, 0.4), st.floats(0.002, 0.3))
def test_quality_finds_about_the_smallest_budget_that_does(
    drift: float, halving: float, target: float
) -> None:
    def residual(budget: float) -> float:
        return drift * math.pow(0.5, budget / halving)

    chooser = controller(ReuseTarget.QUALITY, max_drift=target)
    for _ in range(60):
        budget = chooser.choose(WORK).budget
        chooser.observe(WORK, BlendOptions(budget=budget), outcome(budget, residual(budget)), 1.0)
    budget = chooser.choose(WORK).budget
    step = (HIGH / LOW) ** (1 / 11)
    # Within a step of the grid on this side, two on the other.
    assert residual(budget * step) <= target * 1.1 or budget == pytest.approx(HIGH)
    smaller = budget / step**2
    assert smaller < LOW or residual(smaller) > target * 0.9


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-4, 1e-2), st.floats(1e-6, 1e-3), st.floats(0.01, 30), st.integers(64, 20_000))
def test_latency_is_kept_once_it_is_known(
    layer_s: float, row_s: float, limit_s: float, num_rows: int
) -> None:
    def seconds(work: BlendWork, budget: float) -> float:
        computed = budget * work.num_rows + work.num_fresh
        return work.num_layers * (layer_s + row_s * computed)

    chooser = controller(ReuseTarget.LATENCY, max_blend_s=limit_s)
    for rows in (256, 512, 1024, 4096) * 6:
        work = BlendWork(30, rows, 5)
        budget = chooser.choose(work).budget
        took = seconds(work, budget)
        chooser.observe(work, BlendOptions(budget=budget), outcome(budget, None), took)
    work = BlendWork(30, num_rows, 5)
    budget = chooser.choose(work).budget
    assert budget == LOW or seconds(work, budget) <= limit_s * 1.15
    assert budget == HIGH or seconds(work, budget * 1.3) >= limit_s * 0.85


def test_quality_sends_probes_where_the_guard_sends_none() -> None:
    assert controller(ReuseTarget.QUALITY).choose(WORK).guard_tokens > 0
    assert controller(ReuseTarget.FIXED).choose(WORK).guard_tokens == 0


def test_the_work_of_a_plan_leaves_exact_chunks_out() -> None:
    spans = (ChunkSpan(start=8, stop=40, is_exact=True), ChunkSpan(start=40, stop=72))
    plan = BlendPlan(token_ids=tuple(range(90)), spans=spans, start=8, stop=75, query_start=75)
    assert BlendWork.of(plan, 4) == BlendWork(num_layers=4, num_rows=32, num_fresh=3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_budget": 0.0},
        {"max_budget": 1.5},
        {"min_budget": 0.6},
        {"max_drift": 0.0},
        {"max_blend_s": math.inf},
    ],
)
def test_senseless_targets_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="reuse"):
        controller(ReuseTarget.QUALITY, **wrong)
