from __future__ import annotations

import pytest
import torch

from ucm.kernels.linear import Linear


@pytest.mark.parametrize(("out_features", "in_features"), [(48, 32), (32, 48), (32, 32)])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("packed", [None, False])
def test_equals_a_product_in_fp32(
    out_features: int,
    in_features: int,
    rows: int,
    dtype: torch.dtype,
    tolerance: float,
    packed: bool | None,
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    x = torch.randn(rows, in_features, generator=generator).to(dtype)
    residual = torch.randn(rows, out_features, generator=generator).to(dtype)
    kept = residual.clone()
    linear = Linear(weight, packed=packed)
    expected = x.float() @ weight.float().t()
    torch.testing.assert_close(linear(x).float(), expected, atol=tolerance, rtol=1e-2)
    added = linear.add(x, residual).float()
    torch.testing.assert_close(added, expected + kept.float(), atol=tolerance, rtol=1e-2)
    assert torch.equal(residual, kept)
    assert (linear.out_features, linear.in_features) == (out_features, in_features)


def test_many_rows_give_the_same_packed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    linear = Linear(torch.randn(48, 32, generator=generator).to(torch.bfloat16))
    x = torch.randn(6, 32, generator=generator).to(torch.bfloat16)
    before = linear(x)
    monkeypatch.setattr("ucm.kernels.linear.MANY_ROWS", 4)
    torch.testing.assert_close(linear(x), before, atol=0.05, rtol=1e-2)
