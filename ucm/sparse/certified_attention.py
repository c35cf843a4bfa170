"""Certificates as attention of decode steps: over the pool, one sequence and layer at a time.

    CertifiedStep    reads blocks until the error is bounded (`certificates`); needs a key shadow
    ConformalStep    reads what its calibrator asks for (`conformal`); audits read everything

    blocks   | sink | candidates: their summaries are in the table | recent, unsummarised, filling |
    read       always   as many as the promise needs                 always
             0        sink                                first_recent                num_blocks - 1

Where all candidates are read, the model's own dense attention is used, so that the result is the
dense one to the bit. A certificate is about the attention of one layer, given that layer's query:
what errors of earlier layers did to the query is not in it.

Invariant: only blocks that were asked for are read from the pool.

Envelope: a certified layer at 4,096 tokens is 5 to 10 ms in numpy, some 200 ms a step of
SmolLM2-135M: it pays where reading a block costs more than 50 us, so from a tier, not from memory.

Shapes: H query heads, G KV heads, n blocks, B block tokens, S window tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ucm.kernels.attention import PagedSequence, select_attention
from ucm.kernels.block_scores import MAX_QUERY, SummaryTable

from .certificates import CertifiedOptions, CertifiedResult, WindowKv, certify
from .conformal import ConformalOptions, ConformalStats, Drift, TailCalibrator
from .protocols import BlockIndexes, BlockSelector, DecodeStep, ItemAttention, Selection
from .selector import as_floats
from .tail_bounds import BlockBeliefs

F32 = NDArray[np.float32]


def shadow_beliefs(table: SummaryTable, layer: int, q: F32, first: int, end: int) -> BlockBeliefs:
    """What a key shadow knows of blocks `first` to `end - 1`.

    Args:
        table: of `shadow2` or `shadow4` summaries, `end` blocks at least.
        layer: which.
        q: [Q, H, D] queries, not scaled.
        first: first candidate.
        end: behind the last.

    Raises:
        InvalidArgumentError: the table's kind keeps no keys, or the query does not fit it.
    """
    logits, errors = table.token_logits(layer, q)
    means, radii = table.values(layer)
    return BlockBeliefs(
        logits=logits[:, :, first:end],
        slack=errors[:, :, first:end],
        mean_values=means[first:end],
        value_radii=radii[first:end],
    )


@dataclass(slots=True)
class CertifiedStats:
    """Counters over the layers of certified steps."""

    layers: int = 0
    """Attentions computed."""
    complete: int = 0
    """Of them, those for which everything was read."""
    blocks_read: int = 0
    blocks_dense: int = 0
    """What the same attentions would have read densely."""
    worst_bound: float = 0.0
    """Largest bound of the error over the output's norm, where not everything was read."""

    @property
    def read_ratio(self) -> float:
        """Blocks read over all blocks; 0.0 before the first."""
        return self.blocks_read / self.blocks_dense if self.blocks_dense else 0.0

    def count(self, result: CertifiedResult, num_always: int, num_blocks: int) -> None:
        """Count one attention."""
        self.layers += 1
        self.complete += result.is_complete
        self.blocks_read += num_always + len(result.blocks)
        self.blocks_dense += num_blocks
        if not result.is_complete:
            norm = np.linalg.norm(result.out.astype(np.float64), axis=-1)
            ratio = result.error_bound / np.maximum(norm, np.finfo(np.float64).tiny)
            self.worst_bound = max(self.worst_bound, float(ratio.max()))


