"""`ucm bench rag`: chunks that return at other positions, by what of them is recomputed.

For each prompt, policy and budget, against a full prefill of the same tokens:

    kl          mean KL divergence of the next token's distribution, over the text that follows the
                chunks, full prefill from reuse, in nats
    top1        share of these tokens whose likeliest next token is the same
    dnll        negative log-likelihood of that text, reuse minus full prefill, nats a token
    cost        recomputed token-layers over those of the chunk rows that are not exact where they
                stand; everything computed to choose them is counted
    ttft_ms     of the real engine, the chunks in host memory; the text that follows is the query
    gold_logp   log-probability of answers to questions for facts in the chunks, nats a token; one
                question for every chunk but the first

`none` and `full` have no budget: their numbers are the same at each. `geomean_kl` is the geometric
mean over prompts; `ttft_ratio` is `progressive` at 0.18 over full prefill, medians of turns, for
about 1,000 and 3,000 tokens of chunks, measured first. What was measured besides is in `details`.
Prompts are in `rag_prompts`, quality in `rag_quality`, times in `rag_ttft`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ucm.engine.loading import LoadedModel, default_model_folder, load_model

from .gsa import LEAST_KL
from .gsa_documents import Document
from .rag_prompts import CONT, RAG, PlainEncoder, Prompt, PromptMaker, PromptOptions, Shape
from .rag_quality import PromptQuality, QualityOptions, measure_quality
from .rag_targets import gold_error, gold_loss, targets_of
from .rag_texts import check_folder, folder_texts, own_texts
from .rag_ttft import TtftResult, TtftRig, measure_ttft, ttft_ratio

Progress = Callable[[str], None]
Result = dict[str, Any]

RATIO_SHAPES = {"1k": Shape(CONT, 4, 256), "3k": Shape(CONT, 8, 384)}
"""Prompts of our own text that `ttft_ratio` is measured on, whatever the others are made of."""
RATIO_BUDGET = 0.18


@dataclass(frozen=True, slots=True, kw_only=True)
class RagBenchOptions:
    """What to measure."""

    model_path: Path | None = None
    """Model folder or GGUF file; None takes the one that `ucm model pull` fetched."""
    documents: Path | None = None
    """Folder of anybody's texts; None: our own."""
    prompts: PromptOptions = field(default_factory=PromptOptions)
    quality: QualityOptions = field(default_factory=QualityOptions)
    ratio_lengths: tuple[str, ...] = tuple(RATIO_SHAPES)
    ratio_repeats: int = 7

    def quick(self) -> RagBenchOptions:
        """One prompt of three short chunks, one question: below 50 s."""
        shapes = (Shape(RAG, 3, 96),)
        prompts = replace(self.prompts, shapes=shapes, window_tokens=32, num_questions=1)
        return replace(
            self,
            prompts=prompts,
            quality=replace(self.quality, copy_budgets=()),
            ratio_lengths=("1k",),
            ratio_repeats=1,
        )


def run_rag_bench(options: RagBenchOptions, progress: Progress | None = None) -> Result:
    """Measure; see the module. Blocks for a minute to half an hour and uses every core.

    Args:
        options: what to measure.
        progress: called with a line of text before each longer piece of work, and for a warning.

    Returns:
        The JSON object that the command prints.

    Raises:
        ConfigError: there is no model, or the folder holds too little text.
    """
    say = progress or (lambda _line: None)
    if options.documents is not None:
        check_folder(options.documents)
    say("loading the model")
    loaded = load_model(options.model_path or default_model_folder(), "fp32")
    bench = _Bench(loaded, options, say)
    prompts = bench.prompts()
    # Ahead of the rest: behind it, the same turns were slower, those of `progressive` most.
    ratios = bench.ratios()
    rows = [bench.measure(prompt) for prompt in prompts]
    result: Result = {
        "model": loaded.config.name,
        "threads": torch.get_num_threads(),
        "budgets": [f"{budget:g}" for budget in options.quality.budgets],
        "prompts": [row.entry() for row in rows],
        "geomean_kl": geomean_kl([row.quality.cells for row in rows]),
    }
    result["ttft_ratio"] = {
        length: ratios[length]["ratio"] if length in ratios else None for length in RATIO_SHAPES
    }
    result["warnings"] = bench.warnings
    result["details"] = {
        "prompts": {row.prompt.name: row.details() for row in rows},
        "ttft": ratios,
        "gold": gold_details(result["prompts"], [row.quality.details for row in rows]),
    }
    return {**result, "targets": targets_of(result)}


