"""Geometric summaries: what a block's keys look like, in a few percent of their bytes.

    kind      what is kept of the keys of one (slab, KV head)              source
    gsa-k4    4 cluster centroids, seeded by the key farthest from the     UCM's "max-norm + SVD",
              mean and those farthest from it; counts, radii               on centred keys
    gsa-2     mean, 2 outliers, 2 directions of spread                     the same
    shadowN   every key in N bits a channel, and each key's error          KIVI, arXiv 2402.02750
    mean      their mean                                                   UCM as released
    box       each channel's extent                                        Quest, arXiv 2406.10774
    cuboid    centre of the box, mean distance from it                     ArkVale, NeurIPS 2024
    hash128   128 signs a key, and its norm                                HATA, ACL 2025; SimHash
    maxnorm   the 2 keys of largest norm: UCM's articles read literally    a negative control

Invariants: what is stored is quantised first; radii, errors and extents are measured against the
*dequantised* summary, enlarged by what float32 arithmetic can lose, and rounded outward to half
precision. So bounds from a record hold for the stored keys. Keys that are not finite, or that half
precision cannot speak of, give a record with the `must` flag and nothing else.

Envelope: one SmolLM2 block is 90 (slab, head)s of 32 x 64: 0.7 MB as float32, 60 us a pass; its
prefill takes about 80 ms on two cores, so there is time for some 60 passes.

Shapes: N (slab, head)s, S slabs, G KV heads, B tokens of a block, D head size, C centroids.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ucm.checksum import check_block_length
from ucm.errors import InvalidArgumentError
from ucm.layout import KvDtype, KvLayout
from ucm.types import SummaryKind

from .key_clusters import clusters, farthest, gram_of, principal_axes
from .summary_record import (
    HASH_BYTES,
    MUST,
    NUM_CENTROIDS,
    SHADOW_BITS,
    WITH_VALUES,
    Records,
    record_dtype,
)

Floats: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int64]

HALF_MAX = float(np.finfo(np.float16).max)
"""Largest finite half: no scale, radius or norm of a record is above."""
LLOYD_ITERATIONS = 2
"""With seeds this far apart, more changed neither recall nor output error on SmolLM2."""
HASH_SEED = 128
UNDERFLOW = np.float32(1e-18)
"""More than the norm of a vector whose squares vanish in float32."""
SLABS_AT_ONCE = 32
"""Their keys, as float32, stay in a core's second-level cache with their work space."""


