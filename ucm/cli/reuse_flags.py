"""`--chunk` and `--recompute`: what they ask for, and what came of it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ucm.errors import ConfigError
from ucm.text_files import SkippedFile, read_text

if TYPE_CHECKING:
    from ucm.engine.chunk_prompts import ChunkPrompts
    from ucm.engine.reuse_report import ReuseReport
    from ucm.engine.tokenizer import Tokenizer
    from ucm.reuse.options import ReuseOptions

    from .generate import GenerateOptions

GUARD_TOKENS = 8
"""Probes a chunk with `--recompute quality`."""
RECOMPUTE_HELP = (
    "How much of reused chunks to compute again: a share from 0 (nothing) to 1 (all, exact), "
    "quality (as little as keeps the drift low), or latency (what half a second allows). "
    "Default: 0.18."
)


def chunk_texts(flags: GenerateOptions) -> list[str]:
    """The texts of `--chunk`, in its order.

    Raises:
        ConfigError: a file that holds no text, or `--recompute` without `--chunk`.
    """
    if not flags.chunk:
        if flags.recompute is not None:
            raise ConfigError("--recompute does nothing without --chunk FILE")
        return []
    _recompute(flags.recompute)  # what cannot be is refused before a file is read
    return [_text(path) for path in flags.chunk]


def _text(path: Path) -> str:
    found = read_text(path)
    if isinstance(found, SkippedFile):
        raise ConfigError(f"--chunk {found.name}: {found.detail}")
    return found.text


def document_prompts(tokenizer: Tokenizer, *, is_chat: bool) -> ChunkPrompts:
    """Prompts with documents, alike in all commands: what one stores, the other finds.

    Raises:
        ConfigError: the model's chat template cannot be used.
    """
    from ucm.engine.chunk_prompts import ChunkPrompts

    try:
        return ChunkPrompts(tokenizer, is_chat=is_chat)
    except ConfigError as error:
        raise ConfigError(f"{error}; --raw does without a template") from error


def reuse_options(recompute: str | None, prompts: ChunkPrompts) -> ReuseOptions:
    """What the engine is told about chunks.

    Raises:
        ConfigError: neither a share nor a target.
    """
    from ucm.reuse.options import ReuseOptions

    return ReuseOptions(sink_tokens=prompts.sink_tokens, **_recompute(recompute))  # type: ignore[arg-type]


def pool_blocks(texts: list[str], tokenizer: Tokenizer, max_tokens: int) -> int:
    """Blocks of a pool in which a request about documents finds room.

    A chunk takes its place in the prompt, its original as much again; the rest is for the question,
    the answer, and a chunk that is being computed.
    """
    from ucm.engine.engine import EngineOptions

    defaults = EngineOptions()
    num_tokens = sum(len(tokenizer.encode_plain(text)) for text in texts)
    return defaults.num_blocks + (2 * num_tokens + max_tokens) // defaults.block_tokens


def _recompute(text: str | None) -> dict[str, object]:
    """Fields of `ReuseOptions`."""
    from ucm.reuse.options import BlendOptions, RecomputePolicy, ReuseTarget

    if text is None:
        return {}
    if text == ReuseTarget.LATENCY:
        return {"target": ReuseTarget.LATENCY}
    if text == ReuseTarget.QUALITY:
        return {
            "target": ReuseTarget.QUALITY,
            "blend": BlendOptions(guard_tokens=GUARD_TOKENS),
        }
    try:
        budget = float(text)
    except ValueError:
        budget = math.nan
    if not 0.0 <= budget <= 1.0:
        raise ConfigError(f"--recompute {text!r}: give a share from 0 to 1, quality or latency")
    policies = {0.0: RecomputePolicy.NONE, 1.0: RecomputePolicy.FULL}
    policy = policies.get(budget, RecomputePolicy.PROGRESSIVE)
    return {"blend": BlendOptions(policy=policy, budget=budget)}


def reuse_line(report: ReuseReport) -> str:
    """What reuse did for a request, for people."""
    if report.fallback is not None:
        return (
            f"chunks: nothing was reused ({report.fallback.value}); the prompt was computed whole"
        )
    tokens = report.num_chunk_tokens
    if not tokens:
        return "chunks: nothing to reuse, the prefix cache had the whole prompt"
    line = (
        f"chunks: {tokens:,} tokens reused ({report.num_loaded_tokens:,} of them loaded, "
        f"{report.num_found_tokens:,} in the pool, {report.num_encoded_tokens:,} computed for "
        f"the first time); {report.cost:.0%} of the work repeated in "
        f"{1e3 * report.seconds:,.0f} ms, {report.num_saved_tokens:,.0f} tokens' worth saved"
    )
    if report.drift is not None:
        line += f"; drift {report.drift:.2f}"
    if report.num_guarded:
        line += f"; {report.num_guarded} chunks had drifted too far and were computed in full"
    return line


def reuse_figures(report: ReuseReport | None) -> dict[str, object] | None:
    """The same for programs; None without chunks."""
    if report is None:
        return None
    return {
        **dataclasses.asdict(report),
        "num_recomputed_tokens": report.num_recomputed_tokens,
        "num_saved_tokens": report.num_saved_tokens,
    }
