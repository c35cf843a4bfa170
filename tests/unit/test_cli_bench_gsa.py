"""`ucm bench gsa` refuses a plot that cannot be, before it measures or asks for a package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from ucm.cli.bench_gsa import check_plot_file
from ucm.errors import ConfigError


@pytest.fixture(autouse=True)
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_a_format_that_cannot_be_is_refused_whatever_is_installed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out\.gif: name it \.png, \.svg, \.pdf"):
        check_plot_file(tmp_path / "out.gif")


def test_a_plot_that_could_be_asks_for_the_package(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ucm-cache\[plot\]"):
        check_plot_file(tmp_path / "out.svg")
