"""`blend`: chunks that were placed elsewhere, repaired layer by layer.

Reads a layer's KV, recomputes the rows that the policy chose and those that no chunk holds, writes
them, and goes on to the next layer with the rows that the policy keeps. A generator: between two
steps its caller may do anything else, and need not come back.

Invariants: layers are read in order, and the caller is asked before each that was not read yet;
a row is written once a layer at most; what was spent never exceeds the budget; with nothing to
recompute nothing is written.

Shapes: S rows, T positions of the request so far, H query heads, G KV heads, D head size, C hidden
size, N candidates.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .candidates import Allowance, CandidateRows, fresh_positions
from .drift import relative_drift
from .guard import KeptAttention, choose_probes, median_drifts
from .importance import Importance
from .narrow_attention import AttendFn, NarrowAttention
from .options import BlendOptions, RecomputePolicy
from .policies import (
    CacheBlend,
    ProjectedRows,
    RowPolicy,
    all_rows,
    chunk_heads,
    looked_at_most,
    no_rows,
)
from .progressive import Progressive
from .protocols import BlendOutcome, BlendPlan, BlendStep, KvRows, LayerwiseModel
from .row_attention import attend_rows

QUERY_SHARE = 1 / 16
"""What stage 1 may take of the budget, ..."""
MIN_QUERIES = 8
"""... and tokens that it gets in any case, up to a third of the budget."""

Steps = Generator[BlendStep, None, None]


def blend(
    model: LayerwiseModel, rows: KvRows, plan: BlendPlan, options: BlendOptions
) -> Generator[BlendStep, None, BlendOutcome]:
    """Repair the chunks of a request.

    Yields before it reads a layer that it has not read, and after every slice of rows. Abandoned
    at a step it leaves layers behind that are not repaired, and nothing else.

    Args:
        model: what the chunks were encoded with.
        rows: their KV, at the new positions; see `KvRows`.
        plan: what stands where.
        options: which rows to recompute, and how many.

    Returns:
        What it did.
    """
    job = _Blend(model, rows, plan, options)
    yield from job.run()
    return job.outcome()


@dataclass(slots=True)
class _RowSet:
    """Rows on their way through the layers, in ascending order; S of them."""

    x: Tensor
    """[S, C]."""
    positions: Tensor
    """[S] int64."""
    indexes: Tensor
    """[S] int64 into the candidates; -1 for a fresh row."""

    def take(self, at: Tensor) -> _RowSet:
        """Those at [n] places, int64 and ascending."""
        if len(at) == len(self.positions):
            return self
        return _RowSet(self.x.index_select(0, at), self.positions[at], self.indexes[at])


class _Blend:
    """One blend's state."""

    def __init__(
        self, model: LayerwiseModel, rows: KvRows, plan: BlendPlan, options: BlendOptions
    ) -> None:
        self._model = model
        self._kv = rows
        self._plan = plan
        self._options = options
        self._device = model.embed([]).device
        self._candidates = CandidateRows.of(plan, self._device)
        self._fresh = fresh_positions(plan, self._device)
        """Those that no stage has computed."""
        self._num_fresh = len(self._fresh)
        whole = self._whole_allowance()
        # Probes are rows like any others: a budget that pays for every row pays for them too.
        self._is_whole = whole.constant_rows >= len(self._candidates)
        self._allowance, self._is_probe = self._draw_probes(whole)
        self._kept = KeptAttention(self._candidates)
        self._narrow: NarrowAttention | None = None
        self._drift: tuple[float, ...] = ()
        self._num_read = 0
        self._spent = 0.0
        self._unreported = 0.0
        self._rows_per_layer: list[int] = []
        self._last: Tensor | None = None

    def run(self) -> Steps:
        """All layers."""
        policy, importance = yield from self._choose()
        chosen = policy.first() | self._is_probe
        # The rules of the literature attend to everything, and are measured as published.
        if importance is not None and self._options.policy is RecomputePolicy.PROGRESSIVE:
            self._narrow = NarrowAttention(
                self._plan, self._candidates, chosen, importance.masses, self._options.narrow_share
            )
        current = self._enter(chosen)
        for layer in range(self._model.num_layers):
            if importance is not None:
                yield from self._look_ahead(importance, layer)
            yield from self._read_first(layer)
            if layer > 0 and self._is_guarded:
                repaired = current.indexes[current.indexes >= 0]
                mass = None if importance is None else importance.masses[layer]
                self._kept.add(mass, repaired)
            current = yield from self._run_layer(layer, current, policy)
        if self._plan.has_last:
            self._last = current.x
        if self._unreported:
            yield self._step()

    def outcome(self) -> BlendOutcome:
        """What was done; after `run`."""
        all_token_layers = max(1, self._model.num_layers * len(self._candidates))
        has_kept = not self._is_whole or self._options.policy is RecomputePolicy.NONE
        return BlendOutcome(
            cost=self._spent / all_token_layers,
            rows_per_layer=tuple(self._rows_per_layer),
            num_fresh=self._num_fresh,
            drift=self._drift,
            drifted=tuple(
                i
                for i, drift in enumerate(self._drift)
                if has_kept and drift > self._options.guard_limit
            ),
            residual=self._kept.residual(self._drift) if self._drift else None,
            last=self._last,
        )

    # What is recomputed.

    def _choose(self) -> Generator[BlendStep, None, tuple[RowPolicy, Importance | None]]:
        """The policy, with what it has to know before layer 0."""
        kind, candidates, allowance = self._options.policy, self._candidates, self._allowance
        if kind is RecomputePolicy.NONE or allowance.constant_rows == 0:
            return no_rows(candidates), None
        if self._is_whole:
            return all_rows(candidates), None
        if self._model.num_layers == 1:
            return no_rows(candidates), None
        if kind is RecomputePolicy.CACHEBLEND:
            return CacheBlend(candidates, allowance), None
        importance = None
        if kind is not RecomputePolicy.LEGO:
            importance = self._importance(allowance)
        if importance is None:
            return chunk_heads(candidates, allowance), None
        allowance = allowance.less(importance.num_queries * allowance.row_cost)
        yield from self._look_ahead(importance, 0)
        if kind is RecomputePolicy.QUERY:
            return looked_at_most(importance, allowance), importance
        return Progressive(candidates, importance, allowance, self._options), importance

    def _draw_probes(self, whole: Allowance) -> tuple[Allowance, Tensor]:
        """What is left for the policy, and the rows that the guard looks at."""
        options = self._options
        is_probe, count = choose_probes(
            self._candidates, options.guard_tokens, whole.constant_rows, options.seed
        )
        self._is_guarded = count > 0
        return whole.less(count * whole.row_cost), is_probe

    def _whole_allowance(self) -> Allowance:
        num_layers = self._model.num_layers
        budget = 1.0 if self._options.policy is RecomputePolicy.FULL else self._options.budget
        return Allowance(
            token_layers=budget * num_layers * len(self._candidates),
            num_layers=num_layers,
            projection_share=self._model.projection_share,
        )

    def _importance(self, allowance: Allowance) -> Importance | None:
        """Stage 1 over as many query tokens as its share of the budget pays for."""
        plan, rows = self._plan, allowance.constant_rows
        affordable = min(max(MIN_QUERIES, int(rows * QUERY_SHARE)), rows // 3)
        count = min(self._options.num_queries, affordable, len(plan.token_ids) - plan.query_start)
        if count < 1:
            return None
        is_front = self._fresh < plan.spans[0].start
        front, self._fresh = self._fresh[is_front], self._fresh[~is_front]
        return Importance(self._model, plan, count, front, self._fresh)

    def _look_ahead(self, importance: Importance, layer: int) -> Steps:
        """Run stage 1 as far ahead of `layer` as it may be."""
        num_layers = self._model.num_layers
        ahead = self._options.importance_layers
        end = num_layers if ahead is None else min(num_layers, layer + 1 + max(1, ahead))
        while importance.num_done < end:
            done = importance.num_done
            yield from self._read_first(done)
            kv_2GFD = importance.run_layer(self._kv.read(done), self._candidates.positions)
            if len(importance.front):
                self._kv.write(done, importance.front, kv_2GFD)
            is_last = done == num_layers - 1
            share = self._model.projection_share if is_last else 1.0
            self._spend(importance.num_queries * share)
            self._unreported += len(importance.front) * share

    # One layer.

    def _enter(self, chosen: Tensor) -> _RowSet:
        """The rows of layer 0: those chosen, and all fresh ones."""
        indexes = chosen.nonzero()[:, 0]
        positions = torch.cat((self._candidates.positions[indexes], self._fresh))
        indexes = torch.cat((indexes, torch.full_like(self._fresh, -1)))
        order = positions.argsort()
        positions = positions[order]
        tokens = self._plan.token_ids
        x_SC = self._model.embed([tokens[i] for i in positions.tolist()])
        return _RowSet(x_SC, positions, indexes[order])

    def _run_layer(
        self, layer: int, entered: _RowSet, policy: RowPolicy
    ) -> Generator[BlendStep, None, _RowSet]:
        """Compute and write the rows' KV, and run those that the policy keeps."""
        kv_2GTD = self._kv.read(layer)
        if len(entered.positions) == 0:
            self._rows_per_layer.append(0)
            return entered
        queries, new_2GSD = yield from self._project(layer, entered)
        is_kept = self._keep(layer, entered, policy, new_2GSD, kv_2GTD)
        kv_2GTD.index_copy_(2, entered.positions, new_2GSD)
        self._kv.write(layer, entered.positions, new_2GSD)
        at = is_kept.nonzero()[:, 0]
        kept = entered.take(at)
        q_SHD = queries if kept is entered else queries.index_select(0, at)
        num_kept = int((kept.indexes >= 0).sum())
        self._rows_per_layer.append(num_kept)
        attend = self._attention(layer, kv_2GTD)
        done = []
        for rows in _slices(len(kept.positions), self._options.slice_tokens):
            attended = attend(q_SHD[rows], kept.positions[rows])
            done.append(self._model.finish(layer, kept.x[rows], attended))
            share = 1 - self._model.projection_share
            self._account(kept.indexes[rows], share)
            yield self._step()
        return replace(kept, x=_joined(done)) if done else kept

    def _attention(self, layer: int, kv_2GTD: Tensor) -> AttendFn:
        """How rows attend to a layer."""
        if self._narrow is not None and self._narrow.is_narrow(layer):
            return self._narrow.over(kv_2GTD)
        return lambda q_SHD, positions: attend_rows(q_SHD, kv_2GTD, positions)

    def _project(
        self, layer: int, rows: _RowSet
    ) -> Generator[BlendStep, None, tuple[Tensor, Tensor]]:
        """Queries [S, H, D], keys and values [2, G, S, D] of all rows."""
        queries, kv = [], []
        for part in _slices(len(rows.positions), self._options.slice_tokens):
            q_SHD, kv_2GSD = self._model.project(layer, rows.x[part], rows.positions[part])
            queries.append(q_SHD)
            kv.append(kv_2GSD)
            self._account(rows.indexes[part], self._model.projection_share)
            if part.stop < len(rows.positions):
                yield self._step()
        return _joined(queries), _joined(kv, 2)

    def _keep(
        self, layer: int, rows: _RowSet, policy: RowPolicy, new_2GSD: Tensor, kv_2GTD: Tensor
    ) -> Tensor:
        """[S] bool: the rows that run the layer; fresh ones do.

        In the last one only the request's last token does, if the plan includes it.
        """
        is_kept = torch.ones_like(rows.indexes, dtype=torch.bool)
        is_last = layer == self._model.num_layers - 1
        if layer == 0 and not is_last:
            return is_kept
        where = (rows.indexes >= 0).nonzero()[:, 0]
        old_2GSD = kv_2GTD.index_select(2, rows.positions[where])
        new_2GSD = new_2GSD.index_select(2, where)
        seen = ProjectedRows(layer, rows.indexes[where], new_2GSD, old_2GSD)
        if is_last:
            self._look_at_probes(seen)
            return rows.positions == len(self._plan.token_ids) - 1
        is_kept[where] = policy.keep(seen) | self._is_probe[seen.indexes]
        return is_kept

    def _look_at_probes(self, rows: ProjectedRows) -> None:
        """In the last layer: how far each chunk has drifted."""
        if self._is_guarded:
            is_probe = self._is_probe[rows.indexes]
            drift_S = relative_drift(rows.new, rows.old)[is_probe]
            span_of_S = self._candidates.span_of[rows.indexes][is_probe]
            self._drift = median_drifts(drift_S, span_of_S, len(self._plan.spans))

    # Steps and accounts.

    def _read_first(self, layer: int) -> Steps:
        """Let the caller know before a layer is read for the first time."""
        if layer >= self._num_read:
            yield self._step()
            self._num_read = layer + 1

    def _step(self) -> BlendStep:
        computed, self._unreported = self._unreported, 0.0
        return BlendStep(next_layer=self._num_read, token_layers=computed)

    def _account(self, indexes: Tensor, share: float) -> None:
        """Count rows that did `share` of a layer."""
        num_candidates = int((indexes >= 0).sum())
        self._spend(num_candidates * share)
        self._unreported += (len(indexes) - num_candidates) * share

    def _spend(self, token_layers: float) -> None:
        self._spent += token_layers
        self._unreported += token_layers


def _slices(length: int, size: int) -> Iterator[slice]:
    for first in range(0, length, size):
        yield slice(first, min(first + size, length))


def _joined(parts: list[Tensor], axis: int = 0) -> Tensor:
    """`torch.cat`, which copies a single part too."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