@dataclass(frozen=True, slots=True)
class StepBlocks:
    """Which blocks of a step are candidates; the others are always read."""

    step: DecodeStep
    first: int
    """First candidate: behind the sink."""
    end: int
    """Behind the last candidate; at least `first`."""

    @classmethod
    def of(cls, step: DecodeStep, num_summaries: int, sink: int, recent: int) -> StepBlocks:
        """Candidates have a summary, and are neither sink nor recent."""
        end = min(num_summaries, step.num_sealed - recent)
        return cls(step, min(sink, step.num_blocks), max(end, min(sink, step.num_blocks)))

    @property
    def any_candidate(self) -> bool:
        """Whether anything can be left out."""
        return self.end > self.first

    @property
    def always(self) -> BlockIndexes:
        """Blocks that are always read, ascending; the one that is being filled is the last."""
        behind = np.arange(self.end, self.step.num_blocks, dtype=np.int64)
        return np.concatenate([np.arange(self.first, dtype=np.int64), behind])

    def read(self, blocks: BlockIndexes, kv_layer: Tensor) -> tuple[F32, F32]:
        """Keys and values of logical blocks, each [n, G, B, D]."""
        ids = [self.step.block_ids[block] for block in blocks.tolist()]
        found = as_floats(kv_layer[ids])
        return found[:, 0], found[:, 1]

    def window(self, kv_layer: Tensor) -> WindowKv:
        """What is always read, without the rows behind the step's token."""
        keys, values = (
            np.moveaxis(each, 1, 0).reshape(each.shape[1], -1, each.shape[-1])
            for each in self.read(self.always, kv_layer)
        )
        empty = -(self.step.position + 1) % self.step.block_tokens
        length = keys.shape[1] - empty
        return WindowKv(keys=keys[:, :length], values=values[:, :length])


@dataclass(slots=True)
class CertifiedStep:
    """An `ItemAttention`: one decode step whose attention bears a certificate in every layer."""

    blocks: StepBlocks
    table: SummaryTable
    options: CertifiedOptions
    stats: CertifiedStats
    _dense: _Dense = field(init=False)

    def __post_init__(self) -> None:
        """The fallback is built when it is needed."""
        self._dense = _Dense(self.blocks.step)

    def __call__(self, layer: int, q_THD: Tensor, kv_layer: Tensor, /) -> Tensor:
        """See `ItemAttention`."""
        blocks, num_blocks = self.blocks, self.blocks.step.num_blocks
        num_always = num_blocks - (blocks.end - blocks.first)
        q = as_floats(q_THD)
        if self.options.is_dense or not (blocks.any_candidate and np.isfinite(q).all()):
            self.stats.layers += 1
            self.stats.complete += 1
            self.stats.blocks_read += num_blocks
            self.stats.blocks_dense += num_blocks
            return self._dense(layer, q_THD, kv_layer)
        result = certify(
            q,
            shadow_beliefs(self.table, layer, q, blocks.first, blocks.end),
            lambda chosen: blocks.read(chosen + blocks.first, kv_layer),
            self.options,
            blocks.window(kv_layer),
        )
        self.stats.count(result, num_always, num_blocks)
        if result.is_complete:
            return self._dense(layer, q_THD, kv_layer)
        return torch.from_numpy(result.out).to(device=q_THD.device, dtype=q_THD.dtype)


@dataclass(slots=True)
class _Dense:
    """The model's own attention over all blocks of a step."""

    step: DecodeStep
    _sequence: PagedSequence | None = None

    def __call__(self, _layer: int, q_THD: Tensor, kv_layer: Tensor, /) -> Tensor:
        """See `ItemAttention`."""
        if self._sequence is None:
            step = self.step
            self._sequence = PagedSequence.build(step.position, 1, step.block_ids, kv_layer)
        shape = (q_THD.shape[1], q_THD.shape[2])
        attend = select_attention(self._sequence, shape, kv_layer)
        return attend(q_THD, kv_layer, self._sequence)[0]


