"""Decode with most of the KV on a tier of limited bandwidth: everything read, or what is chosen.

    prompt   chunk by chunk, its full blocks kept on the tier; not timed, not throttled
    dense    `num_dense` tokens, throttled and timed; the rest of the text unthrottled, for its NLL
    gsa      the same text from the same prompt, throttled and timed from the first token on, with
             a pool that is empty at first

The text is given (teacher-forced), so both read the same tokens: the difference of their mean
negative log-likelihoods is what leaving blocks out costs. Both own the same pool blocks; dense
decode keeps what is in them, so it reads only what they cannot hold.

The tier is this process's memory behind a token bucket: a disk would add its own delays to both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ucm.clock import SystemClock
from ucm.engine.model import ForwardItem, LlamaModel
from ucm.engine.pool import KvPool
from ucm.engine.runner import layout_of
from ucm.errors import InvalidArgumentError
from ucm.kernels.block_scores import Budget, SummaryTable
from ucm.sparse.decoding import SparseStats
from ucm.sparse.offload import OffloadedAttention, OffloadOptions
from ucm.sparse.offload_chooser import SummaryChooser
from ucm.sparse.options import SparseOptions
from ucm.sparse.selector import Settings
from ucm.sparse.slab_source import HostSlabSource, SlabShelf
from ucm.storage.throttled_io import bucket_of
from ucm.types import SummaryKind

MB = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadCase:
    """What is measured."""

    bandwidth_mb_s: float = 50.0
    """Of the tier, in 1e6 bytes a second."""
    context_tokens: int = 8_000
    """Prompt."""
    resident_tokens: int = 2_048
    """KV that the pool holds."""
    num_tokens: int = 64
    """Decoded behind the prompt, sparsely; and densely, for the NLL."""
    num_dense: int = 2
    """Of these, timed densely: one takes as long as all that is not in the pool does."""
    budget: Budget = field(default_factory=lambda: Budget(ratio=0.4))
    """More than elsewhere: what a slow tier saves leaves room for quality. The pool keeps a part of
    the chosen blocks, so the bytes moved are far fewer than the budget."""
    kind: SummaryKind = SummaryKind.GSA_K4
    block_tokens: int = 32
    chunk_tokens: int = 512


class ForcedSequence:
    """One sequence beyond the pool whose tokens are given."""

    def __init__(
        self,
        model: LlamaModel,
        case: OffloadCase,
        pool: KvPool,
        shelf: SlabShelf,
        chooser: SummaryChooser,
    ) -> None:
        """Go on behind what the shelf keeps."""
        self._model = model
        self._pool = pool
        self._case = case
        options = OffloadOptions(resident_blocks=pool.blocks.num_blocks)
        self._chunk = min(case.chunk_tokens, options.max_chunk_tokens(case.block_tokens))
        ids = range(pool.blocks.num_blocks)
        self.attention = OffloadedAttention(options, pool.tensor, ids, shelf, chooser)
        self.num_computed = shelf.num_kept * case.block_tokens

    def prefill(self, tokens: Sequence[int]) -> None:
        """Compute `tokens` behind what is computed."""
        while self.num_computed < len(tokens):
            stop = min(len(tokens), self.num_computed + self._chunk)
            self._compute(tokens[:stop], is_decode=False)

    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        """Compute the last of `tokens`."""
        return self._compute(tokens, is_decode=True)

    def _compute(self, tokens: Sequence[int], *, is_decode: bool) -> torch.Tensor:
        start = self.num_computed
        new = list(tokens[start:])
        table = self.attention.begin_pass(start, len(new), is_decode=is_decode)
        look_ahead = self.attention.look_ahead if is_decode else None
        item = ForwardItem(new, start, table, self.attention, look_ahead)
        logits = self._model.forward([item], self._pool.tensor)[0]
        self.attention.end_pass(tokens, len(tokens), 0)
        self.num_computed = len(tokens)
        return logits


def measure_offload(
    model: LlamaModel,
    token_ids: Sequence[int],
    case: OffloadCase | None = None,
    tell: Callable[[str], None] = lambda _line: None,
) -> dict[str, float]:
    """Measure one case; minutes at 8,000 tokens.

    Args:
        model: the decoder.
        token_ids: a text of at least `context_tokens + num_tokens + 1` tokens.
        case: what; the defaults when None.
        tell: told what is under way.

    Returns:
        bandwidth_mb_s, context_tokens, dense_tokens_s, gsa_tokens_s, dnll, and beside these
        dense_mb_per_token, gsa_mb_per_token, pool_tokens, num_tokens, useful_ahead, wasted_ahead.

    Raises:
        InvalidArgumentError: the text is too short, or the model's context is.
    """
    case = case or OffloadCase()
    needed = case.context_tokens + case.num_tokens + 1
    if len(token_ids) < needed or model.config.max_context_tokens < needed:
        raise InvalidArgumentError(
            f"{needed} tokens are needed: the text has {len(token_ids)}, the model takes "
            f"{model.config.max_context_tokens}"
        )
    num_bytes = 4 * needed * model.config.num_layers * model.config.num_kv_heads
    source = HostSlabSource(num_bytes * 2 * model.config.head_dim)
    try:
        return _Measurement(model, list(token_ids[:needed]), case, source, tell).run()
    finally:
        source.close()


@dataclass(slots=True)
class _Measurement:
    model: LlamaModel
    tokens: list[int]
    case: OffloadCase
    source: HostSlabSource
    tell: Callable[[str], None]
    is_sparse: bool = False
    stats: SparseStats = field(default_factory=SparseStats)

    def run(self) -> dict[str, float]:
        """Prompt, dense, sparse."""
        case, model = self.case, self.model
        pool = self._pool()
        table = SummaryTable(case.kind, pool.layout)
        options = SparseOptions(min_context_tokens=1, budget=case.budget)
        chooser = SummaryChooser(table, options, self._settings, self.stats)
        shelf = self.source.open("bench")
        dense = ForcedSequence(model, case, pool, shelf, chooser)
        self.tell(f"prompt of {case.context_tokens} tokens")
        dense.prefill(self.tokens[: case.context_tokens])
        self.tell("dense decode")
        dense_rate, dense_mb = self._timed(dense, case.num_dense)
        nll = [*dense_rate.nll, *self._decode(dense, case.num_tokens - case.num_dense)]
        dense.attention.stop()
        prompt_blocks = case.context_tokens // case.block_tokens
        shelf.truncate(prompt_blocks)
        chooser.truncate(prompt_blocks)
        sparse = ForcedSequence(model, case, pool, shelf, chooser)
        if sparse.num_computed < case.context_tokens:
            sparse.prefill(self.tokens[: case.context_tokens])
        self.tell("sparse decode")
        self.is_sparse = True
        gsa_rate, gsa_mb = self._timed(sparse, case.num_tokens)
        sparse.attention.stop()
        residency = sparse.attention.resident.stats
        return {
            "bandwidth_mb_s": case.bandwidth_mb_s,
            "context_tokens": case.context_tokens,
            "dense_tokens_s": dense_rate.tokens_s,
            "gsa_tokens_s": gsa_rate.tokens_s,
            "dnll": sum(gsa_rate.nll) / len(gsa_rate.nll) - sum(nll) / len(nll),
            "dense_mb_per_token": dense_mb,
            "gsa_mb_per_token": gsa_mb,
            "pool_tokens": pool.blocks.num_blocks * case.block_tokens,
            "num_tokens": case.num_tokens,
            "useful_ahead": residency.useful_ahead,
            "wasted_ahead": residency.wasted_ahead,
        }

    def _pool(self) -> KvPool:
        layout = layout_of(self.model, self.case.block_tokens)
        return KvPool(layout, self.case.resident_tokens // self.case.block_tokens)

    def _settings(self) -> Settings | None:
        return Settings(self.case.budget, 1) if self.is_sparse else None

    def _timed(self, sequence: ForcedSequence, count: int) -> tuple[_Rate, float]:
        """Decode under the limit; the rate, and the MB read a token."""
        self.source.limiter = bucket_of(int(self.case.bandwidth_mb_s * MB), SystemClock())
        before, started_s = self.source.read_bytes, time.perf_counter()
        nll = self._decode(sequence, count)
        seconds = time.perf_counter() - started_s
        self.source.limiter = None
        return _Rate(count / seconds, nll), (self.source.read_bytes - before) / MB / count

    def _decode(self, sequence: ForcedSequence, count: int) -> list[float]:
        """Decode the next tokens of the text; the NLL of the token behind each."""
        nll = []
        for _ in range(count):
            end = sequence.num_computed + 1
            logits = sequence.decode(self.tokens[:end])
            nll.append(-float(torch.log_softmax(logits.double(), -1)[self.tokens[end]]))
        return nll


@dataclass(frozen=True, slots=True)
class _Rate:
    tokens_s: float
    nll: list[float]
