"""Bounds of every kind of summary hold for any block there can be; damage is never trusted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ucm.kernels.block_scores import SummaryTable
from ucm.kernels.summarize import summarize
from ucm.kernels.summary_record import (
    WITH_VALUES,
    decode_summary,
    encode_summary,
    summary_bytes,
)
from ucm.layout import KvDtype, KvLayout
from ucm.types import SummaryKind

Maker = Callable[[np.random.Generator], NDArray[np.float32]]

KINDS = list(SummaryKind)
SHADOWS = (SummaryKind.SHADOW2, SummaryKind.SHADOW4)
LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=8, dtype=KvDtype.FLOAT32)
SHAPE = (3, 2, 2, 2, 8, 16)  # [n, L, 2, G, B, D]


def noise(random: np.random.Generator) -> NDArray[np.float32]:
    return random.standard_normal(SHAPE).astype(np.float32)


def heavy_tails(random: np.random.Generator) -> NDArray[np.float32]:
    return (noise(random) / np.abs(noise(random))).astype(np.float32)


def far_from_zero(random: np.random.Generator) -> NDArray[np.float32]:
    """All keys nearly alike and large: where centring loses digits."""
    away = 1000 * random.standard_normal((3, 2, 2, 2, 1, 16))
    return (away + noise(random)).astype(np.float32)


def duplicates(random: np.random.Generator) -> NDArray[np.float32]:
    block = noise(random)
    block[..., 2:, :] = block[..., :1, :]
    return block


def constant(random: np.random.Generator) -> NDArray[np.float32]:
    return np.full(SHAPE, random.standard_normal() * 10, np.float32)


def zeros(_: np.random.Generator) -> NDArray[np.float32]:
    return np.zeros(SHAPE, np.float32)


def denormals(random: np.random.Generator) -> NDArray[np.float32]:
    return noise(random) * np.float32(1e-41)


def half_denormals(random: np.random.Generator) -> NDArray[np.float32]:
    """Scales and radii fall below the smallest half."""
    return noise(random) * np.float32(1e-7)


def one_giant(random: np.random.Generator) -> NDArray[np.float32]:
    block = noise(random)
    block[..., 3, 5] = 50_000
    return block


def beyond_half(random: np.random.Generator) -> NDArray[np.float32]:
    """Some heads overflow half precision, some float32's squares."""
    return noise(random) * np.float32(10.0 ** random.integers(4, 38))


def not_finite(random: np.random.Generator) -> NDArray[np.float32]:
    block = noise(random)
    spoil = random.random(SHAPE) < 0.01
    block[spoil] = random.choice([np.nan, np.inf, -np.inf], spoil.sum())
    return block


BLOCKS = [
    noise,
    heavy_tails,
    far_from_zero,
    duplicates,
    constant,
    zeros,
    denormals,
    half_denormals,
    one_giant,
    beyond_half,
    not_finite,
]
MAKERS = st.sampled_from(BLOCKS)
SEEDS = st.integers(0, 2**32 - 1)


def table_of(kind: SummaryKind, slabs: NDArray[np.float32]) -> SummaryTable:
    records = summarize(kind, slabs.reshape(-1, *SHAPE[2:])).reshape(3, 2, 2)
    table = SummaryTable(kind, LAYOUT)
    table.extend(records)
    return table


