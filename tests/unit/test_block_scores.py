"""Tables of summaries, shared selections, budgets."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ucm.errors import InvalidArgumentError
from ucm.kernels.block_scores import Budget, SummaryTable, choose_blocks, shared_mass
from ucm.kernels.summarize import summarize
from ucm.kernels.summary_record import WITH_VALUES, Records
from ucm.layout import KvDtype, KvLayout
from ucm.types import SummaryKind

LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=8, dtype=KvDtype.FLOAT32)
TOKEN_KINDS = (SummaryKind.SHADOW2, SummaryKind.SHADOW4, SummaryKind.HASH128)


def slabs_of(num: int, seed: int = 0) -> NDArray[np.float32]:
    """[n, L, 2, G, B, D]"""
    random = np.random.default_rng(seed)
    return random.standard_normal((num, 2, 2, 2, 8, 16)).astype(np.float32)


def records_of(kind: SummaryKind, slabs: NDArray[np.float32]) -> Records:
    return summarize(kind, slabs.reshape(-1, 2, 2, 8, 16)).reshape(len(slabs), 2, 2)


def query(num: int = 1, seed: int = 9) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((num, 4, 16)).astype(np.float32)


def filled(kind: SummaryKind, num: int = 5) -> SummaryTable:
    table = SummaryTable(kind, LAYOUT)
    table.extend(records_of(kind, slabs_of(num)))
    return table


@pytest.mark.parametrize("kind", SummaryKind)
def test_growing_one_by_one_is_growing_at_once(kind: SummaryKind) -> None:
    records = records_of(kind, slabs_of(150))
    whole, slow = SummaryTable(kind, LAYOUT), SummaryTable(kind, LAYOUT)
    whole.extend(records)
    for one in records:
        slow.extend(one)
    assert len(whole) == len(slow) == 150
    assert (whole.log_mass(1, query(2)) == slow.log_mass(1, query(2))).all()
    assert whole.num_bytes > 0
    assert slow.num_bytes < 4 * whole.num_bytes


@pytest.mark.parametrize("kind", SummaryKind)
def test_replaced_and_truncated_tables_are_as_if_never_otherwise(kind: SummaryKind) -> None:
    table, expected = filled(kind), SummaryTable(kind, LAYOUT)
    spoiled = slabs_of(2, seed=1)
    spoiled[0, :, 0, 0, 0, 0] = np.nan
    other = records_of(kind, spoiled)
    table.replace(4, other)
    assert len(table) == 6
    table.truncate(5)
    expected.extend(records_of(kind, slabs_of(5))[:4])
    expected.extend(other[:1])
    assert len(table) == len(expected) == 5
    assert (table.must(0) == [False] * 4 + [True]).all()
    assert (table.log_mass(0, query()) == expected.log_mass(0, query())).all()
    table.truncate(9)
    assert len(table) == 5
    table.truncate(0)
    assert table.must(1).shape == (0,)


@pytest.mark.parametrize("kind", SummaryKind)
def test_an_empty_table_scores_nothing(kind: SummaryKind) -> None:
    table = SummaryTable(kind, LAYOUT)
    assert table.log_mass(0, query(3)).shape == (3, 4, 0)
    assert [each.shape for each in table.bounds(0, query(3))] == [(3, 4, 0)] * 2
    table.extend(records_of(kind, slabs_of(1))[:0])
    assert len(table) == 0
    assert len(shared_mass(table.log_mass(0, query()))) == 0


def test_heads_and_queries_stay_apart() -> None:
    """Each head's row is what that head alone would get, with the KV head it belongs to."""
    slabs, q = slabs_of(5), query(3)
    table = filled(SummaryKind.SHADOW4)
    mass = table.log_mass(1, q)
    for head in range(4):
        keys = slabs[:, 1, 0, head // 2]
        logits = np.einsum("qd,nbd->qnb", q[:, head], keys) / 4
        assert np.abs(np.log(np.exp(logits).sum(axis=-1)) - mass[:, head]).max() < 0.2


@pytest.mark.parametrize("kind", TOKEN_KINDS)
def test_logits_of_keys_make_up_the_mass(kind: SummaryKind) -> None:
    table, q = filled(kind), query(2)
    logits, errors = table.token_logits(0, q)
    assert logits.shape == errors.shape == (2, 4, 5, 8)
    mass = np.log(np.exp(logits).sum(axis=-1))
    assert np.allclose(mass, table.log_mass(0, q), atol=1e-5)
    empty = SummaryTable(kind, LAYOUT)
    assert empty.token_logits(0, q)[0].shape == (2, 4, 0, 8)


@pytest.mark.parametrize("kind", SummaryKind)
def test_shares_are_those_of_the_estimated_masses(kind: SummaryKind) -> None:
    table, spoiled = filled(kind), slabs_of(2, seed=1)
    for queries in (query(), query(3)):
        expected = shared_mass(table.log_mass(1, queries))
        np.testing.assert_allclose(table.shares(1, queries), expected, rtol=1e-5, atol=1e-7)
    spoiled[0, :, 0, 0, 0, 0] = np.nan
    table.extend(records_of(kind, spoiled))
    found, expected = table.shares(0, query()), shared_mass(table.log_mass(0, query()))
    assert found[5] == 0
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    expected = shared_mass(table.log_mass(0, query())[:, :, :4])
    np.testing.assert_allclose(table.shares(0, query(), 4), expected, rtol=1e-5, atol=1e-7)
    table.replace(0, records_of(kind, np.full_like(slabs_of(7), np.nan)))
    assert (table.shares(0, query()) == 0).all()
    assert SummaryTable(kind, LAYOUT).shares(0, query()).shape == (0,)


def test_what_a_kind_does_not_keep_is_refused() -> None:
    for kind in SummaryKind:
        if kind not in TOKEN_KINDS:
            with pytest.raises(InvalidArgumentError, match="single keys"):
                filled(kind).token_logits(0, query())
        if kind not in WITH_VALUES:
            with pytest.raises(InvalidArgumentError, match="no values"):
                filled(kind).values(0)


@pytest.mark.parametrize("kind", sorted(WITH_VALUES))
def test_mean_values(kind: SummaryKind) -> None:
    mean, radius = filled(kind).values(1)
    assert np.abs(mean - slabs_of(5)[:, 1, 1].mean(axis=2)).max() < 0.01
    assert radius.shape == (5, 2)
    assert [each.shape[0] for each in SummaryTable(kind, LAYOUT).values(0)] == [0, 0]


@pytest.mark.parametrize("shape", [(4, 16), (1, 3, 16), (1, 4, 8), (1, 0, 16), (1, 4, 16, 1)])
def test_queries_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgumentError, match="a query is"):
        filled(SummaryKind.MEAN).log_mass(0, np.zeros(shape, np.float32))


