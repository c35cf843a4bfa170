"""`ucm generate`: one prompt through the reference engine, with or without a cache."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ucm import model_hub
from ucm.errors import ConfigError
from ucm.path_errors import path_error
from ucm.plurals import counted
from ucm.types import SummaryKind

from .cache_choice import CONNECT_TIMEOUT_S, reached_cache, say_loading
from .chunk_report import (
    ChunkFate,
    chunk_fates,
    fate_line,
    reuse_figures,
    reuse_line,
    unstored_hint,
)
from .console import print_json
from .decision_report import decision_figures, explanation
from .option_class import takes_options
from .options import DEFAULT_MODEL, CacheOption, JsonOption, ModelOption
from .reuse_flags import (
    CONTEXT_HELP,
    RECOMPUTE_HELP,
    chunk_texts,
    document_prompts,
    pool_blocks,
    reuse_options,
)
from .sparse_flags import sparse_line, sparse_options

if TYPE_CHECKING:
    from ucm.connectors.cached_engine import CachedEngine
    from ucm.connectors.link import CacheFactory
    from ucm.connectors.session import CacheSession
    from ucm.engine.chunk_prompts import ChunkPrompts
    from ucm.engine.engine import Engine, EngineOptions
    from ucm.engine.loading import LoadedModel
    from ucm.engine.request import RequestResult
    from ucm.engine.sampling import SamplingParams
    from ucm.reuse.segments import Chunk, SegmentedPrompt
    from ucm.sparse.slab_source import HostSlabSource

    Prompt = list[int] | SegmentedPrompt

FLUSH_TIMEOUT_S = 30.0

command = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """What the command line asks for."""

    model: ModelOption = DEFAULT_MODEL
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read the prompt from here; - for stdin.")
    ] = None
    chunk: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A document that the prompt asks about; may be repeated. Its KV is computed and "
            "stored once, and reused wherever it stands; that of a document deleted from its "
            "collection is not stored again.",
        ),
    ] = None
    recompute: Annotated[
        str | None, typer.Option(metavar="SHARE|quality|latency", help=RECOMPUTE_HELP)
    ] = None
    context: Annotated[Path | None, typer.Option(metavar="FILE", help=CONTEXT_HELP)] = None
    cache: CacheOption = None
    accept_lossy: Annotated[
        bool,
        typer.Option("--accept-lossy", help="Use blocks that a codec of the cache made smaller."),
    ] = False
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer, at most.")] = 128
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0
    seed: Annotated[int, typer.Option(min=0, help="Of the random draws.")] = 0
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32"
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Use the model's chat template, or the bare text.")
    ] = True
    deadline_s: Annotated[
        float, typer.Option(min=0.05, help="What the request may lose to a cache that is away.")
    ] = 2.0
    sparse: Annotated[
        str | None,
        typer.Option(
            metavar="MODE",
            help="Long contexts: the tokens behind the prompt read only the blocks that matter; "
            "prompts are dense. latency, concurrency, auto; reuse and exact read everything. "
            "Default: off.",
        ),
    ] = None
    sparse_budget: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            help="Share of the blocks to read; 1 reads all. "
            "Default: 0.3, in the mode concurrency 0.125.",
        ),
    ] = None
    sparse_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Or: tokens to read in each layer. Default: by ratio."),
    ] = None
    sparse_eps: Annotated[
        float | None,
        typer.Option(
            metavar="EPS",
            help="Or: attention mass that may be left out, as estimated; 0 reads all, more than 0 "
            "reads 1/16 to 1/2 of the blocks whatever the estimate. Default: by ratio.",
        ),
    ] = None
    sparse_summary: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help=f"What blocks are chosen by: {', '.join(SummaryKind)}. Default: gsa-k4.",
        ),
    ] = None
    sparse_stride: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            help="Steps that a choice is used for. Default: 6, in the mode concurrency 8.",
        ),
    ] = None
    sparse_dense_layers: Annotated[
        int | None,
        typer.Option(metavar="N", help="First layers that read everything. Default: 0."),
    ] = None
    sparse_min_context: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", help="Shorter contexts are read whole. Default: 1024."),
    ] = None
    sparse_resident_blocks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Blocks of 32 tokens that the KV pool holds; what a longer context needs besides "
            "lies in host memory, and is read as it is chosen. Default: the pool holds all.",
        ),
    ] = None
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Say what was loaded, what computed, and on what grounds."),
    ] = False
    as_json: JsonOption = False


@command.command()
@takes_options(GenerateOptions)
def generate(options: GenerateOptions) -> None:
    """Generate text; the answer goes to standard output as it comes."""
    prompt = _read_prompt(options.prompt, options.prompt_file)
    sparse_options(options)  # what cannot be is refused before a model is loaded
    texts = chunk_texts(options)
    model = model_hub.resolve(options.model)
    with reached_cache(options.cache, options.deadline_s) as factory:
        say_loading(model)
        _generate(options, model, _Asked(prompt, texts), factory)


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt's text.

    Raises:
        ConfigError: not exactly one source, a file that is no text, or an empty prompt.
        UcmError: it cannot be read.
    """
    if (prompt is None) == (prompt_file is None):
        raise ConfigError("give the prompt with either --prompt or --prompt-file")
    if prompt_file is not None:
        try:
            is_stdin = str(prompt_file) == "-"
            prompt = sys.stdin.read() if is_stdin else prompt_file.read_text(encoding="utf-8")
        except OSError as error:
            advice = "name a text file, or - for standard input"
            raise path_error(error, f"cannot read the prompt from {prompt_file}", advice) from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"cannot read the prompt from {prompt_file}: it is not UTF-8; convert it first"
            ) from error
    assert prompt is not None
    if not prompt.strip():
        raise ConfigError("the prompt is empty")
    return prompt


