"""`BudgetController`: how much of a request's chunks to recompute, from what blends have told.

    target    budget
    fixed     the one that was configured
    quality   the smallest at which what is left of the drift (`BlendOutcome.residual`) is expected
              to stay below `max_drift`
    latency   the largest that is expected to take no longer than `max_blend_s`

Quality is learnt on a grid of budgets: a believed curve, a factor for all of it, and a correction
for each point, the latter two as running means of the logarithm of what was seen over what was
expected. A blend says most about its own point and something about all others, so a budget that
nobody tried yet is expected to do what its neighbours do. Latency is a learnt line (`RobustFit`)
over layers and token-layers.

Invariants: a budget is within `min_budget` and `max_budget`, whatever was observed; what is learnt
is a fixed number of finite floats; no clock, no I/O. Not thread-safe.

Envelope: 10 us a choice, 50 us an observation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ucm.errors import ConfigError
from ucm.robust_fit import RobustFit

from .options import BlendOptions, ReuseOptions, ReuseTarget
from .protocols import BlendOutcome, BlendPlan

GRID_POINTS = 12
MEMORY = 16
"""Blends that a running mean remembers."""
TRUST = 1.0
"""Blends at a point of the grid after which half of its own correction counts."""
PROBES = 4
"""Probes a chunk for the target `quality`, where the guard sends none."""
MAX_LOG = 6.0
"""Largest logarithm of seen over expected that is believed of one blend."""
START_DRIFT = 0.1
"""Believed before anything was seen: the residual drift of a budget of 0 ..."""
HALVING = 0.2
"""... and the budget that halves it."""


@dataclass(frozen=True, slots=True)
class BlendWork:
    """How large a blend is."""

    num_layers: int
    num_rows: int
    """Rows of chunks that can have drifted."""
    num_fresh: int
    """Rows that are computed whatever the budget."""

    @classmethod
    def of(cls, plan: BlendPlan, num_layers: int) -> BlendWork:
        """The work that a plan asks for."""
        held = sum(span.stop - span.start for span in plan.spans)
        exact = sum(span.stop - span.start for span in plan.spans if span.is_exact)
        return cls(num_layers, held - exact, plan.stop - plan.start - held)


class BudgetController:
    """Chooses a blend's budget and learns from how it went; see the module."""

    def __init__(self, options: ReuseOptions) -> None:
        """Start from what is believed.

        Raises:
            ConfigError: the budgets or targets of `options` make no sense.
        """
        _check(options)
        self._options = options
        low, high = options.min_budget, options.max_budget
        ratio: float = (high / low) ** (1 / (GRID_POINTS - 1))
        self._grid = tuple(min(high, low * ratio**i) for i in range(GRID_POINTS))
        self._common = 0.0
        self._num_seen = 0
        self._own = [0.0] * GRID_POINTS
        self._num_own = [0] * GRID_POINTS
        # A layer costs some launches, a token-layer some FLOPs: 135 M parameters on two cores.
        self._seconds = RobustFit((1e-3, 1e-4))

    def choose(self, work: BlendWork) -> BlendOptions:
        """The options of a blend of this size, its budget chosen."""
        options, blend = self._options, self._options.blend
        if options.target is ReuseTarget.QUALITY:
            probes = blend.guard_tokens or PROBES
            return replace(blend, budget=self._for_quality(), guard_tokens=probes)
        if options.target is ReuseTarget.LATENCY:
            return replace(blend, budget=self._for_latency(work))
        return blend

    def observe(
        self, work: BlendWork, options: BlendOptions, outcome: BlendOutcome, seconds: float
    ) -> None:
        """Learn from a blend that has ended.

        Args:
            work: what was given to `choose`.
            options: what it gave.
            outcome: of the blend.
            seconds: computing time of its steps, waits for loads left out.
        """
        computed = outcome.cost * work.num_rows + work.num_fresh
        if work.num_layers > 0 and math.isfinite(seconds) and seconds > 0:
            features = (work.num_layers, computed * work.num_layers)
            self._seconds.observe(features, seconds)
        residual = outcome.residual
        if residual is not None and math.isfinite(residual) and residual >= 0:
            self._learn(options.budget, residual)

    def expected_seconds(self, work: BlendWork, budget: float) -> float:
        """How long a blend is expected to take."""
        computed = budget * work.num_rows + work.num_fresh
        return self._seconds.predict((work.num_layers, computed * work.num_layers))

    def _for_quality(self) -> float:
        for budget, residual in zip(self._grid, self._curve(), strict=True):
            if residual <= self._options.max_drift:
                return budget
        return self._grid[-1]

    def _for_latency(self, work: BlendWork) -> float:
        low, high = self._options.min_budget, self._options.max_budget
        nothing = self.expected_seconds(work, 0.0)
        everything = self.expected_seconds(work, 1.0)
        if everything <= nothing:
            return high
        budget = (self._options.max_blend_s - nothing) / (everything - nothing)
        return min(max(budget, low), high)

    def _curve(self) -> list[float]:
        """Expected residual at each point; never rises with the budget."""
        expected = [self._expected_log(i) for i in range(GRID_POINTS)]
        for i in reversed(range(GRID_POINTS - 1)):
            expected[i] = max(expected[i], expected[i + 1])
        return [math.exp(value) for value in expected]

    def _expected_log(self, point: int) -> float:
        count = self._num_own[point]
        own = self._own[point] * count / (count + TRUST)
        return _believed_log(self._grid[point]) + self._common + own

    def _learn(self, budget: float, residual: float) -> None:
        point = self._nearest(budget)
        seen = math.log(max(residual, 1e-9)) - _believed_log(self._grid[point])
        error = min(max(seen - self._common, -MAX_LOG), MAX_LOG)
        self._num_seen = min(self._num_seen + 1, MEMORY)
        self._common += error / self._num_seen
        self._num_own[point] = min(self._num_own[point] + 1, MEMORY)
        own_error = min(max(seen - self._common - self._own[point], -MAX_LOG), MAX_LOG)
        self._own[point] += own_error / self._num_own[point]

    def _nearest(self, budget: float) -> int:
        return min(range(GRID_POINTS), key=lambda i: abs(self._grid[i] - budget))


def _believed_log(budget: float) -> float:
    return math.log(START_DRIFT) - budget / HALVING * math.log(2)


def _check(options: ReuseOptions) -> None:
    if not 0 < options.min_budget <= options.max_budget <= 1:
        raise ConfigError(
            f"reuse: budgets from {options.min_budget} to {options.max_budget}; they are shares, "
            "above 0, at most 1, the smaller one first"
        )
    for name in ("max_drift", "max_blend_s"):
        value = getattr(options, name)
        if not 0 < value < math.inf:
            raise ConfigError(f"reuse: {name} is {value}; give a positive number")
