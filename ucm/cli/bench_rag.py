"""`ucm bench rag`: its options, and what becomes of its result."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ucm import model_hub

from .bench_gsa import check_plot_file, draw
from .console import say, show_result
from .options import DEFAULT_MODEL, JsonOption, ModelOption
from .termination import unwinding_on_sigterm

if TYPE_CHECKING:
    from ucm.bench.rag import RagBenchOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class RagOptions:
    """What the command line asks for."""

    quick: Annotated[
        bool,
        typer.Option("--quick", help="One prompt of short chunks, less of all else; below 50 s."),
    ] = False
    documents: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="A folder of texts in UTF-8 to cut prompts from, instead of ours."
        ),
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw quality against cost: .png, .svg or .pdf."),
    ] = None
    model: ModelOption = DEFAULT_MODEL
    as_json: JsonOption = False


def run_rag(options: RagOptions) -> None:
    """Measure and report.

    Raises:
        ConfigError: an option that makes no sense, or a folder without texts.
        Exit: with 2 where the plot could not be written.
    """
    if options.plot is not None:
        check_plot_file(options.plot)
    wanted = bench_options(options)
    from ucm.bench.rag import run_rag_bench
    from ucm.bench.rag_plot import save_plot
    from ucm.bench.rag_report import rag_bench_report

    with unwinding_on_sigterm():
        result = run_rag_bench(wanted, say)
    # Before the file: a disk that is full now must not cost what took minutes.
    show_result(result, rag_bench_report, as_json=options.as_json)
    if options.plot is not None:
        draw(partial(save_plot, result), options.plot)


def bench_options(options: RagOptions) -> RagBenchOptions:
    """The benchmark's options for those of the command line.

    Raises:
        ConfigError: there is no such model.
    """
    from ucm.bench.rag import RagBenchOptions

    path = model_hub.resolve(options.model)
    found = RagBenchOptions(model_path=path, documents=options.documents)
    return found.quick() if options.quick else found
