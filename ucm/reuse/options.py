"""Options of reuse at any position."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from ucm.enum_words import word_of
from ucm.errors import ConfigError


class RecomputePolicy(enum.StrEnum):
    """Which rows of reused chunks are recomputed."""

    NONE = "none"
    CACHEBLEND = "cacheblend"
    LEGO = "lego"
    QUERY = "query"
    PROGRESSIVE = "progressive"
    FULL = "full"


class ReuseTarget(enum.StrEnum):
    """What the budget of a request is chosen for."""

    FIXED = "fixed"
    QUALITY = "quality"
    LATENCY = "latency"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendOptions:
    """How one blend chooses its rows; see `ucm.reuse.progressive`."""

    policy: RecomputePolicy = RecomputePolicy.PROGRESSIVE
    budget: float = 0.18
    """Recomputed share of the chunks' token-layers, every probe included; 0 to 1."""
    decay: float = 0.5
    """Exponent p of the sets' size over depth; 0 keeps it constant."""
    theta: float = 0.005
    """Relative drift below which a row leaves the set."""
    num_queries: int = 16
    """Last query tokens whose attention says which rows matter; fewer where the budget is low."""
    narrow_share: float = 0.015
    """Of the query's attention: in layers where all rows that were not chosen get less, recomputed
    rows leave out those of other chunks (PROGRESSIVE only); 0: they see everything everywhere."""
    importance_layers: int | None = None
    """How many layers that attention runs ahead of the recompute; None: all of them first."""
    guard_tokens: int = 0
    """Probes a chunk that say how far what was kept has drifted; 0: no quality guard."""
    guard_limit: float = 0.6
    """Median drift of a chunk's probes (of keys and of values, added) above which it is computed in
    full; chunks of ordinary prompts have .1 to .5, more where more stands before them."""
    slice_tokens: int = 512
    """Rows computed between two steps."""
    seed: int = 0
    """Of the choice of probes."""

    def __post_init__(self) -> None:
        """Refuse here what would fail in the middle of a request.

        Raises:
            ConfigError: which option, and what it may be.
        """
        policy = word_of(RecomputePolicy, self.policy, "reuse: policy", ConfigError)
        object.__setattr__(self, "policy", policy)
        if not 0 <= self.budget <= 1:
            raise ConfigError(f"reuse: a blend's budget is {self.budget}; it is a share, 0 to 1")
        for name in ("decay", "theta", "narrow_share", "guard_limit"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"reuse: {name} is {getattr(self, name)}, must be >= 0")
        least = {"num_queries": 1, "guard_tokens": 0, "slice_tokens": 1}
        if self.importance_layers is not None:
            least["importance_layers"] = 1
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ConfigError(f"reuse: {name} is {getattr(self, name)}, must be >= {limit}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseOptions:
    """How an engine reuses chunks."""

    sink_tokens: tuple[int, ...]
    """What every chunk is encoded behind: the system prompt, or the first tokens of it, and a
    context (`ucm.reuse.encoding_context`); >= 4."""
    blend: BlendOptions = field(default_factory=BlendOptions)
    target: ReuseTarget = ReuseTarget.FIXED
    max_drift: float = 0.05
    """QUALITY: what may be left of the drift (`BlendOutcome.residual`); about what a budget of .18
    leaves in ordinary prompts."""
    max_blend_s: float = 0.5
    """LATENCY: what repairing a request's chunks may take, in seconds; with what is computed beside
    them, a short query too."""
    min_budget: float = 0.05
    max_budget: float = 0.5
    model_digest: str = ""
    """What names the weights (`LoadedModel.weights_digest`): a chunk of others is refused."""

    def __post_init__(self) -> None:
        """Take the target's name for it, too.

        Raises:
            ConfigError: there is no such target.
        """
        target = word_of(ReuseTarget, self.target, "reuse: target", ConfigError)
        object.__setattr__(self, "target", target)