@pytest.mark.parametrize("size", [1e8, 1e12, 1e30, 3e38, np.inf, np.nan])
@pytest.mark.parametrize("kind", SummaryKind)
def test_bounds_hold_for_queries_that_no_product_can_hold(kind: SummaryKind, size: float) -> None:
    slabs = slabs_of(6, seed=3) * 10
    table = SummaryTable(kind, LAYOUT)
    table.extend(records_of(kind, slabs))
    q = query(2) / np.abs(query(2)).max() * np.float32(size)
    q[1] = query()[0]
    lower, upper = table.bounds(0, q)
    by_head = np.repeat(slabs[:, 0, 0], 2, axis=1).astype(np.float64)
    if np.isfinite(size):
        logits = np.einsum("qhd,nhbd->qhnb", q.astype(np.float64), by_head) / 4
        assert (logits >= lower[..., None]).all()
        assert (logits <= upper[..., None]).all()
    assert np.isfinite(lower[1]).all()
    assert (np.isfinite(upper[0]) == (size < 1e9)).all()
    assert np.isfinite(table.log_mass(0, q)).all()
    assert np.isfinite(shared_mass(table.log_mass(0, q))).all()
    if kind in TOKEN_KINDS:
        assert np.isfinite(table.token_logits(0, q)[0]).all()
        assert (np.isinf(table.token_logits(0, q)[1][0]) == (not size < 1e9)).all()


