"""Scores of blocks from their summaries: how much attention a query will find in each.

Invariants: `log_mass` is an estimate and decides what is worth reading; `bounds` are sound for
every key of the block as it is stored. A block whose summary says `must` has no estimate (-inf),
bounds of -inf and inf, and is always read. A query whose products float32 cannot hold has no
estimate either (all blocks are alike to it) and no bounds.

Envelope: 128 blocks of SmolLM2 are 512 centroids of 64 floats a KV head: 0.4 MB a layer, 40 us from
memory; the rest of the 80 us are a dozen numpy calls.

Shapes: n blocks, L layers, H query heads, G KV heads, R = H / G, D head size, C terms of a block,
m rows of queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ucm.errors import InvalidArgumentError, UcmError
from ucm.layout import KvLayout
from ucm.types import SummaryKind

from .score_columns import TokenColumns, make_columns, sizes
from .summary_record import MUST, WITH_VALUES, Records, layout_dtype

Floats: TypeAlias = NDArray[np.float32]
Bools: TypeAlias = NDArray[np.bool_]


MAX_QUERY = 1e9
"""Largest element of a query that is scored: no product with a record that `summarize` makes
overflows below. A model's own are a few hundred at most."""


class SummaryTable:
    """The summaries of one sequence's blocks, ready to be scored. Not thread-safe."""

    def __init__(self, kind: SummaryKind, layout: KvLayout) -> None:
        """An empty table.

        Args:
            kind: of the summaries that will come.
            layout: of the blocks; its dtype does not matter.

        Raises:
            LayoutMismatchError: this kind cannot describe such blocks.
        """
        self.kind = kind
        self.layout = layout
        self._dtype = layout_dtype(layout, kind)
        self._columns = make_columns(kind, layout)
        self._scale = np.float32(1 / math.sqrt(layout.head_dim))
        self._must = np.zeros((layout.num_layers, 0), np.bool_)
        self._has_must = False
        self._length = 0

    def __len__(self) -> int:
        """Blocks."""
        return self._length

    @property
    def num_bytes(self) -> int:
        """Memory held, with the room to grow."""
        return self._columns.num_bytes + self._must.nbytes

    def least_bytes(self, num_blocks: int) -> int:
        """Memory that a table of so many blocks takes at least, with the room to grow."""
        shape = (1, self.layout.num_layers, self.layout.num_kv_heads)
        return self._columns.least_bytes(np.zeros(shape, self._dtype), num_blocks)

    def extend(self, records: Records) -> None:
        """Append the blocks that follow.

        Args:
            records: [n, L, G] of `record_dtype`, or [L, G] of one block.

        Raises:
            InvalidArgumentError: records of another shape or kind.
        """
        self.replace(self._length, records)

    def replace(self, start: int, records: Records) -> None:
        """Write blocks start..start+n-1, over those that are there and beyond.

        Args:
            start: index of the first, at most `len(self)`.
            records: as for `extend`.

        Raises:
            InvalidArgumentError: records of another shape or kind, or `start` leaves a gap.
        """
        layers, heads = self.layout.num_layers, self.layout.num_kv_heads
        new = records[None] if records.ndim == 2 else records
        if new.dtype != self._dtype or new.shape[1:] != (layers, heads):
            raise InvalidArgumentError(
                f"records of shape {records.shape} are no {self.kind} of [n, {layers}, {heads}]"
            )
        if not 0 <= start <= self._length:
            raise InvalidArgumentError(f"block {start} does not follow {self._length} blocks")
        if not len(new):
            return
        self._columns.write(start, new)
        flags = (new["flags"] & MUST != 0).any(axis=2).T
        behind = self._must[:, start + len(new) :]
        self._must = np.concatenate([self._must[:, :start], flags, behind], axis=1)
        self._has_must = bool(self._must.any())
        self._length = max(self._length, start + len(new))

    def truncate(self, num_blocks: int) -> None:
        """Keep the first `num_blocks`; nothing happens if there are fewer."""
        self._length = min(self._length, max(0, num_blocks))
        self._must = self._must[:, : self._length]
        self._has_must = bool(self._must.any())

    @property
    def has_must(self) -> bool:
        """Whether any block has to be read in any layer."""
        return self._has_must

    def must(self, layer: int) -> Bools:
        """[n] blocks that have to be read: their summaries say nothing."""
        must: Bools = self._must[layer]
        return must

    def log_mass(self, layer: int, q: Floats, num_blocks: int | None = None) -> Floats:
        """Estimate log(sum over a block's keys of exp(q . k / sqrt(D))).

        Args:
            layer: which.
            q: [nq, H, D] queries after RoPE; head h attends to KV head h // (H / G).
            num_blocks: of the leading blocks only; of all if None or more than there are.

        Returns:
            [nq, H, n]; -inf for blocks of `must`.

        Raises:
            InvalidArgumentError: `layer` or the shape of `q` does not fit.
        """
        rows = self._rows(layer, q)
        num = self._leading(num_blocks)
        if not num:
            return np.zeros((*q.shape[:2], 0), np.float32)
        found = self._heads(self._columns.log_mass(layer, rows, num), q)
        must = self._must[layer, :num]
        if must.any():
            found[:, :, must] = -np.inf
        return found

    def shares(self, layer: int, q: Floats, num_blocks: int | None = None) -> Floats:
        """`shared_mass(log_mass(...))`, in half the time: what decode steps choose by.

        Args:
            layer: which.
            q: [nq, H, D].
            num_blocks: as for `log_mass`.

        Returns:
            [n]; 0 for blocks of `must`.

        Raises:
            InvalidArgumentError: as `log_mass`.
        """
        rows = self._rows(layer, q)
        num = self._leading(num_blocks)
        if not num:
            return np.zeros(0, np.float32)
        must = self._must[layer, :num] if self._has_must else None
        return self._columns.shares(layer, rows, num, must)

    def bounds(self, layer: int, q: Floats, num_blocks: int | None = None) -> tuple[Floats, Floats]:
        """Sound bounds of every logit q . k / sqrt(D) of each block's stored keys.

        Args:
            layer: which.
            q: [nq, H, D].
            num_blocks: as for `log_mass`.

        Returns:
            (lower, upper), each [nq, H, n]; -inf and inf for blocks of `must`.

        Raises:
            InvalidArgumentError: as `log_mass`.
        """
        rows = self._rows(layer, q)
        num = self._leading(num_blocks)
        if not num:
            empty = np.zeros((*q.shape[:2], 0), np.float32)
            return empty, empty
        lower, upper = (self._heads(each, q) for each in self._columns.bounds(layer, rows, num))
        must = self._must[layer, :num]
        lower[:, :, must], upper[:, :, must] = -np.inf, np.inf
        wild = _wild(q)
        lower[wild], upper[wild] = -np.inf, np.inf
        return lower, upper

    def token_logits(self, layer: int, q: Floats) -> tuple[Floats, Floats]:
        """Logits of single keys, for kinds that keep something of each (shadows, hashes).

        Args:
            layer: which.
            q: [nq, H, D].

        Returns:
            (logits, errors), each [nq, H, n, B]: for a shadow the true logit of the stored key is
            within the error (infinite for blocks of `must`, and for queries beyond `MAX_QUERY`);
            for a hash the error is |q| |k|.

        Raises:
            InvalidArgumentError: as `log_mass`, or the kind keeps no tokens.
        """
        rows = self._rows(layer, q)
        if not isinstance(self._columns, TokenColumns):
            raise InvalidArgumentError(f"{self.kind} summaries keep no single keys")
        shape = (*q.shape[:2], self._length, self.layout.block_tokens)
        if not self._length:
            return np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        logits = self._columns.token_logits(layer, rows, self._length)
        reach = sizes(rows)[:, :, None, None]
        errors = reach * self._columns.token_errors(layer, self._length)[:, None]
        errors[:, :, self._must[layer]] = np.inf
        found = self._heads(errors, q)
        found[_wild(q)] = np.inf
        return self._heads(logits, q), found

    def values(self, layer: int) -> tuple[Floats, Floats]:
        """The blocks' mean values, for what is left out of the attention.

        Args:
            layer: which.

        Returns:
            (mean [n, G, D], radius [n, G]): every stored value of a block lies within the radius
            of the mean; infinite for blocks of `must`.

        Raises:
            InvalidArgumentError: the kind keeps no values.
        """
        if self.kind not in WITH_VALUES:
            raise InvalidArgumentError(f"{self.kind} summaries keep no values")
        if not self._length:
            heads, dim = self.layout.num_kv_heads, self.layout.head_dim
            return np.zeros((0, heads, dim), np.float32), np.zeros((0, heads), np.float32)
        mean, radius = self._columns.values(layer, self._length)
        radius[self._must[layer]] = np.inf
        return mean, radius

    def _leading(self, num_blocks: int | None) -> int:
        return self._length if num_blocks is None else min(num_blocks, self._length)

    def _rows(self, layer: int, q: Floats) -> Floats:
        """[G, nq * R, D] queries scaled by 1 / sqrt(D), by KV head; zeros for wild ones."""
        shape = self.layout
        heads, dim = shape.num_kv_heads, shape.head_dim
        if not 0 <= layer < shape.num_layers:
            raise InvalidArgumentError(f"layer {layer} is outside 0..{shape.num_layers - 1}")
        if q.ndim != 3 or q.shape[2] != dim or q.shape[1] % heads or not q.shape[1]:
            raise InvalidArgumentError(
                f"a query is [nq, H, {dim}] with H a multiple of {heads}, not {list(q.shape)}"
            )
        scaled = q.astype(np.float32, copy=False) * self._scale
        if not np.abs(scaled).max() <= MAX_QUERY * self._scale:  # also where it is not a number
            scaled[_wild(q)] = 0
        if len(q) == 1:
            return scaled.reshape(heads, -1, dim)
        split = scaled.reshape(len(q), heads, -1, dim).transpose(1, 0, 2, 3)
        rows: Floats = split.reshape(heads, -1, dim)
        return rows

    def _heads(self, found: Floats, q: Floats) -> Floats:
        """[G, nq * R, ...] back to [nq, H, ...]."""
        num, heads = q.shape[:2]
        behind = found.shape[2:]
        split = found.reshape(len(found), num, -1, *behind).swapaxes(0, 1)
        back: Floats = split.reshape(num, heads, *behind)
        return back


