"""Attention of scattered rows against attention by the definition, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ucm.kernels import attention
from ucm.reuse.row_attention import MASKED_PAIRS, MASKED_ROWS, attend_rows

WIDE = MASKED_PAIRS // MASKED_ROWS
"""Columns over which so many rows are still done with one mask."""


@pytest.mark.parametrize("groups", [(3, 3, 64), (1, 4, 8), (2, 1, 16)])
@pytest.mark.parametrize(
    ("num_rows", "num_columns"),
    [
        (1, 1),
        (1, 7),
        (MASKED_ROWS, MASKED_ROWS),
        (MASKED_ROWS + 1, 2 * WIDE),
        (3 * MASKED_ROWS, 100),
        (9 * MASKED_ROWS, WIDE),
        (400, 401),
    ],
)
def test_each_row_sees_what_is_not_behind_it(
    groups: tuple[int, int, int], num_rows: int, num_columns: int
) -> None:
    torch.manual_seed(num_rows)
    kv_heads, repeat, dim = groups
    heads = kv_heads * repeat
    positions = torch.randperm(num_columns)[:num_rows].sort().values
    q_SHD = torch.randn(num_rows, 2 * heads, dim)[:, :heads]  # strided, as a projection leaves it
    kv_2GTD = torch.randn(2, kv_heads, num_columns, dim)

    found = attend_rows(q_SHD, kv_2GTD, positions)

    k, v = kv_2GTD.double().repeat_interleave(repeat, 1)
    mask = torch.arange(num_columns) <= positions.unsqueeze(1)
    exact = F.scaled_dot_product_attention(
        q_SHD.double().transpose(0, 1), k, v, attn_mask=mask
    ).transpose(0, 1)
    torch.testing.assert_close(found.double(), exact, atol=3e-6, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 3e-6), (torch.bfloat16, 0.03), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("has_kernel", [True, False])
def test_parts_are_merged_alike_with_and_without_the_kernel(
    dtype: torch.dtype, error: float, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernel:
        monkeypatch.setattr(attention, "_FLASH", None)
    torch.manual_seed(0)
    positions = torch.randperm(WIDE)[: 9 * MASKED_ROWS].sort().values
    q_SHD = torch.randn(len(positions), 6, 32).to(dtype)
    kv_2GTD = torch.randn(2, 2, WIDE, 32).to(dtype)

    found = attend_rows(q_SHD, kv_2GTD, positions)

    assert found.dtype is dtype
    k, v = kv_2GTD.double().repeat_interleave(3, 1)
    mask = torch.arange(WIDE) <= positions.unsqueeze(1)
    exact = F.scaled_dot_product_attention(
        q_SHD.double().transpose(0, 1), k, v, attn_mask=mask
    ).transpose(0, 1)
    torch.testing.assert_close(found.double(), exact, atol=error, rtol=0)


@pytest.mark.parametrize("num_rows", [1, 5 * MASKED_ROWS])
@pytest.mark.parametrize("num_before", [0, 1, WIDE])
def test_more_columns_are_seen_by_every_row(num_rows: int, num_before: int) -> None:
    torch.manual_seed(num_before)
    positions = torch.randperm(WIDE)[:num_rows].sort().values
    q_SHD = torch.randn(num_rows, 6, 16)
    kv_2GAD = torch.randn(2, 3, num_before + WIDE, 16)
    before_2GUD, kv_2GTD = kv_2GAD[:, :, :num_before], kv_2GAD[:, :, num_before:]

    found = attend_rows(q_SHD, kv_2GTD, positions, before_2GUD)

    torch.testing.assert_close(
        found, attend_rows(q_SHD, kv_2GAD, positions + num_before), atol=3e-6, rtol=0
    )


def test_no_rows_attend_to_nothing() -> None:
    none = torch.empty(0, dtype=torch.int64)
    kv_2GTD = torch.randn(2, 3, 5, 8)
    assert attend_rows(torch.empty(0, 6, 8), kv_2GTD, none).shape == (0, 6, 8)
    assert attend_rows(torch.empty(0, 6, 8), kv_2GTD, none, kv_2GTD).shape == (0, 6, 8)