def test_layers_and_records_out_of_place_are_refused() -> None:
    table = filled(SummaryKind.MEAN)
    for layer in (-1, 2):
        with pytest.raises(InvalidArgumentError, match="layer"):
            table.bounds(layer, query())
    with pytest.raises(InvalidArgumentError, match="does not follow"):
        table.replace(7, records_of(SummaryKind.MEAN, slabs_of(1)))
    with pytest.raises(InvalidArgumentError, match="no mean"):
        table.extend(records_of(SummaryKind.BOX, slabs_of(1)))
    with pytest.raises(InvalidArgumentError, match="no mean"):
        table.extend(records_of(SummaryKind.MEAN, slabs_of(1))[:, :1])


def test_shared_mass_is_the_mean_of_each_heads_share() -> None:
    log_mass = np.log(np.array([[[1, 3], [1, 1]]], np.float32))
    assert np.allclose(shared_mass(log_mass), [0.375, 0.625])
    assert np.allclose(shared_mass(log_mass + 1000), [0.375, 0.625])
    nothing = np.full((2, 1, 3), -np.inf, np.float32)
    assert (shared_mass(nothing) == 0).all()
    nothing[0, 0, 1] = 5
    assert np.allclose(shared_mass(nothing), [0, 0.5, 0])


P = np.array([0.05, 0.4, 0.05, 0.3, 0.1, 0.1], np.float32)
NONE = np.zeros(6, np.bool_)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget(ratio=0.3), [1, 3]),
        (Budget(ratio=1), [0, 1, 2, 3, 4, 5]),
        (Budget(tokens=16), [1, 3]),
        (Budget(tokens=1), [1]),
        (Budget(tokens=1000), [0, 1, 2, 3, 4, 5]),
        (Budget(eps=0.3), [1, 3]),
        (Budget(eps=0.29), [1, 3, 4]),
        (Budget(eps=0.01), [1, 3, 4]),
        (Budget(eps=0.01, max_ratio=1), [0, 1, 2, 3, 4, 5]),
        (Budget(eps=0.9, min_ratio=0.5), [1, 3, 4]),
        (Budget(eps=0), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_budgets(budget: Budget, expected: list[int]) -> None:
    choice = choose_blocks(P, budget, NONE, 8)
    assert list(choice.blocks) == expected
    assert choice.blocks.dtype == np.int64
    assert choice.mass == pytest.approx(float(P[expected].sum()))


def test_what_must_be_read_comes_first_and_counts() -> None:
    must = NONE.copy()
    must[[0, 5]] = True
    assert list(choose_blocks(P, Budget(tokens=24), must, 8).blocks) == [0, 1, 5]
    assert list(choose_blocks(P, Budget(tokens=8), must, 8).blocks) == [0, 5]
    assert list(choose_blocks(P, Budget(eps=0.45), must, 8).blocks) == [0, 1, 5]


def test_nothing_to_choose_from() -> None:
    choice = choose_blocks(P[:0], Budget(ratio=0.5), NONE[:0], 8)
    assert len(choice.blocks) == 0
    assert choice.mass == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"ratio": 0.5, "tokens": 3},
        {"ratio": 0.0},
        {"ratio": 1.5},
        {"tokens": 0},
        {"eps": 1.0},
        {"eps": -0.1},
        {"eps": float("nan")},
        {"ratio": float("nan")},
        {"eps": 0.1, "min_ratio": 0.6},
        {"eps": 0.1, "max_ratio": 2.0},
    ],
)
def test_budgets_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidArgumentError, match="budget"):
        Budget(**wrong)  # type: ignore[arg-type]
