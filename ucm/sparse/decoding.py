"""`SparseDecoding`: the sparse attention of an engine's decode steps.

    feed(sequence)    after a pass: its sealed blocks get their summaries
    begin_pass(...)   the mode of this pass
    attention(step)   who attends for one decode item; None: densely, as if this package were not
    drop(sequence)    it left, or gave its blocks up

It is asked about decodes only: prompts are dense. In the modes `exact` and `reuse`, and where
everything would be chosen, the model's own dense attention is used, so tokens are identical.

Envelope: nothing a step but one dictionary look-up a sequence, beside what `selector` costs; the
attention reads the chosen blocks only, which are gathered where they are not consecutive.

Shapes: H query heads, G KV heads, B block tokens, D head size, n chosen blocks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ucm.kernels.attention import AttentionFn, PagedSequence, runs_of, select_attention
from ucm.layout import KvLayout

from .certified_attention import Promises, StepBlocks
from .mode_policy import LoadSignals, ModePolicy, SparseMode
from .offload_chooser import SummaryChooser
from .options import SparseOptions
from .protocols import BlockIndexes, BlockSelector, DecodeStep, ItemAttention, Selection
from .selector import SequenceSelector, Settings
from .table import Lives, PoolSummaries


@dataclass(slots=True)
class SparseStats:
    """Counters over an engine's life."""

    sparse_steps: int = 0
    """Decode steps of a sequence that went through a selection."""
    dense_steps: int = 0
    """Decode steps of a sequence that did not: the sum of the next three."""
    dense_by_mode: int = 0
    """The mode reads everything."""
    dense_by_budget: int = 0
    """The budget is everything."""
    dense_by_context: int = 0
    """The sequence is shorter than `min_context_tokens`."""
    fresh_selections: int = 0
    """Of a layer and step."""
    stale_selections: int = 0
    blocks_read: int = 0
    """Slabs of one layer that sparse steps read; also those that a certificate asked for."""
    blocks_dense: int = 0
    """Slabs that the same steps would have read densely."""
    bytes_read: int = 0
    bytes_dense: int = 0
    select_s: float = 0.0
    """Time spent on choosing."""
    seal_s: float = 0.0
    """Time spent on summaries of sealed blocks."""
    summarised_blocks: int = 0
    mode_switches: int = 0
    mode: SparseMode = SparseMode.REUSE
    """Of the last step."""

    def count(self, selection: Selection, num_blocks: int, slab_bytes: int) -> None:
        """Add one layer's selection, of a sequence of `num_blocks`."""
        self.fresh_selections += selection.is_fresh
        self.stale_selections += not selection.is_fresh
        self.count_slabs(len(selection.blocks), num_blocks, slab_bytes)

    def count_slabs(self, num: int, num_blocks: int, slab_bytes: int) -> None:
        """Add one layer's reads: `num` slabs of a sequence of `num_blocks`."""
        self.blocks_read += num
        self.blocks_dense += num_blocks
        self.bytes_read += num * slab_bytes
        self.bytes_dense += num_blocks * slab_bytes


