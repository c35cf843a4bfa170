"""Synthetic traces: seeded, prefix-chained, and of the kind that they say."""

from __future__ import annotations

import itertools

import pytest

from ucm.bench.policy_replay import replay_ideal, steps_of
from ucm.bench.synthetic import KINDS, SyntheticOptions, synthesize


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_trace(kind: str) -> None:
    options = SyntheticOptions(kind=kind, num_requests=300)
    assert synthesize(options) == synthesize(options)
    assert synthesize(options) != synthesize(SyntheticOptions(kind=kind, num_requests=300, seed=1))


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_names_a_block_and_everything_before_it(kind: str) -> None:
    before: dict[int, int] = {}
    requests = synthesize(SyntheticOptions(kind=kind, num_requests=300))
    assert len(requests) == 300
    for request in requests:
        chain = (-1, *request.block_ids)
        assert request.input_tokens == len(request.block_ids) * request.block_tokens
        for parent, block in itertools.pairwise(chain):
            assert before.setdefault(block, parent) == parent
    times = [request.t_ns for request in requests]
    assert times == sorted(times)


def test_the_kinds_differ_in_what_they_share() -> None:
    ratios = {
        kind: replay_ideal(
            steps_of(synthesize(SyntheticOptions(kind=kind, num_requests=2000)))
        ).hit_ratio
        for kind in KINDS
    }
    assert ratios["scan"] == 0
    assert 0.2 < ratios["chat"] < 0.6
    assert 0.3 < ratios["rag"] < 0.9
    assert ratios["agent"] > 0.8


def test_the_rate_is_about_what_was_asked_for() -> None:
    requests = synthesize(SyntheticOptions(kind="chat", num_requests=6000, requests_per_s=10.0))
    half = requests[3000:]
    span_s = (half[-1].t_ns - half[0].t_ns) / 1e9
    assert 7 < len(half) / span_s < 14
