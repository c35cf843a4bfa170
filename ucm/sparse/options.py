"""`SparseOptions`: what an engine is told about sparse attention."""

from __future__ import annotations

from dataclasses import dataclass, field

from ucm.errors import ConfigError
from ucm.kernels.block_scores import Budget
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
    """By hand, or `auto`."""
    kind: SummaryKind = SummaryKind.GSA_K4
    """Of the summaries that blocks are chosen by."""
    budget: Budget = field(default_factory=lambda: Budget(ratio=0.3))
    """How much a layer reads in the mode `latency`, sink and recent window included."""
    concurrency_budget: Budget = field(default_factory=lambda: Budget(ratio=0.125))
    """The same in the mode `concurrency`."""
    stride: int = 5
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
        for name in ("stride", "concurrency_stride", "sink_blocks", "catch_up_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sparse: {name} is {getattr(self, name)}, must be >= 1")
        for name in ("dense_layers", "recent_blocks", "min_context_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"sparse: {name} is {getattr(self, name)}, must be >= 0")
        if isinstance(self.certificate, CertifiedOptions) and self.kind not in SHADOWS:
            raise ConfigError(
                f"sparse: certified attention needs summaries of kind shadow4 or shadow2, not "
                f"{self.kind}"
            )
        least = self.sink_blocks + self.recent_blocks + 2
        if self.resident_blocks is not None and self.resident_blocks < least:
            raise ConfigError(
                f"sparse: resident_blocks is {self.resident_blocks}; sink, recent window, the "
                f"block being filled and one more need {least}"
            )
