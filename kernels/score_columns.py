"""Summaries of one sequence made ready to be scored: structures of arrays, dequantised.

Each kind of summary belongs to one family of columns, which turn records into arrays once and
answer for a layer's query with a few matrix products. `block_scores.SummaryTable` owns them, knows
how many blocks there are and which must be read anyway.

Shapes: L layers, G KV heads, n blocks, m query rows of a KV head, C terms of a block, B tokens,
D head size. `q_GmD` is scaled by 1 / sqrt(D) already.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ucm.layout import KvLayout
from ucm.types import SummaryKind

from .summarize import hash_directions, unpack_codes
from .summary_record import NUM_CENTROIDS, SHADOW_BITS, WITH_VALUES, Records

Floats: TypeAlias = NDArray[np.float32]
Bools: TypeAlias = NDArray[np.bool_]
Bounds: TypeAlias = tuple[Floats, Floats]

INITIAL_BLOCKS = 64
MAX_SPREAD = 6.0
"""Logits: a normal distribution's moment says nothing about the far tail of 30 keys."""


def make_columns(kind: SummaryKind, layout: KvLayout) -> Columns:
    """The columns that summaries of `kind` are held in."""
    if kind is SummaryKind.GSA_2:
        return AxisColumns(kind, layout)
    if kind in NUM_CENTROIDS:
        return CentroidColumns(kind, layout)
    if kind in SHADOW_BITS:
        return ShadowColumns(kind, layout)
    if kind is SummaryKind.HASH128:
        return HashColumns(kind, layout)
    return BoxColumns(kind, layout)


class Columns(ABC):
    """Arrays that grow geometrically along the blocks, which are their last axis.

    So a product with a query reads rows as long as the sequence: four times as fast as with the
    blocks in front. `_BEHIND` names the arrays that have another axis behind the blocks.
    """

    _BEHIND: frozenset[str] = frozenset({"keys", "signs", "errors", "value_means"})

    def __init__(self, kind: SummaryKind, layout: KvLayout) -> None:
        self._kind = kind
        self._layout = layout
        self._arrays: dict[str, Floats] = {}

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(array.nbytes for array in self._arrays.values())

    def write(self, start: int, records: Records) -> None:
        """Put records [n, L, G] at blocks start..start+n-1."""
        for name, part in self._parts(records).items():
            axis = part.ndim - 1 - (name in self._BEHIND)
            moved = np.moveaxis(part, 0, axis)
            array = self._room(name, moved, axis, start + len(records))
            where = (slice(None),) * axis + (slice(start, start + len(records)),)
            array[where] = moved

    def least_bytes(self, record: Records, blocks: int) -> int:
        """Memory that `blocks` take at least, given one's record [1, L, G]; holds nothing."""
        one = sum(part.nbytes for part in self._parts(record).values())
        return one * max(INITIAL_BLOCKS, blocks)

    def _parts(self, records: Records) -> dict[str, Floats]:
        parts = self._prepare(records)
        if self._kind in WITH_VALUES:
            parts["value_means"] = scaled(records["value_mean"], records["value_scale"])
            parts["value_radii"] = records["value_radius"].astype(np.float32)
        return parts

    def _room(self, name: str, part: Floats, axis: int, blocks: int) -> Floats:
        array = self._arrays.get(name)
        held = 0 if array is None else array.shape[axis]
        if array is not None and held >= blocks:
            return array
        capacity = max(INITIAL_BLOCKS, blocks, 2 * held)
        grown = np.zeros((*part.shape[:axis], capacity, *part.shape[axis + 1 :]), np.float32)
        if array is not None:
            grown[(slice(None),) * axis + (slice(0, held),)] = array
        self._arrays[name] = grown
        return grown

    def _of(self, name: str, layer: int, num: int) -> Floats:
        """[G, ..., num] (and what is behind) of one layer."""
        array = self._arrays[name][layer]
        found: Floats = array[..., :num, :] if name in self._BEHIND else array[..., :num]
        return found

    def values(self, layer: int, num: int) -> tuple[Floats, Floats]:
        """Copies of mean values [num, G, D] and radii [num, G]."""
        mean = self._of("value_means", layer, num).swapaxes(0, 1).copy()
        return mean, self._of("value_radii", layer, num).T.copy()

    @abstractmethod
    def _prepare(self, records: Records) -> dict[str, Floats]:
        """Arrays [n, L, G, ...] of records [n, L, G]; finite also where a record says must.

        The axis of the blocks moves to the end, or before the last of an array of `_BEHIND`.
        """

    @abstractmethod
    def log_mass(self, layer: int, q_GmD: Floats, num: int) -> Floats:
        """[G, m, num] estimates of the log of the sum of exp(logit) over each block's keys."""

    def shares(self, layer: int, q_GmD: Floats, num: int, must: Bools | None) -> Floats:
        """[num] the mean over heads of each one's softmax over blocks; 0 for those of `must`."""
        return mean_softmax(self.log_mass(layer, q_GmD, num)[:, None], must)

    @abstractmethod
    def bounds(self, layer: int, q_GmD: Floats, num: int) -> Bounds:
        """(lower, upper) [G, m, num] of every logit of each block."""


