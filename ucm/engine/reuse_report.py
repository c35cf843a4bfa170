"""What reuse of chunks did: for one request, and over an engine's life."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field


class FallbackReason(enum.StrEnum):
    """Why a prompt with chunks was computed as if it had none."""

    NO_ROOM = "no_room"
    """The pool could not hold the chunks beside the request."""
    OFFLOADED = "offloaded"
    """The request is longer than its share of the pool."""
    LOST = "lost"
    """Chunks that were being loaded were lost, twice."""
    DRIFTED = "drifted"
    """The quality guard found every chunk too far from what it should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseReport:
    """What chunks did for one request. Tokens, where nothing else is said."""

    num_chunks: int = 0
    num_chunk_tokens: int = 0
    """Rows taken from chunks; not those that the prefix cache had already."""
    num_exact_tokens: int = 0
    """Of these the rows of a chunk that stands where it was encoded, behind the same tokens."""
    num_fresh_tokens: int = 0
    """Computed in every layer beside chunks: tails that fill no block, text between them, and the
    end of the prefix that fills none."""
    num_found_tokens: int = 0
    """Rows of chunks that the pool held."""
    num_loaded_tokens: int = 0
    """Rows of chunks that the hook loaded."""
    num_encoded_tokens: int = 0
    """Rows of chunks that nobody had: computed, and offered to the hook."""
    loaded_bytes: int = 0
    budget: float = 0.0
    """Share of the chunks' token-layers that might be recomputed."""
    cost: float = 0.0
    """The share that was, every probe and what the guard had computed included. Rows of exact
    chunks have none."""
    drift: float | None = None
    """Of kept rows, as the probes saw it: the median of the worst chunk; None without probes."""
    num_guarded: int = 0
    """Chunks that the quality guard had computed in full."""
    num_restarts: int = 0
    """Times that the repair began anew, because chunks were lost while they were loaded."""
    seconds: float = 0.0
    """Computing the repair took, a short query's rows included (`blend_job.MAX_QUERY_ROWS`)."""
    fallback: FallbackReason | None = None
    """Set: nothing was reused, and why."""
    chunks: tuple[ChunkOutcome, ...] = field(default=(), repr=False)
    """Of its different chunks, in the prompt's order; none where there was no room for them."""

    @property
    def num_recomputed_tokens(self) -> float:
        """Recomputed token-layers of chunk rows, in whole tokens' worth."""
        return self.cost * (self.num_chunk_tokens - self.num_exact_tokens)

    @property
    def num_saved_tokens(self) -> float:
        """What a full prefill would have computed and this did not, in whole tokens' worth."""
        return self.num_chunk_tokens - self.num_recomputed_tokens - self.num_encoded_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkOutcome:
    """Where the rows of one chunk came from. Tokens, where nothing else is said."""

    token_ids: tuple[int, ...]
    """Of its full blocks."""
    num_found_tokens: int
    """The pool held them."""
    num_loaded_tokens: int
    """The hook loaded them."""
    num_encoded_tokens: int
    """Nobody had them: computed, and offered to the hook."""
    num_losses: int
    """Times that its load came short."""
    is_ready: bool
    """Whether all of it was there in the end."""


@dataclass(slots=True)
class ReuseStats:
    """Counters over an engine's life; units as in `ReuseReport`."""

    requests: int = 0
    """Sequences whose prompts held chunks and that came to the point of using them."""
    blended: int = 0
    """Those that did."""
    chunk_tokens: int = 0
    exact_tokens: int = 0
    fresh_tokens: int = 0
    recomputed_tokens: float = 0.0
    saved_tokens: float = 0.0
    found_tokens: int = 0
    loaded_tokens: int = 0
    loaded_bytes: int = 0
    encoded_tokens: int = 0
    guarded_chunks: int = 0
    restarts: int = 0
    seconds: float = 0.0
    fallbacks: Counter[FallbackReason] = field(default_factory=Counter)

    def add(self, report: ReuseReport) -> None:
        """Count a request; where its chunks came from is counted when they come."""
        self.requests += 1
        self.restarts += report.num_restarts
        self.seconds += report.seconds
        if report.fallback is not None:
            self.fallbacks[report.fallback] += 1
            return
        self.blended += 1
        self.chunk_tokens += report.num_chunk_tokens
        self.exact_tokens += report.num_exact_tokens
        self.fresh_tokens += report.num_fresh_tokens
        self.recomputed_tokens += report.num_recomputed_tokens
        self.saved_tokens += report.num_saved_tokens
        self.guarded_chunks += report.num_guarded
