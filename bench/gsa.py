"""`ucm bench gsa`: what leaving blocks out of attention costs in quality, and what it saves.

For each document, selector and budget, over the document's last tokens fed as they are (nothing is
sampled, so that all selectors see the same text), against dense attention over the same context:

    kl        mean KL divergence of the next token's distribution, dense from sparse, in nats
    top1      share of tokens whose likeliest next token is the same
    dnll      negative log-likelihood of the text, sparse minus dense, nats a token
    mass      share of the true attention mass that the blocks read hold
    recall    share of the oracle's blocks that were chosen, what is always read left out
    bytes_ratio           bytes of blocks and summaries read, over those of all blocks (bf16 KV)
    select_ms_per_step    choosing, all layers, in a decode step of the engine's sparse attention
    step_ms               that decode step

Always read: the first block, the last two full ones, the one being filled. One selection a layer is
shared by its heads, made anew for every token or, with `stride`, kept for so many. `geomean` is
over documents; its `dnll` is the mean of the absolute values. The probes (`passkey`, `copy_probe`)
are in `gsa_probes`, `certified` and `conformal` in `gsa_certificates`, `offload` in `gsa_offload`;
what these measure besides is in `details`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ucm.engine.loading import LoadedModel, default_model_folder, load_model
from ucm.errors import ConfigError
from ucm.kernels.block_scores import Budget

from .gsa_certificates import CertificateBenchOptions, capture, measure_certificates
from .gsa_documents import (
    SOURCES,
    Document,
    check_document,
    own_document,
    own_text,
    read_documents,
)
from .gsa_offload import OffloadCase, measure_offload
from .gsa_probes import (
    COPY_TOKENS,
    DENSE,
    copy_perplexity,
    count_passkeys,
    make_passkeys,
)
from .gsa_rankings import SELECTORS, ranking_of, summary_share
from .gsa_steps import WARM_UP_STEPS, dense_step_ms, time_steps
from .gsa_targets import targets_of
from .gsa_window import Context, ContextBuilder, Ranking, WindowResult, run_window

Progress = Callable[[str], None]
Result = dict[str, Any]

PASSKEY_FRAME_TOKENS = 256
"""More than introduction, key, question and answer have, around a pass-key's text."""
PARTS = {
    "certified": ("eps", "max_error_over_bound", "blocks_read_ratio"),
    "conformal": ("delta", "violation_rate", "blocks_read_ratio"),
    "offload": ("bandwidth_mb_s", "context_tokens", "dense_tokens_s", "gsa_tokens_s", "dnll"),
}
"""What the result says of the other modules' measurements."""
LEAST_KL = 1e-9
"""Smaller ones count as this in a geometric mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GsaBenchOptions:
    """What to measure."""

    model_path: Path | None = None
    """Model folder or GGUF file; None takes the one that `ucm model pull` fetched."""
    own_documents: tuple[str, ...] = tuple(SOURCES)
    """Of the benchmark's own; used where no others are named."""
    documents: tuple[Path, ...] = ()
    """Anybody's texts."""
    max_tokens: int = 4096
    """That others' documents are cut to."""
    own_max_tokens: int = 7168
    budgets: tuple[float, ...] = (0.3, 0.125)
    """Parts of all blocks that are read, largest first."""
    window_tokens: int = 128
    """Of a document, those at its end that are computed sparsely."""
    stride: int | None = None
    """Steps that a choice is used for, in quality and times; None: quality is that of a choice for
    every token, times are those of the engine's default."""
    step_tokens: int = 8
    """Decode steps that are timed, two more not counted."""
    has_copy_probe: bool = True
    passkey_tokens: int = 2048
    passkey_depths: int = 10
    certificates: CertificateBenchOptions = field(default_factory=CertificateBenchOptions)
    certificate_documents: int = 4
    """The first ones; conformal selection learns from the others."""
    certificate_tokens: int = 2048
    """Of each of these."""
    offload: OffloadCase = field(default_factory=lambda: OffloadCase(num_tokens=48))

    def quick(self) -> GsaBenchOptions:
        """One short document, two pass-keys, little of all else: below 50 s."""
        return replace(
            self,
            own_documents=("prose",),
            max_tokens=960,
            own_max_tokens=960,
            window_tokens=32,
            step_tokens=2,
            has_copy_probe=False,
            passkey_tokens=320,
            passkey_depths=2,
            certificates=self.certificates.quick(),
            certificate_documents=1,
            certificate_tokens=512,
            offload=replace(
                self.offload,
                context_tokens=768,
                resident_tokens=320,
                num_tokens=6,
                num_dense=1,
            ),
        )

    @property
    def least_tokens(self) -> int:
        """Of a document: a context of as many tokens as the window, and the last one's target."""
        return 2 * self.window_tokens + 1


