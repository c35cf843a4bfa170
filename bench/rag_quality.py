"""What each policy of reuse costs in quality, on one prompt.

Chunks are encoded once behind their sink and put where they stand; each policy then repairs a copy
of that KV at each budget, and what follows is computed over the result: the window of text, the
questions, the passage that recurs. It is compared with the same over the KV of a full prefill.

    cost     of `ucm.reuse.blend`: recomputed token-layers of chunk rows, whatever was computed to
             choose them included, over all token-layers of rows that are not exact where they stand

`query` and `progressive` look at what follows, so they repair anew for each; what the other
policies recompute does not depend on it, and is computed once.

Shapes: Q tokens that are scored, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ucm.engine.model import LlamaModel
from ucm.reuse.blending import blend
from ucm.reuse.dense_rows import assemble, compute, compute_branches, run_to_end
from ucm.reuse.options import BlendOptions, RecomputePolicy
from ucm.reuse.protocols import BlendOutcome
from ucm.reuse.segments import Chunk, ChunkSpace, SegmentedPrompt, Text

from .gsa import quality
from .rag_facts import Question
from .rag_prompts import COPY_LEAD, Prompt

Result = dict[str, Any]

POLICIES = tuple(RecomputePolicy)
ASKS_THE_QUERY = (RecomputePolicy.QUERY, RecomputePolicy.PROGRESSIVE)
"""Policies whose rows depend on what follows the chunks."""
HAS_NO_BUDGET = (RecomputePolicy.NONE, RecomputePolicy.FULL)
BLOCK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Suffix:
    """What follows the chunks: a query, and what is said of the tokens behind it."""

    query: tuple[int, ...]
    """What a policy may look at."""
    forced: tuple[int, ...]
    """Fed behind it, whatever the model would have said."""
    targets: tuple[int, ...]
    """What is scored: these are the last tokens, and one more."""

    @classmethod
    def of_window(cls, window: Sequence[int]) -> Suffix:
        """Text that goes on: all of it is scored."""
        return cls(tuple(window[:-1]), (), tuple(window[1:]))

    @classmethod
    def of_question(cls, question: Question) -> Suffix:
        """The answer is scored."""
        return cls(question.token_ids, question.gold[:-1], question.gold)

    @classmethod
    def of_passage(cls, passage: Sequence[int]) -> Suffix:
        """What follows its first tokens is scored."""
        rest = tuple(passage[COPY_LEAD:])
        return cls(tuple(passage[:COPY_LEAD]), rest[:-1], rest)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All that is computed."""
        return self.query + self.forced


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityOptions:
    """At which budgets to measure what."""

    budgets: tuple[float, ...] = (0.05, 0.1, 0.18, 0.3)
    copy_budgets: tuple[float, ...] = (0.18,)
    """Of these, where a passage recurs."""


@dataclass(slots=True)
class PromptQuality:
    """What was measured on one prompt."""

    cells: dict[str, dict[str, Result]] = field(default_factory=dict)
    """Policy, budget: kl, top1, dnll, cost, gold_logp."""
    details: dict[str, dict[str, Result]] = field(default_factory=dict)
    """Policy, budget: recomputed_token_layers, rows_per_layer, fresh_rows, exact_match, answer_kl,
    gold_losses, and copy_perplexity where it was measured."""
    full: Result = field(default_factory=dict)
    """Of full prefill: gold_logp."""
    full_details: Result = field(default_factory=dict)
    """Of full prefill: nll, exact_match, copy_perplexity."""
    exact_rows: int = 0
    """Rows of chunks that are exact where they stand."""


def measure_quality(
    model: LlamaModel, prompt: Prompt, options: QualityOptions, say: Callable[[str], None]
) -> PromptQuality:
    """All policies and budgets on one prompt. Blocks for seconds to minutes.

    Args:
        model: computes.
        prompt: its chunks, and what follows them.
        options: which budgets.
        say: called with a line for each policy.
    """
    with torch.inference_mode():
        say("full prefill")
        trial = _Trial(model, prompt)
        found = PromptQuality(
            full=trial.full(), full_details=trial.full_details(), exact_rows=trial.exact_rows
        )
        for policy in POLICIES:
            say(policy)
            runs = _runs(trial, policy, options)
            found.cells[policy] = {budget: cell for budget, (cell, _) in runs.items()}
            found.details[policy] = {budget: detail for budget, (_, detail) in runs.items()}
        return found


def _runs(
    trial: _Trial, policy: RecomputePolicy, options: QualityOptions
) -> dict[str, tuple[Result, Result]]:
    """Cell and details of one policy at every budget."""
    if policy in HAS_NO_BUDGET:
        cell, detail = trial.run(policy, options.budgets[0], has_copy=True)
        return {f"{each:g}": (dict(cell), dict(detail)) for each in options.budgets}
    return {
        f"{each:g}": trial.run(policy, each, has_copy=each in options.copy_budgets)
        for each in options.budgets
    }