def norms(vectors: Floats) -> Floats:
    """Euclidean norms over the last axis."""
    found: Floats = np.sqrt(np.einsum("...d,...d->...", vectors, vectors))
    return found


def sizes(queries: Floats) -> Floats:
    """Euclidean norms over the last axis that neither underflow nor overflow; never too small."""
    largest = np.abs(queries).max(axis=-1)
    unit = queries / np.maximum(largest, np.float32(1e-45))[..., None]
    found: Floats = norms(unit) * largest * np.float32(1 + 1e-6)
    return found


def scaled(codes: NDArray[np.generic], scales: NDArray[np.generic]) -> Floats:
    """Codes [..., D] times their scale [...], as float32."""
    return codes.astype(np.float32) * scales.astype(np.float32)[..., None]


def log_sum(terms_GCmn: Floats) -> Floats:
    """[G, m, n] log of the sum of exp over C, of which one at least is finite."""
    top = terms_GCmn.max(axis=1)
    weights = np.exp(terms_GCmn - top[:, None])
    found: Floats = np.log(weights.sum(axis=1)) + top
    return found


def mean_softmax(terms_GCmn: Floats, must: Bools | None) -> Floats:
    """[n] the mean over heads of each one's softmax over all its terms, summed over C.

    That is the softmax over blocks of the log of each one's sum, with one exponential of a term and
    no logarithm. Changes `terms`. Blocks of `must` get 0; None: there are none.
    """
    if must is not None:
        terms_GCmn[..., must] = -np.inf
    top = terms_GCmn.max(axis=(1, 3), keepdims=True)
    if must is not None:
        top[top == -np.inf] = 0
    terms_GCmn -= top
    weights = np.exp(terms_GCmn, out=terms_GCmn)
    sums = weights.sum(axis=(1, 3), keepdims=True)
    if must is not None:
        sums[sums == 0] = 1
    sums *= sums.size
    weights /= sums
    found: Floats = weights.reshape(-1, weights.shape[3]).sum(axis=0)
    return found


