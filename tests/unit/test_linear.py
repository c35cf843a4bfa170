from __future__ import annotations

import pytest
import torch

from ucm.errors import ConfigError
from ucm.kernels.linear import Linear


@pytest.mark.parametrize(("out_features", "in_features"), [(48, 32), (32, 48), (32, 32)])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("layout", [None, "plain", "transposed", "blocked"])
def test_equals_a_product_in_fp32(
    out_features: int,
    in_features: int,
    rows: int,
    dtype: torch.dtype,
    tolerance: float,
    layout: str | None,
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    x = torch.randn(rows, in_features, generator=generator).to(dtype)
    residual = torch.randn(rows, out_features, generator=generator).to(dtype)
    kept = residual.clone()
    linear = Linear(weight, layout=layout)
    expected = x.float() @ weight.float().t()
    torch.testing.assert_close(linear(x).float(), expected, atol=tolerance, rtol=1e-2)
    added = linear.add(x, residual).float()
    torch.testing.assert_close(added, expected + kept.float(), atol=tolerance, rtol=1e-2)
    assert torch.equal(residual, kept)
    assert (linear.out_features, linear.in_features) == (out_features, in_features)


def test_many_rows_give_the_same_blocked_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    linear = Linear(torch.randn(48, 32, generator=generator).to(torch.bfloat16))
    x = torch.randn(6, 32, generator=generator).to(torch.bfloat16)
    before = linear(x)
    monkeypatch.setattr("ucm.kernels.linear.MANY_ROWS", 4)
    torch.testing.assert_close(linear(x), before, atol=0.05, rtol=1e-2)


def test_a_layout_is_chosen_by_dtype_and_shape() -> None:
    wide, narrow = torch.zeros(48, 32), torch.zeros(32, 48)
    assert (Linear(wide).layout, Linear(narrow).layout) == ("transposed", "plain")
    assert Linear(wide.to(torch.bfloat16)).layout == "blocked"
    assert Linear(wide.to(torch.float16)).layout == "plain"
    with pytest.raises(ConfigError, match="it takes float32 and bfloat16 only"):
        Linear(wide.to(torch.float16), layout="blocked")
    with pytest.raises(ConfigError, match="it has plain, transposed, blocked"):
        Linear(wide, layout="striped")
