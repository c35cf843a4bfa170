"""A cached engine: what its parts know of each other."""

from __future__ import annotations

from pathlib import Path

import ucm
from ucm.connectors.cached_engine import CachedEngineOptions, open_engine
from ucm.engine.engine import EngineOptions
from ucm.engine.loading import load_model
from ucm.engine.scheduler import SchedulerOptions
from ucm.testing.models import write_tiny_model


def test_the_cost_model_knows_the_engines_steps(tmp_path: Path) -> None:
    scheduler = SchedulerOptions(max_sequences=4, max_step_tokens=96, prefill_chunk_tokens=128)
    options = CachedEngineOptions(engine=EngineOptions(num_blocks=16, scheduler=scheduler))
    loaded = load_model(write_tiny_model(tmp_path / "tiny"))
    with open_engine(loaded, lambda: ucm.open(tmp_path / "store"), options) as cached:
        assert cached.session is not None
        known = cached.session.loads.model.options
        assert (known.chunk_tokens, known.joined_tokens) == (96, 96)