@dataclass(slots=True)
class _Rows:
    """What is known of one document."""

    cells: dict[str, dict[str, Result]]
    copy: dict[str, float | None]
    dense_step_ms: float


def run_gsa_bench(options: GsaBenchOptions, progress: Progress | None = None) -> Result:
    """Measure; see the module. Blocks for seconds to a quarter of an hour and uses every core.

    Args:
        options: what to measure.
        progress: called with a line of text before each longer piece of work.

    Returns:
        The JSON object that the command prints.

    Raises:
        ConfigError: there is no model, or a document is no text or too short.
    """
    say = progress or (lambda _line: None)
    for path in options.documents:
        check_document(path)
    say("loading the model")
    loaded = load_model(options.model_path or default_model_folder(), "fp32")
    documents = _documents(loaded, options)
    rows = {document.name: _measure(loaded, document, options, say) for document in documents}
    per_document = {name: row.cells for name, row in rows.items()}
    result: Result = {
        "model": loaded.config.name,
        "threads": torch.get_num_threads(),
        "documents": [document.name for document in documents],
        "document_tokens": {document.name: len(document.token_ids) for document in documents},
        "budgets": [f"{budget:g}" for budget in options.budgets],
        "stride": options.stride,
        "per_document": per_document,
        "geomean": geomean(per_document),
        "dense_step_ms": {name: round(row.dense_step_ms, 3) for name, row in rows.items()},
        "copy_probe": {name: row.copy for name, row in rows.items()},
        "passkey": _passkey(loaded, options, say),
        "passkey_prompts": options.passkey_depths,
    }
    details = {
        **_certificates(loaded, documents, options, say),
        "offload": _offload(loaded, options, say),
    }
    for part, names in PARTS.items():
        result[part] = {name: details[part].pop(name) for name in names}
    result["details"] = details
    return {**result, "targets": targets_of(result)}


def _documents(loaded: LoadedModel, options: GsaBenchOptions) -> list[Document]:
    room = loaded.config.max_context_tokens
    if options.documents:
        limit = min(options.max_tokens, room)
        return read_documents(options.documents, loaded.tokenizer, options.least_tokens, limit)
    limit = min(options.own_max_tokens, room)
    found = [own_document(name, loaded.tokenizer, limit) for name in options.own_documents]
    short = [document.name for document in found if len(document.token_ids) < options.least_tokens]
    if short:
        raise ConfigError(f"the model's context of {room} tokens is too short for {short[0]}")
    return found


def _measure(
    loaded: LoadedModel, document: Document, options: GsaBenchOptions, say: Progress
) -> _Rows:
    """All selectors and budgets on one document."""
    tokens, num = document.token_ids, options.window_tokens
    say(f"{document.name}: reading {len(tokens)} tokens")
    builder = ContextBuilder.of(loaded.model, len(tokens) + COPY_TOKENS)
    window = _Window(builder.fill(tokens[: -num - 1]), tokens, options)
    rows = _Rows({}, {DENSE: window.copy(None, None)}, window.dense_step_ms())
    for selector in SELECTORS:
        say(f"{document.name}: {selector}")
        ranking = ranking_of(selector, window.context)
        rows.cells[selector] = {
            f"{ratio:g}": window.cell(selector, ranking, Budget(ratio=ratio))
            for ratio in options.budgets
        }
        rows.copy[selector] = window.copy(ranking, Budget(ratio=options.budgets[0]))
    return rows


