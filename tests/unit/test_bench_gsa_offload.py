"""The measurement of offloaded decode, on a tiny model."""

from __future__ import annotations

import pytest
import torch

from ucm.bench.gsa_offload import OffloadCase, measure_offload
from ucm.engine.loading import load_model
from ucm.engine.model import LlamaModel
from ucm.errors import InvalidArgumentError
from ucm.kernels.block_scores import Budget
from ucm.testing.models import write_tiny_model

TEXT = [3 + (i * i + 7 * i) % 90 for i in range(400)]
CASE = OffloadCase(
    bandwidth_mb_s=20.0,
    context_tokens=300,
    resident_tokens=80,
    num_tokens=6,
    block_tokens=8,
    chunk_tokens=32,
    budget=Budget(ratio=1.0),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("tiny")), torch.float32).model


def test_reading_everything_costs_nothing_in_quality(model: LlamaModel) -> None:
    found = measure_offload(model, TEXT, CASE)
    assert abs(found["dnll"]) < 1e-4
    assert found["context_tokens"] == 300
    assert found["dense_tokens_s"] > 0
    slab_mb = 2 * 2 * 8 * 16 * 4 / 1e6
    assert found["dense_mb_per_token"] == pytest.approx(3 * (37 - 9) * slab_mb, rel=0.1)


def test_reading_a_third_moves_less(model: LlamaModel) -> None:
    case = OffloadCase(
        context_tokens=300,
        resident_tokens=80,
        num_tokens=6,
        block_tokens=8,
        chunk_tokens=32,
        budget=Budget(ratio=0.3),
    )
    found = measure_offload(model, TEXT, case)
    assert 0 < found["gsa_mb_per_token"] < 0.6 * found["dense_mb_per_token"]


def test_a_text_that_is_too_short_is_refused(model: LlamaModel) -> None:
    with pytest.raises(InvalidArgumentError, match="307 tokens are needed"):
        measure_offload(model, TEXT[:306], CASE)
