"""`SparseOptions`: what an engine is told about sparse attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral
from typing import Final

from ucm.enum_words import word_of
from ucm.errors import ConfigError
from ucm.kernels.block_scores import Budget, check_budget
from ucm.types import SummaryKind

from .certificates import CertifiedOptions
from .conformal import ConformalOptions
from .mode_policy import ModeThresholds, SparseMode

SHADOWS = frozenset({SummaryKind.SHADOW2, SummaryKind.SHADOW4})
"""Kinds that bound the logit of every single key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseOptions:
    """Which blocks decode steps read."""

    mode: SparseMode = SparseMode.LATENCY
    """By hand, or `auto`. The plain word will do, here and for the kind."""
    kind: SummaryKind = SummaryKind.GSA_K4
    """Of the summaries that blocks are chosen by."""
    budget: Budget = field(default_factory=lambda: Budget(ratio=0.3))
    """How much a layer reads in the mode `latency`, sink and recent window included."""
    concurrency_budget: Budget = field(default_factory=lambda: Budget(ratio=0.125))
    """The same in the mode `concurrency`."""
    stride: int = 6
    """Steps that a selection is used for in the mode `latency`; every step refreshes the layers
    whose turn it is. 1 is the most exact and costs a fifth of a step at 4,096 tokens of
    SmolLM2-135M; a stale selection trebles the (small) divergence from dense attention, whether it
    is 4 or 8 steps old."""
    concurrency_stride: int = 8
    """The same in the mode `concurrency`: measured, 8 to 16 cost under a point of mass."""
    dense_layers: int = 0
    """First layers that read everything."""
    sink_blocks: int = 1
    """First blocks that are always read: attention parks mass there."""
    recent_blocks: int = 2
    """Last full blocks that are always read, beside the one that is being filled."""
    min_context_tokens: int = 1024
    """Shorter sequences are dense: choosing costs more than reading there."""
    catch_up_blocks: int = 32
    """Blocks a step that join those a sequence chooses among: the first generated token chooses
    among this many, the second among twice as many; the rest is read meanwhile. That bounds the
    summaries that a step makes for a prompt that was loaded or is shared. One computed here has
    all of its summaries before, and waits for them all the same: its tokens must not depend on
    where its KV came from."""
    thresholds: ModeThresholds = field(default_factory=ModeThresholds)
    """Of the mode `auto`."""
    certificate: CertifiedOptions | ConformalOptions | None = None
    """A promise that decides how much is read, in the place of the budget and the stride; None
    promises nothing. `CertifiedOptions` needs a kind that is a shadow. Not for sequences beyond
    their share of the pool: the engine refuses both."""
    resident_blocks: int | None = None
    """Pool blocks that a sequence may own at most, the rest lying in a slab source; None: all."""

    def __post_init__(self) -> None:
        mode = word_of(SparseMode, self.mode, "sparse: mode", ConfigError)
        object.__setattr__(self, "mode", mode)
        kind = word_of(SummaryKind, self.kind, "sparse: kind", ConfigError)
        object.__setattr__(self, "kind", kind)
        for name in ("budget", "concurrency_budget"):
            check_budget(getattr(self, name), f"sparse: {name}", ConfigError)
        for name, least in _LEAST.items():
            _check_number(name, getattr(self, name), least)
        if not isinstance(self.thresholds, ModeThresholds):
            raise ConfigError(f"sparse: thresholds is a ModeThresholds, not {self.thresholds!r}")
        self._check_certificate()
        self._check_resident_blocks()

    def _check_certificate(self) -> None:
        promise = self.certificate
        if promise is not None and not isinstance(promise, (CertifiedOptions, ConformalOptions)):
            raise ConfigError(
                f"sparse: certificate is a CertifiedOptions or ConformalOptions, not {promise!r}"
            )
        if isinstance(self.certificate, CertifiedOptions) and self.kind not in SHADOWS:
            raise ConfigError(
                f"sparse: certified attention needs summaries of kind shadow4 or shadow2, not "
                f"{self.kind}"
            )

    def _check_resident_blocks(self) -> None:
        if self.resident_blocks is None:
            return
        least = self.sink_blocks + self.recent_blocks + 2
        _check_number("resident_blocks", self.resident_blocks, None)
        if self.resident_blocks < least:
            raise ConfigError(
                f"sparse: resident_blocks is {self.resident_blocks}; sink, recent window, the "
                f"block being filled and one more need {least}"
            )


_LEAST: Final = {
    "stride": 1,
    "concurrency_stride": 1,
    "sink_blocks": 1,
    "catch_up_blocks": 1,
    "dense_layers": 0,
    "recent_blocks": 0,
    "min_context_tokens": 0,
}


def _check_number(name: str, number: object, least: int | None) -> None:
    if not isinstance(number, Integral):
        raise ConfigError(f"sparse: {name} is {number!r}, must be a whole number")
    if least is not None and int(number) < least:
        raise ConfigError(f"sparse: {name} is {number}, must be >= {least}")
