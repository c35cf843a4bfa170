"""`ucm.bench.codecs` on the tiny model: the shape of its result, and what speed cannot change."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from ucm.bench.codecs import CodecBenchOptions, codec_bench_table, run_codec_bench
from ucm.errors import ConfigError
from ucm.testing.models import require_real_model, write_tiny_model


@pytest.mark.timeout(120)
def test_measures_every_codec_beside_a_copy(tmp_path: Path) -> None:
    lines: list[str] = []
    options = CodecBenchOptions(
        model_path=write_tiny_model(tmp_path / "tiny"), context_tokens=96, next_tokens=12
    )
    result = run_codec_bench(options.quick(), lines.append)
    assert result["memcpy_gb_s"] > 0
    assert list(result["codecs"]) == ["raw", "bp-zstd", "int8", "fp8", "int4"]
    for name, row in result["codecs"].items():
        assert row["exact"] == (name in {"raw", "bp-zstd"}), name
        assert row["encode_gb_s"] > 0 < row["decode_gb_s"]
        assert 0 < row["ratio_on_disk"] <= row["ratio"] + 1e-9
        if row["exact"]:
            assert (row["rel_err_k"], row["rel_err_v"], row["kl"], row["top1"]) == (0, 0, 0, 1)
        else:
            assert 0 < row["rel_err_k"] < 0.2 > row["rel_err_v"] > 0
            assert 0 <= row["kl"] < 0.5
    stream = io.StringIO()
    Console(file=stream, width=120).print(codec_bench_table(result))
    assert "bp-zstd" in stream.getvalue()
    assert lines[-1] == "int4"


def test_refuses_a_context_that_is_no_whole_number_of_blocks(tmp_path: Path) -> None:
    options = CodecBenchOptions(model_path=write_tiny_model(tmp_path / "tiny"), context_tokens=100)
    with pytest.raises(ConfigError, match="multiple of 32"):
        run_codec_bench(options)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_models_kv_keeps_what_the_codecs_promise() -> None:
    rows = run_codec_bench(CodecBenchOptions(model_path=require_real_model()).quick())["codecs"]
    assert rows["bp-zstd"]["ratio"] >= 1.40
    assert rows["bp-zstd"]["exact"]
    assert rows["int8"]["ratio"] >= 1.8
    assert rows["int8"]["kl"] <= 2e-4
    assert rows["int4"]["ratio"] >= 3.0
    assert rows["int4"]["kl"] <= 1e-2
