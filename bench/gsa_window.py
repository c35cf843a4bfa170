"""One pass over the last tokens of a document in which each token reads its own choice of blocks.

A decode step computes one token: in each layer its query chooses blocks, and attention reads those.
Here the T tokens of a *window* are computed in one pass, and each token's query chooses for itself,
in each layer, among the blocks that were full before it; or it takes the choice of the token
before, as the engine's steps do within a stride. A token's choice depends only on its own query,
or on one before, and on blocks before it, so the result is that of T decode steps fed the same
tokens (a test compares them), at the price of one.

    blocks   | sink | ... chosen among ... | recent | filling |     of the token at `position`
    read       always   as the budget says   always    always
             0                                       position // B

The pass also sees the true scores, since it masks instead of skipping: what mass the chosen blocks
hold, and what the best choice for the same query would have been.

Envelope: T = 128 tokens on 4,096 of SmolLM2-135M are 35 GFLOP of matrix products, 1 s on two cores,
and 140 million exponentials; 3,840 choices of 60 us.

Shapes: T window tokens, H query heads, G KV heads, R = H / G, n blocks, B block tokens, S = n * B,
D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ucm.engine.model import ForwardItem, LlamaModel
from ucm.engine.runner import layout_of
from ucm.kernels.block_scores import Budget, choose_blocks, shared_mass
from ucm.layout import KvLayout

Floats: TypeAlias = NDArray[np.float32]
Bools: TypeAlias = NDArray[np.bool_]
Indexes: TypeAlias = NDArray[np.int64]

PREFILL_TOKENS = 512
"""Of one pass of a prefill."""


@dataclass(frozen=True, slots=True)
class Window:
    """Which positions are computed, and what they always read."""

    start: int
    """Position of the first token of the window."""
    num_tokens: int
    block_tokens: int
    sink_blocks: int = 1
    recent_blocks: int = 2
    stride: int = 1
    """Steps that a layer's choice is used for; what becomes full meanwhile is read."""

    def is_fresh(self, layer: int, token: int) -> bool:
        """Whether a layer chooses anew for a token; layers take turns, as in the engine."""
        turn = self.start + token + layer
        return token == 0 or turn // self.stride != (turn - 1) // self.stride

    @property
    def num_blocks(self) -> int:
        """Blocks up to the last token, the one that is being filled included."""
        return -(-(self.start + self.num_tokens) // self.block_tokens)

    def num_full(self, token: int) -> int:
        """Blocks that were full before the window's `token`: it chooses among these."""
        return (self.start + token) // self.block_tokens

    def must(self, token: int) -> Bools:
        """[num_full] of them, those that are always read."""
        must = np.zeros(self.num_full(token), np.bool_)
        must[: self.sink_blocks] = True
        must[max(0, len(must) - self.recent_blocks) :] = True
        return must


class Ranking(Protocol):
    """Estimates where a query's attention mass lies."""

    def log_mass(self, layer: int, queries: Floats, kv_layer: Tensor, true: Floats) -> Floats:
        """Log mass of each block for each query.

        Args:
            layer: which; they come in order.
            queries: the window's queries.
            kv_layer: [blocks, 2, G, B, D] the pool's layer, the window's KV included.
            true: [T, H, n] the truth, for the oracle.

        Returns:
            [T, H, m]; m covers at least the blocks that were full before the last token.
        """

    def must(self, layer: int) -> Bools:
        """[m] blocks that nothing is known of, so that they are read."""


@dataclass(slots=True)
class WindowStats:
    """What the choices of one pass were worth; sums over `count` choices (a layer of a token)."""

    count: int = 0
    mass: float = 0.0
    """Share of the true attention mass in the blocks read."""
    recall: float = 0.0
    """Share of the best choice's blocks that were chosen, what is always read left out."""
    num_recalls: int = 0
    """Choices that had anything to choose."""
    read: float = 0.0
    """Blocks read, over all blocks."""
    scored: float = 0.0
    """Blocks whose summaries were read, over all blocks."""


class WindowAttention:
    """The `ItemAttention` of a window; see the module."""

    def __init__(
        self, window: Window, ranking: Ranking | None = None, budget: Budget | None = None
    ) -> None:
        """Read what `ranking` says within `budget`; without a ranking everything."""
        self.window = window
        self.stats = WindowStats()
        self._ranking = ranking
        self._budget = budget

    def __call__(self, layer: int, queries: Tensor, kv_layer: Tensor, /) -> Tensor:
        """See `ItemAttention`."""
        window, (tokens, heads, dim) = self.window, queries.shape
        blocks = kv_layer[: window.num_blocks]
        groups = blocks.shape[2]
        keys, values = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)
        grouped = queries.view(tokens, groups, -1, dim).permute(1, 2, 0, 3)
        scores = (grouped.flatten(1, 2) @ keys.transpose(1, 2)).mul_(dim**-0.5)
        shape = (groups, heads // groups, tokens, window.num_blocks, window.block_tokens)
        by_block = _hide_future(scores, window).view(shape)
        peaks = by_block.amax(-1)
        weights = by_block.sub_(peaks.clamp(min=-1e30).unsqueeze(-1)).exp_()
        sums = weights.sum(-1)
        read = torch.from_numpy(self._read(layer, queries, kv_layer, peaks + sums.log()))
        # Of each block what the merge by log-sum-exp of the blocks read gives it; 0 where not.
        factors = peaks.masked_fill(~read, float("-inf"))
        factors = factors.sub_(factors.amax(-1, keepdim=True)).exp_()
        total = (factors * sums).sum(-1)
        flat = weights.mul_(factors.unsqueeze(-1)).view(groups, -1, values.shape[1])
        out: Tensor = (flat @ values).view(groups, -1, tokens, dim) / total.unsqueeze(-1)
        return out.permute(2, 0, 1, 3).reshape(tokens, heads, dim).to(queries.dtype)

    def _read(self, layer: int, queries: Tensor, kv_layer: Tensor, log_mass: Tensor) -> Bools:
        """[T, n] which blocks each token reads."""
        window, tokens = self.window, queries.shape[0]
        read = np.ones((tokens, window.num_blocks), np.bool_)
        if self._ranking is None:
            return read
        assert self._budget is not None
        true: Floats = log_mass.flatten(0, 1).transpose(0, 1).numpy()
        told = self._ranking.log_mass(layer, np.ascontiguousarray(queries.numpy()), kv_layer, true)
        unknown = self._ranking.must(layer)
        share = _softmax(true)
        for token in range(tokens):
            num = window.num_full(token)
            must = window.must(token)
            if window.is_fresh(layer, token):
                chosen = self._choose(told[token], must | unknown[:num])
                read[token, :num] = False
                read[token, chosen] = True
            else:
                read[token] = read[token - 1]
            best = self._choose(true[token], must)
            self._count(share[token], read[token], best, must)
        return read

    def _choose(self, log_mass: Floats, must: Bools) -> Indexes:
        assert self._budget is not None
        shared = shared_mass(log_mass[None, :, : len(must)])
        return choose_blocks(shared, self._budget, must, self.window.block_tokens).blocks

    def _count(self, share: Floats, read: Bools, best: Indexes, must: Bools) -> None:
        stats, num_blocks = self.stats, len(must) + 1
        stats.count += 1
        stats.mass += float(share[:, read].sum(1).mean())
        stats.read += int(read[:num_blocks].sum()) / num_blocks
        stats.scored += len(must) / num_blocks
        wanted = best[~must[best]]
        if len(wanted):
            stats.recall += float(read[wanted].mean())
            stats.num_recalls += 1


def _hide_future(scores: Tensor, window: Window) -> Tensor:
    """Set to -inf what lies behind each token; scores [G, R * T, S], changed in place."""
    groups, rows, keys = scores.shape
    tail = scores.view(groups, rows // window.num_tokens, window.num_tokens, keys)
    tail = tail[..., window.start :]
    columns = torch.arange(tail.shape[-1])
    tail.masked_fill_(columns > torch.arange(window.num_tokens).unsqueeze(1), float("-inf"))
    return scores


def _softmax(log_mass: Floats) -> Floats:
    weights = np.exp(log_mass - log_mass.max(-1, keepdims=True))
    share: Floats = weights / weights.sum(-1, keepdims=True)
    return share


@dataclass(frozen=True, slots=True)
class Context:
    """A document's first tokens in a pool of its own, and the model that computed them."""

    model: LlamaModel
    pool: Tensor
    """[L, blocks, 2, G, B, D]; block i of the document is block i of the pool."""
    num_tokens: int

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return int(self.pool.shape[4])

    @property
    def layout(self) -> KvLayout:
        """Of the pool's blocks."""
        return layout_of(self.model, self.block_tokens)


@dataclass(slots=True)
class ContextBuilder:
    """Fills a pool with a text, further and further; what is there is not computed again."""

    model: LlamaModel
    pool: Tensor
    _tokens: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, model: LlamaModel, max_tokens: int, block_tokens: int = 32) -> ContextBuilder:
        """Room for `max_tokens`."""
        c = model.config
        num_blocks = -(-max_tokens // block_tokens)
        shape = (c.num_layers, num_blocks, 2, c.num_kv_heads, block_tokens, c.head_dim)
        return cls(model, torch.zeros(shape, dtype=model.dtype))

    def fill(self, token_ids: Sequence[int]) -> Context:
        """The context of these tokens; what an earlier one shares with them from the begin stays.

        It is true until the next call.
        """
        wanted = list(token_ids)
        start = 0
        for ours, theirs in zip(self._tokens, wanted, strict=False):
            if ours != theirs:
                break
            start += 1
        del self._tokens[start:]
        ids = range(self.pool.shape[1])
        for first in range(start, len(wanted), PREFILL_TOKENS):
            part = wanted[first : first + PREFILL_TOKENS]
            self.model.forward([ForwardItem(part, first, ids)], self.pool)
            self._tokens += part
        return Context(self.model, self.pool, len(wanted))


@dataclass(frozen=True, slots=True)
class WindowResult:
    """What a pass over a window gave."""

    logits: Tensor
    """[T, V] fp32: what each of its tokens says of the next."""
    stats: WindowStats


def run_window(
    context: Context,
    token_ids: Sequence[int],
    ranking: Ranking | None = None,
    budget: Budget | None = None,
    stride: int = 1,
) -> WindowResult:
    """Compute `token_ids` behind a context, whose pool has room for them.

    Args:
        context: not changed, but what is behind it in the pool is overwritten.
        token_ids: of the window.
        ranking: what to choose by; None reads everything.
        budget: how much to read.
        stride: steps that a choice is used for.
    """
    window = Window(context.num_tokens, len(token_ids), context.block_tokens, stride=stride)
    attention = WindowAttention(window, ranking, budget)
    item = ForwardItem(
        token_ids, context.num_tokens, range(context.pool.shape[1]), attention=attention
    )
    logits = context.model.forward([item], context.pool, every_token=True)
    return WindowResult(logits, attention.stats)