@dataclass(frozen=True, slots=True)
class _Row:
    """One prompt and all that was measured on it."""

    prompt: Prompt
    quality: PromptQuality
    ttft: TtftResult

    def entry(self) -> Result:
        """Of `prompts`."""
        cells = {
            policy: {
                budget: {**cell, "ttft_ms": self.ttft.policies_ms[policy][budget]}
                for budget, cell in budgets.items()
            }
            for policy, budgets in self.quality.cells.items()
        }
        full = {**self.quality.full, "ttft_ms": self.ttft.full_ms}
        name, kind = self.prompt.name, self.prompt.kind
        return {"name": name, "kind": kind, "policies": cells, "full": full}

    def details(self) -> Result:
        """What the entry has no place for."""
        prompt = self.prompt
        return {
            "num_chunks": len(prompt.chunks),
            "chunk_tokens": len(prompt.chunks[0]),
            "prefix_tokens": len(prompt.prefix),
            "exact_rows": self.quality.exact_rows,
            "loaded_bytes": self.ttft.loaded_bytes,
            "policies": self.quality.details,
            "full": self.quality.full_details,
        }


class _Bench:
    """A model, texts and what was warned of."""

    def __init__(self, loaded: LoadedModel, options: RagBenchOptions, say: Progress) -> None:
        self.warnings: list[str] = []
        self._own: list[Document] = []
        self._loaded = loaded
        self._options = options
        self._say = say

    def prompts(self) -> list[Prompt]:
        """See `PromptMaker.prompts`."""
        folder = self._options.documents
        if folder is None:
            return self._make(self._own_texts(), self._options.prompts)
        texts = folder_texts(folder, PlainEncoder(self._loaded.tokenizer), self._warn)
        return self._make(texts, self._options.prompts)

    def measure(self, prompt: Prompt) -> _Row:
        """Quality and times of one prompt."""
        model, options = self._loaded.model, self._options

        def say(line: str) -> None:
            self._say(f"{prompt.name}: {line}")

        def warn(line: str) -> None:
            self._warn(f"{prompt.name}: {line}")

        quality = measure_quality(model, prompt, options.quality, say)
        say("TTFT, chunks are computed and stored")
        with TtftRig(self._loaded, prompt) as rig:
            ttft = measure_ttft(rig, options.quality.budgets, say, warn)
        return _Row(prompt, quality, ttft)

    def ratios(self) -> dict[str, Result]:
        """`ttft_ratio` for each length that the model has positions for."""
        found = {}
        for length in self._options.ratio_lengths:
            shape = RATIO_SHAPES[length]
            (prompt,) = self._make(self._own_texts(), PromptOptions(shapes=(shape,)))
            if len(prompt.chunks) != shape.num_chunks:
                continue
            self._say(f"TTFT, {length} tokens of chunks")
            repeats = self._options.ratio_repeats
            with TtftRig(self._loaded, prompt) as rig:
                found[length] = ttft_ratio(rig, RATIO_BUDGET, repeats, self._warn)
        return found

    def _own_texts(self) -> list[Document]:
        if not self._own:
            self._own = own_texts(PlainEncoder(self._loaded.tokenizer), self._warn)
        return self._own

    def _make(self, texts: Sequence[Document], options: PromptOptions) -> list[Prompt]:
        maker = PromptMaker(texts, self._loaded.tokenizer, options, self._warn)
        return maker.prompts(self._loaded.config.max_context_tokens)

    def _warn(self, line: str) -> None:
        if line not in self.warnings:
            self.warnings.append(line)
            self._say(f"warning: {line}")


def gold_details(
    prompts: Sequence[Result], details: Sequence[Mapping[str, Mapping[str, Result]]]
) -> Result:
    """What gold answers lose, and how well that is known.

    Args:
        prompts: the result's.
        details: of each prompt: policy, budget, details.

    Returns:
        Policy, budget: `loss` and `standard_error` in nats a token, `num_questions`.
    """

    def cell(policy: str, budget: str) -> Result:
        losses = [each[policy][budget]["gold_losses"] for each in details]
        return {
            "loss": gold_loss({"prompts": prompts}, policy, budget),
            "standard_error": gold_error(losses),
            "num_questions": sum(map(len, losses)),
        }

    return {
        policy: {budget: cell(policy, budget) for budget in budgets}
        for policy, budgets in details[0].items()
    }


def geomean_kl(cells: Sequence[Mapping[str, Mapping[str, Result]]]) -> Result:
    """Geometric mean over prompts; KL below `LEAST_KL` counts as that.

    Args:
        cells: of each prompt: policy, budget, numbers.

    Returns:
        Policy, budget, KL.
    """
    return {
        policy: {
            budget: math.exp(
                statistics.fmean(
                    math.log(max(each[policy][budget]["kl"], LEAST_KL)) for each in cells
                )
            )
            for budget in budgets
        }
        for policy, budgets in cells[0].items()
    }