@dataclass(frozen=True, slots=True)
class _Asked:
    """The prompt, and the documents in front of it."""

    prompt: str
    documents: list[str]


def _generate(
    options: GenerateOptions, model: Path, asked: _Asked, factory: CacheFactory | None
) -> None:
    from ucm.connectors.cached_engine import CachedEngineOptions, open_engine
    from ucm.connectors.session import SessionOptions
    from ucm.engine.loading import load_model
    from ucm.engine.sampling import SamplingParams

    loaded = load_model(model, options.dtype)
    prompts = None
    if asked.documents:
        prompts = document_prompts(loaded.tokenizer, is_chat=options.chat, context=options.context)
    sizes = _sizes(options, loaded, asked, prompts)
    params = SamplingParams(
        max_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed
    )
    settings = CachedEngineOptions(
        engine=sizes,
        session=SessionOptions(deadline_s=options.deadline_s),
        accepts_lossy=options.accept_lossy,
        connect_timeout_s=CONNECT_TIMEOUT_S,
    )
    with ExitStack() as stack:
        source = None
        if options.sparse_resident_blocks is not None:
            source = _host_source(loaded, sizes)
            stack.callback(source.close)
        cached = stack.enter_context(open_engine(loaded, factory, settings, source))
        documents: list[list[Chunk]] = []
        if prompts is None:
            prompt: Prompt = _encode(loaded, asked.prompt, is_chat=options.chat)
        else:
            space = cached.engine.chunk_space
            documents = [prompts.chunks_of(text, space) for text in asked.documents]
            prompt = prompts.prompt([each for chunks in documents for each in chunks], asked.prompt)
        result = _stream(cached.engine, prompt, params, show=not options.as_json)
        cached.flush(FLUSH_TIMEOUT_S)
        fates = chunk_fates(options.chunk or [], documents, cached, result.reuse)
        if options.as_json:
            print_json(_summary(result, cached.session, cached.engine, fates))
            return
        _report(result, cached, unstored_hint(fates))
        if options.explain:
            for line in (*map(fate_line, fates), explanation(cached.session)):
                print(line, file=sys.stderr)


