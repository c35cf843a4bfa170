"""The reference engine against Transformers, and both beside the machine's floor.

One run, one process, the same weights, dtype and threads for both; measurements alternate between
the two, so that a busy machine slows both; medians are reported. The floor is what the work costs
at rates measured in the same run:

    prefill   FLOPs of the matrix products and of causal attention / rate of a large product
    decode    bytes of the weights and of the sequence's KV       / rate of a large copy

A copy moves each byte twice (read and write); decode only reads, so it can come close to 1.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from ucm.engine.loading import default_model_folder, load_weights, parse_dtype
from ucm.engine.model import ForwardItem, LlamaModel
from ucm.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ucm.engine.config import ModelConfig

BLOCK_TOKENS = 32
MATMUL_SIZE = 2048
COPY_BYTES = 256 << 20
SEED = 0

Progress = Callable[[str], None]
Result = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBenchOptions:
    """What to measure."""

    model_path: Path | None = None
    """Model folder or GGUF file; None takes the one that `ucm model pull` fetched."""
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    context_tokens: tuple[int, ...] = (512, 2048, 4096)
    repeats: int = 3
    """Prefills of each engine and context; medians are reported."""
    decode_tokens: int = 24
    """Decode steps of each engine and context."""
    threads: int | None = None
    """Threads of both engines; None keeps PyTorch's default."""
    phase_budget_s: float = 600.0
    """A phase (prefill or decode of one context) that has taken longer stops repeating; each
    engine is measured at least once."""

    def quick(self) -> EngineBenchOptions:
        """The same on less: about a minute."""
        return replace(self, context_tokens=(512,), decode_tokens=12, phase_budget_s=10.0)


