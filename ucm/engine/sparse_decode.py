"""`SparseDecode`: what of a step's batch attends sparsely, in words of `ucm.sparse`.

A decode is a single token behind the prompt, of a sequence for which nothing is being loaded; only
these leave blocks out. A prompt's last token is none, however the prompt was cut into chunks.

Invariant: KV that a sparse step wrote is marked in its sequence (`approximate_from`) before the
pass, so that it is neither shared nor stored under the name of its tokens.

Envelope: without `EngineOptions.sparse` this module is not there; with it a few comparisons a
sequence and step.
"""

from __future__ import annotations

from collections.abc import Sequence

from ucm.sparse.certified_attention import Promises
from ucm.sparse.decoding import SparseDecoding, SparseStats
from ucm.sparse.mode_policy import LoadSignals
from ucm.sparse.offload_chooser import SummaryChooser
from ucm.sparse.options import SparseOptions
from ucm.sparse.protocols import DecodeStep, ItemAttention

from .load_queue import LoadQueue
from .pool import KvPool
from .scheduler import Work
from .sequence import TokenSequence


class SparseDecode:
    """See the module. Owned by the engine's thread."""

    def __init__(self, options: SparseOptions, pool: KvPool, loads: LoadQueue) -> None:
        """Attend over `pool`.

        Raises:
            LayoutMismatchError: the kind of summary cannot describe the pool's blocks.
        """
        self._pool = pool
        self._loads = loads
        self._options = options
        blocks = pool.blocks
        self._decoding = SparseDecoding(options, pool.layout, blocks.num_blocks, blocks.life)

    @property
    def stats(self) -> SparseStats:
        """Counters over the engine's life."""
        return self._decoding.stats

    @property
    def promises(self) -> Promises | None:
        """What certificates came to; None without one."""
        return self._decoding.promises

    def begin_pass(self, batch: Sequence[Work]) -> dict[str, ItemAttention]:
        """Who attends for the items of the next pass that are not dense, by sequence.

        Marks what their KV will be.
        """
        decodes = [work.sequence for work in batch if self._is_decode(work)]
        self._decoding.begin_pass(self._signals(decodes))
        attentions = {}
        for sequence in decodes:
            if sequence.is_offloaded:  # it has a chooser of its own
                is_sparse = self._decoding.count_step(sequence.num_computed)
            else:
                attention = self._decoding.attention(_step_of(sequence), self._pool.tensor)
                is_sparse = attention is not None
                attentions.update({sequence.id: attention} if attention is not None else {})
            if is_sparse and sequence.approximate_from is None:
                sequence.approximate_from = sequence.num_computed
        return attentions

    def end_pass(self, work: Work) -> None:
        """A chunk of a prompt is computed: summarise as many blocks as it may have filled.

        Blocks that came otherwise (shared, or loaded) are caught up with little by little.
        """
        sequence = work.sequence
        is_short = sequence.max_length < self._options.min_context_tokens
        is_done = is_short or work.num_tokens == 1 or sequence.is_offloaded
        if is_done or not self._decoding.may_select:
            return
        num_known = self._decoding.num_fed(sequence.id)
        last = min(sequence.num_full_blocks, num_known + sequence.num_blocks_for(work.num_tokens))
        self._decoding.feed(sequence.id, sequence.block_ids[:last], self._pool.tensor)

    def chooser(self) -> SummaryChooser:
        """Chooses for a sequence whose KV lies below the pool."""
        return self._decoding.chooser()

    def drop(self, sequence: TokenSequence) -> None:
        """The sequence gives its blocks up."""
        self._decoding.drop(sequence.id)

    def check_integrity(self, running: Sequence[TokenSequence]) -> list[str]:
        """Every violated invariant, in words; empty when sound."""
        known = {sequence.id: sequence for sequence in running}
        faults = [f"{gone} has summaries and no blocks" for gone in self._decoding.fed - set(known)]
        for sequence in known.values():
            num_fed = self._decoding.num_fed(sequence.id)
            if num_fed > sequence.num_full_blocks:
                faults.append(
                    f"{sequence.id} has {num_fed} summaries, {sequence.num_full_blocks} full blocks"
                )
        return faults

    def _is_decode(self, work: Work) -> bool:
        sequence = work.sequence
        is_behind = sequence.num_computed >= sequence.num_prompt
        return work.num_tokens == 1 and is_behind and self._loads.get(sequence) is None

    def _signals(self, decodes: Sequence[TokenSequence]) -> LoadSignals:
        blocks = self._pool.blocks
        return LoadSignals(
            context_tokens=max((sequence.num_tokens for sequence in decodes), default=0),
            batch_size=len(decodes),
            pool_pressure=1.0 - blocks.num_available / blocks.num_blocks,
        )


def _step_of(sequence: TokenSequence) -> DecodeStep:
    return DecodeStep(
        sequence_id=sequence.id,
        position=sequence.num_computed,
        num_prompt=sequence.num_prompt,
        block_ids=sequence.block_ids,
        block_tokens=sequence.block_tokens,
    )
