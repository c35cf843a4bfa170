"""`ucm bench NAME`: measurements, each beside the ceiling measured in the same run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ucm import model_hub
from ucm.config_values import parse_size
from ucm.errors import ConfigError

from .bench_overlap import OverlapOptions, run_overlap
from .console import ExitCode, print_json
from .option_class import takes_options
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
def storage(
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything; below 50 s.")] = False,
    path: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where to measure; default: beside the store."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes of one NVMe round; default 512MiB.")
    ] = None,
    lmcache_python: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Interpreter of an environment that has LMCache."),
    ] = None,
    allow_tmpfs: Annotated[
        bool, typer.Option("--allow-tmpfs", help="Measure even where files are memory.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """The store beside the machine's ceilings (memcpy, fio) and other stores, in one run."""
    from dataclasses import replace

    from ucm.bench.storage import run_storage_bench
    from ucm.bench.storage_measure import StorageBenchOptions
    from ucm.bench.storage_report import storage_bench_report

    options = StorageBenchOptions(path=path, allow_tmpfs=allow_tmpfs, lmcache_python=lmcache_python)
    if size is not None:
        try:
            options = replace(options, size_bytes=parse_size(size))
        except ValueError as error:
            raise ConfigError(f"--size {size}: write it as 512MiB") from error
    result = run_storage_bench(
        options.quick() if quick else options, lambda line: print(line, file=sys.stderr)
    )
    if as_json:
        print_json(result)
    else:
        Console(highlight=False).print(storage_bench_report(result))
    if result["wrong_bytes"]:
        raise typer.Exit(ExitCode.CHECK_FAILED)


@command.command()
def policy(
    trace: Annotated[
        str,
        typer.Option(
            metavar="KIND|PATH",
            help="chat, rag, agent, scan or mixed (made by chance), or a Mooncake trace.",
        ),
    ] = "chat",
    seed: Annotated[int, typer.Option(help="Of a trace made by chance, and of smearing.")] = 0,
    model: Annotated[
        str, typer.Option(help="What a hit saves: smollm2-135m or llama-3-8b.")
    ] = "smollm2-135m",
    admission: Annotated[
        str, typer.Option(help="What is stored at all: always or second-touch.")
    ] = "always",
    quick: Annotated[
        bool, typer.Option("--quick", help="4,000 requests, three sizes; below a minute.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Eviction policies on a trace: recomputation saved for each GB, against LRU and the ideal."""
    from ucm.bench.policy import PolicyBenchOptions, policy_bench_table, run_policy_bench
    from ucm.bench.synthetic import KINDS, SyntheticOptions

    made = trace in KINDS
    options = PolicyBenchOptions(
        trace_path=None if made else Path(trace),
        synthetic=SyntheticOptions(kind=trace if made else KINDS[0], seed=seed),
        model=model,
        admission=admission,
        seed=seed,
    )
    result = run_policy_bench(
        options.quick() if quick else options, lambda line: print(line, file=sys.stderr)
    )
    if as_json:
        print_json(result)
    else:
        Console(highlight=False).print(policy_bench_table(result))


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


@command.command()
@takes_options(OverlapOptions)
def overlap(options: OverlapOptions) -> None:
    """Time to the first token: loading, computing, and both at once, by the disk's bandwidth."""
    run_overlap(options)
