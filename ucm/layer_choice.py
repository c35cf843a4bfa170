"""Which blocks a request's queries attend to, by the summaries in a table: pure arithmetic.

What has no summary scores nothing and is in every selection; so is what a summary cannot speak for
(`must`: keys that are not finite), and what the caller names. The budget counts all of them.

Envelope: 30 layers of 128 blocks, one query of 9 heads: 80 us a layer for the choice and as much
again for bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ucm.kernels.block_scores import Choice, choose_blocks, shared_mass

from .select_api import LayerSelection, SelectMode

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ucm.kernels.block_scores import SummaryTable

    from .select_api import Floats, SelectRequest

    Bools = NDArray[np.bool_]


SCORES_AT_ONCE = 1 << 22
"""Queries x heads x tokens that are scored together: some kinds score every token, and keep a few
arrays of so many float32 for it. One query is scored in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The blocks of a sequence that can be chosen: the leading `count` of a table."""

    table: SummaryTable
    count: int
    known: Bools
    """[count]: which of them have a summary."""
    num_kv_heads: int
    block_tokens: int


def choose_layers(
    candidates: Candidates, request: SelectRequest, check_time: Callable[[int], None]
) -> tuple[LayerSelection, ...]:
    """A selection for each layer of the request; `PER_HEAD` for each KV head of each.

    Args:
        candidates: the cached keys of the call.
        request: checked.
        check_time: called before each layer, and before each further part of its queries, with
            the number of layers done; may raise.
    """
    wanted = ~candidates.known
    wanted[[block for block in request.must_blocks if block < candidates.count]] = True
    found: list[LayerSelection] = []
    for position, layer in enumerate(request.layers):
        scores = _scores(candidates, request, position, check_time)
        found += _Layer(candidates, request, wanted, layer, scores).selections()
    return tuple(found)


def _scores(
    candidates: Candidates,
    request: SelectRequest,
    position: int,
    check_time: Callable[[int], None],
) -> list[Floats]:
    """[Q, H, count] estimates of the layer at that position, and both bounds if they are wanted."""
    table, count, layer = candidates.table, candidates.count, request.layers[position]
    queries = request.queries[position]
    each = max(1, request.num_heads * count * candidates.block_tokens)
    step = max(1, SCORES_AT_ONCE // each)
    parts: list[list[Floats]] = []
    for start in range(0, len(queries), step):
        check_time(position)
        part = queries[start : start + step]
        bounds = table.bounds(layer, part, count) if request.bounds else ()
        parts.append([table.log_mass(layer, part, count), *bounds])
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


class _Layer:
    """The scores of one layer."""

    def __init__(
        self,
        candidates: Candidates,
        request: SelectRequest,
        wanted: Bools,
        layer: int,
        scores: list[Floats],
    ) -> None:
        table, count = candidates.table, candidates.count
        self._candidates = candidates
        self._request = request
        self._layer = layer
        self._must = wanted | table.must(layer)[:count]
        self._log_mass = scores[0]
        self._lower, self._upper = scores[1:] or (scores[0], scores[0])

    def selections(self) -> list[LayerSelection]:
        if self._request.mode is SelectMode.SHARED:
            return [self._select(slice(None), None)]
        num_groups = self._candidates.num_kv_heads
        size = self._request.num_heads // num_groups
        return [
            self._select(slice(group * size, (group + 1) * size), group)
            for group in range(num_groups)
        ]

    def _select(self, heads: slice, kv_head: int | None) -> LayerSelection:
        log_mass, tokens = self._log_mass[:, heads], self._candidates.block_tokens
        shares = shared_mass(log_mass)
        choice = choose_blocks(shares, self._request.budget, self._must, tokens)
        blocks = choice.blocks
        mass = self._mass_of(choice)
        if not self._request.bounds:
            return LayerSelection(self._layer, blocks, shares[blocks], mass, kv_head)
        upper = self._upper[:, heads]
        return LayerSelection(
            self._layer,
            blocks,
            shares[blocks],
            mass,
            kv_head,
            log_mass[..., blocks],
            self._lower[:, heads][..., blocks],
            upper[..., blocks],
            _skipped_upper(upper, blocks, tokens),
        )

    def _mass_of(self, choice: Choice) -> float:
        return 1.0 if len(choice.blocks) == self._candidates.count else choice.mass


def _skipped_upper(upper: Floats, blocks: NDArray[np.int64], block_tokens: int) -> Floats:
    """[nq, H]: log of block_tokens * sum of exp(upper) over the blocks left out, rounded up.

    Infinite if one of these bounds is: that of a query too large to be scored.
    """
    left_out = np.ones(upper.shape[-1], np.bool_)
    left_out[blocks] = False
    rest = upper[..., left_out].astype(np.float64)
    if not rest.shape[-1]:
        return np.full(upper.shape[:-1], -np.inf, np.float32)
    top = rest.max(axis=-1)
    unbounded = np.isposinf(top)
    rest[unbounded], top[unbounded] = 0, 0
    log_sum = top + np.log(np.exp(rest - top[..., None]).sum(axis=-1)) + np.log(block_tokens)
    rounded: Floats = np.nextafter(
        (log_sum + 1e-12 * np.abs(log_sum)).astype(np.float32), np.float32(np.inf)
    )
    rounded[unbounded] = np.inf
    return rounded
