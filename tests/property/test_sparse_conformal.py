"""Property: the promise is kept on steps like the audits, and on sequences that drift from them.

The estimates err at random, by an amount that differs from head to head; audits and tests are of
one distribution in the first test. In the streams of the later ones the errors grow, turn to one
side, or change again and again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ucm.errors import InvalidArgumentError
from ucm.sparse.conformal import ConformalOptions, Drift, TailCalibrator

HEADS, BLOCKS, LAYERS = 4, 24, 4
F32 = NDArray[np.float32]


def draw_steps(
    rng: np.random.Generator, count: int, noise: float = 1.0, bias: float = 0.0
) -> Steps:
    """Steps whose blocks are estimated too low by `bias`, give or take `noise`."""
    true = rng.normal(size=(count, HEADS, BLOCKS)) * 2.0
    spread = noise * np.linspace(0.2, 1.5, HEADS)[None, :, None]
    estimates = true + rng.normal(size=true.shape) * spread - bias
    known = np.full((count, HEADS), 1.0)
    return Steps(*(each.astype(np.float32) for each in (estimates, true, known)))


@dataclass(frozen=True)
class Steps:
    """Noisy estimates, true log masses of blocks, and that of what is always read."""

    estimates: F32
    true: F32
    known: F32

    def __getitem__(self, part: slice) -> Steps:
        return Steps(self.estimates[part], self.true[part], self.known[part])

    def audit(self, calibrator: TailCalibrator, shift: float = 0.0) -> NDArray[np.float64]:
        return calibrator.audit(self.estimates, must_blocks(), self.known, self.true, shift)

    def select(self, calibrator: TailCalibrator, shift: float = 0.0) -> NDArray[np.bool_]:
        return calibrator.select(self.estimates, must_blocks(), self.known, shift)

    def missed(self, chosen: NDArray[np.bool_], limit: float) -> float:
        """Share of heads beyond the limit, of one step."""
        base = np.maximum(self.true[0].max(1), self.known[0]).astype(np.float64)
        mass = np.exp(self.true[0] - base[:, None])
        total = mass.sum(1) + np.exp(self.known[0] - base)
        return float((mass[:, ~chosen].sum(1) > limit * total * (1 + 1e-12)).mean())


def must_blocks() -> NDArray[np.bool_]:
    must = np.zeros(BLOCKS, np.bool_)
    must[[0, -1]] = True
    return must


def missed_share(
    calibrator: TailCalibrator, steps: Steps, shift: float = 0.0
) -> tuple[float, float]:
    """(share of heads beyond the limit, share of blocks read) of selections, not of audits."""
    missed, read = [], []
    for step in range(len(steps.true)):
        one = steps[step : step + 1]
        chosen = one.select(calibrator, shift)
        missed.append(one.missed(chosen, calibrator.options.tail_mass))
        read.append(float(chosen.mean()))
    return float(np.mean(missed)), float(np.mean(read))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("delta", [0.01, 0.05])
def test_the_promise_is_kept_and_used_up_on_exchangeable_steps(delta: float) -> None:
    rng = np.random.default_rng(7)
    calibrator = TailCalibrator(ConformalOptions(delta=delta), HEADS)
    draw_steps(rng, 1000).audit(calibrator)
    missed, read = missed_share(calibrator, draw_steps(rng, 2000))
    assert missed == pytest.approx(delta, abs=0.01)
    assert read < 0.95


def decode(options: ConformalOptions, regimes: list[tuple[float, float]], seed: int) -> float:
    """Share of violations of a sequence that changes its ways every 120 steps.

    It is decoded through layers that have learnt from steady steps, as an engine would do it.
    """
    rng = np.random.default_rng(seed)
    calibrators = [TailCalibrator(options, HEADS) for _ in range(LAYERS)]
    for calibrator in calibrators:
        draw_steps(rng, 300).audit(calibrator)
    drift, missed, step = Drift(options), [], 0
    for noise, bias in regimes:
        layers = [draw_steps(rng, 120, noise, bias) for _ in calibrators]
        for row in range(120):
            ones = [steps[row : row + 1] for steps in layers]
            if step < options.opening_audits or step % options.audit_stride == 0:
                audit_all(calibrators, ones, drift)
            else:
                missed += select_all(calibrators, ones, drift)
            step += 1
    return float(np.mean(missed))


def audit_all(calibrators: list[TailCalibrator], ones: list[Steps], drift: Drift) -> None:
    for calibrator, one in zip(calibrators, ones, strict=True):
        drift.observe(one.audit(calibrator, drift.shift), LAYERS)


def select_all(calibrators: list[TailCalibrator], ones: list[Steps], drift: Drift) -> list[float]:
    """Share of violations in each layer."""
    return [
        one.missed(one.select(calibrator, drift.shift), calibrator.options.tail_mass)
        for calibrator, one in zip(calibrators, ones, strict=True)
    ]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "regimes",
    [
        [(2.0, 0.0)] * 2,
        [(1.0, 0.7)] * 2,
        [(1.0, 0.0), (1.5, 0.5), (0.5, 0.0), (2.0, 0.5)],
    ],
    ids=["noisier", "estimated too low", "changing"],
)
def test_a_sequence_unlike_those_before_keeps_the_promise(
    regimes: list[tuple[float, float]],
) -> None:
    options = ConformalOptions(delta=0.02, capacity=400)
    trusting = replace(options, rate=0.0)
    found = decode(options, regimes, 3)
    assert found <= options.delta + 0.01
    assert found < decode(trusting, regimes, 3)


@settings(max_examples=200, deadline=None)
@given(
    missed=st.lists(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=3), max_size=60),
    delta=st.floats(0.001, 0.5),
    rate=st.floats(0.01, 5.0),
)
def test_whatever_audits_show_the_shift_pays_for_what_was_missed(
    missed: list[list[float]], delta: float, rate: float
) -> None:
    """The module's bound of a sequence's mean violation."""
    drift = Drift(ConformalOptions(delta=delta, rate=rate, capacity=10_000))
    for each in missed:
        drift.observe(np.array(each), 2)
        assert drift.shift >= 0.0
    num = sum(map(len, missed))
    assert sum(map(sum, missed)) <= num * delta + 2 * drift.shift / rate + 1e-9


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shifts=st.tuples(st.floats(0, 5), st.floats(0, 5)))
def test_a_larger_shift_reads_more_and_a_huge_one_everything(
    seed: int, shifts: tuple[float, float]
) -> None:
    rng = np.random.default_rng(seed)
    calibrator = TailCalibrator(ConformalOptions(delta=0.2), HEADS)
    draw_steps(rng, 40).audit(calibrator)
    step = draw_steps(rng, 1)
    less, more = (step.select(calibrator, shift) for shift in sorted(shifts))
    assert (more | ~less).all()
    assert step.select(calibrator, 1e6).all()


def test_heads_that_look_at_what_is_always_read_ask_for_nothing() -> None:
    rng = np.random.default_rng(4)
    calibrator = TailCalibrator(ConformalOptions(delta=0.2), HEADS)
    draw_steps(rng, 60).audit(calibrator)
    step = draw_steps(rng, 1)
    assert step.select(calibrator).sum() > must_blocks().sum()
    beside = replace(step, known=np.full_like(step.known, 20.0))
    assert (beside.select(calibrator) == must_blocks()).all()


def test_everything_is_read_until_enough_is_known() -> None:
    options = ConformalOptions(delta=0.05)
    calibrator = TailCalibrator(options, HEADS)
    steps = draw_steps(np.random.default_rng(1), options.min_audits)
    for step in range(options.min_audits):
        one = steps[step : step + 1]
        assert not calibrator.is_ready
        assert one.select(calibrator).all()
        one.audit(calibrator)
    assert calibrator.is_ready
    assert calibrator.stats.audits == 0


@pytest.mark.timeout(120)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.integers(1, 3),
    scale=st.floats(0.0, 100.0),
    shift=st.floats(0.0, 3.0),
)
def test_a_selection_holds_the_must_blocks_and_audits_agree_with_it(
    seed: int, queries: int, scale: float, shift: float
) -> None:
    rng = np.random.default_rng(seed)
    calibrator = TailCalibrator(ConformalOptions(delta=0.2), HEADS)
    draw_steps(rng, 60).audit(calibrator)
    steps = draw_steps(rng, queries)
    steps = Steps(*(x * np.float32(scale) for x in (steps.estimates, steps.true, steps.known)))
    steps.estimates[:, :, 0] = -np.inf
    for step in range(queries):
        one = steps[step : step + 1]
        chosen = one.select(calibrator, shift)
        assert chosen[must_blocks()].all()
        missed = one.missed(chosen, calibrator.options.tail_mass)
        assert one.audit(calibrator, shift)[0] == missed


def test_the_newest_audits_are_remembered() -> None:
    options = ConformalOptions(delta=0.2, capacity=50)
    calibrator = TailCalibrator(options, HEADS)
    exact = TailCalibrator(options, HEADS)
    for noise in (2.0, 0.0):
        steps = draw_steps(np.random.default_rng(2), 80, noise)
        steps.audit(calibrator)
        assert calibrator.num_scores == 50
    steps[30:].audit(exact)
    later = draw_steps(np.random.default_rng(5), 50, 0.0)
    assert missed_share(calibrator, later) == missed_share(exact, later)


@pytest.mark.parametrize("known", [np.nan, np.inf])
def test_a_known_mass_that_is_none_is_refused(known: float) -> None:
    step = draw_steps(np.random.default_rng(0), 1)
    step.known[0, 1] = known
    with pytest.raises(InvalidArgumentError, match="always read"):
        step.select(TailCalibrator(ConformalOptions(), HEADS))


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
    known = np.zeros((1, HEADS), np.float32)
    with pytest.raises(InvalidArgumentError):
        TailCalibrator(ConformalOptions(), HEADS).select(estimates, must_blocks(), known)


@pytest.mark.parametrize(
    "options",
    [
        {"delta": 0.0},
        {"delta": 1.0},
        {"tail_mass": 0.0},
        {"audit_stride": 0},
        {"opening_audits": -1},
        {"rate": -0.1},
        {"rate": float("nan")},
        {"capacity": 10},
    ],
)
def test_a_promise_of_nothing_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidArgumentError):
        ConformalOptions(**options)  # type: ignore[arg-type]
