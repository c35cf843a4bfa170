from __future__ import annotations

from pathlib import Path

import pytest

from ucm.errors import TierUnavailableError
from ucm.testing.models import find_real_model, require_real_model


def refuse(*_arguments: object) -> None:
    raise TierUnavailableError("no registry")


@pytest.fixture
def without_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    monkeypatch.setattr("platformdirs.user_cache_path", lambda _name: tmp_path)
    monkeypatch.setattr("ucm.testing.models.pull", refuse)
    monkeypatch.delenv("UCM_TEST_MODEL", raising=False)
    monkeypatch.delenv("CI", raising=False)
    return monkeypatch


def test_a_missing_model_skips_with_a_reason(without_model: pytest.MonkeyPatch) -> None:
    assert find_real_model() is None
    with pytest.raises(pytest.skip.Exception, match="no registry"):
        require_real_model()


def test_a_missing_model_fails_in_ci(without_model: pytest.MonkeyPatch) -> None:
    without_model.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no registry"):
        require_real_model()


def test_finds_the_named_and_the_pulled_model(
    without_model: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pulled = tmp_path / "models" / "smollm2-135m"
    pulled.mkdir(parents=True)
    (pulled / "x.gguf").touch()
    assert require_real_model() == pulled
    named = tmp_path / "named.gguf"
    named.touch()
    without_model.setenv("UCM_TEST_MODEL", str(named))
    assert require_real_model() == named