class _OurEngine:
    """The model alone, over a pool of one sequence's blocks."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._pool = torch.empty(0)
        self._blocks: list[int] = []
        self._length = 0

    def start(self, num_tokens: int) -> None:
        """Make room for a sequence of up to `num_tokens`."""
        c = self._model.config
        count = -(-num_tokens // BLOCK_TOKENS)
        shape = (c.num_layers, count, 2, c.num_kv_heads, BLOCK_TOKENS, c.head_dim)
        self._pool = torch.zeros(shape, dtype=self._model.dtype)
        self._blocks = list(range(count))

    def prefill(self, token_ids: list[int]) -> int:
        """Compute a whole prompt; the greedy next token."""
        self._length = 0
        return self._step(token_ids)

    def decode(self, token_id: int) -> int:
        """One more token; the greedy next one."""
        return self._step([token_id])

    def _step(self, token_ids: list[int]) -> int:
        item = ForwardItem(token_ids, self._length, self._blocks)
        self._length += len(token_ids)
        return int(self._model.forward([item], self._pool).argmax())


class _Transformers:
    """Transformers at its best on a CPU: sdpa, dynamic cache, logits of the last token only."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        import transformers

        self._transformers = transformers
        shape = transformers.LlamaConfig(**_peer_config(config))
        model: Any = transformers.LlamaForCausalLM(shape)
        model.to(next(iter(weights.values())).dtype)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) <= ({"lm_head.weight"} if config.tied_head else set())
        model.tie_weights()
        self._model = model.eval()
        self._cache: Any = None

    def start(self, num_tokens: int) -> None:
        """Nothing to reserve: its cache grows."""

    def prefill(self, token_ids: list[int]) -> int:
        """Compute a whole prompt; the greedy next token."""
        self._cache = self._transformers.DynamicCache(config=self._model.config)
        return self._step(token_ids)

    def decode(self, token_id: int) -> int:
        """One more token; the greedy next one."""
        return self._step([token_id])

    def _step(self, token_ids: list[int]) -> int:
        with torch.inference_mode():
            out = self._model(
                torch.tensor([token_ids]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            return int(out.logits[0, -1].argmax())


def _peer_config(c: ModelConfig) -> dict[str, Any]:
    """Our configuration in Transformers' words."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_context_tokens,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
        "tie_word_embeddings": c.tied_head,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }


_Engine = _OurEngine | _Transformers


def run_engine_bench(options: EngineBenchOptions, progress: Progress | None = None) -> Result:
    """Measure; see the module. Blocks for minutes and uses every thread it was given.

    Args:
        options: what to measure.
        progress: called with a line of text before each longer piece of work.

    Returns:
        `{model, threads, results: [{dtype, context_tokens, prefill, decode}], ceilings}`; prefill
        and decode hold tokens a second of both engines and of the floor, and the two ratios.

    Raises:
        ConfigError: Transformers is not installed, there is no model, or it is of a kind that
            this comparison does not cover.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "`ucm bench engine` compares with Transformers, which is not installed: "
            "`pip install 'ucm-cache[dev]'`"
        )
    say = progress or (lambda _line: None)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    path = options.model_path or default_model_folder()
    say("measuring the machine")
    ceilings = {
        "matmul_gflop_s": {d: round(_matmul_gflop_s(parse_dtype(d)), 1) for d in options.dtypes},
        "copy_gb_s": round(_copy_gb_s(), 2),
    }
    results: list[Result] = []
    name = ""
    for dtype in options.dtypes:
        say(f"{dtype}: loading the model")
        config, weights = load_weights(path, parse_dtype(dtype))
        if config.rope_scaling is not None:
            raise ConfigError("the comparison covers models without RoPE scaling only")
        name = config.name
        engines = _OurEngine(LlamaModel(config, weights)), _Transformers(config, weights)
        del weights
        for context in options.context_tokens:
            say(f"{dtype}: {context} tokens")
            measured = _measure(engines, config, context, options)
            floors = _floors(config, context, dtype, ceilings)
            results.append({"dtype": dtype, "context_tokens": context, **_rows(measured, floors)})
    threads = torch.get_num_threads()
    return {"model": name, "threads": threads, "results": results, "ceilings": ceilings}


@dataclass(frozen=True, slots=True)
class _Measured:
    """Tokens a second of one engine at one context."""

    prefill_tokens_s: float
    decode_tokens_s: float


def _measure(
    engines: tuple[_Engine, _Engine],
    config: ModelConfig,
    context_tokens: int,
    options: EngineBenchOptions,
) -> tuple[_Measured, ...]:
    """Prefill and decode of both engines, alternating between them."""
    generator = torch.Generator().manual_seed(SEED)
    prompt = torch.randint(config.vocab_size, (context_tokens,), generator=generator).tolist()
    prefills: list[list[float]] = [[] for _ in engines]
    decodes: list[list[float]] = [[] for _ in engines]
    for engine in engines:
        engine.start(context_tokens + options.decode_tokens + 2)
        engine.prefill(prompt[:64])
        engine.decode(prompt[0])
    for _ in _within(options.phase_budget_s, options.repeats):
        for engine, seconds in zip(engines, prefills, strict=True):
            seconds.append(_timed(engine.prefill, prompt))
    for step in _within(options.phase_budget_s, options.decode_tokens):
        for engine, seconds in zip(engines, decodes, strict=True):
            seconds.append(_timed(engine.decode, prompt[step % context_tokens]))
    return tuple(
        _Measured(context_tokens / statistics.median(p), 1 / statistics.median(d))
        for p, d in zip(prefills, decodes, strict=True)
    )


def _within(budget_s: float, count: int) -> Iterator[int]:
    """0, 1, ... below `count`, ending early once `budget_s` has passed."""
    deadline = time.perf_counter() + budget_s
    for index in range(count):
        if index and time.perf_counter() > deadline:
            return
        yield index


def _timed(work: Callable[..., object], *arguments: object) -> float:
    begin = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begin


def _rows(measured: tuple[_Measured, ...], floors: _Measured) -> Result:
    ours, peer = measured
    return {
        "prefill": _row(ours.prefill_tokens_s, peer.prefill_tokens_s, floors.prefill_tokens_s),
        "decode": _row(ours.decode_tokens_s, peer.decode_tokens_s, floors.decode_tokens_s),
    }


def _row(ours: float, peer: float, floor: float) -> Result:
    return {
        "ucm_tokens_s": round(ours, 2),
        "transformers_tokens_s": round(peer, 2),
        "ratio": round(ours / peer, 3),
        "floor_tokens_s": round(floor, 2),
        "floor_ratio": round(ours / floor, 3),
    }


def _floors(
    config: ModelConfig, context_tokens: int, dtype: str, ceilings: Mapping[str, Any]
) -> _Measured:
    """What the same work would reach at the rates of `ceilings`."""
    c = config
    head = c.vocab_size * c.hidden_size
    body = c.num_parameters - head
    # Causal attention looks at half of the square; two products, two FLOPs a multiply-add.
    attention = 2 * c.num_layers * c.num_heads * c.head_dim * context_tokens**2
    prefill_flops = 2 * body * context_tokens + attention + 2 * head
    kv = 2 * c.num_layers * c.num_kv_heads * c.head_dim * context_tokens
    decode_bytes = (c.num_parameters + kv) * parse_dtype(dtype).itemsize
    matmul_s = prefill_flops / (ceilings["matmul_gflop_s"][dtype] * 1e9)
    return _Measured(context_tokens / matmul_s, ceilings["copy_gb_s"] * 1e9 / decode_bytes)


def _matmul_gflop_s(dtype: torch.dtype) -> float:
    """Rate of a large square matrix product, the best of five."""
    a = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype)
    best = min(_timed(torch.mm, a, a) for _ in range(5))
    return float(2 * MATMUL_SIZE**3 / best / 1e9)


def _copy_gb_s() -> float:
    """Bytes read plus bytes written a second by a large copy, the best of five."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    best = min(_timed(target.copy_, source) for _ in range(5))
    return 2 * COPY_BYTES / best / 1e9


def engine_bench_table(result: Result) -> Table:
    """The result for people: tokens a second, and the ratios to the peer and to the floor."""
    ceilings = result["ceilings"]
    rates = ", ".join(f"{d} {rate:.0f}" for d, rate in ceilings["matmul_gflop_s"].items())
    table = Table(
        title=f"{result['model']}, {result['threads']} threads, tokens a second",
        caption=f"floor: matrix product {rates} GFLOP/s, copy {ceilings['copy_gb_s']:.1f} GB/s",
    )
    for heading in ("dtype", "context", "phase", "ucm", "transformers", "ratio", "of the floor"):
        table.add_column(heading, justify="left" if heading in {"dtype", "phase"} else "right")
    for entry in result["results"]:
        for phase in ("prefill", "decode"):
            row = entry[phase]
            table.add_row(
                entry["dtype"],
                str(entry["context_tokens"]),
                phase,
                f"{row['ucm_tokens_s']:.1f}",
                f"{row['transformers_tokens_s']:.1f}",
                f"{row['ratio']:.2f}",
                f"{row['floor_ratio']:.2f}",
            )
    return table
