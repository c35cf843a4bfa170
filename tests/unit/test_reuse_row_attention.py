"""Attention of scattered rows against attention by the definition, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ucm.reuse.row_attention import GROUP_ROWS, attend_rows


@pytest.mark.parametrize("groups", [(3, 3, 64), (1, 4, 8), (2, 1, 16)])
@pytest.mark.parametrize(
    ("num_rows", "num_columns"),
    [(1, 1), (1, 7), (GROUP_ROWS, GROUP_ROWS), (GROUP_ROWS + 1, 400), (3 * GROUP_ROWS, 1000)],
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


def test_no_rows_attend_to_nothing() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert attend_rows(torch.empty(0, 6, 8), torch.randn(2, 3, 5, 8), none).shape == (0, 6, 8)
