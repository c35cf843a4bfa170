"""Paths that cannot be looked at are refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from ucm.errors import ConfigError, PermissionDeniedError, UcmError
from ucm.path_errors import reachable

THERE = Path("/home/other/store")


@pytest.mark.parametrize("refusal", [PermissionDeniedError, ConfigError])
def test_a_folder_of_another_user(refusal: type[UcmError]) -> None:
    with (
        pytest.raises(refusal, match=r"/home/other/store .* another user: ask them$") as caught,
        reachable(THERE, "ask them", refusal),
    ):
        raise PermissionError(13, "Permission denied")
    assert isinstance(caught.value.__cause__, PermissionError)


def test_a_name_that_no_path_can_have(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    with pytest.raises(ConfigError, match=r"x: File name too long$"), reachable(path, "ask them"):
        path.stat()


def test_what_can_be_looked_at_is_not_touched(tmp_path: Path) -> None:
    with reachable(tmp_path, "ask them"):
        assert tmp_path.is_dir()
