"""What summaries cost the engine: beside the prefill of their blocks, and beside a decode step.

    python -m ucm.bench.summaries [KIND ...]      prints one JSON object; a minute for all kinds

One process, the model's own threads for its passes and one for summaries; passes and summaries take
turns, so that a busy machine slows both; medians.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from ucm.engine.loading import default_model_folder, load_model
from ucm.engine.model import ForwardItem, LlamaModel
from ucm.engine.runner import layout_of
from ucm.kernels.block_scores import SummaryTable
from ucm.kernels.summarize import summarize
from ucm.kernels.summary_record import summary_bytes
from ucm.layout import KvLayout
from ucm.types import SummaryKind

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_TOKENS = 32
CHUNK_BLOCKS = 16
"""Blocks of the prefill chunk whose share one block is."""
CONTEXT_BLOCKS = 128
ROUNDS = 7
SEED = 0

Figures = dict[str, float]


def measure(model: LlamaModel, kinds: tuple[SummaryKind, ...]) -> dict[str, object]:
    """Time passes, summaries and scores in turns.

    Returns:
        `prefill_ms_per_block`, `decode_step_ms` (4,096 tokens of context) and by kind
        `bytes_ratio` (of a bf16 block), `summarize_ms_per_block`, `prefill_ratio`,
        `score_us_per_layer` and `step_ratio`.
    """
    layout, pool = _pool_of(model)
    chunk = _item(0, CHUNK_BLOCKS * BLOCK_TOKENS)
    step = _item(CONTEXT_BLOCKS * BLOCK_TOKENS - 1, 1)
    tables = {kind: _table(kind, layout, pool) for kind in kinds}
    q = np.random.default_rng(SEED).standard_normal((1, model.config.num_heads, layout.head_dim))
    query = q.astype(np.float32)
    prefill, decode = [], []
    made: dict[SummaryKind, list[float]] = {kind: [] for kind in kinds}
    scored: dict[SummaryKind, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        prefill.append(_time(lambda: model.forward([chunk], pool)) / CHUNK_BLOCKS)
        for kind in kinds:
            slabs = _slabs(pool, CHUNK_BLOCKS)
            made[kind].append(_time(partial(summarize, kind, slabs)) / CHUNK_BLOCKS)
        for kind in kinds:
            decode.append(_time(lambda: model.forward([step], pool)))
            scored[kind].append(_time(partial(_score, tables[kind], query)))
    block_s, step_s = statistics.median(prefill), statistics.median(decode)
    result: dict[str, object] = {
        "prefill_ms_per_block": round(block_s * 1e3, 2),
        "decode_step_ms": round(step_s * 1e3, 2),
    }
    for kind in kinds:
        made_s, scored_s = statistics.median(made[kind]), statistics.median(scored[kind])
        result[kind] = _figures(layout, kind, made_s / block_s, scored_s / step_s) | {
            "summarize_ms_per_block": round(made_s * 1e3, 2),
            "score_us_per_layer": round(scored_s / layout.num_layers * 1e6, 1),
        }
    return result


def _figures(layout: KvLayout, kind: SummaryKind, prefill: float, step: float) -> Figures:
    size = summary_bytes(layout, kind) / layout.block_bytes * layout.dtype.itemsize_bytes / 2
    return {
        "bytes_ratio": round(size, 4),
        "prefill_ratio": round(prefill, 4),
        "step_ratio": round(step, 4),
    }


def _pool_of(model: LlamaModel) -> tuple[KvLayout, torch.Tensor]:
    """A pool for the longest context, full of noise."""
    layout = layout_of(model, BLOCK_TOKENS)
    torch.manual_seed(SEED)
    return layout, torch.randn(layout.num_layers, CONTEXT_BLOCKS, *layout.slab_shape)


def _item(start: int, num_tokens: int) -> ForwardItem:
    return ForwardItem([1 + i % 200 for i in range(num_tokens)], start, list(range(CONTEXT_BLOCKS)))


def _slabs(pool: torch.Tensor, num_blocks: int) -> NDArray[np.float32]:
    """[num_layers * num_blocks, 2, G, B, D] as they lie in the pool of one sequence."""
    slabs: NDArray[np.float32] = pool[:, :num_blocks].reshape(-1, *pool.shape[2:]).numpy()
    return slabs


def _table(kind: SummaryKind, layout: KvLayout, pool: torch.Tensor) -> SummaryTable:
    table = SummaryTable(kind, layout)
    records = summarize(kind, _slabs(pool, CONTEXT_BLOCKS))
    table.extend(records.reshape(layout.num_layers, CONTEXT_BLOCKS, -1).swapaxes(0, 1))
    return table


def _score(table: SummaryTable, query: NDArray[np.float32]) -> None:
    for layer in range(table.layout.num_layers):
        table.shares(layer, query)


def _time(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Print the figures of the kinds that the command line names, on `smollm2-135m`."""
    kinds = tuple(map(SummaryKind, sys.argv[1:] or SummaryKind))
    print(json.dumps(measure(load_model(default_model_folder()).model, kinds), indent=1))


if __name__ == "__main__":
    main()
