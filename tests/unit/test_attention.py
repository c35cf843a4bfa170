from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ucm.errors import ConfigError, LayoutMismatchError
from ucm.kernels.attention import (
    ATTENTION,
    AttentionProblem,
    PagedSequence,
    merge_partials,
    merge_two,
    select_attention,
    tiled_attention,
)

BLOCK = 8
POOL_BLOCKS = 24
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

BLOCK_IDS = {
    "consecutive": list(range(3, 13)),
    "two_runs": [7, 8, 9, 10, 11, 0, 1, 2, 3, 4],
    "scattered": [20, 3, 17, 5, 1, 13, 9, 22, 11, 7],
}


def make_pool(kv_heads: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (POOL_BLOCKS, 2, kv_heads, BLOCK, dim)
    return torch.randn(shape, generator=generator).to(dtype)


def reference(q: Tensor, pool: Tensor, sequence: PagedSequence) -> tuple[Tensor, Tensor]:
    """F.scaled_dot_product_attention over gathered keys, and the scores' log-sum-exp."""
    heads, dim = q.shape[1:]
    kv = pool[sequence.block_ids].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : sequence.length]
    k, v = kv.float().repeat_interleave(heads // pool.shape[2], dim=1)
    rows = torch.arange(sequence.num_tokens).unsqueeze(1) + sequence.start
    mask = torch.arange(sequence.length) <= rows
    q_HTD = q.float().transpose(0, 1)
    out = F.scaled_dot_product_attention(q_HTD, k, v, attn_mask=mask)
    scores = (q_HTD @ k.transpose(1, 2)) * dim**-0.5
    lse = scores.masked_fill(~mask, float("-inf")).logsumexp(-1)
    return out.transpose(0, 1), lse.transpose(0, 1)


SPANS = [(0, 1), (0, 31), (40, 33), (63, 1), (64, 1), (72, 1)]
CASES = [(name, span) for name in ("tiled", "flash") for span in SPANS]
CASES += [("split_flash", span) for span in SPANS if span[1] == 1]


@pytest.mark.parametrize(("name", "span"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", list(BLOCK_IDS))
@pytest.mark.parametrize("heads", [(9, 3), (4, 4), (8, 1)])
def test_equals_scaled_dot_product_attention(
    name: str,
    dtype: torch.dtype,
    blocks: str,
    heads: tuple[int, int],
    span: tuple[int, int],
) -> None:
    start, tokens = span
    pool = make_pool(heads[1], 16, dtype)
    q = torch.randn(tokens, heads[0], 16, generator=torch.Generator().manual_seed(5)).to(dtype)
    sequence = PagedSequence.build(start, tokens, BLOCK_IDS[blocks], pool)
    run = select_attention(sequence, (heads[0], 16), pool, name)
    out, lse = run(q, pool, sequence)
    expected, expected_lse = reference(q, pool, sequence)
    assert out.dtype is dtype
    assert lse.dtype is torch.float32
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=TOLERANCE[dtype], rtol=0)


def test_queries_may_be_a_strided_view() -> None:
    pool = make_pool(2, 16)
    packed = torch.randn(5, 8, 16)
    sequence = PagedSequence.build(10, 5, [0, 1, 2], pool)
    for name in ("tiled", "flash"):
        run = select_attention(sequence, (4, 16), pool, name)
        strided = run(packed[:, :4], pool, sequence)[0]
        torch.testing.assert_close(strided, run(packed[:, :4].clone(), pool, sequence)[0])


def test_tiles_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ucm.kernels.attention.TILE_TOKENS", 2 * BLOCK)
    pool = make_pool(2, 16)
    q = torch.randn(20, 4, 16)
    sequence = PagedSequence.build(50, 20, BLOCK_IDS["scattered"], pool)
    out, lse = tiled_attention(q, pool, sequence)
    expected, expected_lse = reference(q, pool, sequence)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tiled", "flash", "split_flash"])
def test_what_lies_behind_the_end_does_not_matter(name: str) -> None:
    pool = make_pool(3, 16)
    q = torch.randn(1, 9, 16)
    sequence = PagedSequence.build(20, 1, [4, 5, 6], pool)
    run = select_attention(sequence, (9, 16), pool, name)
    before = run(q, pool, sequence)[0]
    pool[6, :, :, 5:] = 1e4
    assert torch.equal(run(q, pool, sequence)[0], before)


def test_merge_partials_equals_the_whole() -> None:
    pool = make_pool(2, 16)
    q = torch.randn(1, 4, 16)
    whole = PagedSequence.build(4 * BLOCK - 1, 1, [0, 1, 2, 3], pool)
    halves = [PagedSequence.build(2 * BLOCK - 1, 1, ids, pool) for ids in ([0, 1], [2, 3])]
    outs, lses = zip(*(tiled_attention(q, pool, half) for half in halves), strict=True)
    expected, expected_lse = tiled_attention(q, pool, whole)
    for out, lse in (
        merge_partials(torch.stack(outs), torch.stack(lses)),
        merge_two(outs[0], lses[0], outs[1], lses[1]),
    ):
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(lse, expected_lse, atol=1e-6, rtol=0)


def test_a_merge_ignores_a_part_without_keys() -> None:
    outs = torch.stack((torch.ones(2, 4), torch.zeros(2, 4)))
    lses = torch.tensor([[0.5, 2.0], [float("-inf"), float("-inf")]])
    for out, lse in (
        merge_partials(outs, lses),
        merge_two(outs[0], lses[0], outs[1], lses[1]),
        merge_two(outs[1], lses[1], outs[0], lses[0]),
    ):
        assert torch.equal(out, outs[0])
        assert torch.equal(lse, lses[0])


@pytest.mark.parametrize(
    ("start", "tokens", "ids"),
    [(0, 17, [1, 2]), (-1, 4, [1]), (0, 0, [1]), (0, 1, [24]), (0, 1, [-1])],
)
def test_blocks_that_do_not_fit_are_refused(start: int, tokens: int, ids: list[int]) -> None:
    with pytest.raises(LayoutMismatchError):
        PagedSequence.build(start, tokens, ids, make_pool(1, 16))


def test_surplus_blocks_are_ignored() -> None:
    sequence = PagedSequence.build(0, 3, [2, 9, 11], make_pool(1, 16))
    assert sequence.runs == ((2, 1),)
    assert sequence.block_ids.tolist() == [2]


def problem(device: str, dtype: torch.dtype, queries: int, keys: int) -> AttentionProblem:
    return AttentionProblem(
        device=device,
        dtype=dtype,
        num_queries=queries,
        num_keys=keys,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
    )


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (problem("cpu", torch.float32, 512, 512), "flash"),
        (problem("cpu", torch.float32, 1, 4096), "split_flash"),
        (problem("cpu", torch.bfloat16, 1, 4096), "flash"),
        (problem("cpu", torch.float16, 1, 64), "tiled"),
        (problem("cuda", torch.float32, 1, 64), "tiled"),
    ],
)
def test_dispatch_picks_what_measured_fastest(case: AttentionProblem, expected: str) -> None:
    assert ATTENTION.select(case).name == expected


def test_an_override_that_does_not_admit_the_problem_is_refused() -> None:
    pool = make_pool(3, 16)
    sequence = PagedSequence.build(0, 4, [0], pool)
    with pytest.raises(ConfigError):
        select_attention(sequence, (9, 16), pool, "split_flash")
