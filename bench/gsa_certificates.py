"""Certificates on a real model: what they cost in blocks, and whether they hold.

    certified    one step after the other, all layers: the error against attention in float64 over
                 the same keys, over the bound that was claimed; blocks read, over all blocks
    conformal    a stream of steps of a text that nothing was learnt from: share of heads whose
                 unread mass exceeds the limit in steps that are no audits, blocks read (in audits
                 all)
    geometric    blocks that must be read until the bound of a summary proves that a head leaves at
                 most 1 % of its mass unread: for each head alone, in the order of the bounds

The queries are those of the last tokens of each document, computed densely, so that errors of
earlier layers do not enter. Sink, two recent blocks and the one being filled are always read; where
a document has no more than these, everything is read and there is no error to bound.

`conformal` learns from all other documents and is tested on each in turn, audits going on as they
do in an engine; with one document it learns from the first half of the window.

`ucm bench gsa` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ucm.engine.model import ForwardItem, LlamaModel
from ucm.kernels.attention import PagedSequence, select_attention
from ucm.kernels.block_scores import SummaryTable
from ucm.kernels.summarize import summarize
from ucm.layout import KvDtype, KvLayout
from ucm.sparse.certificates import CertifiedOptions, WindowKv, certify
from ucm.sparse.certified_attention import shadow_beliefs, true_log_mass
from ucm.sparse.conformal import ConformalOptions, Drift, TailCalibrator
from ucm.types import SummaryKind

F32 = NDArray[np.float32]
Progress = Callable[[str], None]
Result = dict[str, Any]

BLOCK_TOKENS = 32
PREFILL_TOKENS = 512
RECENT_BLOCKS = 2
TAIL_MASS = 0.01
"""Of the comparison of geometric bounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateBenchOptions:
    """What to measure."""

    window_tokens: int = 256
    """Of each document, its last ones: their queries are what is measured."""
    certified_steps: int = 4
    """Of the window, evenly spaced."""
    certified: CertifiedOptions = field(
        default_factory=lambda: CertifiedOptions(relative_error=1 / 8)
    )
    kinds: tuple[SummaryKind, ...] = (SummaryKind.SHADOW4,)
    """Shadows that certificates are tried with; the first is what `certified` reports."""
    conformal: ConformalOptions = field(default_factory=ConformalOptions)
    conformal_kind: SummaryKind = SummaryKind.GSA_K4
    geometric_kinds: tuple[SummaryKind, ...] = (
        SummaryKind.BOX,
        SummaryKind.GSA_K4,
        SummaryKind.SHADOW2,
        SummaryKind.SHADOW4,
    )
    layer_stride: int = 1
    """Every how many layers are measured."""

    def quick(self) -> CertificateBenchOptions:
        """A few seconds, on short documents."""
        return replace(
            self,
            window_tokens=160,
            certified_steps=2,
            layer_stride=3,
            conformal=replace(self.conformal, delta=0.02, audit_stride=16),
        )


