"""Readers of request traces: one record, whatever the file.

A reader declares the units of its format, and never guesses them:

    format    time                       block       ids
    mooncake  milliseconds, `timestamp`  512 tokens  `hash_ids`: one for each block of the prompt,
                                                     the same only after the same prefix

Mooncake: Qin et al., "Mooncake: Trading more storage for less computation", FAST 2025; its public
conversation trace has all arrivals of three seconds at one instant, which `smear` undoes.
Files may be compressed: `.gz`, `.zst`.
"""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from ucm.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512
MOONCAKE_BUCKET_NS = 3_000_000_000
_NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace."""

    t_ns: int
    """Arrival, from the beginning of the trace."""
    input_tokens: int
    output_tokens: int
    block_tokens: int
    """Tokens that each of `block_ids` stands for; the last one may stand for fewer."""
    block_ids: tuple[int, ...]
    """The prompt's blocks in order. An id names a block and everything before it."""
    category: str = ""
    """Kind of work, where the trace says."""


def read_mooncake(path: Path) -> list[TraceRequest]:
    """Read a trace in Mooncake's JSONL, in order of arrival; other keys than its own are ignored.

    Raises:
        ConfigError: the file is missing, or a line is not such a record; it names the line.
    """
    try:
        with _open(path) as lines:
            requests = [
                _mooncake_request(line, f"{path}:{number}")
                for number, line in enumerate(lines, start=1)
                if line.strip()
            ]
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from error
    return sorted(requests, key=lambda request: request.t_ns)


def write_mooncake(path: Path, requests: list[TraceRequest]) -> None:
    """Write requests of 512-token blocks in Mooncake's JSONL, uncompressed."""
    with path.open("w", encoding="utf-8") as file:
        for request in requests:
            assert request.block_tokens == MOONCAKE_BLOCK_TOKENS, request.block_tokens
            record = {
                "timestamp": request.t_ns // _NS_PER_MS,
                "input_length": request.input_tokens,
                "output_length": request.output_tokens,
                "hash_ids": request.block_ids,
            }
            file.write(json.dumps(record) + "\n")


def smear(requests: list[TraceRequest], seed: int, bucket_ns: int) -> list[TraceRequest]:
    """Spread arrivals that were rounded down to `bucket_ns` evenly over their bucket.

    Requests of one bucket come out in the order of their new times.
    """
    rng = random.Random(seed)
    spread = [
        replace(request, t_ns=request.t_ns + rng.randrange(bucket_ns)) for request in requests
    ]
    return sorted(spread, key=lambda request: request.t_ns)


def _mooncake_request(line: str, origin: str) -> TraceRequest:
    try:
        record = json.loads(line)
        ids = tuple(int(each) for each in record["hash_ids"])
        return TraceRequest(
            t_ns=int(record["timestamp"] * _NS_PER_MS),
            input_tokens=int(record["input_length"]),
            output_tokens=int(record["output_length"]),
            block_tokens=MOONCAKE_BLOCK_TOKENS,
            block_ids=ids,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{origin} is no record of a Mooncake trace (timestamp, input_length, output_length, "
            f"hash_ids): {error!r}"
        ) from error


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        import zstandard

        stream: IO[str] = zstandard.open(path, "rt", encoding="utf-8")
        return stream
    return path.open(encoding="utf-8")