class _Window:
    """The end of one document, and what dense attention says of it."""

    def __init__(
        self, context: Context, token_ids: Sequence[int], options: GsaBenchOptions
    ) -> None:
        self.context = context
        self._context_ids = token_ids[: context.num_tokens]
        self._tokens = list(token_ids[context.num_tokens : -1])
        self._targets = torch.tensor(token_ids[context.num_tokens + 1 :])
        self._steps = self._tokens[: options.step_tokens + WARM_UP_STEPS]
        self._has_copy_probe = options.has_copy_probe
        self._stride = options.stride
        self._dense = torch.log_softmax(run_window(context, self._tokens).logits, -1)

    def cell(self, selector: str, ranking: Ranking, budget: Budget) -> Result:
        """One selector at one budget: the numbers of the module's table."""
        found = run_window(self.context, self._tokens, ranking, budget, self._stride or 1)
        times = time_steps(self.context, self._steps, selector, budget, self._stride)
        share = summary_share(selector, self.context)
        return {
            **quality(self._dense, torch.log_softmax(found.logits, -1), self._targets),
            **_choices(found, share),
            "select_ms_per_step": round(times.select_ms, 4),
            "step_ms": round(times.step_ms, 4),
        }

    def copy(self, ranking: Ranking | None, budget: Budget | None) -> float | None:
        """See `copy_perplexity`; None where it is not asked for."""
        if not self._has_copy_probe:
            return None
        found = copy_perplexity(self.context, self._context_ids, ranking, budget, self._stride or 1)
        return None if found is None else round(found, 4)

    def dense_step_ms(self) -> float:
        """Of the steps that the selectors are timed on."""
        return dense_step_ms(self.context, self._steps)


def quality(dense: Tensor, sparse: Tensor, targets: Tensor) -> Result:
    """How far one next-token distribution is from another.

    Args:
        dense: [T, V] log-probabilities.
        sparse: [T, V] log-probabilities.
        targets: [T] what came next.
    """
    kl = (dense.exp() * (dense - sparse)).sum(-1).mean()
    same = (dense.argmax(-1) == sparse.argmax(-1)).float().mean()
    nll = [-logs.gather(1, targets.unsqueeze(1)).mean() for logs in (sparse, dense)]
    return {
        # Rounding of sums can make it negative where the distributions are the same.
        "kl": max(0.0, float(kl)),
        "top1": float(same),
        "dnll": float(nll[0] - nll[1]),
    }


def _choices(found: WindowResult, summary_share: float) -> Result:
    stats = found.stats
    read, scored = stats.read / stats.count, stats.scored / stats.count
    return {
        "mass": stats.mass / stats.count,
        "recall": stats.recall / stats.num_recalls if stats.num_recalls else 1.0,
        "bytes_ratio": read + scored * summary_share,
    }


def geomean(per_document: Mapping[str, Mapping[str, Mapping[str, Result]]]) -> Result:
    """Over documents, of every number; of `dnll` the mean of the absolute values.

    Args:
        per_document: document, selector, budget, number.
    """
    tables = list(per_document.values())
    found: Result = {}
    for selector, budgets in tables[0].items():
        found[selector] = {}
        for budget, cell in budgets.items():
            cells = [table[selector][budget] for table in tables]
            found[selector][budget] = {
                name: _mean(name, [each[name] for each in cells]) for name in cell
            }
    return found


def _mean(name: str, values: Sequence[float]) -> float:
    if name == "dnll":
        return statistics.fmean(map(abs, values))
    return math.exp(statistics.fmean(math.log(max(value, LEAST_KL)) for value in values))


def _passkey(loaded: LoadedModel, options: GsaBenchOptions, say: Progress) -> dict[str, int]:
    text, room = SOURCES["prose"].make(), loaded.config.max_context_tokens
    num_tokens = min(options.passkey_tokens, room - PASSKEY_FRAME_TOKENS)
    passkeys = make_passkeys(text, loaded.tokenizer, num_tokens, options.passkey_depths)
    longest = max(len(passkey.prompt) + len(passkey.answer) for passkey in passkeys)
    builder = ContextBuilder.of(loaded.model, longest)
    budget, stride = Budget(ratio=options.budgets[0]), options.stride or 1
    return count_passkeys(builder, passkeys, budget, say, stride)


def _certificates(
    loaded: LoadedModel, documents: Sequence[Document], options: GsaBenchOptions, say: Progress
) -> Result:
    captured = {}
    for document in documents[: options.certificate_documents]:
        say(f"certificates: reading {document.name}")
        tokens = document.token_ids[: options.certificate_tokens]
        # A short document is all window but for the first blocks.
        window = min(options.certificates.window_tokens, len(tokens) // 2)
        captured[document.name] = capture(loaded.model, tokens, window)
    return measure_certificates(captured, options.certificates, say)


def _offload(loaded: LoadedModel, options: GsaBenchOptions, say: Progress) -> Result:
    """On a text of our own, which is long enough."""
    text = own_text("manual", loaded.tokenizer)
    case = options.offload
    room = loaded.config.max_context_tokens - case.num_tokens - 1
    case = replace(case, context_tokens=min(case.context_tokens, room))
    return dict(measure_offload(loaded.model, text, case, lambda line: say(f"offload: {line}")))
