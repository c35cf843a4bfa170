"""What `CacheApi.select` and its kin take and give: which blocks a query will attend to.

    select            (keys, layers, queries, budget) -> per layer: blocks, shares, mass, bounds
    select_and_load   the same, and a load plan of every block that some layer chose; one call
    map_summaries     a lease of the encoded summaries, for who scores in its own process

Blocks are named by their *index in the keys of the call*. A selection is an estimate made from
summaries; only `lower`, `upper` and `skipped_upper` are sound, relative to the stored keys. No call
here reads a key or a value: what has no summary at hand is included, not looked at.

Array suffixes: Q queries of one layer, H query heads, K blocks chosen.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ucm.kernels.block_scores import Budget, check_budget

from .enum_words import word_of
from .errors import InvalidArgumentError
from .types import LeaseId, SummaryStatus

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .layout import KvLayout
    from .types import SummaryKind

    Floats = NDArray[np.float32]
    Indexes = NDArray[np.int64]

MAX_LAYER_SCORES = 1 << 22
"""Queries x heads x keys of one call: what scoring one layer keeps in memory, a few times over, in
4 bytes each. 16384 keys (half a million tokens) leave room for 8 queries of 32 heads."""


class SelectMode(enum.StrEnum):
    """Who shares a selection."""

    SHARED = "shared"
    """All heads of a layer: one selection a layer. Costs under a point of captured mass."""
    PER_HEAD = "per_head"
    """The query heads of one KV head: as many selections a layer as it has KV heads."""


@dataclass(frozen=True, slots=True, eq=False)
class SelectRequest:
    """What to choose by. `check` says what is wrong with it."""

    layers: Sequence[int]
    """The layers to choose for, ascending."""
    queries: Floats
    """[len(layers), Q, H, head_dim] float32, after RoPE, not scaled."""
    budget: Budget
    """How much of the keys that are cached, must-include ones too."""
    must_blocks: Sequence[int] = ()
    """Indexes in the keys of blocks that are in every selection: the sink, the recent window."""
    mode: SelectMode = SelectMode.SHARED
    """The plain word ("per_head") will do."""
    bounds: bool = True
    """Whether to answer `log_mass`, `lower`, `upper` and `skipped_upper` too."""

    def __post_init__(self) -> None:
        """Make a plain word the mode that it spells; `check` refuses what is none."""
        if self.mode in tuple(SelectMode):
            object.__setattr__(self, "mode", word_of(SelectMode, self.mode, "mode"))

    @property
    def num_queries(self) -> int:
        """Queries of each layer."""
        return int(self.queries.shape[1])

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return int(self.queries.shape[2])

    def check(self, layout: KvLayout, num_keys: int) -> None:
        """Refuse what cannot be answered in a namespace of `layout`.

        Raises:
            InvalidArgumentError: with what to do about it.
        """
        _check_layers(self.layers, layout.num_layers)
        _check_queries(self.queries, len(self.layers), layout)
        word_of(SelectMode, self.mode, "a selection's mode")
        check_budget(self.budget)
        scores = self.num_queries * self.num_heads * num_keys
        if scores > MAX_LAYER_SCORES:
            raise InvalidArgumentError(
                f"{self.num_queries} queries of {self.num_heads} heads against {num_keys} keys are "
                f"{scores} scores a layer, at most {MAX_LAYER_SCORES} are made in one call; "
                "send fewer queries or keys in each"
            )
        for block in self.must_blocks:
            if not 0 <= block < num_keys:
                raise InvalidArgumentError(
                    f"must-include block {block} is no index of the {num_keys} keys of the call"
                )


def _check_layers(layers: Sequence[int], num_layers: int) -> None:
    ascending = all(one < after for one, after in itertools.pairwise(layers))
    if not layers or not ascending or not 0 <= layers[0] <= layers[-1] < num_layers:
        raise InvalidArgumentError(
            f"layers {list(layers)[:8]}: name at least one, ascending, each once, "
            f"of 0..{num_layers - 1}"
        )


def _check_queries(queries: Any, num_layers: int, layout: KvLayout) -> None:
    wanted = f"[{num_layers}, queries, heads, {layout.head_dim}]"
    if not isinstance(queries, np.ndarray) or queries.dtype != np.float32:
        kind = getattr(queries, "dtype", type(queries).__name__)
        raise InvalidArgumentError(f"queries are a float32 array {wanted}, not {kind}")
    shape = queries.shape
    fits = queries.ndim == 4 and (shape[0], shape[3]) == (num_layers, layout.head_dim)
    if not fits or 0 in shape:
        raise InvalidArgumentError(
            f"queries have the shape {list(shape)}, this call needs {wanted}: one entry a layer "
            "named, at least one query and head, the namespace's head size"
        )
    if shape[2] % layout.num_kv_heads:
        raise InvalidArgumentError(
            f"{shape[2]} query heads do not share {layout.num_kv_heads} KV heads evenly; "
            "send the heads of all groups, in the model's order"
        )
    if not math.isfinite(float(np.abs(queries).sum(dtype=np.float64))):
        raise InvalidArgumentError("a query is not finite (NaN or infinity); attend densely")


@dataclass(frozen=True, slots=True, eq=False)
class LayerSelection:
    """The blocks chosen for one layer, or for one KV head of it."""

    layer: int
    blocks: Indexes
    """[K], ascending: indexes in the keys of the call."""
    shares: Floats
    """[K]: the share of the attention mass of all scored blocks that each is estimated to hold;
    0 where there was no summary."""
    mass: float
    """The share that they hold together, estimated; 1.0 when nothing was left out."""
    kv_head: int | None = None
    """None when all heads share the selection."""
    log_mass: Floats | None = None
    """[Q, H, K]: estimate of log sum exp(q.k / sqrt(head_dim)) over the tokens of each; -inf where
    there was no summary. Of the query heads that share the selection; so are the next three."""
    lower: Floats | None = None
    """[Q, H, K]: no q.k / sqrt(head_dim) of the block is below."""
    upper: Floats | None = None
    """[Q, H, K]: none is above."""
    skipped_upper: Floats | None = None
    """[Q, H]: log of a bound on the sum of exp(q.k / sqrt(head_dim)) over all blocks left out:
    -inf when there are none."""


@dataclass(frozen=True, slots=True, eq=False)
class SelectResult:
    """The answer to one request."""

    statuses: tuple[SummaryStatus, ...]
    """One for every key asked for, in order."""
    layers: tuple[LayerSelection, ...]
    """One a layer asked for, in order; `PER_HEAD` one a KV head of each."""

    def union(self) -> Indexes:
        """Every block that some selection has, ascending."""
        if not self.layers:
            return np.empty(0, np.int64)
        return np.unique(np.concatenate([each.blocks for each in self.layers]))


@dataclass(frozen=True, slots=True)
class SummaryLease:
    """Encoded summaries that stay in place while they are leased; ended by `CacheApi.release`.

    One entry for every key asked for, in order. After the lease's time an entry may hold another
    block's summary: `contents` tells. So an entry is read, and checked, by
    `ucm.kernels.summary_record.summary_of(layout, entry, content)`, with the entry's own number
    of `contents`; it answers None where the entry is not that block's summary any more.
    """

    id: LeaseId
    kind: SummaryKind
    entries: tuple[memoryview | None, ...]
    """Read-only, without padding; None unless READY."""
    statuses: tuple[SummaryStatus, ...]
    contents: tuple[int, ...]
    """Of what content each is the summary, as `content` in its header says. 0 unless READY."""
    timeout_s: float
    """The cache may take the memory back this long after the call was answered."""