class Calibrators:
    """What an engine has learnt of its layers and of its sequences. Of one thread."""

    def __init__(self, options: ConformalOptions) -> None:
        """Start without any knowledge: the first steps read everything."""
        self.options = options
        self._layers: dict[int, TailCalibrator] = {}
        self._sequences: dict[str, _Followed] = {}

    def of(self, layer: int, num_heads: int) -> TailCalibrator:
        """The calibrator of a layer with `num_heads` query heads, over all sequences."""
        if layer not in self._layers:
            self._layers[layer] = TailCalibrator(self.options, num_heads)
        return self._layers[layer]

    @property
    def num_layers(self) -> int:
        """Layers that it was asked for."""
        return len(self._layers)

    def follow(self, step: DecodeStep) -> Drift:
        """The drift of a step's sequence; a sequence that is new to it begins at this step."""
        return self._followed(step).drift

    def is_due(self, step: DecodeStep) -> bool:
        """Whether a step is an audit whatever is known: one of the first, or the stride's turn."""
        options = self.options
        age = step.position - self._followed(step).begin
        return age < options.opening_audits or step.position % options.audit_stride == 0

    def forget(self, sequence_id: str) -> None:
        """A sequence left; nothing happens if it is not known."""
        self._sequences.pop(sequence_id, None)

    @property
    def stats(self) -> ConformalStats:
        """Sums over all layers."""
        each = [calibrator.stats for calibrator in self._layers.values()]
        return ConformalStats(
            audits=sum(stats.audits for stats in each),
            violations=sum(stats.violations for stats in each),
        )

    def _followed(self, step: DecodeStep) -> _Followed:
        found = self._sequences.get(step.sequence_id)
        if found is None:
            found = self._sequences[step.sequence_id] = _Followed(
                step.position, Drift(self.options)
            )
        return found


@dataclass(frozen=True, slots=True)
class _Followed:
    """A sequence whose audits are learnt from."""

    begin: int
    """Position of its first step."""
    drift: Drift


@dataclass(slots=True)
class ConformalSelector:
    """A `BlockSelector`: the blocks that keep the unread mass below the limit, nearly always."""

    blocks: StepBlocks
    table: SummaryTable
    calibrators: Calibrators
    known: F32 | None = None
    """[1, H] true log mass of what is always read, of the layer that is asked for next; without it
    everything is read."""

    def is_audit(self, layer: int, q: F32) -> bool:
        """Whether this step reads everything in `layer` and is learnt from."""
        if not (self.blocks.any_candidate and np.isfinite(q).all()):
            return False
        is_ready = self.calibrators.of(layer, q.shape[1]).is_ready
        return not is_ready or self.calibrators.is_due(self.blocks.step)

    def estimates(self, layer: int, q: F32) -> tuple[F32, NDArray[np.bool_]]:
        """What the summaries say of the candidates: log mass [1, H, n] and must [n].

        A block whose estimate is beyond what a number holds is one of those.
        """
        first, end = self.blocks.first, self.blocks.end
        must = self.table.must(layer)[first:end]
        with np.errstate(over="ignore", invalid="ignore"):
            log_mass = self.table.log_mass(layer, q)[:, :, first:end]
        unknown = ~np.isfinite(log_mass).all((0, 1))
        return np.where(unknown, np.float32(-np.inf), log_mass), must | unknown

    def choose(self, layer: int, q_THD: Tensor, /) -> Selection:
        """See `BlockSelector.choose`."""
        blocks, known = self.blocks, self.known
        everything = Selection(np.arange(blocks.step.num_blocks, dtype=np.int64), 1.0)
        q = as_floats(q_THD)
        if self.is_audit(layer, q) or not (blocks.any_candidate and _is_scored(q)):
            return everything
        if known is None or not np.isfinite(known).all():
            return everything
        log_mass, must = self.estimates(layer, q)
        calibrator = self.calibrators.of(layer, q.shape[1])
        shift = self.calibrators.follow(blocks.step).shift
        chosen = blocks.first + np.flatnonzero(calibrator.select(log_mass, must, known, shift))
        limit = self.calibrators.options.tail_mass
        return Selection(np.sort(np.concatenate([blocks.always, chosen])), 1.0 - limit)


def _is_scored(q: F32) -> bool:
    """Whether estimates say anything of the query; not of one that is not finite either."""
    return bool(np.abs(q).max() <= MAX_QUERY)


