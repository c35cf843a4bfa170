"""`RobustFit`: learns a non-negative linear cost from noisy measurements, one at a time.

    seconds = w_0 * x_0 + w_1 * x_1 + ...      for instance passes, tokens, pairs of tokens

A Kalman filter over the weights, each counted in units of its prior, with a random walk as the
model of change (R. E. Kalman, A New Approach to Linear Filtering and Prediction Problems, 1960).
Around it, what a shared machine asks for:

    noise     learnt as a share of the prediction, so that small and large measurements weigh alike
    outliers  a measurement beyond `GATE_SIGMAS` is set aside (an innovation gate, Bar-Shalom and
              Fortmann, Tracking and Data Association, 1988) ...
    change    ... but `PATIENCE` of them in a row on the same side are no outliers, nor are half of
              all: the weights are made uncertain again, so that a new bandwidth is learnt in three

Invariants: weights are finite and at least `FLOOR` of their prior; a direction that the
measurements do not excite keeps its prior and never winds up; no I/O, no clock, not thread-safe.

Envelope: 30 us a measurement of three features, 2 us a prediction, a few hundred bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

PRIOR_SPREAD: Final = 3.0
"""How wrong a prior may be, in units of itself: the first measurements outweigh it."""
DRIFT: Final = 0.02
"""What a weight may change between two measurements, as a share of itself."""
GATE_SIGMAS: Final = 3.0
PATIENCE: Final = 3
MIN_NOISE: Final = 0.05
MAX_NOISE: Final = 0.4
NOISE_GAIN: Final = 0.1
ODD_GAIN: Final = 0.15
MAX_ODD_SHARE: Final = 0.5
"""More outliers than this are the sign of weights that are wrong."""
FLOOR: Final = 1e-6
"""Least weight, in units of the prior: a cost is never negative."""
MAX_VALUE: Final = 1e9
"""Largest cost that is believed: thirty years, and far from where squares overflow."""

Pending = tuple[tuple[float, ...], float, float | None]


class RobustFit:
    """A learnt linear cost; see the module."""

    def __init__(self, priors: Sequence[float]) -> None:
        """Start from what is believed before any measurement.

        Args:
            priors: one weight a feature, each > 0.
        """
        assert all(prior > 0 and math.isfinite(prior) for prior in priors)
        self.num_observations = 0
        """Measurements that were taken, those set aside left out."""
        self._priors = tuple(priors)
        self._size = len(self._priors)
        self._weights = [1.0] * self._size
        self._covariance = [[0.0] * self._size for _ in self._priors]
        self._noise = 2 * MIN_NOISE
        self._pending: list[Pending] = []
        self._odd_share = 0.0
        self._forget()

    @property
    def weights(self) -> tuple[float, ...]:
        """The cost of one unit of each feature."""
        return tuple(w * p for w, p in zip(self._weights, self._priors, strict=True))

    @property
    def noise(self) -> float:
        """Typical error of one measurement, as a share of the prediction."""
        return self._noise

    def predict(self, features: Sequence[float]) -> float:
        """The cost of `features`."""
        triples = zip(features, self._weights, self._priors, strict=True)
        return sum(x * w * p for x, w, p in triples)

    def observe(self, features: Sequence[float], value: float, noise: float | None = None) -> bool:
        """Learn from one measurement.

        Args:
            features: as for `predict`, not negative, one of them positive.
            value: what it cost.
            noise: standard deviation of `value`; None takes the learnt share of the prediction.

        Returns:
            False when it was set aside as an outlier, for now.
        """
        scaled = tuple(x * p for x, p in zip(features, self._priors, strict=True))
        if not abs(value) <= MAX_VALUE or max(scaled) <= 0:
            return False
        error, spread, sigma = self._innovation(scaled, value, noise)
        is_odd = abs(error) > GATE_SIGMAS * math.hypot(spread, sigma)
        if noise is None and self.num_observations >= PATIENCE:
            self._learn_noise(error * self._noise / sigma)
        is_odd = is_odd and self.num_observations >= PATIENCE
        self._odd_share += ODD_GAIN * (is_odd - self._odd_share)
        if not is_odd:
            self._pending.clear()
            self._update(scaled, value, noise)
            return True
        return self._doubt((scaled, value, noise), is_above=error > 0)

    def _doubt(self, observation: Pending, *, is_above: bool) -> bool:
        """Set a measurement aside, or accept that the world has changed."""
        if self._pending:
            scaled, value, noise = self._pending[-1]
            if (self._innovation(scaled, value, noise)[0] > 0) != is_above:
                self._pending.clear()
        self._pending.append(observation)
        if len(self._pending) < PATIENCE and self._odd_share < MAX_ODD_SHARE:
            return False
        changed, self._pending, self._odd_share = self._pending, [], 0.0
        self._forget()
        for scaled, value, noise in changed:
            self._update(scaled, value, noise)
        return True

    def _innovation(
        self, scaled: Sequence[float], value: float, noise: float | None
    ) -> tuple[float, float, float]:
        """(measured - predicted, how uncertain the prediction is, how noisy the measurement)."""
        predicted = sum(x * w for x, w in zip(scaled, self._weights, strict=True))
        variance = sum(x * y for x, y in zip(scaled, self._times(scaled), strict=True))
        spread = math.sqrt(max(variance, 0.0))
        # A prediction that is mere belief says nothing of how noisy the measurement is.
        size = predicted if spread < predicted else min(predicted, value)
        sigma = noise if noise is not None else self._noise * size
        return value - predicted, spread, max(sigma, 1e-12)

    def _update(self, scaled: Sequence[float], value: float, noise: float | None) -> None:
        self._drift()
        error, spread, sigma = self._innovation(scaled, value, noise)
        total = spread * spread + sigma * sigma
        gain = [y / total for y in self._times(scaled)]
        for i in range(self._size):
            self._weights[i] += gain[i] * error
        # Both halves of the matrix from one product, so that it stays symmetric.
        for i in range(self._size):
            for j in range(i, self._size):
                value_ij = self._covariance[i][j] - gain[i] * gain[j] * total
                self._covariance[i][j] = self._covariance[j][i] = value_ij
            self._covariance[i][i] = max(self._covariance[i][i], FLOOR * FLOOR)
        self._keep_positive()
        self.num_observations += 1

    def _keep_positive(self) -> None:
        """Move to the most likely weights that are not negative, one bound after the other."""
        for _ in self._weights:
            low = min(range(self._size), key=lambda i: self._weights[i])
            missing = FLOOR - self._weights[low]
            if missing <= 0:
                return
            row, variance = self._covariance[low], self._covariance[low][low]
            for i in range(self._size):
                self._weights[i] += row[i] / variance * missing
        self._weights = [max(FLOOR, weight) for weight in self._weights]

    def _drift(self) -> None:
        """Between two measurements the weights may have changed a little."""
        for i, weight in enumerate(self._weights):
            most = (PRIOR_SPREAD * max(weight, DRIFT)) ** 2
            if self._covariance[i][i] < most:
                self._covariance[i][i] += (DRIFT * weight) ** 2

    def _forget(self) -> None:
        """Make every weight as uncertain as a prior is."""
        for i, weight in enumerate(self._weights):
            for j in range(self._size):
                self._covariance[i][j] = (PRIOR_SPREAD * max(weight, DRIFT)) ** 2 if i == j else 0.0

    def _learn_noise(self, relative_error: float) -> None:
        # 1.25: from the mean absolute deviation to the standard deviation of a normal error.
        seen = min(1.25 * abs(relative_error), MAX_NOISE)
        mixed = (1 - NOISE_GAIN) * self._noise + NOISE_GAIN * seen
        self._noise = min(max(mixed, MIN_NOISE), MAX_NOISE)

    def _times(self, scaled: Sequence[float]) -> list[float]:
        return [sum(p * x for p, x in zip(row, scaled, strict=True)) for row in self._covariance]
