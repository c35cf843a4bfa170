"""Times of a sparse decode step, and of the choosing in it: one token a pass, as an engine decodes.

What attends is `SparseDecoding`, the engine's own; a step is the model's pass. The oracle is no
method of the product's: its choosing is the masked attention of `gsa_window`, which reads all keys.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ucm.engine.model import ForwardItem
from ucm.kernels.block_scores import Budget
from ucm.sparse.decoding import SparseDecoding
from ucm.sparse.mode_policy import LoadSignals
from ucm.sparse.options import SparseOptions
from ucm.sparse.protocols import DecodeStep, ItemAttention
from ucm.types import SummaryKind

from .gsa_rankings import ORACLE, OracleRanking
from .gsa_window import Context, Window, WindowAttention

SEQUENCE = "benchmark"
WARM_UP_STEPS = 2
"""Not measured: the first step makes the summaries of the whole context."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Medians over steps."""

    select_ms: float
    """Of choosing, in all layers."""
    step_ms: float
    """Of the whole pass."""


Attend = Callable[[int], tuple[ItemAttention | None, Callable[[], float]]]
"""For a position: who attends, and a clock of the seconds spent on choosing so far."""


def time_steps(
    context: Context,
    token_ids: Sequence[int],
    selector: str,
    budget: Budget,
    stride: int | None = None,
) -> StepTimes:
    """Decode `token_ids` behind a context one by one; what is behind it in the pool is overwritten.

    Args:
        context: prefilled.
        token_ids: at least three; the first two are not measured.
        selector: whose choice is read.
        budget: how much to read.
        stride: steps that a choice is used for, by all but the oracle; None: the engine's default.
    """
    if selector == ORACLE:
        attend = _oracle(context, budget)
    else:
        attend = _sparse(context, selector, budget, stride)
    chosen_s, step_s = [], []
    for position, token in enumerate(token_ids, start=context.num_tokens):
        started_s = time.perf_counter()
        attention, clock = attend(position)
        before_s = clock()
        decode_one(context, token, position, attention)
        step_s.append(time.perf_counter() - started_s)
        chosen_s.append(clock() - before_s)
    return StepTimes(_median_ms(chosen_s), _median_ms(step_s))


def decode_one(
    context: Context, token: int, position: int, attention: ItemAttention | None
) -> Tensor:
    """One decode step; [V] what it says of the next token."""
    item = ForwardItem([token], position, range(context.pool.shape[1]), attention=attention)
    return context.model.forward([item], context.pool)[0]


def sparse_attention(context: Context, options: SparseOptions) -> Callable[[int], ItemAttention]:
    """The engine's sparse attention over a context: for a position, who attends there."""
    decoding = _decoding(context, options)
    return lambda position: _attention(decoding, context, position)


def _sparse(context: Context, selector: str, budget: Budget, stride: int | None) -> Attend:
    num_blocks = context.pool.shape[1]
    decoding = _decoding(context, sparse_options(selector, budget, num_blocks, stride))
    return lambda position: (
        _attention(decoding, context, position),
        lambda: decoding.stats.select_s,
    )


def sparse_options(
    selector: str, budget: Budget, num_blocks: int, stride: int | None
) -> SparseOptions:
    """Of the engine's sparse attention, over `num_blocks` from the first step on.

    Args:
        selector: a kind of summary.
        budget: how much to read.
        num_blocks: of the context.
        stride: steps that a choice is used for; None: the engine's default.
    """
    options = SparseOptions(
        kind=SummaryKind(selector),
        budget=budget,
        min_context_tokens=1,
        catch_up_blocks=num_blocks,
    )
    return options if stride is None else replace(options, stride=stride)


def _decoding(context: Context, options: SparseOptions) -> SparseDecoding:
    return SparseDecoding(options, context.layout, context.pool.shape[1], lambda _block: 0)


def _attention(decoding: SparseDecoding, context: Context, position: int) -> ItemAttention:
    pool = context.pool
    decoding.begin_pass(LoadSignals(position + 1, 1, 0.0))
    step = DecodeStep(
        sequence_id=SEQUENCE,
        position=position,
        num_prompt=context.num_tokens,
        block_ids=range(pool.shape[1]),
        block_tokens=context.block_tokens,
    )
    attention = decoding.attention(step, pool)
    assert attention is not None, "a context is long enough by the options above"
    return attention


@dataclass(slots=True)
class _Timed:
    """An attention with a clock."""

    seconds: float = 0.0
    inner: ItemAttention | None = field(default=None)

    def __call__(self, layer: int, queries: Tensor, kv_layer: Tensor, /) -> Tensor:
        assert self.inner is not None
        started_s = time.perf_counter()
        out = self.inner(layer, queries, kv_layer)
        self.seconds += time.perf_counter() - started_s
        return out


def _oracle(context: Context, budget: Budget) -> Attend:
    timed = _Timed()

    def attend(position: int) -> tuple[ItemAttention, Callable[[], float]]:
        window = Window(position, 1, context.block_tokens)
        timed.inner = WindowAttention(window, OracleRanking(), budget)
        return timed, lambda: timed.seconds

    return attend


def _median_ms(seconds: Sequence[float]) -> float:
    return 1e3 * statistics.median(seconds[WARM_UP_STEPS:])


def dense_step_ms(context: Context, token_ids: Sequence[int]) -> float:
    """The same steps with the model's own dense attention."""
    seconds = []
    with torch.inference_mode():
        for position, token in enumerate(token_ids, start=context.num_tokens):
            started_s = time.perf_counter()
            decode_one(context, token, position, None)
            seconds.append(time.perf_counter() - started_s)
    return _median_ms(seconds)
