"""Certificates over a paged pool: near dense within the bound, and only what was asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ucm.errors import ConfigError
from ucm.kernels.attention import PagedSequence, select_attention
from ucm.kernels.block_scores import SummaryTable
from ucm.kernels.summarize import summarize
from ucm.layout import KvDtype, KvLayout
from ucm.sparse.certificates import CertifiedOptions
from ucm.sparse.certified_attention import StepBlocks, true_log_mass
from ucm.sparse.conformal import ConformalOptions
from ucm.sparse.decoding import SparseDecoding
from ucm.sparse.mode_policy import LoadSignals, SparseMode
from ucm.sparse.options import SparseOptions
from ucm.sparse.protocols import DecodeStep
from ucm.types import SummaryKind

LAYERS, GROUPS, HEADS, TOKENS, DIM = 2, 2, 4, 8, 16
POOL_BLOCKS = 60
CERTIFIED = CertifiedOptions(relative_error=0.05)


def make_pool(seed: int = 0) -> torch.Tensor:
    """Keys of which some blocks stand out, so that there is something to leave out."""
    random = torch.Generator().manual_seed(seed)
    pool = torch.randn(LAYERS, POOL_BLOCKS, 2, GROUPS, TOKENS, DIM, generator=random)
    pool[:, ::7, 0] += 1.5
    return pool


def make_step(position: int, sequence_id: str = "s") -> DecodeStep:
    """A sequence whose blocks lie in the pool backwards."""
    ids = list(range(POOL_BLOCKS - 1, -1, -1))[: position // TOKENS + 1]
    return DecodeStep(sequence_id, position, position - 400, ids, TOKENS)


def make_decoding(options: SparseOptions) -> SparseDecoding:
    layout = KvLayout(
        num_layers=LAYERS,
        num_kv_heads=GROUPS,
        head_dim=DIM,
        block_tokens=TOKENS,
        dtype=KvDtype.FLOAT32,
    )
    decoding = SparseDecoding(options, layout, POOL_BLOCKS, lambda _block: 0)
    decoding.begin_pass(LoadSignals(400, 1, 0.1))
    return decoding


def options_of(**changes: object) -> SparseOptions:
    base = SparseOptions(kind=SummaryKind.SHADOW4, min_context_tokens=1, certificate=CERTIFIED)
    return replace(base, **changes)  # type: ignore[arg-type]


def queries(seed: int = 5) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return 1.5 + torch.randn(1, HEADS, DIM, generator=random)


def dense(step: DecodeStep, q: torch.Tensor, kv_layer: torch.Tensor) -> torch.Tensor:
    sequence = PagedSequence.build(step.position, 1, step.block_ids, kv_layer)
    return select_attention(sequence, (HEADS, DIM), kv_layer)(q, kv_layer, sequence)[0]


def test_a_certified_step_is_near_dense_and_reads_less() -> None:
    pool, q = make_pool(), queries()
    decoding, step = make_decoding(options_of()), make_step(419)
    attend = decoding.attention(step, pool)
    assert attend is not None
    assert decoding.promises is not None
    for layer in range(LAYERS):
        out, true = attend(layer, q, pool[layer]), dense(step, q, pool[layer])
        error = (out - true).norm(dim=-1)
        assert (error <= 0.05 * out.norm(dim=-1) + 1e-5).all()
    stats = decoding.promises.certified
    assert stats.layers == LAYERS
    assert stats.complete == 0
    assert 0.0 < stats.read_ratio < 0.7
    assert stats.worst_bound <= 0.05
    all_stats, slab_bytes = decoding.stats, 2 * GROUPS * TOKENS * DIM * 4
    assert (all_stats.blocks_read, all_stats.blocks_dense) == (stats.blocks_read, LAYERS * 53)
    assert all_stats.bytes_read == stats.blocks_read * slab_bytes
    assert all_stats.bytes_dense == LAYERS * 53 * slab_bytes


def test_only_what_was_asked_for_is_read() -> None:
    """NaN in the blocks that were left out does not reach the output."""
    pool, q = make_pool(), queries()
    step = make_step(419)
    options = options_of()
    attend = make_decoding(options).attention(step, pool)
    assert attend is not None
    reads: list[int] = []
    blocks = attend.attend.blocks  # type: ignore[attr-defined]
    real = StepBlocks.read

    def spy(self: StepBlocks, chosen: np.ndarray, kv_layer: torch.Tensor) -> object:
        reads.extend(chosen.tolist())
        return real(self, chosen, kv_layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepBlocks, "read", spy)
        out = attend(0, q, pool[0])
    left = sorted(set(range(step.num_blocks)) - set(reads))
    assert left
    assert len(reads) == len(set(reads))
    assert set(blocks.always.tolist()) <= set(reads)
    poisoned = pool.clone()
    poisoned[0, [step.block_ids[block] for block in left]] = float("nan")
    again = attend(0, q, poisoned[0])
    assert torch.equal(out, again)


@pytest.mark.parametrize("position", [0, 7, 30, 400, 415])
@pytest.mark.parametrize("certificate", [CertifiedOptions(relative_error=0.0), ConformalOptions()])
def test_zero_error_and_audits_are_dense_to_the_bit(
    position: int, certificate: CertifiedOptions | ConformalOptions
) -> None:
    pool, q, step = make_pool(), queries(), make_step(position)
    decoding = make_decoding(options_of(certificate=certificate))
    attend = decoding.attention(step, pool)
    assert attend is not None
    for layer in range(LAYERS):
        assert torch.equal(attend(layer, q, pool[layer]), dense(step, q, pool[layer]))


def test_keys_that_are_not_finite_are_read_and_end_dense() -> None:
    pool, q, step = make_pool(), queries(), make_step(419)
    pool[0, step.block_ids[20], 0, 0, 3, 5] = float("inf")
    pool[0, step.block_ids[21], 1, 1, 3, 5] = float("nan")
    attend = make_decoding(options_of()).attention(step, pool)
    assert attend is not None
    out, true = attend(0, q, pool[0]), dense(step, q, pool[0])
    assert torch.equal(torch.nan_to_num(out), torch.nan_to_num(true))


@pytest.mark.parametrize("certificate", [CERTIFIED, ConformalOptions(delta=0.2)])
def test_a_query_that_is_not_finite_is_attended_densely(
    certificate: CertifiedOptions | ConformalOptions,
) -> None:
    pool, q, step = make_pool(), queries(), make_step(419)
    q[0, 1, 2] = float("nan")
    attend = make_decoding(options_of(certificate=certificate)).attention(step, pool)
    assert attend is not None
    out, true = attend(0, q, pool[0]), dense(step, q, pool[0])
    assert torch.equal(torch.nan_to_num(out), torch.nan_to_num(true))


def test_conformal_steps_learn_and_then_leave_blocks_out() -> None:
    pool = make_pool()
    certificate = ConformalOptions(delta=0.1, tail_mass=0.2, audit_stride=16)
    decoding = make_decoding(options_of(kind=SummaryKind.GSA_K4, certificate=certificate))
    assert decoding.promises is not None
    calibrators = decoding.promises.calibrators
    assert calibrators is not None
    for position in range(401, 460):
        attend = decoding.attention(make_step(position), pool)
        assert attend is not None
        for layer in range(LAYERS):
            attend(layer, queries(position), pool[layer])
    assert calibrators.of(0, HEADS).is_ready
    assert calibrators.stats.audits == LAYERS * len([p for p in range(410, 460) if p % 16 == 0])
    assert decoding.stats.blocks_read < decoding.stats.blocks_dense


def test_a_sequence_that_is_new_opens_with_audits() -> None:
    pool = make_pool()
    certificate = ConformalOptions(delta=0.1, tail_mass=0.2, opening_audits=4)
    decoding = make_decoding(options_of(kind=SummaryKind.GSA_K4, certificate=certificate))

    def is_dense(position: int, sequence_id: str) -> bool:
        stats, step = decoding.stats, make_step(position, sequence_id)
        before = stats.blocks_dense - stats.blocks_read
        attend = decoding.attention(step, pool)
        assert attend is not None
        for layer in range(LAYERS):
            attend(layer, queries(position), pool[layer])
        return stats.blocks_dense - stats.blocks_read == before

    assert all(is_dense(position, "first") for position in range(401, 410))
    assert not any(is_dense(position, "first") for position in range(410, 415))
    opening = [True] * 4 + [False] * 2
    assert [is_dense(position, "second") for position in range(401, 407)] == opening
    decoding.drop("second")
    assert [is_dense(position, "second") for position in range(407, 413)] == opening


def test_a_surprise_makes_its_sequence_read_more() -> None:
    """Its summaries are of other keys: what audits of the first sequence taught is not enough."""
    pool, odd = make_pool(), make_pool(1)
    odd[:, ::7, 0, :, ::2] *= 3
    certificate = ConformalOptions(delta=0.1, tail_mass=0.2)
    decoding = make_decoding(options_of(kind=SummaryKind.MEAN, certificate=certificate))
    assert decoding.promises is not None
    calibrators = decoding.promises.calibrators
    assert calibrators is not None
    for sequence_id, kv in (("usual", pool), ("odd", odd)):
        for position in range(401, 430):
            attend = decoding.attention(make_step(position, sequence_id), kv)
            assert attend is not None
            for layer in range(LAYERS):
                attend(layer, queries(position), kv[layer])
    usual, strange = (calibrators.follow(make_step(430, name)).shift for name in ("usual", "odd"))
    assert strange > usual
    assert calibrators.stats.violation_rate > 0


@pytest.mark.parametrize("certificate", [CERTIFIED, ConformalOptions(delta=0.1, tail_mass=0.2)])
def test_dense_layers_read_everything_whatever_is_promised(
    certificate: CertifiedOptions | ConformalOptions,
) -> None:
    pool = make_pool()
    decoding = make_decoding(options_of(certificate=certificate, dense_layers=1))
    for position in range(401, 440):
        step, q = make_step(position), queries(position)
        attend = decoding.attention(step, pool)
        assert attend is not None
        outs = [attend(layer, q, pool[layer]) for layer in range(LAYERS)]
        assert torch.equal(outs[0], dense(step, q, pool[0]))
    num_blocks = sum(make_step(position).num_blocks for position in range(401, 440))
    assert decoding.stats.blocks_dense == LAYERS * num_blocks
    assert num_blocks < decoding.stats.blocks_read < LAYERS * num_blocks
    assert decoding.promises is not None
    if isinstance(certificate, CertifiedOptions):
        assert decoding.promises.certified.layers == 39 * (LAYERS - 1)


@pytest.mark.parametrize("size", [1e15, 1e25, 1e38])
@pytest.mark.parametrize("certificate", [CERTIFIED, ConformalOptions(delta=0.2, tail_mass=0.2)])
def test_estimates_that_overflow_end_no_step(
    certificate: CertifiedOptions | ConformalOptions, size: float
) -> None:
    pool = make_pool()
    decoding = make_decoding(options_of(certificate=certificate))
    pool[0, make_step(419).block_ids[20], 0, 0, 3] = size
    for position in range(405, 440):
        attend = decoding.attention(make_step(position), pool)
        assert attend is not None
        assert attend(0, size**0.5 * queries(position), pool[0]).shape == (1, HEADS, DIM)


def test_a_query_whose_estimates_overflow_reads_everything() -> None:
    pool = make_pool()
    certificate = ConformalOptions(delta=0.2, tail_mass=0.2, audit_stride=64)
    decoding = make_decoding(options_of(kind=SummaryKind.GSA_2, certificate=certificate))
    for position in range(405, 431):
        step, q = make_step(position), queries(position)
        q *= 1e20 if position == 430 else 1.0
        attend = decoding.attention(step, pool)
        assert attend is not None
        out = attend(0, q, pool[0])
    assert decoding.promises is not None
    assert decoding.promises.calibrators is not None
    assert decoding.promises.calibrators.of(0, HEADS).is_ready
    assert torch.equal(out, dense(step, q, pool[0]))


def test_true_log_mass_is_the_log_of_the_sum() -> None:
    rng = np.random.default_rng(0)
    q = rng.normal(size=(3, HEADS, DIM)).astype(np.float32)
    keys = rng.normal(size=(5, GROUPS, TOKENS, DIM)).astype(np.float32)
    logits = np.einsum("qhd,nhbd->qhnb", q, keys[:, np.arange(HEADS) // 2]) / np.sqrt(DIM)
    expected = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(true_log_mass(q, keys), expected, rtol=1e-5)


def test_certified_attention_needs_a_shadow() -> None:
    with pytest.raises(ConfigError, match="shadow4"):
        options_of(kind=SummaryKind.GSA_K4)


def test_exact_mode_promises_nothing_as_it_is_dense() -> None:
    decoding = make_decoding(options_of(mode=SparseMode.EXACT))
    assert decoding.attention(make_step(419), make_pool()) is None


def test_a_shadow_bounds_every_stored_logit() -> None:
    """The intervals that certificates are built on, as they come from the records."""
    pool = make_pool(3)
    layout = KvLayout(
        num_layers=1,
        num_kv_heads=GROUPS,
        head_dim=DIM,
        block_tokens=TOKENS,
        dtype=KvDtype.FLOAT32,
    )
    table = SummaryTable(SummaryKind.SHADOW2, layout)
    table.extend(summarize(SummaryKind.SHADOW2, pool[0].numpy())[:, None])
    q = queries().numpy() * 10
    logits, errors = table.token_logits(0, q)
    keys = pool[0, :, 0].numpy().astype(np.float64)
    true = np.einsum("qhd,nhbd->qhnb", q, keys[:, np.arange(HEADS) // 2]) / np.sqrt(DIM)
    assert (np.abs(true - logits) <= errors).all()
