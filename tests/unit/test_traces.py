"""Trace readers: units as declared, compressed files, and what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import zstandard

from ucm.bench.traces import TraceRequest, read_mooncake, smear, write_mooncake
from ucm.errors import ConfigError

LINES = (
    '{"timestamp": 3000, "input_length": 1030, "output_length": 5, "hash_ids": [0, 7, 8]}\n'
    "\n"
    '{"timestamp": 0, "input_length": 600, "output_length": 9, "hash_ids": [0, 1], "extra": 1}\n'
)
REQUESTS = [
    TraceRequest(0, 600, 9, 512, (0, 1)),
    TraceRequest(3_000_000_000, 1030, 5, 512, (0, 7, 8)),
]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_mooncake_is_milliseconds_and_512_tokens(tmp_path: Path, suffix: str) -> None:
    packed = {
        "": LINES.encode(),
        ".gz": gzip.compress(LINES.encode()),
        ".zst": zstandard.ZstdCompressor().compress(LINES.encode()),
    }
    path = tmp_path / f"trace.jsonl{suffix}"
    path.write_bytes(packed[suffix])
    assert read_mooncake(path) == REQUESTS


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write_mooncake(path, REQUESTS)
    assert read_mooncake(path) == REQUESTS


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"timestamp": 1}',
        LINES.replace("[0, 7, 8]", '["x"]'),
        LINES.replace("3000", '"3"'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=r"trace.jsonl:1 is no record"):
        read_mooncake(path)


def test_a_file_that_is_missing_or_not_compressed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_mooncake(tmp_path / "none.jsonl")
    path = tmp_path / "trace.jsonl.gz"
    path.write_text(LINES)
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_mooncake(path)


def test_smearing_keeps_requests_in_their_bucket_and_the_seed_decides() -> None:
    bucket_ns = 3_000_000_000
    crowd = [TraceRequest(number // 10 * bucket_ns, number, 1, 512, ()) for number in range(100)]
    spread = smear(crowd, 1, bucket_ns)
    assert spread == smear(crowd, 1, bucket_ns)
    assert spread != smear(crowd, 2, bucket_ns)
    times = [request.t_ns for request in spread]
    assert times == sorted(times)
    assert len(set(times)) == 100
    assert [t // bucket_ns for t in times] == [number // 10 for number in range(100)]