def _wild(q: Floats) -> Bools:
    """[nq, H]: queries that are not finite or too large to be scored."""
    wild: Bools = ~(np.abs(q).max(axis=-1) <= MAX_QUERY)
    return wild


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many blocks to read: exactly one of `ratio`, `tokens` and `eps` is given."""

    ratio: float | None = None
    """Part of all blocks, 0 < ratio <= 1."""
    tokens: int | None = None
    """Tokens in the chosen blocks."""
    eps: float | None = None
    """As few blocks as are estimated to hold all but this part of the attention mass, within the
    two limits below; 0 leaves nothing out: all blocks, whatever the limits are."""
    min_ratio: float = 1 / 16
    """With `eps` above 0: never less than this part of the blocks."""
    max_ratio: float = 1 / 2
    """With `eps` above 0: never more."""

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.ratio, self.tokens, self.eps)) != 1:
            raise InvalidArgumentError("a budget is one of ratio, tokens and eps")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise InvalidArgumentError(f"budget ratio {self.ratio} is not in (0, 1]")
        if self.tokens is not None and self.tokens < 1:
            raise InvalidArgumentError(f"budget of {self.tokens} tokens, must be at least 1")
        if self.eps is not None and not 0 <= self.eps < 1:
            raise InvalidArgumentError(f"budget eps {self.eps} is not in [0, 1)")
        if not 0 <= self.min_ratio <= self.max_ratio <= 1:
            raise InvalidArgumentError(
                f"budget between {self.min_ratio} and {self.max_ratio} of the blocks"
            )

    @property
    def is_everything(self) -> bool:
        """Whether all blocks are read whatever they hold."""
        return self.ratio == 1.0 or self.eps == 0.0


def check_budget(
    budget: object, what: str = "a budget", error: type[UcmError] = InvalidArgumentError
) -> None:
    """Refuse what is no `Budget`, with the one that a plain number may stand for.

    Raises:
        UcmError: an `error` that begins with `what`.
    """
    if isinstance(budget, Budget):
        return
    example = "ratio=0.3"
    if isinstance(budget, int) and budget > 1:
        example = f"tokens={budget}"
    elif isinstance(budget, float) and 0 < budget <= 1:
        example = f"ratio={budget}"
    raise error(f"{what} is a Budget, not {budget!r}; for example Budget({example})")


@dataclass(frozen=True, slots=True)
class Choice:
    """Blocks to read in one layer."""

    blocks: NDArray[np.int64]
    """Indexes of blocks, ascending."""
    mass: float
    """Estimated part of the attention mass that they hold, 0..1."""


def shared_mass(log_mass: Floats) -> Floats:
    """One distribution over blocks for all heads and queries: the mean of each one's softmax.

    Args:
        log_mass: [nq, H, n].

    Returns:
        [n], sums to 1 (to 0 if there is nothing to distribute).
    """
    if not log_mass.size:
        return np.zeros(log_mass.shape[-1], np.float32)
    rows = log_mass.reshape(-1, log_mass.shape[-1])
    top = rows.max(axis=1, keepdims=True)
    top[~np.isfinite(top)] = 0
    weights = np.exp(rows - top)
    sums = weights.sum(axis=1)
    sums[sums == 0] = 1
    mass: Floats = (1 / (sums * len(rows))) @ weights
    return mass


def choose_blocks(p: Floats, budget: Budget, must: Bools, block_tokens: int) -> Choice:
    """The blocks of largest `p` within a budget; those of `must` first, and counted in it.

    Args:
        p: [n] estimated part of the mass in each block.
        budget: how many.
        must: [n] blocks that are taken whatever the budget says.
        block_tokens: tokens of a block.
    """
    keys = -p
    keys[must] = -np.inf
    order = keys.argsort(kind="stable")
    count = max(int(np.count_nonzero(must)), _budget_blocks(p, order, budget, block_tokens))
    blocks = order[:count]
    blocks.sort()
    return Choice(blocks, min(1.0, float(p[blocks].sum())))


def _budget_blocks(p: Floats, order: NDArray[np.int64], budget: Budget, block_tokens: int) -> int:
    num = len(p)
    if budget.is_everything:
        return num
    if budget.ratio is not None:
        return _part(budget.ratio, num)
    if budget.tokens is not None:
        return max(1, budget.tokens // block_tokens)
    assert budget.eps is not None
    enough = int(np.searchsorted(np.cumsum(p[order]), 1 - budget.eps - 1e-6)) + 1
    return min(max(enough, _part(budget.min_ratio, num)), _part(budget.max_ratio, num))


def _part(ratio: float, num: int) -> int:
    """That part of `num`, rounded up, but not for the last bit of a product: 0.07 * 100 is 7."""
    return math.ceil(ratio * num - 1e-9)