class CentroidColumns(Columns):
    """Clusters of keys: centre, log of the count, radius."""

    def _prepare(self, records: Records) -> dict[str, Floats]:
        centres = scaled(records["centroids"], records["scales"])
        counts = records["counts"].astype(np.float32)
        radii = records["radii"].astype(np.float32)
        fullest = counts.argmax(axis=-1)[..., None]
        np.put_along_axis(counts, fullest, np.maximum(counts.max(axis=-1), 1)[..., None], axis=-1)
        if self._kind is SummaryKind.MAXNORM:
            # What is not kept lies in a ball around zero, of which nothing is estimated.
            rest = records["rest_radius"].astype(np.float32)[..., None]
            radii = np.concatenate([radii, rest], axis=-1)
            counts = np.concatenate([counts, np.zeros_like(rest)], axis=-1)
            centres = np.concatenate([centres, np.zeros_like(centres[..., :1, :])], axis=-2)
        elif (counts == 0).any():
            # An empty cluster repeats the fullest: it changes no bound.
            source = np.where(counts > 0, np.arange(counts.shape[-1]), fullest)
            centres = np.take_along_axis(centres, source[..., None], axis=-2)
            radii = np.take_along_axis(radii, source, axis=-1)
        with np.errstate(divide="ignore"):
            return {"centres": centres, "bias": np.log(counts), "radii": radii}

    def _logits(self, layer: int, q_GmD: Floats, num: int) -> Floats:
        """[G, C, m, num] of the centres."""
        logits: Floats = q_GmD[:, None] @ self._of("centres", layer, num)
        return logits

    def _terms(self, layer: int, q_GmD: Floats, num: int) -> Floats:
        """[G, C, m, num] whose exponentials add up to a block's mass."""
        terms = self._logits(layer, q_GmD, num)
        terms += self._of("bias", layer, num)[:, :, None]
        return terms

    def log_mass(self, layer: int, q_GmD: Floats, num: int) -> Floats:
        """See `Columns.log_mass`."""
        return log_sum(self._terms(layer, q_GmD, num))

    def shares(self, layer: int, q_GmD: Floats, num: int, must: Bools | None) -> Floats:
        """See `Columns.shares`."""
        return mean_softmax(self._terms(layer, q_GmD, num), must)

    def bounds(self, layer: int, q_GmD: Floats, num: int) -> Bounds:
        """See `Columns.bounds`."""
        logits = self._logits(layer, q_GmD, num)
        reach = sizes(q_GmD)[:, None, :, None] * self._of("radii", layer, num)[:, :, None]
        return (logits - reach).min(axis=1), (logits + reach).max(axis=1)


class AxisColumns(CentroidColumns):
    """Clusters, and of the first the directions in which its keys spread (gsa-2)."""

    def _prepare(self, records: Records) -> dict[str, Floats]:
        parts = super()._prepare(records)
        parts["axes"] = scaled(records["axes"], records["axis_scales"])
        squares = [records["sigmas"], records["rest_sigma"][..., None]]
        parts["variances"] = np.concatenate(squares, axis=-1).astype(np.float32) ** 2
        parts["lows"] = records["lows"].astype(np.float32)
        parts["highs"] = records["highs"].astype(np.float32)
        parts["rest_radii"] = records["rest_radius"].astype(np.float32)
        return parts

    def _terms(self, layer: int, q_GmD: Floats, num: int) -> Floats:
        """The spread adds half the logits' variance to the mean's term."""
        terms = super()._terms(layer, q_GmD, num)
        square = (q_GmD[:, None] @ self._of("axes", layer, num)) ** 2
        left = np.maximum(norms(q_GmD)[:, :, None] ** 2 - square.sum(axis=1), 0)
        variances = self._of("variances", layer, num)[:, :, None]
        spread = (square * variances[:, :2]).sum(axis=1) + left * variances[:, 2]
        terms[:, 0] += np.minimum(spread / 2, MAX_SPREAD)
        return terms

    def bounds(self, layer: int, q_GmD: Floats, num: int) -> Bounds:
        """See `Columns.bounds`: of the first cluster the ball's or the box's along the axes."""
        logits = self._logits(layer, q_GmD, num)
        size = sizes(q_GmD)[:, :, None]
        reach = size[:, None] * self._of("radii", layer, num)[:, :, None]
        lower, upper = logits - reach, logits + reach
        along = q_GmD[:, None] @ self._of("axes", layer, num)
        ends = [along * self._of(name, layer, num)[:, :, None] for name in ("lows", "highs")]
        rest = size * self._of("rest_radii", layer, num)[:, None]
        box_low = logits[:, 0] + np.minimum(*ends).sum(axis=1) - rest
        box_high = logits[:, 0] + np.maximum(*ends).sum(axis=1) + rest
        lower[:, 0] = np.maximum(lower[:, 0], box_low)
        upper[:, 0] = np.minimum(upper[:, 0], box_high)
        return lower.min(axis=1), upper.max(axis=1)


