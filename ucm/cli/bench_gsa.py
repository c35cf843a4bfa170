"""`ucm bench gsa`: its options, and what becomes of its result."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ucm import model_hub
from ucm.errors import ConfigError

from .console import ExitCode, say, show_result
from .options import DEFAULT_MODEL, JsonOption, ModelOption
from .termination import unwinding_on_sigterm

if TYPE_CHECKING:
    from ucm.bench.gsa import GsaBenchOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class GsaOptions:
    """What the command line asks for."""

    quick: Annotated[
        bool, typer.Option("--quick", help="One short document, less of all else; below 50 s.")
    ] = False
    document: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A text in UTF-8 to measure on, instead of our own; may be repeated.",
        ),
    ] = None
    tokens: Annotated[
        int | None, typer.Option(min=512, help="That a document is cut to; default: 4096.")
    ] = None
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="STEPS",
            help="That a layer keeps its choice for. Default: quality of a choice for every token, "
            "times of the engine's default.",
        ),
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw quality against bytes read: .png, .svg or .pdf."),
    ] = None
    model: ModelOption = DEFAULT_MODEL
    as_json: JsonOption = False


def run_gsa(options: GsaOptions) -> None:
    """Measure and report.

    Raises:
        ConfigError: an option that makes no sense, or a document that is none.
        Exit: with 2 where the plot could not be written.
    """
    if options.plot is not None:
        check_plot_file(options.plot)
    wanted = bench_options(options)
    from ucm.bench.gsa import run_gsa_bench
    from ucm.bench.gsa_report import gsa_bench_report

    with unwinding_on_sigterm():
        result = run_gsa_bench(wanted, say)
    # Before the file: a disk that is full now must not cost what took minutes.
    show_result(result, gsa_bench_report, as_json=options.as_json)
    if options.plot is not None:
        from ucm.bench.gsa_plot import save_plot

        draw(partial(save_plot, result), options.plot)


def bench_options(options: GsaOptions) -> GsaBenchOptions:
    """The benchmark's options for those of the command line.

    Raises:
        ConfigError: there is no such model.
    """
    from ucm.bench.gsa import GsaBenchOptions

    found = GsaBenchOptions(
        model_path=model_hub.resolve(options.model),
        documents=tuple(options.document or ()),
        stride=options.stride,
    )
    found = found.quick() if options.quick else found
    if options.tokens is not None:
        found = replace(found, max_tokens=options.tokens, own_max_tokens=options.tokens)
    return found


def check_plot_file(path: Path) -> None:
    """Complain now about what would fail after the measurement.

    Raises:
        ConfigError: the plot could not be drawn or written.
    """
    from ucm.bench.gsa_plot import check_plot

    check_plot(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: `pip install 'ucm-cache[plot]'`")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is no folder: create it, or write {path.name} elsewhere")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written: name another file")


def draw(save: Callable[[Path], None], path: Path) -> None:
    """Write a plot; the result is on standard output already.

    Raises:
        Exit: with 2 where it cannot be written.
    """
    try:
        save(path)
    except OSError as error:
        # No second JSON object.
        print(f"ucm: cannot write {path}: {error.strerror}", file=sys.stderr)
        raise typer.Exit(ExitCode.WRONG_USE) from error
