"""Reuse at any position: chunks that return elsewhere, repaired where they drifted.

Knows tokens, chunks and one layer of a model at a time; no requests, no scheduler, no cache. The
engine imports this package, never the other way round. Importing it is cheap: no torch.
"""

from __future__ import annotations

from .chunks import check_reusable
from .segments import (
    Chunk,
    ChunkSpace,
    PlacedChunk,
    Segment,
    SegmentedPrompt,
    Text,
    split_document,
)

__all__ = [
    "Chunk",
    "ChunkSpace",
    "PlacedChunk",
    "Segment",
    "SegmentedPrompt",
    "Text",
    "check_reusable",
    "split_document",
]