@dataclass(frozen=True, slots=True)
class Captured:
    """A document's keys, values and last queries."""

    queries: F32
    """[L, W, H, D]"""
    kv: F32
    """[L, N, 2, G, B, D]"""
    num_tokens: int

    def position(self, row: int) -> int:
        """Of the window's query `row`."""
        return int(self.num_tokens - self.queries.shape[1] + row)

    def table(self, kind: SummaryKind) -> SummaryTable:
        """Summaries of all full blocks."""
        layers, _, _, groups, tokens, dim = self.kv.shape
        layout = KvLayout(
            num_layers=layers,
            num_kv_heads=groups,
            head_dim=dim,
            block_tokens=tokens,
            dtype=KvDtype.FLOAT32,
        )
        table = SummaryTable(kind, layout)
        for block in range(self.num_tokens // tokens):
            table.extend(summarize(kind, self.kv[:, block]))
        return table


class _Recorder:
    """Dense attention that keeps its queries."""

    def __init__(self, item: tuple[int, int, Sequence[int]]) -> None:
        self._item = item
        self._sequence: PagedSequence | None = None
        self.queries: list[Tensor] = []

    def __call__(self, _layer: int, queries: Tensor, kv_layer: Tensor, /) -> Tensor:
        self.queries.append(queries.float().clone())
        if self._sequence is None:
            self._sequence = PagedSequence.build(*self._item, kv_layer)
        attend = select_attention(self._sequence, (queries.shape[1], queries.shape[2]), kv_layer)
        return attend(queries, kv_layer, self._sequence)[0]


def capture(model: LlamaModel, token_ids: Sequence[int], window_tokens: int) -> Captured:
    """Prefill a document and keep its last queries.

    Args:
        model: computes on the CPU.
        token_ids: of the document, more than `window_tokens`.
        window_tokens: queries to keep.
    """
    c, tokens = model.config, list(token_ids)
    ids = list(range(-(-len(tokens) // BLOCK_TOKENS)))
    shape = (c.num_layers, len(ids), 2, c.num_kv_heads, BLOCK_TOKENS, c.head_dim)
    pool = torch.zeros(shape, dtype=model.dtype)
    begin = len(tokens) - window_tokens
    for first in range(0, begin, PREFILL_TOKENS):
        part = tokens[first : min(first + PREFILL_TOKENS, begin)]
        model.forward([ForwardItem(part, first, ids)], pool)
    recorder = _Recorder((begin, window_tokens, ids))
    model.forward([ForwardItem(tokens[begin:], begin, ids, recorder)], pool)
    return Captured(torch.stack(recorder.queries).numpy(), pool.float().numpy(), len(tokens))


def measure_certificates(
    captured: Mapping[str, Captured],
    options: CertificateBenchOptions,
    progress: Progress | None = None,
) -> Result:
    """Measure; see the module.

    Returns:
        `certified`, `conformal` and `geometric`.
    """
    say = progress or (lambda _line: None)
    result: Result = {}
    step = options.layer_stride
    captured = {
        name: Captured(each.queries[::step], each.kv[::step], each.num_tokens)
        for name, each in captured.items()
    }
    for kind in options.kinds:
        say(f"certificates from {kind}")
        rows = [_certified(document, kind, options) for document in captured.values()]
        found = {
            "kind": kind.value,
            "eps": options.certified.relative_error,
            "max_error_over_bound": max(row["max_error_over_bound"] for row in rows),
            "blocks_read_ratio": _mean([row["blocks_read_ratio"] for row in rows]),
            "mean_error": _mean([row["mean_error"] for row in rows]),
            "steps": sum(row["steps"] for row in rows),
        }
        result.setdefault("certified", found)
        result.setdefault("certified_by_kind", {})[kind.value] = found
    say(f"conformal selection by {options.conformal_kind}")
    result["conformal"] = _conformal(captured, options)
    say("geometric bounds")
    result["geometric"] = _geometric(captured, options)
    return result


def _certified(document: Captured, kind: SummaryKind, options: CertificateBenchOptions) -> Result:
    table = document.table(kind)
    rows = np.linspace(0, document.queries.shape[1] - 1, options.certified_steps).astype(int)
    worst, errors, read = 0.0, [], []
    for row in rows.tolist():
        first, end, _ = _candidates(document.position(row))
        if first == end:
            errors += [0.0] * len(document.queries)
            read += [1.0] * len(document.queries)
            continue
        for layer in range(len(document.queries)):
            error, bound, norm, ratio = _certify_one(document, table, (layer, row), options)
            worst = max(worst, float((error / bound).max()))
            errors.append(float((error / norm).mean()))
            read.append(ratio)
    return {
        "max_error_over_bound": worst,
        "blocks_read_ratio": _mean(read),
        "mean_error": _mean(errors),
        "steps": len(rows),
    }


def _certify_one(
    document: Captured,
    table: SummaryTable,
    at: tuple[int, int],
    options: CertificateBenchOptions,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float]:
    """(true error, bound, norm of the output, share of blocks read) of one step and layer."""
    layer, row = at
    position = document.position(row)
    first, end, num_blocks = _candidates(position)
    q = document.queries[layer, row][None]
    keys, values = document.kv[layer, :, 0], document.kv[layer, :, 1]
    inside = np.r_[0:first, end:num_blocks]
    window_k, window_v = (
        np.moveaxis(x[inside], 1, 0).reshape(x.shape[1], -1, x.shape[-1]) for x in (keys, values)
    )
    length = window_k.shape[1] - (num_blocks * BLOCK_TOKENS - position - 1)
    result = certify(
        q,
        shadow_beliefs(table, layer, q, first, end),
        lambda chosen: (keys[chosen + first], values[chosen + first]),
        options.certified,
        WindowKv(keys=window_k[:, :length], values=window_v[:, :length]),
    )
    truth = _dense(q[0], keys, values, position)
    error = np.linalg.norm(result.out[0].astype(np.float64) - truth, axis=-1)
    norm = np.linalg.norm(truth, axis=-1)
    read = (len(inside) + len(result.blocks)) / num_blocks
    return error, result.error_bound[0], norm, read


def _candidates(position: int) -> tuple[int, int, int]:
    """First candidate, behind the last one, and blocks of the sequence."""
    sealed = position // BLOCK_TOKENS
    return 1, max(1, sealed - RECENT_BLOCKS), sealed + 1


def _dense(query: F32, keys: F32, values: F32, position: int) -> NDArray[np.float64]:
    """Attention in float64, [H, D]."""
    groups, dim = keys.shape[1], keys.shape[-1]
    k, v = (
        np.moveaxis(x, 1, 0).reshape(groups, -1, dim)[:, : position + 1].astype(np.float64)
        for x in (keys, values)
    )
    logits = query.reshape(groups, -1, dim).astype(np.float64) @ k.transpose(0, 2, 1) * dim**-0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    out: NDArray[np.float64] = (weights @ v) / weights.sum(-1, keepdims=True)
    return out.reshape(-1, dim)


@dataclass(frozen=True, slots=True)
class _Masses:
    """One layer of one document: estimates and truth for queries with the same candidates."""

    estimates: F32
    """[Q, H, n]"""
    true: F32
    """[Q, H, n]"""
    known: F32
    """[Q, H] of all that is always read: what is not in a candidate block."""

    def row(self, row: int) -> _Masses:
        """Of one query."""
        one = slice(row, row + 1)
        return _Masses(self.estimates[one], self.true[one], self.known[one])

    @property
    def must(self) -> NDArray[np.bool_]:
        """[n] no candidate is read anyway."""
        return np.zeros(self.true.shape[2], np.bool_)


def _masses(document: Captured, table: SummaryTable, layer: int, first_row: int = 0) -> _Masses:
    """Of the window's queries from `first_row` on, to the last with that one's candidates."""
    start = document.position(first_row)
    first, end, _ = _candidates(start)
    q = document.queries[layer, first_row : _behind(document, first_row)]
    keys = document.kv[layer, :, 0]
    always = np.r_[0:first, end : len(keys)]
    window = np.moveaxis(keys[always], 1, 0).reshape(keys.shape[1], -1, keys.shape[-1])
    single = true_log_mass(q, np.moveaxis(window, 1, 0)[:, :, None])
    positions = (always[:, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).ravel()
    hidden = positions > start + np.arange(len(q))[:, None]
    single = np.where(hidden[:, None], -np.inf, single)
    return _Masses(
        estimates=table.log_mass(layer, q)[:, :, first:end],
        true=true_log_mass(q, keys[first:end]),
        known=np.logaddexp.reduce(single, axis=-1).astype(np.float32),
    )


def _behind(document: Captured, row: int) -> int:
    """The row behind the last one whose candidates are those of `row`."""
    left = BLOCK_TOKENS - document.position(row) % BLOCK_TOKENS
    return min(int(document.queries.shape[1]), row + left)


Layers = Sequence[Sequence[_Masses]]
"""Of one document: for each layer its window in pieces."""


def _conformal(captured: Mapping[str, Captured], options: CertificateBenchOptions) -> Result:
    """Leave one document out; learn from the others."""
    missed, read = {}, {}
    masses = {name: _layers(each, options.conformal_kind) for name, each in captured.items()}
    for name, own in masses.items():
        others = [masses[other] for other in masses if other != name]
        missed[name], read[name] = _stream(own, others, options.conformal)
    return {
        "kind": options.conformal_kind.value,
        "delta": options.conformal.delta,
        "tail_mass": options.conformal.tail_mass,
        "violation_rate": _mean(list(missed.values())),
        "blocks_read_ratio": _mean(list(read.values())),
        "violation_rate_by_document": missed,
        "blocks_read_ratio_by_document": read,
    }


def _layers(document: Captured, kind: SummaryKind) -> Layers:
    table, starts = document.table(kind), [0]
    while (row := _behind(document, starts[-1])) < document.queries.shape[1]:
        starts.append(row)
    return [
        [_masses(document, table, layer, row) for row in starts]
        for layer in range(len(document.queries))
    ]


def _stream(
    own: Layers, others: Sequence[Layers], conformal: ConformalOptions
) -> tuple[float, float]:
    """Decode one document's window as an engine would that has seen the others.

    Returns:
        (share of (layer, step, head)s beyond the limit where something was left out, share of
        blocks read, audits included).
    """
    calibrators = [TailCalibrator(conformal, pieces[0].true.shape[1]) for pieces in own]
    for other in others:
        for calibrator, pieces in zip(calibrators, other, strict=True):
            for each in pieces:
                calibrator.audit(each.estimates, each.must, each.known, each.true)
    rows = [(piece, row) for piece, each in enumerate(own[0]) for row in range(len(each.true))]
    begin = 0 if others else len(rows) // 2
    drift, missed, read = Drift(conformal), [], []
    for step, (piece, row) in enumerate(rows):
        age = step - begin
        is_due = age < conformal.opening_audits or step % conformal.audit_stride == 0
        for calibrator, pieces in zip(calibrators, own, strict=True):
            one = pieces[piece].row(row)
            if is_due or not calibrator.is_ready:
                shares = calibrator.audit(one.estimates, one.must, one.known, one.true, drift.shift)
                drift.observe(shares, len(own))
                read.append((age, 1.0))
                continue
            chosen = calibrator.select(one.estimates, one.must, one.known, drift.shift)
            always = RECENT_BLOCKS + 2  # the sink, and the one being filled
            missed.append(_missed(one, chosen, conformal.tail_mass))
            read.append((age, (chosen.sum() + always) / (len(chosen) + always)))
    return _mean(missed), _mean([ratio for age, ratio in read if age >= 0])


def _missed(one: _Masses, chosen: NDArray[np.bool_], limit: float) -> float:
    true, known = one.true[0].astype(np.float64), one.known[0].astype(np.float64)
    total = np.logaddexp(np.logaddexp.reduce(true, axis=-1), known)
    unread = np.exp(true[:, ~chosen] - total[:, None]).sum(-1)
    return float((unread > limit).mean())


def _geometric(captured: Mapping[str, Captured], options: CertificateBenchOptions) -> Result:
    """Blocks until a bound proves the limit, each head alone; and where the truth would."""
    found: dict[str, list[float]] = {kind.value: [] for kind in options.geometric_kinds}
    found["oracle"] = []
    for document in captured.values():
        width = document.queries.shape[1]
        rows = np.linspace(0, width - 1, options.certified_steps).astype(int)
        sampled = replace_queries(document, rows)
        first, end, _ = _candidates(sampled.position(0))
        if first == end:
            for each in found.values():
                each.append(1.0)
            continue
        tables = {kind: document.table(kind) for kind in options.geometric_kinds}
        for layer in range(len(document.queries)):
            for kind, table in tables.items():
                masses = _masses(sampled, table, layer)
                queries = sampled.queries[layer, : len(masses.true)]
                upper = _log_upper(table, layer, queries)[:, :, first:end]
                found[kind.value].append(_needed(masses, upper))
            found["oracle"].append(_needed(masses, masses.true))
    return {"tail_mass": TAIL_MASS} | {kind: _mean(each) for kind, each in found.items()}


def replace_queries(document: Captured, rows: NDArray[np.int64]) -> Captured:
    """The same document with some of its queries only, as if they stood at its end."""
    return Captured(document.queries[:, rows], document.kv, document.num_tokens)


def _log_upper(table: SummaryTable, layer: int, q: F32) -> F32:
    """[Q, H, n] logarithm of a sound upper bound of each block's mass."""
    if "shadow" in table.kind:
        logits, errors = table.token_logits(layer, q)
        upper: F32 = np.logaddexp.reduce(logits + errors, axis=-1)
        return upper
    return table.bounds(layer, q)[1] + np.float32(np.log(BLOCK_TOKENS))


def _needed(masses: _Masses, upper: F32) -> float:
    """Share of the candidates that a head reads until the bound of the rest is low enough."""
    true = masses.true.astype(np.float64)
    base = np.logaddexp(np.logaddexp.reduce(true, axis=-1), masses.known)[..., None]
    order = np.argsort(-upper, axis=-1)
    always = np.exp(masses.known[..., None] - base)
    exact = np.exp(np.take_along_axis(true, order, -1) - base)
    with np.errstate(over="ignore"):
        bound = np.exp(np.take_along_axis(upper.astype(np.float64), order, -1) - base)
    read = always + exact.cumsum(-1) - exact
    rest = bound[..., ::-1].cumsum(-1)[..., ::-1]
    needed = (rest > TAIL_MASS / (1 - TAIL_MASS) * read).sum(-1)
    return float(needed.mean() / upper.shape[-1])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