@dataclass(slots=True)
class ConformalStep:
    """An `ItemAttention`: attends through another one, and learns where that reads everything."""

    selector: ConformalSelector
    attend: ItemAttention
    """Over what `selector` chooses."""

    def __call__(self, layer: int, q_THD: Tensor, kv_layer: Tensor, /) -> Tensor:
        """See `ItemAttention`."""
        q, blocks = as_floats(q_THD), self.selector.blocks
        # Before it learns: an audit that makes the layer ready still reads everything itself.
        is_audit = self.selector.is_audit(layer, q)
        if blocks.any_candidate:
            self.selector.known = true_log_mass(q, blocks.window(kv_layer).keys[None])[..., 0]
        out = self.attend(layer, q_THD, kv_layer)
        if is_audit:
            self._learn(layer, q, kv_layer)
        return out

    def _learn(self, layer: int, q: F32, kv_layer: Tensor) -> None:
        selector, blocks = self.selector, self.selector.blocks
        log_mass, must = selector.estimates(layer, q)
        keys, _ = blocks.read(np.arange(blocks.first, blocks.end, dtype=np.int64), kv_layer)
        true, known = true_log_mass(q, keys), selector.known
        # NaN, or more than a number holds: such a step shows nothing.
        if known is None or not ((true < np.inf).all() and (known < np.inf).all()):
            return
        calibrators = selector.calibrators
        calibrator, drift = calibrators.of(layer, q.shape[1]), calibrators.follow(blocks.step)
        missed = calibrator.audit(log_mass, must, known, true, drift.shift)
        drift.observe(missed, calibrators.num_layers)


def true_log_mass(q_QHD: F32, keys_NGBD: F32) -> F32:
    """log(sum over a block's keys of exp(q . k / sqrt(D))), [Q, H, N]."""
    queries, heads, dim = q_QHD.shape
    groups = keys_NGBD.shape[1]
    rows = (q_QHD * np.float32(dim**-0.5)).reshape(queries, groups, -1, dim)
    keys = np.moveaxis(keys_NGBD, 1, 0).reshape(groups, -1, dim)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        logits = np.moveaxis(rows, 1, 0).reshape(groups, -1, dim) @ keys.transpose(0, 2, 1)
        split = logits.reshape(groups, queries, heads // groups, *keys_NGBD.shape[0:3:2])
        peak = split.max(-1)
        base = np.where(np.isfinite(peak), peak, 0.0)
        log_mass = base + np.log(np.exp(split - base[..., None]).sum(-1))
    joined: F32 = np.moveaxis(log_mass, 0, 1).reshape(queries, heads, -1).astype(np.float32)
    return joined


@dataclass(slots=True)
class _DenseFirst:
    """An `ItemAttention`: the first layers read everything, and no promise is about them."""

    num_layers: int
    dense: _Dense
    others: ItemAttention

    def __call__(self, layer: int, q_THD: Tensor, kv_layer: Tensor, /) -> Tensor:
        """See `ItemAttention`."""
        attend = self.dense if layer < self.num_layers else self.others
        return attend(layer, q_THD, kv_layer)


class Promises:
    """An engine's attention with certificates. Of the engine's thread."""

    def __init__(self, options: CertifiedOptions | ConformalOptions, dense_layers: int = 0) -> None:
        """Keep what was asked for; the first `dense_layers` read everything."""
        self._dense_layers = dense_layers
        self._certified = options if isinstance(options, CertifiedOptions) else None
        self.certified = CertifiedStats()
        self.calibrators = Calibrators(options) if isinstance(options, ConformalOptions) else None

    def attention(
        self,
        blocks: StepBlocks,
        table: SummaryTable,
        over: Callable[[BlockSelector], ItemAttention],
    ) -> ItemAttention:
        """Who attends for one decode step.

        Args:
            blocks: its candidates.
            table: of the sequence, `blocks.end` summaries at least.
            over: attention over what a selector chooses.
        """
        promised: ItemAttention
        if self._certified is not None:
            promised = CertifiedStep(blocks, table, self._certified, self.certified)
        else:
            assert self.calibrators is not None
            selector = ConformalSelector(blocks, table, self.calibrators)
            promised = ConformalStep(selector, over(selector))
        if self._dense_layers == 0:
            return promised
        return _DenseFirst(self._dense_layers, _Dense(blocks.step), promised)

    def forget(self, sequence_id: str) -> None:
        """A sequence left; nothing happens if it is not known."""
        if self.calibrators is not None:
            self.calibrators.forget(sequence_id)
