"""`ucm bench overlap`: its options, and what becomes of its result."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ucm import model_hub
from ucm.errors import ConfigError
from ucm.types import TierKind

from .console import ExitCode, say, show_result
from .options import DEFAULT_MODEL, JsonOption, ModelOption
from .termination import unwinding_on_sigterm

if TYPE_CHECKING:
    from ucm.bench.overlap import OverlapOutcome
    from ucm.bench.overlap_cells import OverlapBenchOptions

UNLIMITED = "unlimited"


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapOptions:
    """What the command line asks for."""

    quick: Annotated[bool, typer.Option("--quick", help="Two cells of 512 tokens; below 50 s.")] = (
        False
    )
    bandwidth: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MB/S",
            help="Of the disk (memory is only measured unlimited); a number or `unlimited`; "
            "may be repeated. Default: 1, 3, 10, 30, 100, unlimited.",
        ),
    ] = None
    hit_ratio: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of the prompt in the cache; may be repeated. Default: 0.5, 0.9, 1.",
        ),
    ] = None
    context: Annotated[
        list[int] | None,
        typer.Option(
            min=64, help="Tokens of the prompt; may be repeated. Default: 1024, 3072, 6144."
        ),
    ] = None
    tier: Annotated[
        list[str] | None,
        typer.Option(
            help="nvme (the default), or memory, which no --bandwidth limits; may be repeated."
        ),
    ] = None
    every_cell: Annotated[
        bool,
        typer.Option(
            "--every-cell",
            help="All combinations of bandwidth, hit ratio and context, not only enough for all "
            "pairs; about an hour.",
        ),
    ] = False
    repeats: Annotated[
        int,
        typer.Option(min=1, help="Runs of each way, at least; quick ones get three. Medians."),
    ] = 1
    decode_rounds: Annotated[
        int | None,
        typer.Option(
            min=0, help="Decodes with storing on, and as many with it off; 0: none. Default: 6."
        ),
    ] = None
    model: ModelOption = DEFAULT_MODEL
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32"
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the store of the benchmark lies. Default: temporary files.",
        ),
    ] = None
    trace_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a timeline for Perfetto or chrome://tracing."),
    ] = None
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page that draws the most telling cell."),
    ] = None
    as_json: JsonOption = False


def run_overlap(options: OverlapOptions) -> None:
    """Measure and report.

    Raises:
        ConfigError: an option that makes no sense.
        Exit: with 1 where bytes or tokens were wrong, 2 where a file could not be written.
    """
    for path in _files_of(options):
        _check_writable(path)
    from ucm.bench.overlap import run_overlap_bench
    from ucm.bench.overlap_report import overlap_bench_table

    with unwinding_on_sigterm():
        outcome = run_overlap_bench(bench_options(options), say)
    result = outcome.result
    # Before the files: a disk that is full now must not cost what took hours.
    show_result(result, overlap_bench_table, as_json=options.as_json)
    is_written = _write_files(options, outcome)
    if result["wrong_bytes"] or not all(cell["identical_tokens"] for cell in result["cells"]):
        raise typer.Exit(ExitCode.CHECK_FAILED)
    if not is_written:
        raise typer.Exit(ExitCode.WRONG_USE)


def bench_options(options: OverlapOptions) -> OverlapBenchOptions:
    """The benchmark's options for those of the command line.

    Raises:
        ConfigError: a bandwidth or a tier that is none.
    """
    from ucm.bench.overlap_cells import OverlapBenchOptions

    found = OverlapBenchOptions(
        model_path=model_hub.resolve(options.model),
        dtype=options.dtype,
        repeats=options.repeats,
        every_cell=options.every_cell,
        store=options.store,
    )
    found = found.quick() if options.quick else found
    if options.bandwidth:
        found = replace(found, bandwidths_mb_s=tuple(map(_bandwidth, options.bandwidth)))
    if options.hit_ratio:
        found = replace(found, hit_ratios=tuple(options.hit_ratio))
    if options.context:
        found = replace(found, context_tokens=tuple(options.context))
    if options.decode_rounds is not None:
        found = replace(found, decode_rounds=options.decode_rounds)
    if options.tier:
        found = replace(found, tiers=tuple(map(_tier, options.tier)))
    return found


def _bandwidth(text: str) -> float | None:
    if text == UNLIMITED:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise ConfigError(f"--bandwidth {text}: write MB/s as a number, or `{UNLIMITED}`")
    return value


def _tier(text: str) -> TierKind:
    try:
        return TierKind(text)
    except ValueError as error:
        raise ConfigError(f"--tier {text}: nvme or memory") from error


def _files_of(options: OverlapOptions) -> list[Path]:
    return [path for path in (options.trace_out, options.html) if path is not None]


def _check_writable(path: Path) -> None:
    """Complain now about what would fail after the measurement."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is no folder: create it, or write {path.name} elsewhere")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written: name another file")


def _write_files(options: OverlapOptions, outcome: OverlapOutcome) -> bool:
    """Write what was asked for; whether all of it could be, and a line for what could not."""
    from ucm.bench.overlap_report import overlap_page, overlap_trace

    texts = {}
    if options.trace_out is not None:
        texts[options.trace_out] = json.dumps(overlap_trace(outcome.timelines))
    if options.html is not None:
        texts[options.html] = overlap_page(outcome.result, outcome.timelines)
    is_written = True
    for path, text in texts.items():
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            # No second JSON object: the result is on standard output already.
            print(f"ucm: cannot write {path}: {error.strerror}", file=sys.stderr)
            is_written = False
    return is_written
