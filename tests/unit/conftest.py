"""Fixtures that several modules of unit tests use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ucm.engine.model import LlamaModel


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    """The tiny decoder with four layers, in float32; a module that needs another has its own."""
    import torch

    from ucm.engine.loading import load_model
    from ucm.testing.models import write_tiny_model

    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), num_hidden_layers=4)
    return load_model(folder, torch.float32).model
