from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ucm.engine.config import ModelConfig
from ucm.engine.loading import load_model
from ucm.engine.rope import RopeTable, rotate_
from ucm.errors import ConfigError, LayoutMismatchError
from ucm.kernels.rope import Rope, RopeScaling, RopeStyle, cos_sin
from ucm.kernels.rotate import rotate_keys
from ucm.testing.models import write_tiny_model

SCALINGS = [
    None,
    RopeScaling(kind="linear", factor=4.0),
    RopeScaling(kind="ntk", factor=3.0),
    RopeScaling(kind="dynamic", factor=2.0),
    RopeScaling(kind="llama3", factor=8.0, original_context_tokens=2048),
    RopeScaling(kind="yarn", factor=4.0, original_context_tokens=2048),
]


def make_config(scaling: RopeScaling | None = None) -> ModelConfig:
    return ModelConfig(
        name="tiny",
        vocab_size=10,
        hidden_size=64,
        intermediate_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_context_tokens=8192,
        rms_norm_eps=1e-5,
        rope_base=10_000.0,
        rope_scaling=scaling,
    )


def written_out(keys: Tensor, rope: Rope, position: int) -> Tensor:
    """The rotation by its definition, in fp64."""
    cos, sin = cos_sin(rope, torch.tensor(position))
    keys, out = keys.double(), torch.empty_like(keys, dtype=torch.float64)
    half = rope.head_dim // 2
    for plane in range(half):
        split = rope.style is RopeStyle.HALF_SPLIT
        i, j = (plane, plane + half) if split else (2 * plane, 2 * plane + 1)
        out[..., i] = keys[..., i] * cos[plane] - keys[..., j] * sin[plane]
        out[..., j] = keys[..., j] * cos[plane] + keys[..., i] * sin[plane]
    return out


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("old", "new"), [(0, 8000), (8000, 0), (4, 1029), (3000, 3001)])
def test_keys_are_those_of_the_new_positions(
    scaling: RopeScaling | None, old: int, new: int
) -> None:
    config = make_config(scaling)
    table = RopeTable(config, torch.float32)
    raw = torch.randn(32, 2, 64, generator=torch.Generator().manual_seed(1))
    there, here = raw.clone(), raw.clone()
    rotate_(there, *table.at(torch.arange(old, old + 32)))
    rotate_(here, *table.at(torch.arange(new, new + 32)))
    moved = rotate_keys(there, config.rope, new - old)
    assert error(moved, here) < 2e-6
    assert error(moved, here) < 2e-7, "half of it is each rotation's own rounding"


@given(
    shift=st.integers(-(2**20), 2**20),
    style=st.sampled_from(list(RopeStyle)),
    seed=st.integers(0, 2**16),
    scaling=st.sampled_from(SCALINGS),
)
def test_any_shift_is_the_definition(
    shift: int, style: RopeStyle, seed: int, scaling: RopeScaling | None
) -> None:
    rope = Rope(head_dim=16, base=500.0, scaling=scaling, style=style)
    keys = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(seed))
    assert error(rotate_keys(keys, rope, shift), written_out(keys, rope, shift)) < 2e-7


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}
CONFIGURED: dict[str, dict[str, object] | None] = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "ntk": {"type": "ntk", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": dict(YARN),
    "yarn, ramp": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "yarn, magnitude": {**YARN, "attention_factor": 1.25},
    "yarn, mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_models_first_keys_move_as_its_configuration_says(name: str, tmp_path: Path) -> None:
    """Layer 0 knows nothing but tokens and positions, so a moved key has a true value."""
    options: dict[str, Any] = {"rope_scaling": CONFIGURED[name], "max_position_embeddings": 8192}
    folder = write_tiny_model(tmp_path / "m", **options)
    loaded = load_model(folder, torch.float32)
    hidden = loaded.model.embed([7 * i % 250 for i in range(48)])
    rope, base = loaded.config.rope, 16
    _, (stored, _) = loaded.model.project(0, hidden, torch.arange(base, base + 48))
    before = stored.clone()
    for start in (0, 17, 1029, 8192 - 48):
        _, (want, _) = loaded.model.project(0, hidden, torch.arange(start, start + 48))
        moved = rotate_keys(stored, rope, start - base)
        assert error(moved, want) < 2e-6
        interleaved = dataclasses.replace(rope, style=RopeStyle.INTERLEAVED)
        assert error(rotate_keys(_paired(stored), interleaved, start - base), _paired(want)) < 2e-6
    assert torch.equal(stored, before), "always from the original bytes"


def _paired(keys: Tensor) -> Tensor:
    """Half-split keys in the interleaved order: the halves of a plane beside each other."""
    return keys.view(*keys.shape[:-1], 2, -1).transpose(-1, -2).flatten(-2)


def test_rotating_the_original_does_not_add_up_errors() -> None:
    rope = Rope(head_dim=64, base=10_000.0)
    keys = torch.randn(64, 64).to(torch.bfloat16)
    exact = written_out(keys, rope, 1000)
    once = rotate_keys(keys, rope, 1000)
    many = keys
    for _ in range(100):
        many = rotate_keys(many, rope, 10)
    assert error(once, exact) < 2e-3
    assert error(many, exact) > 3 * error(once, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_result_is_rounded_once(dtype: torch.dtype) -> None:
    rope = Rope(head_dim=16, base=500.0)
    keys = torch.randn(5, 16).to(dtype)
    expected = written_out(keys, rope, 77)
    got = rotate_keys(keys, rope, 77)
    assert got.dtype is dtype
    half_ulp = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert ((got.double() - expected).abs() <= half_ulp * keys.double().abs().amax() * 2).all()


def test_in_place_into_a_view_and_not_at_all() -> None:
    rope = Rope(head_dim=16, base=500.0)
    slabs = torch.randn(4, 2, 3, 8, 16)
    values, expected = slabs[:, 1].clone(), rotate_keys(slabs[:, 0].clone(), rope, 5)
    assert rotate_keys(slabs[:, 0], rope, 5, out=slabs[:, 0]).data_ptr() == slabs.data_ptr()
    assert torch.equal(slabs[:, 0], expected)
    assert torch.equal(slabs[:, 1], values)
    keys = torch.randn(2, 16)
    same = rotate_keys(keys, rope, 0)
    assert torch.equal(same, keys)
    assert same.data_ptr() != keys.data_ptr()


def test_what_does_not_fit_is_refused() -> None:
    rope = Rope(head_dim=16, base=500.0)
    with pytest.raises(LayoutMismatchError, match="16 dimensions"):
        rotate_keys(torch.randn(2, 8), rope, 1)
    with pytest.raises(LayoutMismatchError, match="int32"):
        rotate_keys(torch.zeros(2, 16, dtype=torch.int32), rope, 1)
    with pytest.raises(LayoutMismatchError, match="rotated keys"):
        rotate_keys(torch.randn(2, 16), rope, 1, out=torch.empty(3, 16))
    with pytest.raises(ConfigError, match="GPU"):
        rotate_keys(torch.randn(2, 16), rope, 1, override="kernel")
