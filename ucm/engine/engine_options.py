"""Sizes and limits of one engine, and what it counted."""

from __future__ import annotations

from dataclasses import dataclass, field

from ucm.errors import ConfigError
from ucm.reuse.options import ReuseOptions
from ucm.sparse.offload import OffloadOptions
from ucm.sparse.options import SparseOptions

from .reuse_report import ReuseStats
from .scheduler import SchedulerOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Sizes and limits of one engine."""

    num_blocks: int = 512
    """KV pool: 16,384 tokens. Memory is used only as blocks are written."""
    block_tokens: int = 32
    """Tokens a block; the cache's block, so that slabs move unchanged."""
    device: str = "cpu"
    """Where the pool lives: the model's device."""
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    max_pinned_share: float = 0.5
    """Share of the pool that the hook's stores may pin; the rest of the new blocks is offered in
    later steps, so a slow store never starves the decode."""
    stall_timeout_s: float = 30.0
    """How long to wait for the hook to give pinned blocks back when nothing can run without."""
    sparse: SparseOptions | None = None
    """Which blocks decodes of long sequences read; None: all of them, always."""
    offload: OffloadOptions | None = None
    """How a sequence lives with less of the pool than it needs; None: as `sparse.resident_blocks`
    says, and without that it must fit."""

    reuse: ReuseOptions | None = None
    """How chunks of prompts are reused at any position; None: prompts have none."""

    @property
    def max_pinned(self) -> int:
        """Blocks that stores may pin."""
        return max(1, int(self.num_blocks * self.max_pinned_share))

    @property
    def share(self) -> OffloadOptions | None:
        """What a sequence may own of the pool; None: what it needs."""
        sparse = self.sparse
        if self.offload is not None or sparse is None or sparse.resident_blocks is None:
            return self.offload
        return OffloadOptions(
            resident_blocks=sparse.resident_blocks,
            sink_blocks=sparse.sink_blocks,
            recent_blocks=sparse.recent_blocks,
        )

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.block_tokens < 1:
            raise ConfigError(
                f"engine: num_blocks is {self.num_blocks} and block_tokens {self.block_tokens}, "
                "both must be >= 1"
            )
        self._check_parts()
        if self.share is not None and self.share.resident_blocks > self.num_blocks:
            raise ConfigError(
                f"engine: a sequence is to own {self.share.resident_blocks} blocks "
                f"(resident_blocks), the pool has {self.num_blocks}"
            )
        if self.share is not None and self.sparse is not None and self.sparse.certificate:
            raise ConfigError(
                "engine: a sequence beyond its share of the pool (resident_blocks) reads by "
                "budget; it cannot keep a certificate's promise. Give up one of them"
            )
        if not 0.0 < self.max_pinned_share <= 1.0:
            raise ConfigError(
                f"engine: max_pinned_share is {self.max_pinned_share}, must be in (0, 1]"
            )

    def _check_parts(self) -> None:
        """Refuse a word where options are due."""
        if not isinstance(self.sparse, SparseOptions | None):
            raise ConfigError(
                f"engine: sparse is a SparseOptions, not {self.sparse!r}; for example "
                "SparseOptions(mode='latency')"
            )
        if not isinstance(self.offload, OffloadOptions | None):
            raise ConfigError(f"engine: offload is an OffloadOptions, not {self.offload!r}")
        if not isinstance(self.reuse, ReuseOptions | None):
            raise ConfigError(f"engine: reuse is a ReuseOptions, not {self.reuse!r}")


@dataclass(slots=True)
class EngineStats:
    """Counters over the engine's life."""

    steps: int = 0
    computed_tokens: int = 0
    """Tokens that went through the model, recomputed ones included. Not what a repair of chunks
    computes, nor a short query's rows that it takes along: see `ReuseReport.seconds`."""
    preemptions: int = 0
    copied_blocks: int = 0
    """Shared partial blocks that had to be copied before a write."""
    reuse: ReuseStats = field(default_factory=ReuseStats)
    """What reuse of chunks did."""
