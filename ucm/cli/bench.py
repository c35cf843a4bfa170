"""`ucm bench NAME`: measurements, each beside the ceiling measured in the same run."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from ucm import model_hub

from .console import print_json
from .options import JsonOption

command = typer.Typer(help="Measure.", no_args_is_help=True, add_completion=False)


@command.callback()
def _group() -> None:
    """Measure."""


@command.command()
def engine(
    quick: Annotated[
        bool, typer.Option("--quick", help="512 tokens only; about a minute.")
    ] = False,
    model: Annotated[
        str, typer.Option(metavar="NAME|PATH", help="A model's folder or GGUF file, or its name.")
    ] = "smollm2-135m",
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp32 or bf16; may be repeated; default: both.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of both engines; default: PyTorch's.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prefill and decode of the reference engine against Transformers and the machine's floor."""
    from ucm.bench.engine import EngineBenchOptions, engine_bench_table, run_engine_bench

    path = model_hub.resolve(model)
    options = EngineBenchOptions(model_path=path, threads=threads)
    if dtype:
        options = EngineBenchOptions(model_path=path, threads=threads, dtypes=tuple(dtype))
    result = run_engine_bench(
        options.quick() if quick else options, lambda line: print(line, file=sys.stderr)
    )
    if as_json:
        print_json(result)
    else:
        Console(highlight=False).print(engine_bench_table(result))


@command.command()
def codecs(
    quick: Annotated[
        bool, typer.Option("--quick", help="One pass over the blocks; below a minute.")
    ] = False,
    model: Annotated[
        str, typer.Option(metavar="NAME|PATH", help="A model's folder or GGUF file, or its name.")
    ] = "smollm2-135m",
    as_json: JsonOption = False,
) -> None:
    """Size, speed and fidelity of the codecs at rest on a real model's KV."""
    from ucm.bench.codecs import CodecBenchOptions, codec_bench_table, run_codec_bench

    options = CodecBenchOptions(model_path=model_hub.resolve(model))
    result = run_codec_bench(
        options.quick() if quick else options, lambda line: print(line, file=sys.stderr)
    )
    if as_json:
        print_json(result)
    else:
        Console(highlight=False).print(codec_bench_table(result))
