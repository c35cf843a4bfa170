"""Property: the promise is kept on steps like the audits, and on steps that drift away from them.

The estimates err at random, by an amount that differs from head to head; audits and tests are of
one distribution in the first test, and the errors grow by themselves in the last one.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ucm.errors import InvalidArgumentError
from ucm.sparse.conformal import ConformalOptions, TailCalibrator

HEADS, BLOCKS = 4, 24
F32 = NDArray[np.float32]


def draw_steps(rng: np.random.Generator, count: int, noise: float = 1.0) -> tuple[F32, F32, F32]:
    """True log masses of blocks and of the rest, and noisy estimates."""
    true = rng.normal(size=(count, HEADS, BLOCKS)) * 2.0
    spread = noise * np.linspace(0.2, 1.5, HEADS)[None, :, None]
    estimates = true + rng.normal(size=true.shape) * spread
    rest = np.full((count, HEADS), 1.0)
    return estimates.astype(np.float32), true.astype(np.float32), rest.astype(np.float32)


def must_blocks() -> NDArray[np.bool_]:
    must = np.zeros(BLOCKS, np.bool_)
    must[[0, -1]] = True
    return must


def missed_share(calibrator: TailCalibrator, steps: tuple[F32, F32, F32]) -> tuple[float, float]:
    """(share of heads beyond the limit, share of blocks read) of selections, not of audits."""
    missed, read = [], []
    for estimate, true, rest in zip(*steps, strict=True):
        chosen = calibrator.select(estimate[None], must_blocks())
        mass = np.exp(true.astype(np.float64))
        unread = mass[:, ~chosen].sum(1)
        total = mass.sum(1) + np.exp(rest.astype(np.float64))
        missed.append(float((unread > calibrator.options.tail_mass * total).mean()))
        read.append(float(chosen.mean()))
    return float(np.mean(missed)), float(np.mean(read))


@pytest.mark.parametrize("delta", [0.01, 0.05])
def test_the_promise_is_kept_and_used_up_on_exchangeable_steps(delta: float) -> None:
    rng = np.random.default_rng(7)
    calibrator = TailCalibrator(ConformalOptions(delta=delta), HEADS)
    estimate, true, rest = draw_steps(rng, 1000)
    calibrator.audit(estimate, must_blocks(), true, rest)
    missed, read = missed_share(calibrator, draw_steps(rng, 2000))
    assert missed == pytest.approx(delta, abs=0.01)
    assert read < 0.95


def test_drift_is_tracked() -> None:
    rng = np.random.default_rng(11)
    steady = TailCalibrator(ConformalOptions(delta=0.05, rate=0.0), HEADS)
    tracked = TailCalibrator(ConformalOptions(delta=0.05), HEADS)
    for calibrator in (steady, tracked):
        estimate, true, rest = draw_steps(np.random.default_rng(3), 1000)
        calibrator.audit(estimate, must_blocks(), true, rest)
    shares: dict[int, list[float]] = {id(steady): [], id(tracked): []}
    for _ in range(40):
        steps = draw_steps(rng, 20, noise=2.0)
        for calibrator in (steady, tracked):
            shares[id(calibrator)].append(missed_share(calibrator, steps)[0])
            estimate, true, rest = (x[:10] for x in steps)
            calibrator.audit(estimate, must_blocks(), true, rest)
    late = {key: float(np.mean(each[10:])) for key, each in shares.items()}
    assert late[id(tracked)] == pytest.approx(0.05, abs=0.01)
    assert abs(late[id(tracked)] - 0.05) < abs(late[id(steady)] - 0.05)


def test_everything_is_read_until_enough_is_known() -> None:
    options = ConformalOptions(delta=0.05)
    calibrator = TailCalibrator(options, HEADS)
    estimate, true, rest = draw_steps(np.random.default_rng(1), options.min_audits)
    for step in range(options.min_audits):
        assert not calibrator.is_ready
        assert calibrator.select(estimate[step : step + 1], must_blocks()).all()
        one = (x[step : step + 1] for x in (true, rest))
        calibrator.audit(estimate[step : step + 1], must_blocks(), *one)
    assert calibrator.is_ready
    assert calibrator.stats.audits == 0


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), queries=st.integers(1, 3), scale=st.floats(0.0, 100.0))
def test_a_selection_holds_the_must_blocks_and_audits_agree_with_it(
    seed: int, queries: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    calibrator = TailCalibrator(ConformalOptions(delta=0.2, rate=0.0), HEADS)
    estimate, true, rest = draw_steps(rng, 60)
    calibrator.audit(estimate, must_blocks(), true, rest)
    estimate, true, rest = (x * np.float32(scale) for x in draw_steps(rng, queries))
    estimate[:, :, 0] = -np.inf
    for step in range(queries):
        one = slice(step, step + 1)
        chosen = calibrator.select(estimate[one], must_blocks())
        assert chosen[must_blocks()].all()
        mass = np.exp(true[step].astype(np.float64) - true[step].max())
        unread = mass[:, ~chosen].sum(1)
        total = mass.sum(1) + np.exp(rest[step].astype(np.float64) - true[step].max())
        missed = calibrator.audit(estimate[one], must_blocks(), true[one], rest[one])
        assert missed[0] == (unread > calibrator.options.tail_mass * total * (1 + 1e-12)).mean()


def test_the_newest_audits_are_remembered() -> None:
    options = ConformalOptions(delta=0.2, capacity=50, rate=0.0)
    calibrator = TailCalibrator(options, HEADS)
    exact = TailCalibrator(options, HEADS)
    for noise in (2.0, 0.0):
        estimate, true, rest = draw_steps(np.random.default_rng(2), 80, noise)
        calibrator.audit(estimate, must_blocks(), true, rest)
        assert calibrator.num_scores == 50
    exact.audit(estimate[-50:], must_blocks(), true[-50:], rest[-50:])
    steps = draw_steps(np.random.default_rng(5), 50, 0.0)
    assert missed_share(calibrator, steps) == missed_share(exact, steps)


@pytest.mark.parametrize(
    ("shape", "bad"),
    [
        ((1, HEADS + 1, BLOCKS), 0.0),
        ((HEADS, BLOCKS), 0.0),
        ((1, HEADS, BLOCKS - 1), 0.0),
        ((1, HEADS, BLOCKS), np.nan),
        ((1, HEADS, BLOCKS), -np.inf),
    ],
)
def test_estimates_that_fit_nothing_are_refused(shape: tuple[int, ...], bad: float) -> None:
    estimates = np.zeros(shape, np.float32)
    estimates[..., 3] += np.float32(bad)
    with pytest.raises(InvalidArgumentError):
        TailCalibrator(ConformalOptions(), HEADS).select(estimates, must_blocks())


@pytest.mark.parametrize(
    "options",
    [{"delta": 0.0}, {"delta": 1.0}, {"tail_mass": 0.0}, {"audit_stride": 0}, {"capacity": 10}],
)
def test_a_promise_of_nothing_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidArgumentError):
        ConformalOptions(**options)  # type: ignore[arg-type]
