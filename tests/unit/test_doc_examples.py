"""The examples of the documentation run, and say what the text says."""

from __future__ import annotations

import re
import runpy
import textwrap
from pathlib import Path
from typing import Any

import pytest

from ucm.engine.loading import load_model
from ucm.engine.sampling import SamplingParams
from ucm.testing.models import write_tiny_model
from ucm.testing.reference import DOCS

EXAMPLES = DOCS / "examples"


def test_select_on_an_embedded_cache(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "select_blocks.py"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.fullmatch(r"layer [01]: 12 of 40 blocks, mass 0\.[3-9]\d", line)


def test_a_context_larger_than_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["beyond_the_pool.py", str(write_tiny_model(tmp_path / "m"))])
    runpy.run_path(str(EXAMPLES / "beyond_the_pool.py"))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "8 tokens, 7 sparse steps"
    counts = re.fullmatch(r"read (\d+) of (\d+) blocks", second)
    assert counts is not None
    assert 0 < int(counts[1]) < 0.4 * int(counts[2])


def test_a_certificate_and_where_its_numbers_are(tmp_path: Path) -> None:
    """The example of docs/sparse-certificates.md as it stands there."""
    text = (DOCS / "sparse-certificates.md").read_text()
    lines = text.partition("    from ucm.engine")[2].partition("\n\nAll options")[0]
    loaded = load_model(write_tiny_model(tmp_path / "m"))
    names: dict[str, Any] = {"model": loaded.model, "tokenizer": loaded.tokenizer}
    exec(textwrap.dedent("    from ucm.engine" + lines), names)
    with names["engine"] as engine:
        prompt = [3 + (i * i + 7 * i) % 90 for i in range(1100)]
        engine.generate_all([prompt], SamplingParams(max_tokens=3, ignore_eos=True))
        assert engine.promises.certified.layers > 0
        assert engine.sparse_stats.blocks_read > 0
