from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ucm.errors import ConfigError
from ucm.kernels.rope import Rope, RopeScaling, cos_sin, inverse_frequencies


def make_rope(scaling: RopeScaling | None = None) -> Rope:
    return Rope(head_dim=16, base=100.0, scaling=scaling)


def test_linear_scaling_divides_all_angles() -> None:
    plain = inverse_frequencies(make_rope())
    scaled = inverse_frequencies(make_rope(RopeScaling(kind="linear", factor=4.0)))
    torch.testing.assert_close(scaled, plain / 4)


def test_llama3_scaling_keeps_short_and_stretches_long_wavelengths() -> None:
    scaling = RopeScaling(
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_context_tokens=64,
    )
    plain = inverse_frequencies(make_rope())
    scaled = inverse_frequencies(make_rope(scaling))
    for before, after in zip(plain.tolist(), scaled.tolist(), strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 64 / 4.0:
            assert after == pytest.approx(before)
        elif wavelength > 64 / 1.0:
            assert after == pytest.approx(before / 8)
        else:
            smooth = (64 / wavelength - 1.0) / 3.0
            assert after == pytest.approx((1 - smooth) * before / 8 + smooth * before)


def test_ntk_stretches_the_longest_wavelength_by_its_factor() -> None:
    plain = inverse_frequencies(make_rope())
    scaled = inverse_frequencies(make_rope(RopeScaling(kind="ntk", factor=4.0)))
    assert scaled[0] == plain[0]
    assert float(plain[-1] / scaled[-1]) == pytest.approx(4.0)


def test_dynamic_is_plain_within_the_trained_context() -> None:
    scaled = inverse_frequencies(make_rope(RopeScaling(kind="dynamic", factor=4.0)))
    assert torch.equal(scaled, inverse_frequencies(make_rope()))


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("default", {}),
        ("linear", {"factor": 4.0}),
        ("dynamic", {"factor": 2.0}),
        ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("yarn", {"factor": 4.0}),
        ("yarn", {"factor": 40.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}),
        ("yarn", {"factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5}),
        ("yarn", {"factor": 8.0, "attention_factor": 1.5}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_frequencies_are_those_of_transformers(
    kind: str, parameters: dict[str, Any], tmp_path: Any
) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from ucm.engine.config import config_from_hf

    rope = {"rope_type": kind, "rope_theta": 50_000.0, **parameters}
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = 512
    theirs = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters=rope,
    )
    theirs.architectures = ["LlamaForCausalLM"]
    theirs.save_pretrained(tmp_path)
    table = LlamaRotaryEmbedding(theirs)
    ours = config_from_hf(tmp_path / "config.json").rope
    torch.testing.assert_close(inverse_frequencies(ours).float(), table.inv_freq, rtol=1e-5, atol=0)
    assert ours.magnitude == pytest.approx(table.attention_scaling)


def test_angles_keep_their_precision_far_out() -> None:
    cos, sin = cos_sin(Rope(head_dim=4, base=10_000.0), torch.tensor([1_000_000]))
    assert float(cos[0, 0]) == pytest.approx(math.cos(1e6), abs=1e-9)
    assert float(sin[0, 1]) == pytest.approx(math.sin(1e4), abs=1e-9)


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(ConfigError, match="longrope"):
        RopeScaling(kind="longrope", factor=2.0)
    with pytest.raises(ConfigError, match="factor"):
        RopeScaling(kind="linear", factor=0.0)
    with pytest.raises(ConfigError, match="even"):
        Rope(head_dim=15, base=1e4)
    with pytest.raises(ConfigError, match="rope_base"):
        Rope(head_dim=16, base=math.inf)