class SparseDecoding:
    """See the module. Of the engine's thread."""

    def __init__(
        self,
        options: SparseOptions,
        layout: KvLayout,
        num_blocks: int,
        life_of: Lives,
    ) -> None:
        """Attend over a pool.

        Args:
            options: what is wanted.
            layout: of the pool.
            num_blocks: in the pool.
            life_of: for a pool block; see `table`.

        Raises:
            LayoutMismatchError: the kind of summary cannot describe such blocks.
        """
        self.options = options
        self.stats = SparseStats()
        self._layout = layout
        self._policy = ModePolicy(options.thresholds)
        self._summaries = PoolSummaries(options.kind, layout, num_blocks, life_of)
        self._selectors: dict[str, SequenceSelector] = {}
        self.promises: Promises | None = None
        if options.certificate is not None:
            self.promises = Promises(options.certificate, options.dense_layers)

    def begin_pass(self, signals: LoadSignals) -> SparseMode:
        """Settle the mode of the next pass."""
        mode = self.options.mode
        if mode is SparseMode.AUTO:
            mode = self._policy.observe(signals)
            self.stats.mode_switches = self._policy.num_switches
        self.stats.mode = mode
        return mode

    @property
    def settings(self) -> Settings | None:
        """How the present mode selects; None when it reads everything."""
        options = self.options
        if self.stats.mode is SparseMode.LATENCY:
            settings = Settings(options.budget, options.stride)
        elif self.stats.mode is SparseMode.CONCURRENCY:
            settings = Settings(options.concurrency_budget, options.concurrency_stride)
        else:
            return None
        return None if settings.budget.is_everything else settings

    @property
    def may_select(self) -> bool:
        """Whether some step may ever leave blocks out."""
        return self.options.mode.is_sparse or self.options.mode is SparseMode.AUTO

    def attention(self, step: DecodeStep, kv_pool: Tensor) -> ItemAttention | None:
        """Who attends for one decode item of the next pass.

        Args:
            step: the sequence now.
            kv_pool: [L, num_blocks, 2, G, B, D].

        Returns:
            None when the step is dense.
        """
        settings = self.settings
        if not self.count_step(step.position) or settings is None:
            return None
        selector = self._selector(step.sequence_id)
        self.feed(step.sequence_id, step.block_ids[: selector.num_scored(step)], kv_pool)
        if self.promises is not None:
            options, num_scored = self.options, selector.num_scored(step)
            blocks = StepBlocks.of(step, num_scored, options.sink_blocks, options.recent_blocks)
            promised = self.promises.attention(
                blocks,
                selector.table,
                lambda chosen: _SparseStep(step, chosen, self.stats, self._layout),
            )
            return _PromisedStep(step, promised, self.promises, self.stats, self._layout)
        selector.begin(step, settings)
        return _SparseStep(step, selector, self.stats, self._layout)

    def count_step(self, position: int) -> bool:
        """Count one decode step of a sequence, whoever attends for it.

        Returns:
            Whether it may leave blocks out.
        """
        stats, is_short = self.stats, position + 1 < self.options.min_context_tokens
        if self.settings is not None and not is_short:
            stats.sparse_steps += 1
            return True
        stats.dense_steps += 1
        stats.dense_by_mode += not stats.mode.is_sparse
        stats.dense_by_context += stats.mode.is_sparse and is_short
        stats.dense_by_budget += stats.mode.is_sparse and not is_short
        return False

    def chooser(self) -> SummaryChooser:
        """Chooses for a sequence whose KV lies below the pool, as the mode says."""
        table = self._summaries.table()
        return SummaryChooser(table, self.options, lambda: self.settings, self.stats)

    def num_fed(self, sequence_id: str) -> int:
        """Leading blocks of a sequence that it was fed."""
        selector = self._selectors.get(sequence_id)
        return 0 if selector is None else len(selector.table)

    @property
    def fed(self) -> set[str]:
        """Sequences that were fed, and not dropped."""
        return set(self._selectors)

    def feed(self, sequence_id: str, sealed_ids: Sequence[int], kv_pool: Tensor) -> None:
        """Summarise the sealed blocks of a sequence that have no summary yet.

        Args:
            sequence_id: whose.
            sealed_ids: its leading pool blocks whose every row is final; those that it was fed
                before are skipped.
            kv_pool: [L, num_blocks, 2, G, B, D].
        """
        table = self._selector(sequence_id).table
        if len(table) >= len(sealed_ids):
            return
        started_s, num_made = time.perf_counter(), self._summaries.num_made
        table.extend(self._summaries.records(sealed_ids[len(table) :], kv_pool))
        self.stats.seal_s += time.perf_counter() - started_s
        self.stats.summarised_blocks += self._summaries.num_made - num_made

    def drop(self, sequence_id: str) -> None:
        """The sequence left or gave its blocks up; nothing happens if it is not known."""
        self._selectors.pop(sequence_id, None)
        if self.promises is not None:
            self.promises.forget(sequence_id)

    def _selector(self, sequence_id: str) -> SequenceSelector:
        selector = self._selectors.get(sequence_id)
        if selector is None:
            selector = SequenceSelector(self._summaries.table(), self.options)
            self._selectors[sequence_id] = selector
        return selector