def true_logits(
    slabs: NDArray[np.float32], layer: int, q: NDArray[np.float32]
) -> NDArray[np.float64]:
    """[nq, H, n, B] in double precision."""
    keys = slabs[:, layer, 0].astype(np.float64).repeat(q.shape[1] // 2, axis=1)
    logits: NDArray[np.float64] = np.einsum("qhd,nhbd->qhnb", q.astype(np.float64), keys) / 4
    return logits


@pytest.mark.parametrize("kind", KINDS)
@given(make=MAKERS, seed=SEEDS, scale=st.sampled_from([0.0, 1e-30, 1.0, 300.0]))
def test_bounds_hold_for_the_stored_keys(
    kind: SummaryKind, make: Maker, seed: int, scale: float
) -> None:
    random = np.random.default_rng(seed)
    slabs = make(random)
    table = table_of(kind, slabs)
    q = (random.standard_normal((2, 4, 16)) * scale).astype(np.float32)
    for layer in range(2):
        lower, upper = table.bounds(layer, q)
        must = table.must(layer)
        finite = np.isfinite(slabs[:, layer, 0]).all(axis=(1, 2, 3))
        assert (finite | must).all()
        with np.errstate(invalid="ignore"):
            truth = true_logits(slabs, layer, q)[:, :, ~must]
        assert (lower[:, :, ~must, None] <= truth).all()
        assert (truth <= upper[:, :, ~must, None]).all()
        assert np.isneginf(lower[:, :, must]).all()
        assert np.isposinf(upper[:, :, must]).all()
        estimate = table.log_mass(layer, q)
        assert not np.isnan(estimate).any()
        assert np.isneginf(estimate[:, :, must]).all()


@pytest.mark.parametrize("kind", SHADOWS)
@given(make=MAKERS, seed=SEEDS)
def test_errors_of_shadow_keys_hold(kind: SummaryKind, make: Maker, seed: int) -> None:
    random = np.random.default_rng(seed)
    slabs = make(random)
    table = table_of(kind, slabs)
    q = random.standard_normal((1, 4, 16)).astype(np.float32)
    logits, errors = table.token_logits(1, q)
    good = ~table.must(1)
    with np.errstate(invalid="ignore", over="ignore"):
        truth = true_logits(slabs, 1, q)[:, :, good]
    assert (np.abs(truth - logits[:, :, good].astype(np.float64)) <= errors[:, :, good]).all()
    assert np.isposinf(errors[:, :, ~good]).all()


@pytest.mark.parametrize("kind", sorted(WITH_VALUES))
@given(make=MAKERS, seed=SEEDS)
def test_every_value_is_within_the_radius(kind: SummaryKind, make: Maker, seed: int) -> None:
    slabs = make(np.random.default_rng(seed))
    table = table_of(kind, slabs)
    for layer in range(2):
        mean, radius = table.values(layer)
        good = ~table.must(layer)
        values = slabs[good, layer, 1].astype(np.float64)
        distance = np.linalg.norm(values - mean[good][:, :, None].astype(np.float64), axis=-1)
        assert (distance <= radius[good][:, :, None]).all()
        assert np.isposinf(radius[~good]).all()


@given(
    kind=st.sampled_from(KINDS),
    position=st.integers(0, 10_000),
    bit=st.integers(0, 7),
    seed=SEEDS,
)
def test_no_flipped_bit_is_trusted(kind: SummaryKind, position: int, bit: int, seed: int) -> None:
    slabs = noise(np.random.default_rng(seed))[0]
    encoded = bytearray(encode_summary(LAYOUT, kind, summarize(kind, slabs), [seed, 7]))
    assert decode_summary(LAYOUT, bytes(encoded), [seed, 7]) is not None
    encoded[position % len(encoded)] ^= 1 << bit
    assert decode_summary(LAYOUT, bytes(encoded), [seed, 7]) is None


@given(data=st.binary(max_size=400))
def test_noise_is_no_summary(data: bytes) -> None:
    assert decode_summary(LAYOUT, data, [1, 2]) is None


@given(kind=st.sampled_from(KINDS), make=MAKERS, seed=SEEDS)
def test_what_is_encoded_is_decoded(kind: SummaryKind, make: Maker, seed: int) -> None:
    slabs = make(np.random.default_rng(seed))[0]
    records = summarize(kind, slabs)
    encoded = encode_summary(LAYOUT, kind, records, [1, 2])
    assert len(encoded) == summary_bytes(LAYOUT, kind)
    found = decode_summary(LAYOUT, memoryview(encoded + bytes(100)), [1, 2])
    assert found is not None
    assert found.kind is kind
    assert (found.records == records).all()
