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

from ucm.kernels.attention import PagedSequence, select_attention
from ucm.kernels.rope import Rope
from ucm.kernels.rotate import rotate_keys

from .protocols import BlendPlan, BlendStep, ChunkSpan, LayerwiseModel
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

    def restore(self, original: DenseRows) -> None:
        """Be equal to others of the same shape again: no memory is asked for, as a copy does."""
        self.kv_L2GTD.copy_(original.kv_L2GTD)


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
        hidden += compute_branches(model, rows, [part], first)
    return torch.cat(hidden)


def compute_branches(
    model: LayerwiseModel, rows: DenseRows, branches: Sequence[Sequence[int]], start: int
) -> list[Tensor]:
    """Compute several continuations of the same rows, each as if it were the only one.

    They share the products with the weights. Rows from `start` on are left as one of them wrote
    them.

    Args:
        model: computes.
        rows: of all positions; those before `start` are read.
        branches: tokens of each, from position `start` on.
        start: where all of them begin.

    Returns:
        Hidden states behind the last layer, [len(branch), C] for each.
    """
    lengths = [len(branch) for branch in branches]
    x_SC = model.embed([token for branch in branches for token in branch])
    places = [torch.arange(start, start + length, device=x_SC.device) for length in lengths]
    positions = torch.cat(places)
    # A layer's rows are a pool of one block, and each branch is a slice of an ordinary prefill.
    paged = [PagedSequence.build(start, n, [0], rows.kv_L2GTD[:1]) for n in lengths]
    for layer in range(model.num_layers):
        q_SHD, kv_2GSD = model.project(layer, x_SC, positions)
        parts = zip(
            places,
            paged,
            q_SHD.split_with_sizes(lengths),
            kv_2GSD.split_with_sizes(lengths, 2),
            strict=True,
        )
        attended = [_attend_branch(rows, layer, *part) for part in parts]
        x_SC = model.finish(layer, x_SC, torch.cat(attended))
    return list(x_SC.split_with_sizes(lengths))


def _attend_branch(
    rows: DenseRows,
    layer: int,
    positions: Tensor,
    sequence: PagedSequence,
    q_SHD: Tensor,
    kv_2GSD: Tensor,
) -> Tensor:
    rows.write(layer, positions, kv_2GSD)
    kv_layer = rows.kv_L2GTD[layer : layer + 1]
    attend = select_attention(sequence, (q_SHD.shape[1], q_SHD.shape[2]), kv_layer)
    return attend(q_SHD, kv_layer, sequence)[0]


def run_to_end(blending: Generator[BlendStep, None, Result]) -> Result:
    """Run a blend without a pause."""
    while True:
        try:
            next(blending)
        except StopIteration as end:
            outcome: Result = end.value
            return outcome


def _empty(model: LayerwiseModel, num_positions: int) -> DenseRows:
    x_SC = model.embed([0])
    _, kv = model.project(0, x_SC, torch.zeros(1, dtype=torch.int64, device=x_SC.device))
    shape = (model.num_layers, *kv.shape[:2], num_positions, kv.shape[3])
    return DenseRows(kv.new_zeros(shape), num_positions)