class _Trial:
    """One prompt: its KV from chunks, and what full prefill says."""

    def __init__(self, model: LlamaModel, prompt: Prompt) -> None:
        self._model = model
        self._window = Suffix.of_window(prompt.window)
        self._questions = [Suffix.of_question(question) for question in prompt.questions]
        self._passage = Suffix.of_passage(prompt.passage)
        suffixes = [self._window, *self._questions, self._passage]
        self._context = prompt.context
        room = (0,) * max(len(suffix.token_ids) for suffix in suffixes)
        segmented = _segmented(prompt, room)
        self._reused, self._plan = assemble(model, model.config.rope, segmented)
        self._scratch = self._reused.copy()
        """Where full prefill, and then each repair, puts its rows."""
        compute(model, self._scratch, self._context, 0)
        self._truth = dict(zip(suffixes, self._said(suffixes), strict=True))

    def full(self) -> Result:
        """Of full prefill, what a cell has."""
        return {"gold_logp": self._gold_logp([self._truth[each] for each in self._questions])}

    def full_details(self) -> Result:
        """Of full prefill, the rest."""
        said = [self._truth[each] for each in self._questions]
        return {
            "nll": -_mean_logp(self._truth[self._window], self._window.targets),
            "exact_match": self._exact_match(said),
            "copy_perplexity": self._perplexity(self._truth[self._passage]),
        }

    def run(
        self, policy: RecomputePolicy, budget: float, *, has_copy: bool
    ) -> tuple[Result, Result]:
        """One policy at one budget: its cell, and its details."""
        options = BlendOptions(policy=policy, budget=budget)
        suffixes = [self._window, *self._questions, *([self._passage] if has_copy else [])]
        # One repair serves all that follows, where the policy does not look at it.
        is_asking = policy in ASKS_THE_QUERY
        said, outcomes = [], []
        for group in [[each] for each in suffixes] if is_asking else [suffixes]:
            outcomes.append(self._repair(options, group[0].query))
            said += self._said(group)
        outcome, window = outcomes[0], said[0]
        answers = said[1 : 1 + len(self._questions)]
        targets = torch.tensor(self._window.targets)
        cell = {
            **quality(self._truth[self._window], window, targets),
            "cost": outcome.cost,
            "gold_logp": self._gold_logp(answers),
        }
        detail: Result = {
            "recomputed_token_layers": round(outcome.cost * self._num_token_layers, 1),
            "rows_per_layer": list(outcome.rows_per_layer),
            "fresh_rows": outcome.num_fresh,
            "exact_match": self._exact_match(answers),
            "answer_kl": self._answer_kl(answers),
            "gold_losses": self._gold_losses(answers),
        }
        if has_copy:
            detail["copy_perplexity"] = self._perplexity(said[-1])
        return cell, detail

    @property
    def exact_rows(self) -> int:
        """Rows of chunks that are exact where they stand."""
        return sum(span.stop - span.start for span in self._plan.spans if span.is_exact)

    @property
    def _num_token_layers(self) -> int:
        rows = sum(span.stop - span.start for span in self._plan.spans) - self.exact_rows
        return rows * self._model.config.num_layers

    def _repair(self, options: BlendOptions, query: Sequence[int]) -> BlendOutcome:
        """Have the scratch rows be those that chunks left, repaired for a query."""
        self._scratch.restore(self._reused)
        plan = replace(self._plan, token_ids=(*self._context, *query))
        return run_to_end(blend(self._model, self._scratch, plan, options))

    def _said(self, suffixes: Sequence[Suffix]) -> list[Tensor]:
        """[Q, V] log-probabilities of what is scored of each suffix, behind the scratch rows."""
        texts = [suffix.token_ids for suffix in suffixes]
        hidden = compute_branches(self._model, self._scratch, texts, len(self._context))
        scored = [x[-len(each.targets) :] for x, each in zip(hidden, suffixes, strict=True)]
        return [torch.log_softmax(self._model.logits(x), -1) for x in scored]

    def _gold_logp(self, answers: Sequence[Tensor]) -> float:
        """Mean over questions of the answer's log-probability a token."""
        return statistics.fmean(self._gold_logps(answers))

    def _gold_losses(self, answers: Sequence[Tensor]) -> list[float]:
        """For each question what full prefill gives the answer more, nats a token."""
        truth = self._gold_logps([self._truth[each] for each in self._questions])
        return [
            ours - theirs for ours, theirs in zip(truth, self._gold_logps(answers), strict=True)
        ]

    def _gold_logps(self, answers: Sequence[Tensor]) -> list[float]:
        """For each question the answer's log-probability a token."""
        pairs = zip(answers, self._questions, strict=True)
        return [_mean_logp(said, each.targets) for said, each in pairs]

    def _exact_match(self, answers: Sequence[Tensor]) -> float:
        """Share of questions that greedy decoding answers with the gold answer."""
        pairs = zip(answers, self._questions, strict=True)
        hits = [said.argmax(-1).tolist() == list(each.targets) for said, each in pairs]
        return statistics.fmean(hits)

    def _answer_kl(self, answers: Sequence[Tensor]) -> float:
        """Mean over questions of the divergence from full prefill where the answer stands."""
        pairs = zip(answers, self._questions, strict=True)
        kls = [
            quality(self._truth[each], said, torch.tensor(each.targets))["kl"]
            for said, each in pairs
        ]
        return statistics.fmean(kls)

    def _perplexity(self, said: Tensor) -> float:
        return math.exp(-_mean_logp(said, self._passage.targets))


def _segmented(prompt: Prompt, room: tuple[int, ...]) -> SegmentedPrompt:
    space = ChunkSpace(b"", prompt.sink, BLOCK_TOKENS)
    chunks = [Chunk(chunk, space) for chunk in prompt.chunks]
    return SegmentedPrompt([Text(prompt.prefix), *chunks, Text(room)])


def _mean_logp(said: Tensor, targets: Sequence[int]) -> float:
    return float(said.gather(1, torch.tensor(targets).unsqueeze(1)).mean())