def _sizes(
    options: GenerateOptions, loaded: LoadedModel, asked: _Asked, prompts: ChunkPrompts | None
) -> EngineOptions:
    """An engine for this one request; `prompts` are those with documents, if there are any."""
    from ucm.engine.engine import EngineOptions

    sizes = EngineOptions(sparse=sparse_options(options))
    if options.sparse_resident_blocks is not None:
        sizes = dataclasses.replace(sizes, num_blocks=options.sparse_resident_blocks)
    if prompts is None:
        return sizes
    return dataclasses.replace(
        sizes,
        reuse=reuse_options(options.recompute, prompts),
        num_blocks=pool_blocks(asked.documents, loaded.tokenizer, options.max_tokens),
    )


def _host_source(loaded: LoadedModel, sizes: EngineOptions) -> HostSlabSource:
    """Memory for the longest context of the model; it is taken as blocks are kept."""
    from ucm.engine.runner import layout_of
    from ucm.sparse.slab_source import HostSlabSource

    layout = layout_of(loaded.model, sizes.block_tokens)
    num_blocks = -(-loaded.config.max_context_tokens // sizes.block_tokens)
    return HostSlabSource(num_blocks * layout.num_layers * layout.slab_bytes)


def _encode(loaded: LoadedModel, prompt: str, *, is_chat: bool) -> list[int]:
    if not is_chat:
        return loaded.tokenizer.encode(prompt)
    try:
        text = loaded.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    except ConfigError as error:
        raise ConfigError(f"{error}; --raw does without a template") from error
    return loaded.tokenizer.encode(text)


def _stream(engine: Engine, prompt: Prompt, params: SamplingParams, *, show: bool) -> RequestResult:
    result = None
    for event in engine.generate(prompt, params):
        if show:
            print(event.text, end="", flush=True)
        result = event.result or result
    if show:
        print()
    assert result is not None
    return result


def _summary(
    result: RequestResult, session: CacheSession | None, engine: Engine, fates: list[ChunkFate]
) -> dict[str, object]:
    """Everything, for programs."""
    output, sparse = result.outputs[0], engine.sparse_stats
    is_offloaded = engine.offloads.stats.sequences > 0
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason.value,
        **dataclasses.asdict(result.timings),
        "cache": dataclasses.asdict(session.stats()) if session is not None else None,
        "decision": decision_figures(session),
        "sparse": dataclasses.asdict(sparse) if sparse is not None else None,
        "reuse": reuse_figures(result.reuse),
        "chunks": [dataclasses.asdict(fate) for fate in fates] or None,
        "offload": dataclasses.asdict(engine.offloads.stats) if is_offloaded else None,
    }


def _report(result: RequestResult, cached: CachedEngine, hint: str | None) -> None:
    """What a person wants to know, on standard error."""
    timings, engine = result.timings, cached.engine
    reused = f" and {timings.num_reused_tokens:,} from chunks" if result.reuse else ""
    line = (
        f"{counted(timings.num_prompt_tokens, 'prompt token')}, {timings.num_hook_tokens:,} of "
        f"them from the cache{reused}; first token after {1e3 * timings.ttft_s:,.0f} ms"
    )
    if timings.tpot_s:
        line += f", then {1 / timings.tpot_s:.1f} tokens/s"
    print(line, file=sys.stderr)
    if result.reuse is not None:
        is_cached = cached.session is not None
        line = reuse_line(result.reuse, is_cached=is_cached, is_kept=hint is None)
        print(line if hint is None else f"{line}\n{hint}", file=sys.stderr)
    if engine.sparse_stats is not None:
        print(sparse_line(engine.sparse_stats), file=sys.stderr)
    if engine.offloads.stats.sequences:
        num = engine.options.num_blocks
        held = counted(num, "block")
        print(f"offload: the pool held {held}, host memory the rest", file=sys.stderr)
