"""Documents prefilled once: chunks are computed and stored before anybody asks about them.

An engine does that by itself, with the first request that holds a chunk; here it is done ahead, so
that no request waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ucm.engine.sampling import SamplingParams
from ucm.errors import ConfigError
from ucm.reuse.segments import Chunk, SegmentedPrompt, Text

if TYPE_CHECKING:
    from .cached_engine import CachedEngine

FLUSH_TIMEOUT_S = 120.0

Advance = Callable[[int], None]
"""Is told the tokens of each chunk when it is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredChunks:
    """What became of some chunks. Chunks shorter than a block are in none of the counts."""

    num_known: int = 0
    """The cache had them."""
    num_computed: int = 0
    num_computed_tokens: int = 0
    num_unstored: int = 0
    """Of those computed: not in the cache afterwards. It is full, away, or refuses them."""


def store_chunks(
    cached: CachedEngine, chunks: Iterable[Chunk], advance: Advance = lambda _: None
) -> StoredChunks:
    """Compute the chunks that the cache lacks, and wait until they are stored and durable.

    Blocks for a prefill of what is new. May be interrupted at any point and called again: what is
    stored by then is known.

    Raises:
        ConfigError: there is no cache.
        InvalidArgumentError: the engine's pool is too small for a chunk.
    """
    unique = [chunk for chunk in dict.fromkeys(chunks) if chunk.num_blocks]
    missing = []
    for chunk in unique:
        if is_stored(cached, chunk):
            advance(len(chunk))
        else:
            missing.append(chunk)
    for chunk in missing:
        if not _may_pin(cached, chunk):
            cached.flush(FLUSH_TIMEOUT_S)
        _compute(cached, chunk)
        advance(len(chunk))
    if missing:
        cached.flush(FLUSH_TIMEOUT_S)
    return StoredChunks(
        num_known=len(unique) - len(missing),
        num_computed=len(missing),
        num_computed_tokens=sum(chunk.num_cached_tokens for chunk in missing),
        num_unstored=sum(not is_stored(cached, chunk) for chunk in missing),
    )


def is_stored(cached: CachedEngine, chunk: Chunk) -> bool:
    """Whether the cache has every full block of a chunk; blocks for one call.

    Raises:
        ConfigError: there is no cache.
    """
    if cached.session is None:
        raise ConfigError("there is no cache to store chunks in: open the engine with one")
    extra_keys = chunk.space.extra_keys
    return cached.session.match(chunk.token_ids, 0, extra_keys) >= chunk.num_blocks


def _may_pin(cached: CachedEngine, chunk: Chunk) -> bool:
    """Whether the engine would offer the chunk now; it offers nothing that it may not pin."""
    pool = cached.engine.pool
    pool.drain()
    return pool.num_pinned + chunk.num_blocks <= cached.engine.options.max_pinned


def _compute(cached: CachedEngine, chunk: Chunk) -> None:
    """The shortest request that holds the chunk; the engine offers it to the cache."""
    sink = chunk.space.sink_tokens
    prompt = SegmentedPrompt([Text(sink), chunk, Text(sink[-1:])])
    cached.engine.generate_all([prompt], SamplingParams(max_tokens=1))
