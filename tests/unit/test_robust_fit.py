"""What one learner of costs does with noise, outliers and a world that changes."""

from __future__ import annotations

import math
import random

import pytest

from ucm.robust_fit import PATIENCE, RobustFit

PRIORS = (1e-3, 1e-9)


def test_without_measurements_the_prior_answers() -> None:
    fit = RobustFit(PRIORS)
    assert fit.predict((2, 10**6)) == pytest.approx(2e-3 + 1e-3)
    assert fit.num_observations == 0


@pytest.mark.parametrize("factor", [1e-3, 0.1, 10.0, 1e3])
def test_a_prior_that_is_far_off_is_overcome_in_a_few_measurements(factor: float) -> None:
    fit = RobustFit(PRIORS)
    for size in (10**6, 4 * 10**6, 2 * 10**6, 8 * 10**6, 10**6):
        fit.observe((1, size), factor * (1e-3 + size * 1e-9))
    assert fit.predict((1, 3 * 10**6)) == pytest.approx(factor * 4e-3, rel=0.05)


def test_two_weights_are_told_apart() -> None:
    fit = RobustFit(PRIORS)
    rng = random.Random(1)
    for _ in range(200):
        requests, size = rng.randrange(1, 100), rng.randrange(10**6, 10**8)
        fit.observe((requests, size), (requests * 5e-4 + size * 3e-9) * rng.lognormvariate(0, 0.05))
    request_s, byte_s = fit.weights
    assert request_s == pytest.approx(5e-4, rel=0.15)
    assert byte_s == pytest.approx(3e-9, rel=0.05)


def test_an_outlier_is_set_aside() -> None:
    fit = RobustFit(PRIORS)
    for size in range(10**6, 2 * 10**7, 10**6):
        fit.observe((1, size), size * 2e-9)
    before = fit.predict((1, 10**7))
    assert not fit.observe((1, 10**7), 40 * before)
    assert not fit.observe((1, 10**7), before / 40)
    assert fit.predict((1, 10**7)) == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize("factor", [0.1, 30.0])
def test_a_change_is_accepted_once_it_lasts(factor: float) -> None:
    fit = RobustFit(PRIORS)
    for size in range(10**6, 2 * 10**7, 10**6):
        fit.observe((1, size), size * 2e-9)
    for size in (10**7, 2 * 10**7, 3 * 10**7, 10**7)[: PATIENCE + 1]:
        fit.observe((1, size), factor * size * 2e-9)
    assert fit.predict((1, 10**7)) == pytest.approx(factor * 2e-2, rel=0.1)


def test_a_slow_drift_is_followed() -> None:
    fit = RobustFit(PRIORS)
    rate = 2e-9
    for _ in range(300):
        rate *= 1.01
        fit.observe((1, 10**7), rate * 10**7)
    assert fit.predict((1, 10**7)) == pytest.approx(rate * 10**7, rel=0.1)


def test_what_is_never_excited_does_not_wind_up() -> None:
    fit = RobustFit(PRIORS)
    rng = random.Random(2)
    for _ in range(2000):
        fit.observe((1, 10**7), 1e-2 * rng.lognormvariate(0, 0.1))
    assert fit.predict((1, 10**7)) == pytest.approx(1e-2, rel=0.1)
    # Ten times the bytes and one request: at most what the prior's share of a request allows.
    assert 0.05 < fit.predict((1, 10**8)) < 0.15


def test_the_noise_is_learnt() -> None:
    quiet, loud = RobustFit(PRIORS), RobustFit(PRIORS)
    rng = random.Random(3)
    for _ in range(200):
        size = rng.randrange(10**6, 10**7)
        quiet.observe((1, size), 1e-3 + size * 1e-9)
        loud.observe((1, size), (1e-3 + size * 1e-9) * rng.lognormvariate(0, 0.3))
    assert quiet.noise < 0.06
    assert loud.noise > 0.15


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(value: float) -> None:
    fit = RobustFit(PRIORS)
    assert not fit.observe((1, 1), value)
    assert not fit.observe((0, 0), 1.0)
    assert fit.predict((1, 10**6)) == pytest.approx(2e-3)


def test_a_cost_is_never_negative() -> None:
    fit = RobustFit(PRIORS)
    for size in range(10**6, 10**7, 10**6):
        fit.observe((1, size), max(1e-9, 5e-3 - size * 1e-10))
    assert all(weight > 0 for weight in fit.weights)


@pytest.mark.parametrize("seed", range(40))
def test_machines_drawn_by_chance_are_learnt(seed: int) -> None:
    """Three features whose weights lie orders of magnitude from their priors."""
    rng = random.Random(seed)
    priors = (0.03, 4e-3, 5e-7)
    true = tuple(prior * 10 ** rng.uniform(-2.5, 1.0) for prior in priors)
    fit = RobustFit(priors)
    for step in range(60):
        start, count = rng.randrange(6000), (512, 64, 256, 512)[step % 4]
        seen = (1, count, count * (start + count / 2))
        cost = sum(x * w for x, w in zip(seen, true, strict=True))
        fit.observe(seen, cost * rng.lognormvariate(0.0, 0.05))
    for start, count in ((0, 512), (4000, 512), (0, 128), (2000, 64)):
        seen = (1, count, count * (start + count / 2))
        cost = sum(x * w for x, w in zip(seen, true, strict=True))
        assert fit.predict(seen) == pytest.approx(cost, rel=0.2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, -1e300])
def test_a_measurement_that_cannot_be_is_not_believed(value: float) -> None:
    """Its square would be infinite, and every answer behind it not a number."""
    fit = RobustFit((1.0, 2.0))
    before = fit.predict((1.0, 1.0))
    for _ in range(20):
        assert not fit.observe((1.0, 1.0), value)
    assert fit.predict((1.0, 1.0)) == before
