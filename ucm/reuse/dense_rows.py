"""KV of one request as one tensor: blending without an engine, for experiments and tests.

    rows, plan = assemble(model, rope, prompt)         chunks encoded behind their sink, and placed
    outcome = run_to_end(blend(model, rows, plan, options))
    hidden_QC = compute(model, rows, plan.token_ids, plan.stop)     the query, over what is there

Everything is done at once and in memory; an engine does the same over its paged pool.

Shapes: L layers, G KV heads, T positions, S rows, H query heads, D head size, C hidden size.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ucm.kernels.rope import Rope
from ucm.kernels.rotate import rotate_keys

from .protocols import BlendPlan, BlendStep, ChunkSpan, LayerwiseModel
from .row_attention import attend_rows
from .segments import Chunk, SegmentedPrompt

Result = TypeVar("Result")

SLICE_TOKENS = 512
"""Tokens computed at once: bounds the hidden states and masks held."""


class DenseRows:
    """A `KvRows` over [L, 2, G, T, D]."""

    def __init__(self, kv_L2GTD: Tensor, stop: int) -> None:
        """Take the KV, to be read up to position `stop` - 1; `write` changes it."""
        self.kv_L2GTD = kv_L2GTD
        self._stop = stop

    def read(self, layer: int) -> Tensor:
        """See `KvRows.read`."""
        return self.kv_L2GTD[layer, :, :, : self._stop].clone(memory_format=torch.contiguous_format)

    def write(self, layer: int, positions: Tensor, kv_2GSD: Tensor) -> None:
        """See `KvRows.write`."""
        self.kv_L2GTD[layer].index_copy_(2, positions, kv_2GSD)

    def copy(self) -> DenseRows:
        """Rows of their own, equal to these: a blend changes those it is given."""
        return DenseRows(self.kv_L2GTD.clone(), self._stop)


def encode_chunk(model: LayerwiseModel, chunk: Chunk) -> Tensor:
    """The KV that is kept of a chunk: computed behind its sink, whose rows are dropped.

    Returns:
        [L, 2, G, n, D], n the tokens that fill blocks, keys at positions len(sink) and on.
    """
    sink, block = chunk.space.sink_tokens, chunk.space.block_tokens
    count = len(chunk.token_ids) // block * block
    tokens = (*sink, *chunk.token_ids[:count])
    rows = _empty(model, len(tokens))
    compute(model, rows, tokens, 0)
    return rows.kv_L2GTD[:, :, :, len(sink) :].contiguous()


def assemble(
    model: LayerwiseModel,
    rope: Rope,
    prompt: SegmentedPrompt,
    encoded: Mapping[Chunk, Tensor] | None = None,
) -> tuple[DenseRows, BlendPlan]:
    """Put a prompt's chunks where they stand, and compute the text before the first.

    Args:
        model: computes.
        rope: the model's.
        prompt: text, chunks and text.
        encoded: what `encode_chunk` gave for some of the chunks; the others are encoded here.

    Returns:
        KV of all positions, and the plan; rows that no chunk fills are zero.
    """
    encoded = {} if encoded is None else encoded
    tokens, start, stop = prompt.token_ids, prompt.start, prompt.stop
    rows = _empty(model, len(tokens))
    rows = DenseRows(rows.kv_L2GTD, stop)
    spans = []
    for placed in prompt.spans:
        chunk, at = placed.chunk, placed.start
        stored = encoded[chunk] if chunk in encoded else encode_chunk(model, chunk)
        end = at + stored.shape[3]
        if end > at:
            sink = chunk.space.sink_tokens
            spans.append(ChunkSpan(start=at, stop=end, is_exact=tokens[:at] == sink))
            rows.kv_L2GTD[:, 0, :, at:end] = rotate_keys(stored[:, 0], rope, placed.shift)
            rows.kv_L2GTD[:, 1, :, at:end] = stored[:, 1]
    compute(model, rows, tokens[:start], 0)
    plan = BlendPlan(token_ids=tokens, spans=tuple(spans), start=start, stop=stop, query_start=stop)
    return rows, plan


def compute(model: LayerwiseModel, rows: DenseRows, token_ids: Sequence[int], start: int) -> Tensor:
    """Compute the tokens from position `start` on, over the KV before them, and write theirs.

    Args:
        model: computes.
        rows: of all positions; those before `start` are read.
        token_ids: of all positions up to where to stop.
        start: the first that is computed.

    Returns:
        Hidden states behind the last layer, [len(token_ids) - start, C]; `model.logits` takes
        those that are asked about.
    """
    hidden = [model.embed([])]
    for first in range(start, len(token_ids), SLICE_TOKENS):
        part = token_ids[first : first + SLICE_TOKENS]
        hidden.append(_compute_slice(model, rows, part, first))
    return torch.cat(hidden)


def run_to_end(blending: Generator[BlendStep, None, Result]) -> Result:
    """Run a blend without a pause."""
    while True:
        try:
            next(blending)
        except StopIteration as end:
            outcome: Result = end.value
            return outcome


def _compute_slice(
    model: LayerwiseModel, rows: DenseRows, token_ids: Sequence[int], first: int
) -> Tensor:
    x_SC = model.embed(token_ids)
    positions = torch.arange(first, first + len(token_ids), device=x_SC.device)
    for layer in range(model.num_layers):
        q_SHD, kv_2GSD = model.project(layer, x_SC, positions)
        rows.write(layer, positions, kv_2GSD)
        x_SC = model.finish(layer, x_SC, attend_rows(q_SHD, rows.kv_L2GTD[layer], positions))
    return x_SC


def _empty(model: LayerwiseModel, num_positions: int) -> DenseRows:
    x_SC = model.embed([0])
    _, kv = model.project(0, x_SC, torch.zeros(1, dtype=torch.int64, device=x_SC.device))
    shape = (model.num_layers, *kv.shape[:2], num_positions, kv.shape[3])
    return DenseRows(kv.new_zeros(shape), num_positions)
