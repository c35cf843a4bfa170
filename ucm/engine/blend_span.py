"""Which positions of a prompt chunks fill.

    prompt   | text | chunk: full blocks, tail | text | chunk: full blocks, tail | text |
    span            start                                                        stop

A chunk's tail, which fills no block, and text between chunks have no rows to reuse: they are
computed in every layer, with what of the chunks is recomputed. So is a short query behind the
span (`blend_job`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ucm.errors import InvalidArgumentError
from ucm.hashing import FORMAT_VERSION, Encodable, encode
from ucm.reuse.chunks import as_tokens
from ucm.reuse.options import ReuseOptions
from ucm.reuse.segments import ChunkSpace, SegmentedPrompt

from .interfaces import DecoderModel
from .reuse_report import FallbackReason, ReuseReport


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendChunk:
    """The full blocks of a chunk, where they stand in a prompt."""

    start: int
    token_ids: tuple[int, ...]
    """A multiple of the block size, at least one block."""
    is_exact: bool
    """Whether it stands where it was encoded, behind the same tokens."""

    @property
    def stop(self) -> int:
        """Position behind its last full block."""
        return self.start + len(self.token_ids)


@dataclass(slots=True, eq=False, kw_only=True)
class BlendSpan:
    """The chunks of one sequence."""

    chunks: tuple[BlendChunk, ...]
    """At least one, ascending."""
    stop: int
    """Position behind the last of them, its tail included."""
    num_extra_blocks: int
    """Pool blocks that they take beside the sequence's own, while they are blended in."""
    is_over: bool = False
    """Whether ordinary passes may compute beyond `start`."""
    fallback: FallbackReason | None = None
    report: ReuseReport | None = None

    @property
    def start(self) -> int:
        """Position of the first chunk."""
        return self.chunks[0].start

    def fall_back(self, reason: FallbackReason) -> None:
        """Compute everything, now and after a preemption."""
        self.is_over, self.fallback = True, reason
        report = self.report or ReuseReport()
        self.report = replace(report, fallback=reason)

    def rewind(self) -> None:
        """The sequence lost its KV."""
        self.is_over = self.fallback is not None

    def fork(self) -> BlendSpan:
        """That of another sample, whose KV is the same so far."""
        return replace(self)


def span_of(
    prompt: SegmentedPrompt, block_tokens: int, sink_tokens: Sequence[int]
) -> BlendSpan | None:
    """Where a prompt's chunks stand; None when none of them fills a block."""
    sink = tuple(sink_tokens)
    chunks = tuple(
        BlendChunk(
            start=placed.start,
            token_ids=prompt.token_ids[placed.start : placed.cached_stop],
            is_exact=prompt.token_ids[: placed.start] == sink,
        )
        for placed in prompt.spans
        if placed.chunk.num_blocks
    )
    if not chunks:
        return None
    distinct = {chunk.token_ids for chunk in chunks}
    longest = max(map(len, distinct))
    num_rows = sum(map(len, distinct)) + len(sink) + longest
    return BlendSpan(chunks=chunks, stop=prompt.stop, num_extra_blocks=-(-num_rows // block_tokens))


def chunk_space_of(model: DecoderModel, options: ReuseOptions, block_tokens: int) -> ChunkSpace:
    """Where an engine's chunks mean the same.

    Raises:
        InvalidArgumentError: the sink prefix is too short, too long for the model, or not of its
            vocabulary.
    """
    config = model.config
    if max(as_tokens(options.sink_tokens, "the sink prefix"), default=0) >= config.vocab_size:
        raise InvalidArgumentError(
            f"the sink prefix has a token outside the vocabulary; ids are 0 to "
            f"{config.vocab_size - 1}"
        )
    described: list[Encodable] = [
        *("ucm.chunk.model", FORMAT_VERSION, options.model_digest, str(model.dtype)),
        *(config.num_layers, config.num_kv_heads, config.head_dim, config.vocab_size),
        repr(getattr(config, "rope", None)),
    ]
    return ChunkSpace(
        model=hashlib.sha256(encode(described)).digest(),
        sink_tokens=tuple(options.sink_tokens),
        block_tokens=block_tokens,
        max_positions=config.max_context_tokens,
    )
