"""Which mode of sparse attention fits the load: a pure decision, with hysteresis.

    signal                  enters                      leaves again
    longest context         sparse at enter_context     dense below leave_context
    batch or pool pressure  concurrency at enter_*      latency when both are below leave_*

Between a pair of thresholds nothing changes, and a change is made only when the same other mode was
called for in `patience_steps` steps running and the present one was held for `dwell_steps`. So a
signal that wavers by less than a pair's distance, or for less than the patience, switches nothing,
and there is never more than one switch in `dwell_steps` steps.

Envelope: a dozen comparisons a step.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ucm.errors import ConfigError


class SparseMode(enum.StrEnum):
    """What decode steps do about long contexts."""

    LATENCY = "latency"
    """Sparse: a fresh selection each `stride` steps."""
    CONCURRENCY = "concurrency"
    """Sparse, for many sequences: fewer blocks, selections kept for longer."""
    REUSE = "reuse"
    """Dense: what is gained comes from blocks that need not be computed."""
    EXACT = "exact"
    """Dense, and never anything else: the tokens of an engine without sparse attention."""
    AUTO = "auto"
    """One of the first three, by `ModePolicy`."""

    @property
    def is_sparse(self) -> bool:
        """Whether steps in this mode may leave blocks out."""
        return self in (SparseMode.LATENCY, SparseMode.CONCURRENCY)


@dataclass(frozen=True, slots=True)
class LoadSignals:
    """What a step looks like to the policy."""

    context_tokens: int
    """Of the longest sequence that decodes; 0 when none does."""
    batch_size: int
    """Sequences that decode."""
    pool_pressure: float
    """Share of the KV pool in use, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeThresholds:
    """Where the policy changes its mind; each pair keeps a distance."""

    enter_context_tokens: int = 2048
    """From here on leaving blocks out saves more than choosing them costs."""
    leave_context_tokens: int = 1536
    enter_batch: int = 4
    """Decoding sequences that share the memory bandwidth."""
    leave_batch: int = 2
    enter_pressure: float = 0.85
    leave_pressure: float = 0.70
    patience_steps: int = 4
    """Steps running that must call for the same other mode."""
    dwell_steps: int = 32
    """Steps that a mode is held for at least: a block's worth."""

    def __post_init__(self) -> None:
        pairs = (
            ("context_tokens", self.leave_context_tokens, self.enter_context_tokens),
            ("batch", self.leave_batch, self.enter_batch),
            ("pressure", self.leave_pressure, self.enter_pressure),
        )
        for name, leave, enter in pairs:
            if not 0 <= leave < enter:
                raise ConfigError(
                    f"sparse: leave_{name} is {leave}, must be from 0 to below enter_{name} "
                    f"({enter})"
                )
        if self.patience_steps < 1 or self.dwell_steps < 1:
            raise ConfigError(
                f"sparse: patience_steps is {self.patience_steps} and dwell_steps "
                f"{self.dwell_steps}, both must be >= 1"
            )


class ModePolicy:
    """Follows the load from mode to mode; deterministic, reads no clock."""

    def __init__(self, thresholds: ModeThresholds | None = None) -> None:
        """Start dense: a first step knows no load."""
        self._thresholds = thresholds or ModeThresholds()
        self.mode = SparseMode.REUSE
        self.num_switches = 0
        self._num_held = self._thresholds.dwell_steps
        self._wanted = self.mode
        self._num_wanted = 0

    def observe(self, signals: LoadSignals) -> SparseMode:
        """The mode for this step; a step without decodes changes nothing."""
        if signals.batch_size == 0:
            return self.mode
        self._num_held += 1
        wanted = self._call(signals)
        self._num_wanted = self._num_wanted + 1 if wanted is self._wanted else 1
        self._wanted = wanted
        limits = self._thresholds
        is_due = self._num_wanted >= limits.patience_steps and self._num_held > limits.dwell_steps
        if wanted is not self.mode and is_due:
            self.mode = wanted
            self.num_switches += 1
            self._num_held = 0
        return self.mode

    def _call(self, signals: LoadSignals) -> SparseMode:
        """What this step alone calls for, given the present mode."""
        limits, is_sparse = self._thresholds, self.mode.is_sparse
        least = limits.leave_context_tokens if is_sparse else limits.enter_context_tokens
        if signals.context_tokens < least:
            return SparseMode.REUSE
        is_crowded = self.mode is SparseMode.CONCURRENCY
        if is_crowded:
            is_crowded = (
                signals.batch_size > limits.leave_batch
                or signals.pool_pressure > limits.leave_pressure
            )
        else:
            is_crowded = (
                signals.batch_size >= limits.enter_batch
                or signals.pool_pressure >= limits.enter_pressure
            )
        return SparseMode.CONCURRENCY if is_crowded else SparseMode.LATENCY
