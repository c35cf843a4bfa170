"""`--chunk` and `--recompute`: what cannot be is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ucm.cli.generate import GenerateOptions
from ucm.cli.reuse_flags import chunk_texts, document_prompts, reuse_options
from ucm.engine.chunk_prompts import ChunkPrompts
from ucm.engine.tokenizer import Tokenizer
from ucm.errors import ConfigError
from ucm.reuse.options import RecomputePolicy, ReuseTarget
from ucm.testing.models import tiny_tokenizer

PROMPTS = ChunkPrompts(Tokenizer(tiny_tokenizer(), eos_ids=[2]), is_chat=False)


def test_texts_come_in_the_order_that_was_given(tmp_path: Path) -> None:
    for name in "ba":
        (tmp_path / name).write_text(f"text {name}")
    flags = GenerateOptions(chunk=[tmp_path / "b", tmp_path / "a", tmp_path / "b"])
    assert chunk_texts(flags) == ["text b", "text a", "text b"]
    assert chunk_texts(GenerateOptions()) == []


@pytest.mark.parametrize(
    ("data", "words"), [(b"", "empty"), (b"\0", "not text"), (b"\xff", "not utf-8"), (None, "read")]
)
def test_a_file_that_is_no_text(data: bytes | None, words: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "file").write_bytes(data)
    with pytest.raises(ConfigError, match=rf"--chunk .*/file: .*{words}"):
        chunk_texts(GenerateOptions(chunk=[tmp_path / "file"]))
    with pytest.raises(ConfigError, match="not a regular file"):
        chunk_texts(GenerateOptions(chunk=[tmp_path]))


@pytest.mark.parametrize("recompute", ["1.1", "-0.1", "nan", "inf", "fast", "", "none"])
def test_a_share_that_is_none(recompute: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quality or latency"):
        chunk_texts(GenerateOptions(chunk=[tmp_path / "absent"], recompute=recompute))
    with pytest.raises(ConfigError, match="nothing without --chunk"):
        chunk_texts(GenerateOptions(recompute=recompute))


def test_what_the_engine_is_told() -> None:
    assert reuse_options(None, PROMPTS).blend.policy is RecomputePolicy.PROGRESSIVE
    assert reuse_options("0.3", PROMPTS).blend.budget == 0.3
    assert reuse_options("0", PROMPTS).blend.policy is RecomputePolicy.NONE
    assert reuse_options("1", PROMPTS).blend.policy is RecomputePolicy.FULL
    quality = reuse_options("quality", PROMPTS)
    assert (quality.target, quality.blend.guard_tokens > 0) == (ReuseTarget.QUALITY, True)
    assert reuse_options("latency", PROMPTS).target is ReuseTarget.LATENCY
    assert quality.sink_tokens == PROMPTS.sink_tokens


def test_a_context_is_the_end_of_a_text(tmp_path: Path) -> None:
    file = tmp_path / "sample.txt"
    file.write_text("the cache and the block " * 400)
    own = Tokenizer(tiny_tokenizer(), eos_ids=[2])
    bare = document_prompts(own, is_chat=False)
    prompts = document_prompts(own, is_chat=False, context=file)
    tokens = own.encode_plain(file.read_text())
    assert prompts.sink_tokens == (*bare.sink_tokens, *tokens[-1024:])


def test_a_context_that_is_none(tmp_path: Path) -> None:
    own = Tokenizer(tiny_tokenizer(), eos_ids=[2])
    with pytest.raises(ConfigError, match=r"--context .*not a regular file"):
        document_prompts(own, is_chat=False, context=tmp_path)
    with pytest.raises(ConfigError, match="--context does nothing without --chunk"):
        chunk_texts(GenerateOptions(context=tmp_path / "absent"))