def as_float32(slabs: NDArray[np.generic], dtype: KvDtype | None = None) -> Floats:
    """Stored elements as float32, exactly.

    Args:
        slabs: any shape, float32 or float16, or uint16 that is bfloat16's bits.
        dtype: must be BFLOAT16 for uint16; otherwise found from `slabs`.

    Raises:
        InvalidArgumentError: elements of another type.
    """
    if slabs.dtype == np.uint16 and dtype is KvDtype.BFLOAT16:
        return (slabs.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if slabs.dtype in (np.float32, np.float16) and dtype in (None, KvDtype(slabs.dtype.name)):
        return slabs.astype(np.float32, copy=False)
    raise InvalidArgumentError(f"cannot summarise {slabs.dtype} as {dtype}")


def summarize(
    kind: SummaryKind, slabs: NDArray[np.generic], dtype: KvDtype | None = None
) -> Records:
    """Summarise the keys (and values) of full blocks.

    Args:
        kind: what to keep.
        slabs: [S, 2, G, B, D], any strides: S slabs of any number of blocks and layers, keys
            after RoPE; float32, float16, or uint16 that is bfloat16's bits (then give `dtype`).
        dtype: of the elements.

    Returns:
        [S, G] records of `record_dtype(kind, D, B)`.

    Raises:
        InvalidArgumentError: another shape or element type.
        LayoutMismatchError: this kind cannot describe such a block.
    """
    if slabs.ndim != 5 or slabs.shape[1] != 2:
        raise InvalidArgumentError(f"slabs are [S, 2, G, B, D], not {list(slabs.shape)}")
    num, _, heads, tokens, dim = slabs.shape
    records = np.zeros((num, heads), record_dtype(kind, dim, tokens))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        for first in range(0, num, SLABS_AT_ONCE):
            part = slabs[first : first + SLABS_AT_ONCE]
            flat = records[first : first + SLABS_AT_ONCE].reshape(-1)
            _fill(kind, as_float32(part[:, 0], dtype), flat)
            if kind in WITH_VALUES:
                _fill_values(as_float32(part[:, 1], dtype), flat)
            _mark_must(flat)
    return records


def block_slabs(layout: KvLayout, data: memoryview | bytes) -> NDArray[np.generic]:
    """The slabs of one block where they lie: [num_layers, 2, G, B, D], as `summarize` takes them.

    Raises:
        LayoutMismatchError: `data` is not `layout.block_bytes` long.
    """
    view = memoryview(data).cast("B")
    check_block_length(layout, view)
    kind = np.uint16 if layout.dtype is KvDtype.BFLOAT16 else np.dtype(layout.dtype.value)
    rows = np.frombuffer(view, np.uint8).reshape(layout.num_layers, layout.slab_stride_bytes)
    slabs = rows[:, : layout.slab_bytes].view(kind)
    return slabs.reshape(layout.num_layers, *layout.slab_shape)


def summarize_blocks(
    layout: KvLayout, kind: SummaryKind, blocks: Sequence[memoryview | bytes]
) -> Records:
    """Summarise blocks from their bytes, one call for all.

    Args:
        layout: their shape.
        kind: what to keep.
        blocks: the bytes of each, `layout.block_bytes` long.

    Returns:
        [len(blocks), num_layers, G] records.

    Raises:
        LayoutMismatchError: a block of another length, or a layout this kind cannot describe.
    """
    shape = (len(blocks), layout.num_layers, layout.num_kv_heads)
    records = np.zeros(shape, record_dtype(kind, layout.head_dim, layout.block_tokens))
    for row, data in zip(records, blocks, strict=True):
        row[...] = summarize(kind, block_slabs(layout, data), layout.dtype)
    return records


def _fill(kind: SummaryKind, keys_SGBD: Floats, records: Records) -> None:
    """Summarise keys into [S * G] zeroed records."""
    keys = keys_SGBD.reshape(-1, *keys_SGBD.shape[2:])
    if kind in NUM_CENTROIDS:
        _fill_centroids(kind, keys, records)
    elif kind in SHADOW_BITS:
        _fill_shadow(SHADOW_BITS[kind], keys, records)
    elif kind is SummaryKind.HASH128:
        _fill_hash(keys, records)
    else:
        _fill_box(kind, keys, records)


def _mark_must(records: Records) -> None:
    """Flag and blank what is not finite: any such key or value has spoilt a radius or a norm."""
    good = np.ones(len(records), np.bool_)
    for name in records.dtype.names or ():
        column = records[name]
        if column.dtype.kind == "f":
            good &= np.isfinite(column.reshape(len(records), -1)).all(axis=1)
    if not good.all():
        records[~good] = np.zeros((), records.dtype)
        records["flags"][~good] = MUST


def _quantise(vectors: Floats, scales: NDArray[np.float16], codes: NDArray[np.int8]) -> Floats:
    """Write `vectors` [..., D] as int8 codes with one half scale each; return what they mean."""
    scale = half_up(np.abs(vectors).max(axis=-1) / 127)
    scales[...] = scale
    step = scale.astype(np.float32)[..., None]
    codes[...] = np.clip(np.rint(vectors / np.where(step > 0, step, 1)), -127, 127)
    held: Floats = codes.astype(np.float32) * step
    return held


def half_up(values: Floats) -> NDArray[np.float16]:
    """The smallest halves that are not below `values`; infinity above their range."""
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
        up: NDArray[np.float16] = np.nextafter(halves, np.float16(np.inf))
    return np.where(halves < values, up, halves)


def _slack(dim: int) -> float:
    """Relative error of a float32 dot product of `dim` terms, twice over: ours and the caller's."""
    return 4.0 * (dim + 8) * 2.0**-24


def _radius(distance: Floats, reach: Floats, dim: int) -> NDArray[np.float16]:
    """A measured distance, enlarged so that |q| * radius covers rounding too; outward half.

    Args:
        distance: measured in float32.
        reach: norms of what enters the dot products.
        dim: their length.
    """
    slack = _slack(dim)
    outward = distance * np.float32(1 + slack) + reach * np.float32(slack)
    return half_up(outward + UNDERFLOW)


def _fill_values(values_SGBD: Floats, records: Records) -> None:
    values = values_SGBD.reshape(-1, *values_SGBD.shape[2:])
    held = _quantise(_mean(values)[:, 0], records["value_scale"], records["value_mean"])
    far = _norms(values - held[:, None]).max(axis=1)
    records["value_radius"] = _radius(far, _norms(held), values.shape[2])


def _fill_centroids(kind: SummaryKind, keys: Floats, records: Records) -> None:
    member = _members(kind, keys)
    counts = member.sum(axis=2)
    records["counts"] = counts
    means = member @ keys / np.maximum(counts, 1)[:, :, None]
    held = _quantise(means, records["scales"], records["centroids"])
    rest = keys - member.transpose(0, 2, 1) @ held
    distance = _norms(rest)
    reach = _norms(held)
    records["radii"] = _radius((distance[:, None] * member).max(axis=2), reach, keys.shape[2])
    if kind is SummaryKind.GSA_2:
        _fill_axes(rest * member[:, 0, :, None], counts[:, 0], reach[:, 0], records)
    elif kind is SummaryKind.MAXNORM:
        left = (_norms(keys) * (1 - member.sum(axis=1))).max(axis=1)
        records["rest_radius"] = _radius(left, left, keys.shape[2])


def _members(kind: SummaryKind, keys: Floats) -> Floats:
    """[N, C, B] one-hot: which centroid speaks for which key."""
    num = NUM_CENTROIDS[kind]
    if kind is SummaryKind.MEAN:
        return np.ones((len(keys), 1, keys.shape[1]), np.float32)
    if kind is SummaryKind.MAXNORM:
        return farthest(_norms(keys), num)
    centred = keys - _mean(keys)
    if kind is SummaryKind.GSA_K4:
        return clusters(gram_of(centred), num, LLOYD_ITERATIONS)
    outliers = farthest(_norms(centred), num - 1)
    return np.concatenate([1 - outliers.sum(axis=1, keepdims=True), outliers], axis=1)


def _fill_axes(rest: Floats, count: Floats, reach: Floats, records: Records) -> None:
    """The spread of gsa-2's first cluster: two directions, the extents along them, what remains.

    Args:
        rest: [N, B, D] its keys less its centroid; zeros for other keys.
        count: [N] its keys.
        reach: [N] norm of its centroid.
        records: [N] to fill.
    """
    dim = rest.shape[2]
    axes = _quantise(principal_axes(rest, 2), records["axis_scales"], records["axes"])
    along = rest @ np.ascontiguousarray(axes.transpose(0, 2, 1))
    remains = _norms(rest - along @ axes)
    per_key = 1 / np.maximum(count, 1)
    records["sigmas"] = np.sqrt(np.einsum("nbr,nbr->nr", along, along) * per_key[:, None])
    spread = np.einsum("nb,nb->n", remains, remains) * per_key / max(1, dim - 2)
    records["rest_sigma"] = np.sqrt(spread)
    # Keys of other clusters are zeros here and widen the extents to include zero: harmless.
    records["highs"] = half_up(along.max(axis=1))
    records["lows"] = -half_up(-along.min(axis=1))
    records["rest_radius"] = _radius(remains.max(axis=1), reach + _norms(rest).max(axis=1), dim)


def _norms(vectors: Floats) -> Floats:
    """Euclidean norms over the last axis."""
    found: Floats = np.sqrt(np.einsum("...d,...d->...", vectors, vectors))
    return found


def _mean(keys: Floats) -> Floats:
    """[N, 1, D]; a product, since numpy's own sum over a middle axis takes five times as long."""
    row = np.full((1, keys.shape[1]), 1 / keys.shape[1], np.float32)
    return row @ keys


def _fill_box(kind: SummaryKind, keys: Floats, records: Records) -> None:
    low, high = keys.min(axis=1), keys.max(axis=1)
    centre = _quantise(low / 2 + high / 2, records["scale"], records["centre"])
    offsets = np.abs(keys - centre[:, None])
    slack = np.float32(_slack(keys.shape[-1]))
    if kind is SummaryKind.BOX:
        half = offsets.max(axis=1) * (1 + slack) + np.abs(centre) * slack
    else:
        half = offsets.mean(axis=1)
    scale = half_up(half.max(axis=1) / 255 * (1 + slack))
    step = scale.astype(np.float32)[:, None]
    codes = half / np.where(step > 0, step, 1)
    codes = np.ceil(codes) if kind is SummaryKind.BOX else np.rint(codes)
    records["half_scale"], records["half"] = scale, np.clip(codes, 0, 255)
    far = _norms(offsets).max(axis=1)
    records["radius"] = _radius(far, _norms(centre), keys.shape[2])


def _fill_shadow(bits: int, keys: Floats, records: Records) -> None:
    low, high = keys.min(axis=1), keys.max(axis=1)
    top = 2**bits - 1
    zeros = low.astype(np.float16)
    start = zeros.astype(np.float32)
    scales = half_up(np.maximum(high - start, 0) / top)
    step = scales.astype(np.float32)
    shifted = (keys - start[:, None]) / np.where(step > 0, step, 1)[:, None]
    codes = np.clip(np.rint(shifted), 0, top)
    records["scales"], records["zeros"] = scales, zeros
    records["codes"] = pack_codes(codes.astype(np.uint8), bits)
    held = codes * step[:, None] + start[:, None]
    records["errors"] = _radius(_norms(keys - held), _norms(keys), keys.shape[2])


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes of `bits` bits [..., D], 8 / bits to a byte, the first in the lowest bits."""
    each = 8 // bits
    groups = codes.reshape(*codes.shape[:-1], -1, each)
    packed = groups[..., 0].copy()
    for index in range(1, each):
        packed |= groups[..., index] << np.uint8(bits * index)
    return packed


def unpack_codes(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of `pack_codes`."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = packed[..., None] >> shifts & np.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)


@cache
def hash_directions(head_dim: int) -> Floats:
    """[D, 128] directions, orthogonal D at a time, the same for everybody.

    Drawn by `RandomState`, whose stream numpy has promised never to change.
    """
    random = np.random.RandomState(HASH_SEED)
    bits = 8 * HASH_BYTES
    parts = [
        np.linalg.qr(random.standard_normal((head_dim, head_dim)))[0]
        for _ in range(-(-bits // head_dim))
    ]
    return np.concatenate(parts, axis=1)[:, :bits].astype(np.float32)


def _fill_hash(keys: Floats, records: Records) -> None:
    signs = keys @ hash_directions(keys.shape[-1]) >= 0
    records["bits"] = np.packbits(signs, axis=-1, bitorder="little")
    reach = _norms(keys)
    records["norms"] = _radius(reach, reach, keys.shape[-1])