@dataclass(slots=True)
class _PromisedStep:
    """An `ItemAttention` with a promise, whose reads are counted like those of a selection."""

    step: DecodeStep
    attend: ItemAttention
    promises: Promises
    stats: SparseStats
    layout: KvLayout

    def __call__(self, layer: int, q_THD: Tensor, kv_layer: Tensor, /) -> Tensor:
        """See `ItemAttention`."""
        certified, num_blocks = self.promises.certified, self.step.num_blocks
        num_read, num_counted = certified.blocks_read, self.stats.blocks_dense
        out = self.attend(layer, q_THD, kv_layer)
        if self.stats.blocks_dense == num_counted:  # there was no selection, which counts itself
            # Nothing was certified in the first layers, which are dense.
            num = certified.blocks_read - num_read or num_blocks
            self.stats.count_slabs(num, num_blocks, self.layout.slab_bytes)
        return out


@dataclass(slots=True)
class _SparseStep:
    """An `ItemAttention`: one sequence's decode step over chosen blocks."""

    step: DecodeStep
    selector: BlockSelector
    stats: SparseStats
    layout: KvLayout
    _pool_ids: BlockIndexes = field(init=False)
    """The pool block of each logical one."""
    _masks: dict[int, Tensor] = field(default_factory=dict)
    _attend: dict[int, AttentionFn] = field(default_factory=dict)
    _dense: PagedSequence | None = None

    def __post_init__(self) -> None:
        self._pool_ids = np.array(self.step.block_ids[: self.step.num_blocks], np.int64)

    def __call__(self, layer: int, q_THD: Tensor, kv_layer: Tensor, /) -> Tensor:
        """See `ItemAttention`."""
        started_s = time.perf_counter()
        selection = self.selector.choose(layer, q_THD)
        stats, num = self.stats, len(selection.blocks)
        stats.select_s += time.perf_counter() - started_s
        stats.count(selection, self.step.num_blocks, self.layout.slab_bytes)
        if num == self.step.num_blocks:
            sequence = self._everything(kv_layer)
        else:
            sequence = self._chosen(self._pool_ids[selection.blocks], kv_layer.device)
        attend = self._attend.get(num)
        if attend is None:
            shape = (q_THD.shape[1], q_THD.shape[2])
            attend = self._attend[num] = select_attention(sequence, shape, kv_layer)
        return attend(q_THD, kv_layer, sequence)[0]

    def _everything(self, kv_layer: Tensor) -> PagedSequence:
        """Built as the model does it, so that the result is the same to the bit."""
        if self._dense is None:
            ids = self.step.block_ids
            self._dense = PagedSequence.build(self.step.position, 1, ids, kv_layer)
        return self._dense

    def _chosen(self, pool_ids: BlockIndexes, device: torch.device) -> PagedSequence:
        """Chosen blocks as if they were all there is.

        Keys bear their rotation, so their place among the others does not matter; only the last
        block is partly filled.
        """
        num, tokens = len(pool_ids), self.step.block_tokens
        num_rows = self.step.position % tokens + 1
        mask = self._masks.get(num)
        if mask is None:
            mask = torch.zeros(num, tokens, device=device)
            mask[-1, num_rows:] = float("-inf")
            self._masks[num] = mask
        return PagedSequence(
            start=(num - 1) * tokens + num_rows - 1,
            num_tokens=1,
            block_ids=torch.from_numpy(pool_ids).to(device),
            runs=runs_of(pool_ids.tolist()),
            block_tokens=tokens,
            tail_mask=mask,
        )