class BoxColumns(Columns):
    """A centre and an extent a channel; the score is the largest logit inside the box."""

    def _prepare(self, records: Records) -> dict[str, Floats]:
        centre = scaled(records["centre"], records["scale"])
        half = scaled(records["half"], records["half_scale"])
        return {
            "boxes": np.concatenate([centre, half], axis=-1),
            "radius": records["radius"].astype(np.float32),
        }

    def log_mass(self, layer: int, q_GmD: Floats, num: int) -> Floats:
        """See `Columns.log_mass`; as if all keys were at the corner that q likes best."""
        both = np.concatenate([q_GmD, np.abs(q_GmD)], axis=-1)
        found: Floats = both @ self._of("boxes", layer, num)
        return found

    def bounds(self, layer: int, q_GmD: Floats, num: int) -> Bounds:
        """See `Columns.bounds`: of the ball around the centre, for a box also of the box."""
        boxes = self._of("boxes", layer, num)
        dim = q_GmD.shape[-1]
        middle = q_GmD @ boxes[:, :dim]
        reach = sizes(q_GmD)[:, :, None] * self._of("radius", layer, num)[:, None]
        if self._kind is SummaryKind.BOX:
            reach = np.minimum(reach, np.abs(q_GmD) @ boxes[:, dim:])
        return middle - reach, middle + reach


class TokenColumns(Columns):
    """Something of every key: logits of tokens, from which those of blocks follow."""

    @abstractmethod
    def token_logits(self, layer: int, q_GmD: Floats, num: int) -> Floats:
        """[G, m, num, B] estimates."""

    def log_mass(self, layer: int, q_GmD: Floats, num: int) -> Floats:
        """See `Columns.log_mass`."""
        logits = self.token_logits(layer, q_GmD, num)
        top = logits.max(axis=-1)
        mass: Floats = np.log(np.exp(logits - top[..., None]).sum(axis=-1)) + top
        return mass

    def token_errors(self, layer: int, num: int) -> Floats:
        """[G, num, B]: |q| times it bounds the error of a token's logit."""
        return self._of("errors", layer, num)

    def bounds(self, layer: int, q_GmD: Floats, num: int) -> Bounds:
        """See `Columns.bounds`."""
        logits = self.token_logits(layer, q_GmD, num)
        reach = sizes(q_GmD)[:, :, None, None] * self.token_errors(layer, num)[:, None]
        return (logits - reach).min(axis=-1), (logits + reach).max(axis=-1)


class ShadowColumns(TokenColumns):
    """Dequantised keys."""

    def _prepare(self, records: Records) -> dict[str, Floats]:
        keys = unpack_codes(records["codes"], SHADOW_BITS[self._kind]).astype(np.float32)
        keys *= records["scales"].astype(np.float32)[..., None, :]
        keys += records["zeros"].astype(np.float32)[..., None, :]
        return {"keys": keys.swapaxes(-1, -2), "errors": records["errors"].astype(np.float32)}

    def token_logits(self, layer: int, q_GmD: Floats, num: int) -> Floats:
        """See `TokenColumns.token_logits`."""
        keys = self._of("keys", layer, num)
        heads, dim, _, tokens = keys.shape
        return (q_GmD @ keys.reshape(heads, dim, -1)).reshape(heads, -1, num, tokens)


class HashColumns(TokenColumns):
    """Signs of random projections of the keys, as +-1, and their norms."""

    def _prepare(self, records: Records) -> dict[str, Floats]:
        signs = np.unpackbits(records["bits"], axis=-1, bitorder="little").swapaxes(-1, -2)
        return {
            "signs": signs.astype(np.float32) * 2 - 1,
            "errors": records["norms"].astype(np.float32),
        }

    def token_logits(self, layer: int, q_GmD: Floats, num: int) -> Floats:
        """See `TokenColumns.token_logits`: |q| |k| cos(pi / 128 * differing signs)."""
        signs = self._of("signs", layer, num)
        heads, bits, _, tokens = signs.shape
        of_query = np.where(q_GmD @ hash_directions(q_GmD.shape[-1]) >= 0, 1, -1)
        agree = of_query.astype(np.float32) @ signs.reshape(heads, bits, -1)
        cosine = np.sin(agree * np.float32(np.pi / 2 / bits)).reshape(heads, -1, num, tokens)
        size = sizes(q_GmD)[:, :, None, None] * self.token_errors(layer, num)[:, None]
        logits: Floats = cosine * size
        return logits

    def bounds(self, layer: int, q_GmD: Floats, num: int) -> Bounds:
        """See `Columns.bounds`: signs bound nothing, norms do."""
        reach = sizes(q_GmD)[:, :, None] * self.token_errors(layer, num).max(axis=-1)[:, None]
        return -reach, reach
