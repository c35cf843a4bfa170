"""A request over the tiny model whose chunks are placed and not yet repaired.

    | sink, text | chunk | chunk, tail | text | chunk | query |       blocks of 8 tokens

`RecordingRows` is the proof's side of `KvRows`: who read and wrote which rows of which layer, when.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ucm.engine.loading import load_model
from ucm.engine.model import LlamaModel
from ucm.reuse.dense_rows import DenseRows, assemble, compute
from ucm.reuse.protocols import BlendPlan
from ucm.reuse.segments import Chunk, ChunkSpace, SegmentedPrompt, Text

from .models import write_tiny_model

BLOCK_TOKENS = 8
CHUNK_TOKENS = (48, 35, 64)


@dataclass(frozen=True)
class BlendSetup:
    """See the module."""

    model: LlamaModel
    rows: DenseRows
    """Chunks placed; every test takes a copy."""
    plan: BlendPlan
    full: DenseRows
    """What a full prefill computes."""
    full_logits: Tensor
    """Of the query, [Q, vocab_size]."""

    def query_logits(self, rows: DenseRows) -> Tensor:
        """Logits of the query over these rows, [Q, vocab_size]."""
        plan = self.plan
        return self.model.logits(compute(self.model, rows, plan.token_ids, plan.stop))


def blend_setup(*, is_first_exact: bool = False, num_layers: int = 6) -> BlendSetup:
    """Build it; `is_first_exact` puts nothing between the sink and the first chunk."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_model(write_tiny_model(Path(folder), num_hidden_layers=num_layers))
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> tuple[int, ...]:
        drawn = torch.randint(3, loaded.config.vocab_size, (count,), generator=generator)
        return tuple(drawn.tolist())

    sink = draw(8)
    space = ChunkSpace(b"tiny", sink, BLOCK_TOKENS)
    first, second, third = (Chunk(draw(count), space) for count in CHUNK_TOKENS)
    opening = Text(sink if is_first_exact else sink + draw(3))
    prompt = SegmentedPrompt((opening, first, second, Text(draw(3)), third, Text(draw(20))))
    rows, plan = assemble(loaded.model, loaded.config.rope, prompt)
    full = DenseRows(torch.zeros_like(rows.kv_L2GTD), plan.stop)
    hidden = compute(loaded.model, full, plan.token_ids, 0)
    logits = loaded.model.logits(hidden[plan.stop :])
    return BlendSetup(loaded.model, rows, plan, full, logits)


class RecordingRows:
    """`KvRows` that remembers what was asked of it."""

    def __init__(self, rows: DenseRows) -> None:
        self.rows = rows
        self.reads: list[int] = []
        """Layers, in the order of their reads."""
        self.writes: dict[int, list[int]] = {}
        """Positions written of each layer."""
        self.reads_before_write: dict[int, set[int]] = {}
        """For each layer what had been read before its first write."""

    def read(self, layer: int) -> Tensor:
        """See `KvRows.read`."""
        self.reads.append(layer)
        return self.rows.read(layer)

    def write(self, layer: int, positions: Tensor, kv: Tensor) -> None:
        """See `KvRows.write`."""
        self.reads_before_write.setdefault(layer, set(self.reads))
        self.writes.setdefault(layer, []).extend(positions.tolist())
        self.rows.write(layer, positions, kv)
