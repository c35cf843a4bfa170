"""What became of the documents of `--chunk`: a line in all, a line a chunk with `--explain`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ucm.plurals import counted

if TYPE_CHECKING:
    from ucm.connectors.cached_engine import CachedEngine
    from ucm.engine.reuse_report import ChunkOutcome, ReuseReport
    from ucm.reuse.segments import Chunk

_REASONS: Final[Mapping[str, str]] = {
    "no_room": "there was no room for the chunks beside the prompt, or one could not be computed",
    "offloaded": "the prompt is longer than its share of the pool",
    "lost": "chunks were lost while they were loaded, twice",
    "drifted": "the guard found every chunk too far from what it should be; --recompute SHARE "
    "does without the guard",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkFate:
    """One chunk of a document, and what became of it. Tokens, where nothing else is said."""

    file: str
    number: int
    """In its document, from 1."""
    num_tokens: int
    num_tail_tokens: int
    """At its end, that fill no block: computed with each prompt."""
    num_found_tokens: int = 0
    """The engine's pool had them."""
    num_loaded_tokens: int = 0
    num_computed_tokens: int = 0
    """Nobody had them."""
    num_losses: int = 0
    """Times that its load came short."""
    is_used: bool = False
    """Whether it was looked for: not where the prefix cache had it, or where there was no room."""
    is_repeated: bool = False
    """Whether a chunk before it has the same tokens: what became of them is counted there."""
    is_stored: bool | None = None
    """Whether the cache has it afterwards; None without a cache, or where nothing was computed."""


def chunk_fates(
    paths: Sequence[Path],
    documents: Sequence[Sequence[Chunk]],
    cached: CachedEngine,
    report: ReuseReport | None,
) -> list[ChunkFate]:
    """What became of each chunk; asks the cache, once, for those that were computed.

    Args:
        paths: of the documents.
        documents: their chunks.
        cached: the engine that has answered, its stores flushed.
        report: of the request.
    """
    outcomes = {} if report is None else {each.token_ids: each for each in report.chunks}
    told: set[tuple[int, ...]] = set()
    fates = []
    for path, chunks in zip(paths, documents, strict=True):
        for number, chunk in enumerate(chunks, start=1):
            fate = ChunkFate(
                file=str(path),
                number=number,
                num_tokens=len(chunk),
                num_tail_tokens=len(chunk) - chunk.num_cached_tokens,
            )
            tokens = chunk.token_ids[: chunk.num_cached_tokens]
            if tokens in told:
                fate = dataclasses.replace(fate, is_used=True, is_repeated=True)
            elif tokens in outcomes:
                told.add(tokens)
                fate = _completed(fate, chunk, outcomes[tokens], cached)
            fates.append(fate)
    return fates


def _completed(
    fate: ChunkFate, chunk: Chunk, outcome: ChunkOutcome, cached: CachedEngine
) -> ChunkFate:
    """What came of a chunk that was looked for."""
    from ucm.connectors.chunk_store import is_stored

    is_new = outcome.num_encoded_tokens > 0 and cached.session is not None
    return dataclasses.replace(
        fate,
        num_found_tokens=outcome.num_found_tokens,
        num_loaded_tokens=outcome.num_loaded_tokens,
        num_computed_tokens=outcome.num_encoded_tokens,
        num_losses=outcome.num_losses,
        is_used=True,
        is_stored=is_stored(cached, chunk) if is_new else None,
    )


def fate_line(fate: ChunkFate) -> str:
    """The same for people."""
    counts = {
        "loaded": fate.num_loaded_tokens,
        "in the engine's pool": fate.num_found_tokens,
        "computed for the first time": fate.num_computed_tokens,
        "at the end, too few for a block, computed with each prompt": fate.num_tail_tokens,
    }
    parts = [f"{count:,} {what}" for what, count in counts.items() if count]
    if not fate.is_used and fate.num_tail_tokens < fate.num_tokens:
        parts.insert(0, "not looked for")
    if fate.is_repeated:
        parts.insert(0, "the same as a chunk before it")
    if fate.num_losses:
        parts.append(f"its load came short {counted(fate.num_losses, 'time')}")
    if fate.is_stored is not None:
        parts.append("stored" if fate.is_stored else "NOT STORED")
    tokens = counted(fate.num_tokens, "token")
    return f"{fate.file}, chunk {fate.number}: {tokens}; {'; '.join(parts)}"


def unstored_hint(fates: Sequence[ChunkFate]) -> str | None:
    """Says that chunks will have to be computed again, and why that may be; None when not."""
    files = list(dict.fromkeys(fate.file for fate in fates if fate.is_stored is False))
    if not files:
        return None
    return (
        f"chunks: the cache did not keep all of {', '.join(files)}: the next prompt computes it "
        "again. A document that was deleted from a collection, or has expired, is not stored until "
        "it is added again (`ucm collection add`); or the cache is full or away (`ucm status`)"
    )


def reuse_line(report: ReuseReport, *, is_cached: bool = True, is_kept: bool = True) -> str:
    """What reuse did for a request, for people.

    Args:
        report: of the request.
        is_cached: whether there is a cache to keep the chunks for the next one.
        is_kept: whether it kept all of them; `unstored_hint` says which it did not.
    """
    if report.fallback is not None:
        reason = _REASONS.get(report.fallback.value, report.fallback.value)
        return f"chunks: nothing was reused, the prompt was computed whole: {reason}"
    tokens = report.num_chunk_tokens
    if not tokens:
        return "chunks: nothing to reuse, the prefix cache had the whole prompt"
    savings = _savings(report, is_cached=is_cached, is_kept=is_kept)
    line = (
        f"chunks: {counted(tokens, 'token')} ({report.num_loaded_tokens:,} loaded, "
        f"{report.num_found_tokens:,} in the pool, {report.num_encoded_tokens:,} computed for "
        f"the first time); {report.cost:.0%} of the work repeated in "
        f"{1e3 * report.seconds:,.0f} ms, {savings}"
    )
    if report.drift is not None:
        line += f"; drift {report.drift:.2f}"
    if report.num_guarded:
        line += f"; {counted(report.num_guarded, 'chunk')} drifted too far, computed in full"
    return line


def _savings(report: ReuseReport, *, is_cached: bool, is_kept: bool) -> str:
    """A first run computes the chunks besides the prompt: it saves nothing, the next one does."""
    if report.num_saved_tokens > 0 or not report.num_encoded_tokens:
        return f"{max(0.0, report.num_saved_tokens):,.0f} tokens' worth saved"
    if is_cached and not is_kept:
        return "nothing saved: this run computed them"
    if is_cached:
        return "nothing saved yet: this run computed and stored them, the next one loads them"
    return "nothing saved: without --cache nobody keeps them for the next run"


def reuse_figures(report: ReuseReport | None) -> dict[str, object] | None:
    """The same for programs, but for its `chunks`; None without chunks."""
    if report is None:
        return None
    figures = dataclasses.asdict(report)
    del figures["chunks"]
    return {
        **figures,
        "num_recomputed_tokens": report.num_recomputed_tokens,
        "num_saved_tokens": report.num_saved_tokens,
    }
