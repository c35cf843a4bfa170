"""A prompt in segments: text that is computed, chunks that are reused.

segments   | text (prefix) | chunk | chunk | text? | chunk | text (query) |
positions  0               start                           stop
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChunkSpace:
    """Where chunks mean the same: one model, one sink prefix, one block size."""

    model: bytes
    """Fingerprint of the model and of how it places positions."""
    sink_tokens: tuple[int, ...]
    """Tokens that every chunk is encoded behind; their rows are dropped."""
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens that are computed where they stand."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens whose KV is kept, and placed where they stand."""

    token_ids: tuple[int, ...]
    space: ChunkSpace


Segment = Text | Chunk


@dataclass(frozen=True, slots=True)
class SegmentedPrompt:
    """A request in segments; it begins and ends with text."""

    segments: Sequence[Segment]
