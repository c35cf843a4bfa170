"""What summaries cost: the benchmark measures what it says, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from ucm.bench import summaries
from ucm.engine.loading import load_model
from ucm.testing.models import write_tiny_model
from ucm.types import SummaryKind


def test_every_kind_is_set_beside_the_models_own_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summaries, "ROUNDS", 2)
    kinds = (SummaryKind.GSA_K4, SummaryKind.MEAN)
    found = summaries.measure(load_model(write_tiny_model(tmp_path)).model, kinds)
    for name in ("prefill_ms_per_block", "decode_step_ms"):
        value = found[name]
        assert isinstance(value, float)
        assert value > 0
    figures = [found[kind] for kind in kinds]
    for one in figures:
        assert isinstance(one, dict)
        assert one["summarize_ms_per_block"] > 0
        assert one["score_us_per_layer"] > 0
        assert 0 < one["bytes_ratio"] < 1
