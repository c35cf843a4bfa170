"""What `ucm generate --chunk` tells of its documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ucm
from ucm.cli import main
from ucm.cli.chunk_report import (
    ChunkFate,
    chunk_fates,
    fate_line,
    reuse_figures,
    reuse_line,
    unstored_hint,
)
from ucm.connectors.cached_engine import CachedEngine
from ucm.engine.loading import load_model
from ucm.engine.reuse_report import FallbackReason, ReuseReport
from ucm.reuse.segments import Chunk
from ucm.testing.blend_engines import ask, new_engine, prompt_of
from ucm.testing.models import write_tiny_model


def test_what_is_told_of_a_request() -> None:
    report = ReuseReport(
        num_chunks=3, num_chunk_tokens=1000, num_loaded_tokens=600, num_encoded_tokens=320, cost=0.2
    )
    line = reuse_line(report)
    for words in ("1,000 tokens (600 loaded", "20%", "480 tokens' worth saved"):
        assert words in line
    guarded = ReuseReport(num_chunk_tokens=1, drift=0.4, num_guarded=2)
    assert "drift 0.40; 2 chunks" in reuse_line(guarded)
    assert "prefix cache" in reuse_line(ReuseReport(num_chunks=1))
    figures = reuse_figures(report)
    assert figures is not None
    assert (figures["num_recomputed_tokens"], figures["num_saved_tokens"]) == (200.0, 480.0)
    assert reuse_figures(None) is None


def test_a_first_run_saves_nothing_and_says_what_does() -> None:
    first = ReuseReport(num_chunks=1, num_chunk_tokens=256, num_encoded_tokens=256, cost=0.18)
    assert first.num_saved_tokens < 0
    line = reuse_line(first)
    assert "the next one loads them" in line
    assert "-" not in line
    exact = ReuseReport(num_chunks=1, num_chunk_tokens=256, num_encoded_tokens=256)
    assert "the next one loads them" in reuse_line(exact)
    assert "without --cache" in reuse_line(first, is_cached=False)
    unkept = reuse_line(first, is_kept=False)
    assert unkept.endswith("nothing saved: this run computed them"), "and promises nothing"


@pytest.mark.parametrize("reason", FallbackReason)
def test_a_fallback_is_told_in_words(reason: FallbackReason) -> None:
    line = reuse_line(ReuseReport(fallback=reason))
    assert line.startswith("chunks: nothing was reused, the prompt was computed whole: ")
    assert "_" not in line, "words, not the name of a member"
    assert len(line) > 80


def test_a_line_a_chunk() -> None:
    fate = ChunkFate(
        file="a.txt",
        number=2,
        num_tokens=300,
        num_tail_tokens=12,
        num_found_tokens=32,
        num_loaded_tokens=64,
        num_computed_tokens=192,
        num_losses=1,
        is_used=True,
        is_stored=True,
    )
    assert fate_line(fate) == (
        "a.txt, chunk 2: 300 tokens; 64 loaded; 32 in the engine's pool; 192 computed for the "
        "first time; 12 at the end, too few for a block, computed with each prompt; its load came "
        "short 1 time; stored"
    )
    unused = ChunkFate(file="b", number=1, num_tokens=64, num_tail_tokens=0)
    assert fate_line(unused) == "b, chunk 1: 64 tokens; not looked for"
    assert unstored_hint([fate, unused]) is None


def test_each_of_many_chunks_is_told_and_counts_once(tmp_path: Path) -> None:
    """However many a prompt has; one that stands in it twice is computed once."""
    num_chunks = 70
    loaded = load_model(write_tiny_model(tmp_path / "tiny", num_hidden_layers=2), torch.float32)
    engine = new_engine(loaded.model, num_blocks=600)
    texts = [(3 + i, 4 + i, 7, 9) for i in range(num_chunks)]
    prompt = prompt_of(engine, *texts, texts[0])
    result = ask(engine, prompt)
    assert result.reuse is not None
    assert len(result.reuse.chunks) == num_chunks
    chunks: list[list[Chunk]] = [[span.chunk] for span in prompt.spans]
    paths = [Path(f"{number}.txt") for number in range(len(chunks))]
    fates = chunk_fates(paths, chunks, CachedEngine(loaded, engine, None), result.reuse)
    assert all(fate.is_used for fate in fates)
    num_computed = [fate.num_computed_tokens for fate in fates]
    assert num_computed == [4] * num_chunks + [0]
    assert sum(num_computed) == result.reuse.num_encoded_tokens
    assert [fate.is_repeated for fate in fates] == [False] * num_chunks + [True]
    assert fate_line(fates[-1]) == "70.txt, chunk 1: 4 tokens; the same as a chunk before it"
    figures = reuse_figures(result.reuse)
    assert figures is not None
    assert "chunks" not in figures, "they are told one by one, and without their tokens"
    assert "token_ids" not in repr(result.reuse)


@pytest.mark.timeout(60)
def test_each_chunk_is_explained_and_a_deleted_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, store = write_tiny_model(tmp_path / "tiny"), tmp_path / "store"
    path = tmp_path / "a.txt"
    path.write_text("the layer of the cache and the block " * 30)
    asked = ["generate", "--prompt", "why?", "--max-tokens", "1", "--chunk", str(path)]

    def run(*arguments: str) -> tuple[str, str]:
        common = ("--model", str(tiny), "--cache", str(store))
        monkeypatch.setattr("sys.argv", ["ucm", *arguments, *common])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert not ended.value.code, captured.err
        return captured.out, captured.err

    _, first = run(*asked, "--explain")
    assert f"{path}, chunk 1: " in first
    assert "computed for the first time; " in first
    assert "; stored\n" in first
    assert "the next one loads them" in first
    _, second = run(*asked, "--explain")
    line = next(line for line in second.splitlines() if line.startswith(f"{path}, chunk 1: "))
    assert " loaded" in line
    assert "first time" not in line

    run("collection", "add", "docs", str(path))
    with ucm.open(store) as cache:
        cache.collections.remove("docs")
    for _ in range(2):
        out, err = run(*asked, "--json")
        reply = json.loads(out)
        assert [chunk["is_stored"] for chunk in reply["chunks"]] == [False] * len(reply["chunks"])
    _, err = run(*asked)
    assert f"the cache did not keep all of {path}" in err
    assert "the next one loads them" not in err
    assert "ucm collection add" in err
    run("collection", "add", "docs", str(path))
    _, err = run(*asked)
    assert "did not keep" not in err
