"""Narrow attention of recomputed rows, against its definition in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ucm.reuse.candidates import CandidateRows
from ucm.reuse.narrow_attention import NarrowAttention
from ucm.reuse.protocols import BlendPlan, ChunkSpan

PLAN = BlendPlan(
    token_ids=range(330),
    spans=(
        ChunkSpan(start=20, stop=60, is_exact=True),
        ChunkSpan(start=60, stop=150),
        ChunkSpan(start=153, stop=200),
        ChunkSpan(start=200, stop=300),
    ),
    start=20,
    stop=320,
    query_start=303,
)
CANDIDATES = CandidateRows.of(PLAN, torch.device("cpu"))


def drawn(share: float) -> Tensor:
    """[N] bool: candidates that are chosen, about such a share of them."""
    torch.manual_seed(0)
    return torch.rand(len(CANDIDATES)) < share


def narrow_with(
    is_chosen: Tensor, masses: tuple[Tensor, ...] = (), share: float = 0.1
) -> NarrowAttention:
    return NarrowAttention(PLAN, CANDIDATES, is_chosen, masses, share)


def visible(is_chosen: Tensor, positions: Tensor) -> Tensor:
    """[S, T] bool, position by position as the module's table says."""
    left_out = set(CANDIDATES.positions[~is_chosen].tolist())
    span_of = {p: s for s in PLAN.spans if not s.is_exact for p in range(s.start, s.stop)}
    sees = torch.zeros(len(positions), PLAN.stop, dtype=torch.bool)
    for i, row in enumerate(positions.tolist()):
        for column in range(row + 1):
            is_fresh = row not in span_of
            is_own = not is_fresh and span_of.get(column) is span_of[row]
            sees[i, column] = is_fresh or is_own or column not in left_out
    return sees


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("has_fresh", [True, False])
def test_rows_see_what_the_table_says(share: float, has_fresh: bool) -> None:
    is_chosen = drawn(share)
    rows = CANDIDATES.positions[is_chosen][::2]  # some have left the set since
    if has_fresh:
        rows = torch.cat((rows, torch.tensor([150, 151, 152, *range(300, 320)]))).sort().values
    q_SHD = torch.randn(len(rows), 6, 16)
    kv_2GTD = torch.randn(2, 2, PLAN.stop, 16)

    found = narrow_with(is_chosen).over(kv_2GTD)(q_SHD, rows)

    k, v = kv_2GTD.double().repeat_interleave(3, 1)
    exact = F.scaled_dot_product_attention(
        q_SHD.double().transpose(0, 1), k, v, attn_mask=visible(is_chosen, rows)
    ).transpose(0, 1)
    torch.testing.assert_close(found.double(), exact, atol=3e-6, rtol=0)


def test_what_is_left_out_is_not_read() -> None:
    is_chosen = drawn(0.3)
    kv_2GTD = torch.randn(2, 2, PLAN.stop, 16)
    last = CANDIDATES.positions[is_chosen & (CANDIDATES.positions >= 200)]
    q_SHD = torch.randn(len(last), 6, 16)
    expected = narrow_with(is_chosen).over(kv_2GTD)(q_SHD, last)
    kept = CANDIDATES.positions[~is_chosen]
    kv_2GTD[:, :, kept[kept < 200]] = torch.nan

    assert torch.equal(narrow_with(is_chosen).over(kv_2GTD)(q_SHD, last), expected)


def test_a_layer_is_narrow_by_what_the_query_gives_to_all_that_was_not_chosen() -> None:
    is_chosen = drawn(0.3)
    few = torch.where(is_chosen, 0.5, 0.05 / int((~is_chosen).sum()))
    masses = (few, few * 4)
    narrow = narrow_with(is_chosen, masses)
    assert narrow.is_narrow(0)
    assert not narrow.is_narrow(1)


def test_a_share_of_nothing_makes_no_layer_narrow() -> None:
    is_chosen = torch.ones(len(CANDIDATES), dtype=torch.bool)
    assert not narrow_with(is_chosen, (torch.zeros(len(CANDIDATES)),), 0.0).is_narrow(0)
