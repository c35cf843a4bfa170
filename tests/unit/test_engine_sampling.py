"""Sampling: each filter against its definition, the order of filters, reproducible noise."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from ucm.engine.sampling import Draw, SamplingParams, gumbel_noise, keep, penalise, sample
from ucm.errors import CorruptionError, InvalidArgumentError

SCORES = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2]))


def draw(params: SamplingParams, *, position: int = 3, sample_index: int = 0, row: int = 0) -> Draw:
    return Draw(row=row, params=params, sample_index=sample_index, position=position)


def kept(**settings: Any) -> list[int]:
    return list(keep(SCORES, SamplingParams(temperature=1.0, **settings)))


def test_greedy_takes_the_largest_and_the_lowest_id_of_equals() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0], [3.0, 3.0, 0.0]])
    params = SamplingParams()
    assert sample(logits, [draw(params), draw(params, row=1)]) == [1, 0]


def test_filters_keep_what_their_definition_says() -> None:
    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_k=99) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.64) == [1, 3]
    assert kept(top_p=0.66) == [1, 3, 4]
    assert kept(top_p=0.01) == [1]
    assert kept(min_p=0.5) == [1, 3, 4]
    assert kept(min_p=1.0) == [1]
    assert kept(top_k=3, top_p=0.7) == [1, 3], "top-p sees what top-k left: 0.47, 0.29, 0.24"
    assert kept(top_p=0.9, min_p=0.6) == [1, 3]


def test_the_nucleus_ends_where_its_mass_is_reached() -> None:
    scores = np.log([0.5, 0.25, 0.25])
    assert list(keep(scores, SamplingParams(temperature=1.0, top_p=0.5))) == [0]
    assert list(keep(scores, SamplingParams(temperature=1.0, top_p=0.75))) == [0, 1]


def test_top_k_breaks_ties_by_id() -> None:
    scores = np.array([1.0, 2.0, 1.0, 1.0, 0.0])
    assert list(keep(scores, SamplingParams(temperature=1.0, top_k=3))) == [0, 1, 2]


def test_nucleus_equals_the_plain_algorithm() -> None:
    generator = np.random.default_rng(5)
    for top_p in (0.05, 0.5, 0.9, 0.999):
        scores = 4.0 * generator.standard_normal(2000)
        weights = np.exp(scores - scores.max())
        probabilities = weights / weights.sum()
        order = np.argsort(-probabilities, kind="stable")
        size = int((np.cumsum(probabilities[order]) < top_p).sum()) + 1
        got = keep(scores, SamplingParams(temperature=1.0, top_p=top_p))
        assert sorted(order[:size]) == list(got)


def test_temperature_comes_before_the_filters() -> None:
    logits = torch.from_numpy(SCORES.astype(np.float32))[None, :]
    for position in range(50):
        cold = SamplingParams(temperature=0.01, top_p=0.9)
        assert sample(logits, [draw(cold, position=position)]) == [1]
    hot = SamplingParams(temperature=100.0, top_p=0.9)
    tokens = {sample(logits, [draw(hot, position=position)])[0] for position in range(200)}
    assert tokens == {0, 1, 2, 3, 4}


def test_repetition_penalty_follows_its_sign_and_comes_first() -> None:
    row = np.array([4.0, -1.0, 3.0], dtype=np.float32)
    seen = np.array([True, True, False])
    assert list(penalise(row, seen, 2.0)) == [2.0, -2.0, 3.0]
    assert list(row) == [4.0, -1.0, 3.0]
    params = SamplingParams(repetition_penalty=2.0)
    one = Draw(row=0, params=params, sample_index=0, position=0, seen=seen)
    assert sample(torch.from_numpy(row)[None, :], [one]) == [2]


def test_draws_follow_the_distribution() -> None:
    logits = torch.from_numpy(SCORES.astype(np.float32))[None, :]
    params = SamplingParams(temperature=1.0, seed=11)
    draws = [draw(params, position=position) for position in range(4000)]
    counts = np.bincount(sample(logits, draws), minlength=5) / 4000
    assert np.abs(counts - np.exp(SCORES)).max() < 0.03


def test_noise_is_a_pure_function_with_a_golden_value() -> None:
    first = gumbel_noise(100, 7, 1, 42)
    assert np.array_equal(first, gumbel_noise(100, 7, 1, 42))
    assert np.array_equal(first[:10], gumbel_noise(10, 7, 1, 42)), "by token id"
    assert np.isfinite(first).all()
    golden = [-1.9379679528423794, -0.37791600910242606, -0.7107182642945375]
    assert first[:3].tolist() == pytest.approx(golden, abs=1e-12)


def test_seed_sample_and_position_all_change_the_noise() -> None:
    keys = list(itertools.product((0, 1, 2**64 - 1), (0, 1), (0, 1, 4095)))
    rows = {gumbel_noise(8, *key).tobytes() for key in keys}
    assert len(rows) == len(keys)


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 50, generator=generator)
    params = [SamplingParams(temperature=0.9, top_k=20, seed=i) for i in range(6)]
    alone = [sample(logits[i : i + 1], [draw(params[i])])[0] for i in range(6)]
    together = sample(logits, [draw(params[i], row=i) for i in range(6)])
    assert together == alone
    backwards = sample(logits.flip(0), [draw(params[i], row=5 - i) for i in range(6)])
    assert backwards == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_an_error(bad: float, temperature: float) -> None:
    logits = torch.tensor([[0.0, bad, 1.0]])
    with pytest.raises(CorruptionError, match="weights or the KV cache"):
        sample(logits, [draw(SamplingParams(temperature=temperature))])
    with pytest.raises(CorruptionError):
        sample(torch.full((1, 3), float("-inf")), [draw(SamplingParams(temperature=temperature))])


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": 2**64},
        {"n": 0},
        {"n": 65},
    ],
)
def test_impossible_parameters_are_refused_by_name(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(InvalidArgumentError, match=f"sampling: {name} is"):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 5e-324},
        {"temperature": 1e-320, "top_p": 0.9},
        {"temperature": 1e-308, "top_k": 500, "min_p": 1.0},
        {"temperature": 1e300, "top_k": 1},
        {"temperature": 1.0, "top_p": 5e-324},
    ],
)
def test_extreme_but_valid_parameters_still_choose_the_likeliest(settings: dict[str, Any]) -> None:
    logits = torch.tensor([[-5.0, 7.0, 3.0, 6.5]])
    assert sample(logits, [draw(SamplingParams(**settings))]) == [1]


@pytest.mark.parametrize("penalty", [5e-324, 1e-40, 3e38, 1e300])
def test_an_extreme_penalty_leaves_finite_scores(penalty: float) -> None:
    row = np.array([-5.0, 7.0, 3.0, 6.5], dtype=np.float32)
    assert np.isfinite(penalise(row, np.ones(4, dtype=np.bool_), penalty)).all()
