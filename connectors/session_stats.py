"""What a connector's session counted: the figures a user sees and a test asserts on."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

from ucm.types import TierKind


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStats:
    """Counters since the session began; bytes, seconds, blocks or calls by their names."""

    lookups: int = 0
    hit_tokens_by_tier: dict[TierKind, int] = field(default_factory=dict)
    """Tokens whose KV was loaded and verified, by the tier it was found in."""
    loaded_blocks: int = 0
    loaded_bytes: int = 0
    """Slab bytes copied into the engine's pool and verified there."""
    loaded_chunk_blocks: int = 0
    """Those of `loaded_blocks` that are of chunks."""
    missed_blocks: int = 0
    """Asked for in a load, but not delivered, for whatever reason."""
    stored_blocks: int = 0
    """Accepted by the cache."""
    stored_bytes: int = 0
    stored_chunk_blocks: int = 0
    """Those of `stored_blocks` that are of chunks."""
    summarised_blocks: int = 0
    """Offered to the cache together with their summary."""
    present_blocks: int = 0
    """Offered, but the cache had them already."""
    dropped_blocks: int = 0
    """Offered by the engine, but not stored: queue full, no space, cache away, refused."""
    failures: int = 0
    """Calls that raised or ran into their deadline."""
    timeouts: int = 0
    """Those of them that ran into the deadline."""
    corrupt_blocks: int = 0
    """Blocks refused because their bytes did not match: by the cache, or after our copy."""
    wrong_slabs: int = 0
    """Slabs whose bytes in the pool did not match the checksum they came with."""
    wrong_bytes: int = 0
    """Size of those slabs. They were never used."""
    reconnects: int = 0
    """Connections made after the first."""
    stall_s_total: float = 0.0
    """Time that the engine's step path spent in the session."""
    stall_s_max: float = 0.0
    """Longest time that one request spent in it, look-up and load together."""


class StatsCounter:
    """Adds to `SessionStats` from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = SessionStats()

    def add(self, **amounts: float) -> None:
        """Add to counters by their field names."""
        with self._lock:
            self._stats = replace(
                self._stats,
                **{name: getattr(self._stats, name) + amount for name, amount in amounts.items()},
            )

    def add_hit(self, tier: TierKind, num_tokens: int) -> None:
        """Count tokens found in `tier`."""
        with self._lock:
            hits = dict(self._stats.hit_tokens_by_tier)
            hits[tier] = hits.get(tier, 0) + num_tokens
            self._stats = replace(self._stats, hit_tokens_by_tier=hits)

    def add_stall(self, stall_s: float, request_stall_s: float) -> None:
        """Count one call's time, and what its request has spent so far."""
        with self._lock:
            self._stats = replace(
                self._stats,
                stall_s_total=self._stats.stall_s_total + stall_s,
                stall_s_max=max(self._stats.stall_s_max, request_stall_s),
            )

    def snapshot(self) -> SessionStats:
        """The figures now."""
        with self._lock:
            return self._stats
