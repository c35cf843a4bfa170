"""Property: a certificate's bound is never below the true error, whatever keys and values are.

The truth is computed in extended precision from the same stored arrays. The blocks are built to
be nasty: keys of huge norm, one giant among small ones, duplicates, near ties, constant values,
values that differ in one token only; each seen through a quantised shadow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ucm.errors import InvalidArgumentError
from ucm.sparse.certificates import CertifiedOptions, CertifiedResult, WindowKv, certify
from ucm.sparse.tail_bounds import BlockBeliefs

KEY_KINDS = ("normal", "giant", "duplicates", "near_ties", "zero", "one_giant", "opposed")
VALUE_KINDS = ("normal", "constant", "zero", "one_differs", "huge", "tiny")


@dataclass
class Case:
    """One layer's queries, keys and values, and the shadow through which they are seen."""

    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]
    bits: int
    per_token: bool

    def beliefs(self) -> BlockBeliefs:
        """Quantise per channel and measure each key's error, as a shadow does."""
        q64, k64 = self.q.astype(np.float64), self.k.astype(np.float64)
        low, high = k64.min(2, keepdims=True), k64.max(2, keepdims=True)
        step = np.maximum((high - low) / (2**self.bits - 1), 1e-30)
        shadow = np.rint((k64 - low) / step) * step + low
        errors = np.linalg.norm(k64 - shadow, axis=-1) * (1 + 1e-12)
        heads, dim = self.q.shape[1:]
        group = np.arange(heads) // (heads // self.k.shape[1])
        logits = np.einsum("qhd,nhbd->qhnb", q64, shadow[:, group]) / np.sqrt(dim)
        norms = np.linalg.norm(q64, axis=-1)[:, :, None, None] / np.sqrt(dim)
        by_head = np.moveaxis(errors[:, group], 0, 1)
        reach = np.moveaxis(np.linalg.norm(shadow, axis=-1)[:, group], 0, 1)
        slack = norms * (by_head + 1e-13 * reach)
        v64 = self.v.astype(np.float64)
        means = v64.mean(2).astype(np.float32)
        radii = np.linalg.norm(v64 - means[:, :, None], axis=-1) * (1 + 1e-12)
        return BlockBeliefs(
            logits=logits,
            slack=slack * (1 + 1e-12),
            mean_values=means,
            value_radii=radii if self.per_token else radii.max(-1),
        )

    def truth(self) -> NDArray[np.longdouble]:
        """Dense attention, [Q, H, D]."""
        group = np.arange(self.q.shape[1]) // (self.q.shape[1] // self.k.shape[1])
        q = self.q.astype(np.longdouble)
        k, v = (x.astype(np.longdouble)[:, group] for x in (self.k, self.v))
        logits = np.einsum("qhd,nhbd->qhnb", q, k) / np.sqrt(np.longdouble(q.shape[-1]))
        weights = np.exp(logits - logits.max((2, 3), keepdims=True))
        out = np.einsum("qhnb,nhbd->qhd", weights, v)
        return np.asarray(out / weights.sum((2, 3))[..., None])

    def certify(self, options: CertifiedOptions, window: int = 0) -> CertifiedResult:
        """Certify with the last `window` blocks read in any case."""
        num = len(self.k) - window
        b = self.beliefs()
        dim, groups = self.q.shape[-1], self.k.shape[1]
        keys, values = (
            np.moveaxis(x[num:], 1, 0).reshape(groups, -1, dim) for x in (self.k, self.v)
        )
        return certify(
            self.q,
            BlockBeliefs(
                logits=b.logits[:, :, :num],
                slack=b.slack[:, :, :num],
                mean_values=b.mean_values[:num],
                value_radii=b.value_radii[:num],
            ),
            lambda blocks: (self.k[blocks], self.v[blocks]),
            options,
            WindowKv(keys=keys, values=values) if window else None,
        )


def make_keys(
    kind: str, scale: float, shape: tuple[int, ...], rng: np.random.Generator
) -> NDArray[np.float32]:
    keys = rng.normal(size=shape)
    if kind == "giant":
        keys *= 1000.0
    elif kind == "duplicates":
        keys[:] = keys[:1, :, :1]
    elif kind == "near_ties":
        keys = keys[:1, :, :1] + 1e-6 * keys
    elif kind == "zero":
        keys[:] = 0.0
    elif kind == "one_giant":
        keys[-1, :, 0] *= 1e4
    elif kind == "opposed":
        keys[::2] = -keys[: len(keys[::2])]
    return (keys * scale).astype(np.float32)


