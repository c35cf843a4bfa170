"""What an engine may be told about sparse attention, and what is refused in words."""

from __future__ import annotations

from typing import Any

import pytest

from ucm.engine.engine_options import EngineOptions
from ucm.errors import ConfigError
from ucm.sparse.mode_policy import SparseMode
from ucm.sparse.options import SparseOptions
from ucm.types import SummaryKind


@pytest.mark.parametrize("mode", SparseMode)
@pytest.mark.parametrize("kind", SummaryKind)
def test_plain_words_will_do(mode: SparseMode, kind: SummaryKind) -> None:
    words: dict[str, Any] = {"mode": mode.value, "kind": kind.value}
    options = SparseOptions(**words)
    assert (options.mode, options.kind) == (mode, kind)
    assert options.mode is mode
    assert options.kind is kind


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"mode": "fast"}, "mode 'fast' is not known; use one of latency, concurrency"),
        ({"kind": "gsa"}, "kind 'gsa' is not known; use one of gsa-k4, gsa-2"),
        ({"budget": 0.3}, r"budget is a Budget, not 0.3; for example Budget\(ratio=0.3\)"),
        ({"concurrency_budget": 512}, r"concurrency_budget .* Budget\(tokens=512\)"),
        ({"certificate": "certified"}, "certificate is a CertifiedOptions or ConformalOptions"),
        ({"thresholds": 0.5}, "thresholds is a ModeThresholds"),
        ({"stride": "4"}, "stride is '4', must be a whole number"),
        ({"resident_blocks": 8.5}, "resident_blocks is 8.5, must be a whole number"),
        ({"stride": 0}, "stride is 0, must be >= 1"),
    ],
)
def test_nonsense_is_refused(change: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        SparseOptions(**change)


@pytest.mark.parametrize("name", ["sparse", "offload"])
def test_an_engine_is_told_by_options(name: str) -> None:
    words: dict[str, Any] = {name: "latency"}
    hint = r"sparse is a SparseOptions" if name == "sparse" else "offload is an OffloadOptions"
    with pytest.raises(ConfigError, match=hint):
        EngineOptions(**words)
