from __future__ import annotations

import math

import pytest
import torch

from ucm.engine.config import ModelConfig
from ucm.engine.rope import RopeTable, rotate_
from ucm.kernels.rope import RopeScaling


def make_config(scaling: RopeScaling | None = None) -> ModelConfig:
    return ModelConfig(
        name="tiny",
        vocab_size=10,
        hidden_size=64,
        intermediate_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_context_tokens=64,
        rms_norm_eps=1e-5,
        rope_base=100.0,
        rope_scaling=scaling,
    )


def test_rotates_each_pair_by_its_angle() -> None:
    config = make_config()
    x = torch.randn(3, 4, 16)
    expected = torch.empty_like(x)
    for row, position in enumerate((0, 5, 63)):
        for pair in range(8):
            angle = position * 100.0 ** (-2 * pair / 16)
            a, b = x[row, :, pair], x[row, :, pair + 8]
            expected[row, :, pair] = a * math.cos(angle) - b * math.sin(angle)
            expected[row, :, pair + 8] = b * math.cos(angle) + a * math.sin(angle)
    rotate_(x, *RopeTable(config, torch.float32).at(torch.tensor([0, 5, 63])))
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=0)


def test_products_depend_on_distance_only() -> None:
    table = RopeTable(make_config(), torch.float32)
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def score(q_at: int, k_at: int) -> float:
        rotated_q, rotated_k = q.clone(), k.clone()
        rotate_(rotated_q, *table.at(torch.tensor([q_at])))
        rotate_(rotated_k, *table.at(torch.tensor([k_at])))
        return float((rotated_q * rotated_k).sum())

    assert score(10, 3) == pytest.approx(score(57, 50), abs=1e-4)


def test_a_strided_view_is_rotated_in_place() -> None:
    packed = torch.randn(2, 6, 16)
    expected = packed[:, :4].clone()
    untouched = packed[:, 4:].clone()
    cos, sin = RopeTable(make_config(), torch.float32).at(torch.tensor([7, 8]))
    rotate_(packed[:, :4], cos, sin)
    rotate_(expected, cos, sin)
    assert torch.equal(packed[:, :4], expected)
    assert torch.equal(packed[:, 4:], untouched)


def test_yarn_makes_queries_and_keys_longer() -> None:
    scaling = RopeScaling(kind="yarn", factor=4.0, original_context_tokens=64)
    x = torch.randn(1, 2, 16)
    length = x.norm(dim=-1)
    rotate_(x, *RopeTable(make_config(scaling), torch.float32).at(torch.tensor([9])))
    torch.testing.assert_close(x.norm(dim=-1), length * (0.1 * math.log(4.0) + 1.0))
