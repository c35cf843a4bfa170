from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ucm.kernels.norm import NORM, RmsNorm


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("name", [None, *NORM.names])
def test_equals_the_definition(
    name: str | None,
    rows: int,
    scale: float,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name is not None:
        monkeypatch.setenv("UCM_KERNEL_NORM", name)
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(rows, 96, generator=generator) * scale + scale).to(dtype)
    weight = torch.randn(96, generator=generator).to(dtype)
    normalised = RmsNorm(weight, 1e-5)(x)
    expected = F.rms_norm(x.double(), (96,), weight.double(), 1e-5)
    assert normalised.dtype is dtype
    assert normalised.shape == x.shape
    torch.testing.assert_close(normalised.double(), expected, atol=tolerance, rtol=tolerance)