def make_values(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    values = rng.normal(size=shape)
    if kind == "constant":
        values[:] = values[:1, :, :1]
    elif kind == "zero":
        values[:] = 0.0
    elif kind == "one_differs":
        values[:] = 1.0
        values[0, :, 0] = -1e4
    elif kind == "huge":
        values *= 1e30
    elif kind == "tiny":
        values *= 1e-39
    return values.astype(np.float32)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups, repeat = draw(st.sampled_from([(1, 1), (2, 2), (1, 3)]))
    blocks, tokens = draw(st.sampled_from([(1, 4), (5, 8), (12, 4)]))
    dim = draw(st.sampled_from([4, 16]))
    shape = (blocks, groups, tokens, dim)
    scale = draw(st.sampled_from([1e-3, 1.0, 10.0, 1e5]))
    queries = draw(st.sampled_from([1, 2]))
    q = rng.normal(size=(queries, groups * repeat, dim)) * draw(st.sampled_from([1e-3, 1.0, 30.0]))
    return Case(
        q=q.astype(np.float32),
        k=make_keys(draw(st.sampled_from(KEY_KINDS)), scale, shape, rng),
        v=make_values(draw(st.sampled_from(VALUE_KINDS)), shape, rng),
        bits=draw(st.sampled_from([2, 4, 8])),
        per_token=draw(st.booleans()),
    )


def error_of(result: CertifiedResult, case: Case) -> NDArray[np.longdouble]:
    difference = result.out.astype(np.longdouble) - case.truth()
    return np.asarray(np.sqrt((difference**2).sum(-1)))


@pytest.mark.timeout(120)
@settings(max_examples=200, deadline=None)
@given(
    case=cases(),
    eps=st.sampled_from([0.0, 1e-9, 2.0**-8, 0.1, 1.0, 1e3]),
    window=st.sampled_from([0, 1]),
)
def test_the_bound_holds_and_the_target_is_met(case: Case, eps: float, window: int) -> None:
    window = min(window, len(case.k) - 1)
    result = case.certify(CertifiedOptions(relative_error=eps), window)
    assert (error_of(result, case) <= result.error_bound).all()
    if not result.is_complete:
        norm = np.linalg.norm(result.out.astype(np.float64), axis=-1)
        assert (result.error_bound <= eps * norm * (1 + 1e-9)).all()
    if eps == 0.0:
        assert result.is_complete


@pytest.mark.timeout(120)
@settings(max_examples=100, deadline=None)
@given(case=cases(), tail_mass=st.sampled_from([1e-6, 0.01, 0.3]))
def test_the_bound_of_the_unread_mass_holds(case: Case, tail_mass: float) -> None:
    result = case.certify(CertifiedOptions(tail_mass=tail_mass))
    group = np.arange(case.q.shape[1]) // (case.q.shape[1] // case.k.shape[1])
    q, k = case.q.astype(np.longdouble), case.k.astype(np.longdouble)[:, group]
    logits = np.einsum("qhd,nhbd->qhnb", q, k) / np.sqrt(np.longdouble(q.shape[-1]))
    weights = np.exp(logits - logits.max((2, 3), keepdims=True)).sum(-1)
    unread = np.setdiff1d(np.arange(len(case.k)), result.blocks)
    tail = weights[..., unread].sum(-1) / weights.sum(-1)
    assert (tail <= result.tail_bound).all()
    assert result.is_complete or (result.tail_bound <= tail_mass).all()
    assert (error_of(result, case) <= result.error_bound).all()


def plain_case(seed: int = 0) -> Case:
    """Peaked attention: a few blocks hold nearly all the mass."""
    rng = np.random.default_rng(seed)
    q = np.ones((1, 4, 16), np.float32)
    k = rng.normal(size=(40, 2, 8, 16)).astype(np.float32) * 0.1
    k[7] += 3.0
    k[23] += 2.5
    return Case(q, k, rng.normal(size=k.shape).astype(np.float32), 8, per_token=False)


def test_few_blocks_suffice_where_attention_is_peaked() -> None:
    result = plain_case().certify(CertifiedOptions(relative_error=0.05))
    assert not result.is_complete
    assert 7 in result.blocks
    assert len(result.blocks) <= 4


def test_a_block_is_read_at_most_once_and_all_reads_are_counted() -> None:
    case = plain_case(1)
    reads: list[int] = []

    def read(blocks: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        reads.extend(blocks.tolist())
        return case.k[blocks], case.v[blocks]

    result = certify(case.q, case.beliefs(), read, CertifiedOptions(relative_error=1e-4))
    assert sorted(reads) == result.blocks.tolist()
    assert len(set(reads)) == len(reads)


def test_what_is_not_known_is_read_first() -> None:
    case = plain_case(2)
    beliefs = case.beliefs()
    beliefs.logits[:, :, 3] = np.nan
    beliefs.slack[:, :, 5] = np.inf
    beliefs.mean_values[9] = np.inf
    reads: list[list[int]] = []

    def read(blocks: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        reads.append(blocks.tolist())
        return case.k[blocks], case.v[blocks]

    result = certify(case.q, beliefs, read, CertifiedOptions(relative_error=0.05))
    assert reads[0] == [3, 5, 9]
    assert not result.is_complete
    assert (error_of(result, case) <= result.error_bound).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["k", "v"])
def test_a_block_that_is_not_finite_ends_dense_without_a_certificate(
    bad: float, where: str
) -> None:
    case = plain_case(3)
    beliefs = case.beliefs()
    getattr(case, where)[7, 0, 2, 1] = bad
    result = certify(
        case.q,
        beliefs,
        lambda blocks: (case.k[blocks], case.v[blocks]),
        CertifiedOptions(relative_error=0.05),
    )
    assert result.is_complete
    assert np.isinf(result.error_bound).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("q", np.ones((1, 3, 16), np.float32)),
        ("q", np.ones((1, 4, 8), np.float32)),
        ("q", np.ones((4, 16), np.float32)),
        ("q", np.full((1, 4, 16), np.nan, np.float32)),
    ],
)
def test_a_query_of_the_wrong_shape_is_refused(field: str, value: NDArray[np.float32]) -> None:
    case = plain_case(4)
    beliefs = case.beliefs()
    setattr(case, field, value)
    with pytest.raises(InvalidArgumentError):
        certify(case.q, beliefs, lambda b: (case.k[b], case.v[b]), CertifiedOptions())


@pytest.mark.parametrize("limit", [-0.1, np.nan, np.inf])
@pytest.mark.parametrize("name", ["relative_error", "absolute_error", "tail_mass"])
def test_a_limit_must_be_a_limit(name: str, limit: float) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{name} is {limit}"):
        CertifiedOptions(**{name: limit})


def test_all_of_the_mass_is_no_limit() -> None:
    with pytest.raises(InvalidArgumentError, match=r"tail_mass is 1\.0"):
        CertifiedOptions(tail_mass=1.0)
    assert CertifiedOptions(tail_mass=0.0).is_dense
