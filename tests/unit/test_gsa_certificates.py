"""The benchmark of certificates on a tiny model: its result's shape, and that it can fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ucm.bench.gsa_certificates import (
    BLOCK_TOKENS,
    Captured,
    CertificateBenchOptions,
    capture,
    measure_certificates,
)
from ucm.engine.loading import load_model
from ucm.engine.model import LlamaModel
from ucm.sparse.certificates import CertifiedOptions
from ucm.testing.models import write_tiny_model

OPTIONS = replace(CertificateBenchOptions().quick(), window_tokens=64, layer_stride=2)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("model")), "fp32").model


@pytest.fixture(scope="module")
def captured(tiny_model: LlamaModel) -> dict[str, Captured]:
    random = np.random.default_rng(3)
    return {
        name: capture(tiny_model, random.integers(3, 250, length).tolist(), 64)
        for name, length in (("one", 400), ("two", 333))
    }


def test_certificates_hold_and_everything_is_a_share(captured: dict[str, Captured]) -> None:
    result = measure_certificates(captured, OPTIONS)
    certified, conformal, geometric = (
        result[key] for key in ("certified", "conformal", "geometric")
    )
    assert certified["eps"] == OPTIONS.certified.relative_error
    assert 0 < certified["max_error_over_bound"] <= 1
    assert 0 < certified["blocks_read_ratio"] <= 1
    assert 0 <= conformal["violation_rate"] <= 1
    assert 0 < conformal["blocks_read_ratio"] <= 1
    assert geometric["oracle"] <= geometric["shadow4"] <= geometric["shadow2"] <= 1
    assert geometric["shadow4"] <= geometric["box"] <= 1


def test_a_larger_error_reads_fewer_blocks(captured: dict[str, Captured]) -> None:
    read = [
        measure_certificates(
            captured, replace(OPTIONS, certified=CertifiedOptions(relative_error=eps))
        )["certified"]["blocks_read_ratio"]
        for eps in (0.0, 5.0, 100.0)
    ]
    assert read[0] == 1.0
    assert read[0] >= read[1] >= read[2]
    assert read[2] < 0.9


def test_the_captured_queries_are_those_of_the_last_tokens(captured: dict[str, Captured]) -> None:
    document = captured["two"]
    assert document.position(0) == 333 - 64
    assert document.queries.shape[1] == 64
    assert document.kv.shape[1] == -(-333 // BLOCK_TOKENS)
    assert np.abs(document.kv[:, -1, :, :, 333 % BLOCK_TOKENS :]).max() == 0.0


@pytest.mark.parametrize("length", [65, 105, 205])
def test_a_document_with_nothing_to_choose_from(length: int, tiny_model: LlamaModel) -> None:
    tokens = np.random.default_rng(length).integers(3, 250, length).tolist()
    document = capture(tiny_model, tokens, length // 2)
    result = measure_certificates({"short": document}, OPTIONS)
    certified, geometric = result["certified"], result["geometric"]
    assert 0 <= certified["max_error_over_bound"] <= 1
    assert 0 < certified["blocks_read_ratio"] <= 1
    assert 0 < result["conformal"]["blocks_read_ratio"] <= 1
    assert 0 <= result["conformal"]["violation_rate"] <= 1
    assert 0 < geometric["oracle"] <= geometric["box"] <= 1
    if length < 4 * BLOCK_TOKENS:  # sink, recent blocks and the one being filled are all there is
        assert certified["blocks_read_ratio"] == geometric["oracle"] == 1.0
        assert certified["max_error_over_bound"] == 0.0
