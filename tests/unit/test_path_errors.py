"""Paths that cannot be looked at are refused in words."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ucm.errors import (
    CapacityError,
    ConfigError,
    PermissionDeniedError,
    TierUnavailableError,
    UcmError,
)
from ucm.path_errors import path_error, reachable

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
    with (
        pytest.raises(ConfigError, match=r"x: File name too long; name"),
        reachable(path, "ask them"),
    ):
        path.stat()


def test_what_can_be_looked_at_is_not_touched(tmp_path: Path) -> None:
    with reachable(tmp_path, "ask them"):
        assert tmp_path.is_dir()


@pytest.mark.parametrize(
    ("code", "kind", "advice"),
    [
        (errno.ENOTDIR, ConfigError, "name another path"),
        (errno.EIO, TierUnavailableError, "dmesg"),
        (errno.ESTALE, TierUnavailableError, "dmesg"),
        (errno.ENOSPC, CapacityError, "free some"),
    ],
)
def test_a_disk_that_fails_is_no_mistake_of_the_user(
    code: int, kind: type[UcmError], advice: str
) -> None:
    with pytest.raises(UcmError) as caught, reachable(THERE, "ask them"):
        raise OSError(code, os.strerror(code))
    assert type(caught.value) is kind
    assert str(THERE) in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    assert advice in str(caught.value)


def test_an_error_without_words_of_the_system() -> None:
    assert "odd" in str(path_error(OSError("odd"), "cannot open it", "leave it"))
