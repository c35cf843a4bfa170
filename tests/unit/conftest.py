"""Fixtures that several modules of unit tests use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ucm.engine.model import LlamaModel
    from ucm.testing.stores import FakeStore


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    """The tiny decoder with four layers, in float32; a module that needs another has its own."""
    import torch

    from ucm.engine.loading import load_model
    from ucm.testing.models import write_tiny_model

    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), num_hidden_layers=4)
    return load_model(folder, torch.float32).model


@pytest.fixture
def store() -> Iterator[FakeStore]:
    """A store on a disk that fails when it is told to; flushed and checked at the end."""
    from ucm.testing.stores import FakeStore

    made = FakeStore()
    yield made
    made.disk.faults.reads_may_go.set()
    made.disk.faults.writes_may_go.set()
    made.cache.flush(timeout_s=5)
    assert made.manager.check_integrity() == []
    made.close()
