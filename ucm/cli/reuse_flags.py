"""`--chunk`, `--context` and `--recompute`: what they ask for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ucm.errors import ConfigError
from ucm.text_files import SkippedFile, read_text

if TYPE_CHECKING:
    from ucm.engine.chunk_prompts import ChunkPrompts
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
CONTEXT_HELP = (
    "A text file like the documents: chunks are encoded behind the end of it, at most 1,024 "
    "tokens, which brings them closer to what is computed in full. The same one for "
    "`ucm collection add` and `ucm generate`. Default: none."
)


def chunk_texts(flags: GenerateOptions) -> list[str]:
    """The texts of `--chunk`, in its order.

    Raises:
        ConfigError: a file that holds no text, `--recompute` without `--chunk`, or a pool that is
            too small for reuse.
    """
    if not flags.chunk:
        if flags.recompute is not None:
            raise ConfigError("--recompute does nothing without --chunk FILE")
        if flags.context is not None:
            raise ConfigError("--context does nothing without --chunk FILE")
        return []
    if flags.sparse_resident_blocks is not None:
        raise ConfigError(
            "--chunk needs a pool that holds the whole prompt; give up --sparse-resident-blocks"
        )
    _recompute(flags.recompute)  # what cannot be is refused before a file is read
    return [_text(path, "--chunk") for path in flags.chunk]


def _text(path: Path, flag: str) -> str:
    found = read_text(path)
    if isinstance(found, SkippedFile):
        raise ConfigError(f"{flag} {found.name}: {found.detail}")
    return found.text


def document_prompts(
    tokenizer: Tokenizer, *, is_chat: bool, context: Path | None = None
) -> ChunkPrompts:
    """Prompts with documents, alike in all commands: what one stores, the other finds.

    Raises:
        ConfigError: the model's chat template cannot be used, or the context holds no text.
    """
    from ucm.engine.chunk_prompts import ChunkPrompts
    from ucm.reuse.encoding_context import CONTEXT_TOKENS

    tokens = [] if context is None else tokenizer.encode_plain(_text(context, "--context"))
    try:
        return ChunkPrompts(tokenizer, is_chat=is_chat, context=tokens[-CONTEXT_TOKENS:])
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
    the answer, and a chunk that is being computed behind its context.
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
