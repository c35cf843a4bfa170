"""Blending under any options: nested sets, the budget, the order of reads, and resuming."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ucm.reuse.blending import blend
from ucm.reuse.dense_rows import run_to_end
from ucm.reuse.options import BlendOptions, RecomputePolicy
from ucm.testing.blend_setup import BlendSetup, RecordingRows, blend_setup

pytestmark = pytest.mark.timeout(60)

setup_of = functools.cache(blend_setup)

options = st.builds(
    BlendOptions,
    policy=st.sampled_from(RecomputePolicy),
    budget=st.floats(0, 1),
    decay=st.floats(0, 3),
    theta=st.floats(0, 0.5),
    num_queries=st.integers(1, 40),
    narrow_share=st.floats(0, 1),
    importance_layers=st.none() | st.integers(1, 8),
    guard_tokens=st.integers(0, 6),
    slice_tokens=st.integers(1, 300),
    seed=st.integers(0, 5),
)


def positions_of(setup: BlendSetup) -> tuple[set[int], set[int]]:
    """(candidate, fresh) positions of a plan."""
    held = {p for span in setup.plan.spans for p in range(span.start, span.stop)}
    exact = {p for s in setup.plan.spans if s.is_exact for p in range(s.start, s.stop)}
    return held - exact, set(range(setup.plan.start, setup.plan.stop)) - held


@settings(max_examples=20, deadline=None)
@given(options, st.booleans())
def test_sets_are_nested_paid_for_and_written_once(
    chosen: BlendOptions, is_first_exact: bool
) -> None:
    setup = setup_of(is_first_exact=is_first_exact)
    candidates, fresh = positions_of(setup)
    rows = RecordingRows(setup.rows.copy())
    outcome = run_to_end(blend(setup.model, rows, setup.plan, chosen))
    num_layers = setup.model.num_layers
    sets = [rows.writes.get(layer, []) for layer in range(num_layers)]
    for written in sets:
        assert len(written) == len(set(written))
        assert fresh <= set(written) <= candidates | fresh
        assert written == sorted(written)
    for wider, narrower in itertools.pairwise(sets):
        assert set(narrower) <= set(wider)
    ran = [len(set(later) & candidates) for later in sets[1:]]
    assert list(outcome.rows_per_layer) == [*ran, 0]
    least = sum(ran) + len(set(sets[0]) & candidates) * setup.model.projection_share
    assert outcome.cost * num_layers * len(candidates) >= least * (1 - 1e-6)
    if chosen.policy is not RecomputePolicy.FULL:
        assert outcome.cost <= chosen.budget + 1e-9


@settings(max_examples=20, deadline=None)
@given(options)
def test_a_layer_is_announced_before_it_is_read(chosen: BlendOptions) -> None:
    setup = setup_of()
    rows = RecordingRows(setup.rows.copy())
    announced: set[int] = set()
    for step in blend(setup.model, rows, setup.plan, chosen):
        assert set(rows.reads) <= announced
        announced.add(step.next_layer)
    assert sorted(set(rows.reads)) == list(range(setup.model.num_layers))
    ahead = chosen.importance_layers
    if ahead is not None:
        for layer, seen in rows.reads_before_write.items():
            assert max(seen) <= layer + ahead


@settings(max_examples=8, deadline=None)
@given(options, st.integers(1, 300))
def test_slices_of_any_size_give_the_same_rows(chosen: BlendOptions, size: int) -> None:
    setup = setup_of()
    results = []
    for slice_tokens in (chosen.slice_tokens, size):
        rows = setup.rows.copy()
        sliced = BlendOptions(
            policy=chosen.policy,
            budget=chosen.budget,
            theta=0.0,
            narrow_share=chosen.narrow_share,
            slice_tokens=slice_tokens,
        )
        run_to_end(blend(setup.model, rows, setup.plan, sliced))
        results.append(rows.kv_L2GTD)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@settings(max_examples=8, deadline=None)
@given(options, options, st.lists(st.booleans(), max_size=200))
def test_other_work_between_steps_changes_nothing(
    first: BlendOptions, second: BlendOptions, turns: list[bool]
) -> None:
    setup = setup_of()
    alone = []
    for chosen in (first, second):
        rows = setup.rows.copy()
        run_to_end(blend(setup.model, rows, setup.plan, chosen))
        alone.append(rows.kv_L2GTD)
    together = [setup.rows.copy(), setup.rows.copy()]
    jobs = [
        blend(setup.model, rows, setup.plan, chosen)
        for rows, chosen in zip(together, (first, second), strict=True)
    ]
    for turn in turns:
        next(jobs[turn], None)
    for job in jobs:
        for _ in job:
            pass
    for rows, expected in zip(together, alone, strict=True):
        assert torch.equal(rows.kv_L2GTD, expected)
