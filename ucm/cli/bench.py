"""`ucm bench NAME`: measurements, each beside the ceiling measured in the same run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from ucm import model_hub
from ucm.config_values import parse_size
from ucm.errors import ConfigError

from .bench_gsa import GsaOptions, run_gsa
from .bench_overlap import OverlapOptions, run_overlap
from .bench_rag import RagOptions, run_rag
from .console import ExitCode, say, show_result
from .option_class import takes_options
from .options import DEFAULT_MODEL, JsonOption, ModelOption
from .termination import unwinding_on_sigterm

command = typer.Typer(help="Measure.", no_args_is_help=True, add_completion=False)


@command.callback()
def _group() -> None:
    """Measure."""


@command.command()
def engine(
    quick: Annotated[
        bool, typer.Option("--quick", help="512 tokens only; about a minute.")
    ] = False,
    model: ModelOption = DEFAULT_MODEL,
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
    result = run_engine_bench(options.quick() if quick else options, say)
    show_result(result, engine_bench_table, as_json=as_json)


@command.command()
def storage(
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything; below 50 s.")] = False,
    path: Annotated[
        Path | None,
        typer.Option(
            "--path",
            "--store",
            metavar="FOLDER",
            help="Where to measure. Default: beside the store.",
        ),
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
    from ucm.bench.storage import run_storage_bench
    from ucm.bench.storage_measure import StorageBenchOptions
    from ucm.bench.storage_report import storage_bench_report

    options = StorageBenchOptions(path=path, allow_tmpfs=allow_tmpfs, lmcache_python=lmcache_python)
    if size is not None:
        try:
            options = replace(options, size_bytes=parse_size(size))
        except ValueError as error:
            raise ConfigError(f"--size {size}: write it as 512MiB") from error
    with unwinding_on_sigterm():
        result = run_storage_bench(options.quick() if quick else options, say)
    show_result(result, storage_bench_report, as_json=as_json)
    if result["wrong_bytes"]:
        raise typer.Exit(ExitCode.CHECK_FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """What the command line asks of the simulation of policies."""

    trace: Annotated[
        str,
        typer.Option(
            metavar="KIND|PATH",
            help="chat, rag, agent, scan or mixed (made by chance), or a Mooncake trace.",
        ),
    ] = "chat"
    seed: Annotated[int, typer.Option(help="Of a trace made by chance, and of smearing.")] = 0
    model: Annotated[str, typer.Option(help="What a hit saves: smollm2-135m or llama-3-8b.")] = (
        "smollm2-135m"
    )
    admission: Annotated[
        str, typer.Option(help="What is stored at all: always or second-touch.")
    ] = "always"
    policy: Annotated[
        list[str] | None,
        typer.Option(help="lru, s3-fifo or tree-gdsf; may be repeated; default: all."),
    ] = None
    working_set: Annotated[
        str, typer.Option(help="What sizes are shares of: blocks reused, or the whole footprint.")
    ] = "reused"
    size: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE",
            help="Of the working set, up to 1; may be repeated; default: 0.1, 0.2 and 0.3.",
        ),
    ] = None
    quick: Annotated[
        bool, typer.Option("--quick", help="The first 4,000 requests only; some 20 s.")
    ] = False
    as_json: JsonOption = False


@command.command()
@takes_options(PolicyOptions)
def policy(asked: PolicyOptions) -> None:
    """Eviction policies on a trace: recomputation saved for each GB, against LRU and the ideal."""
    from ucm.bench.policy import PolicyBenchOptions, policy_bench_table, run_policy_bench
    from ucm.bench.synthetic import KINDS, SyntheticOptions

    made = asked.trace in KINDS
    if not made and not Path(asked.trace).exists():
        raise ConfigError(
            f"--trace {asked.trace}: no such file, and none of {', '.join(KINDS)}, which are made"
        )
    options = PolicyBenchOptions(
        trace_path=None if made else Path(asked.trace),
        synthetic=SyntheticOptions(kind=asked.trace if made else KINDS[0], seed=asked.seed),
        model=asked.model,
        admission=asked.admission,
        working_set=asked.working_set,
        seed=asked.seed,
    )
    if asked.quick:
        options = options.quick()
    if asked.policy:
        options = replace(options, policies=tuple(asked.policy))
    if asked.size:
        options = replace(options, fractions=tuple(asked.size))
    result = run_policy_bench(options, say)
    show_result(result, policy_bench_table, as_json=asked.as_json)


@command.command()
def codecs(
    quick: Annotated[
        bool, typer.Option("--quick", help="One pass over the blocks; below a minute.")
    ] = False,
    model: ModelOption = DEFAULT_MODEL,
    as_json: JsonOption = False,
) -> None:
    """Size, speed and fidelity of the codecs at rest on a real model's KV."""
    from ucm.bench.codecs import CodecBenchOptions, codec_bench_table, run_codec_bench

    options = CodecBenchOptions(model_path=model_hub.resolve(model))
    result = run_codec_bench(options.quick() if quick else options, say)
    show_result(result, codec_bench_table, as_json=as_json)


@command.command()
@takes_options(OverlapOptions)
def overlap(options: OverlapOptions) -> None:
    """Time to the first token: loading, computing, and both at once, by the disk's bandwidth."""
    run_overlap(options)


@command.command()
@takes_options(GsaOptions)
def gsa(options: GsaOptions) -> None:
    """Sparse attention: quality, bytes and time of every selector, against dense attention."""
    run_gsa(options)


@command.command()
@takes_options(RagOptions)
def rag(options: RagOptions) -> None:
    """Reuse at any position: quality, cost and time of every policy, against full prefill."""
    run_rag(options)
