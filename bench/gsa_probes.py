"""Probes of sparse attention: is a key found again, is a passage that recurs still predicted.

*Pass-key*: a number of five digits stands somewhere in a handbook; at its end the model is asked
for it. Everything up to the question's last token is computed densely, as a prompt is; that token
and the answer are decoded sparsely. The model decodes the key greedily exactly if each of its
digits is the likeliest token behind the digits before it, which one pass shows.

*Copy*: a passage of the context recurs behind it. What a passage says next is then known from its
first occurrence, so the perplexity of its second half shows whether that block is still found.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ucm.kernels.block_scores import Budget

from .gsa_documents import Encoder
from .gsa_rankings import SELECTORS, ranking_of
from .gsa_window import Context, ContextBuilder, Ranking, run_window

DENSE = "dense"
INTRODUCTION = "One sentence of the following text holds a pass key. Remember it.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
COPY_TOKENS = 64
"""Of the passage that recurs."""
COPY_LEAD = 16
"""Of its tokens, those that only show which passage it is."""


@dataclass(frozen=True, slots=True)
class Passkey:
    """One prompt and the key that it hides."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """Tokens of the key, as the model continues the prompt."""


def make_passkeys(
    text: str, encoder: Encoder, num_tokens: int, num_depths: int, seed: int = 5
) -> list[Passkey]:
    """Prompts of about `num_tokens`, each with its key at another depth, evenly from 0 to 1.

    Args:
        text: to hide the key in; cut at a sentence's end.
        encoder: of the model.
        num_tokens: of a prompt; fewer where the text is short.
        num_depths: how many prompts.
        seed: of the keys.
    """
    dice = random.Random(seed)
    sentences = _sentences(text, encoder, num_tokens)
    found = []
    for index in range(num_depths):
        key = str(dice.randrange(10_000, 100_000))
        place = round(index * len(sentences) / max(1, num_depths - 1))
        needle = f"The pass key is {key}. Remember it: {key} is the pass key. "
        hidden = "".join((*sentences[:place], needle, *sentences[place:]))
        prompt = encoder.encode(INTRODUCTION + hidden + QUESTION)
        whole = encoder.encode(f"{INTRODUCTION}{hidden}{QUESTION} {key}")
        found.append(Passkey(tuple(prompt), tuple(whole[len(prompt) :])))
    return found


def _sentences(text: str, encoder: Encoder, num_tokens: int) -> list[str]:
    taken, used = [], 0
    for sentence in text.replace("\n", " ").split(". "):
        used += len(encoder.encode(f"{sentence}. "))
        if used > num_tokens:
            break
        taken.append(f"{sentence}. ")
    return taken


def count_passkeys(
    builder: ContextBuilder,
    passkeys: Sequence[Passkey],
    budget: Budget,
    progress: Callable[[str], None],
    stride: int = 1,
) -> dict[str, int]:
    """How many of the keys are found, by selector, and densely.

    Args:
        builder: with room for the prompts and answers.
        passkeys: see `make_passkeys`.
        budget: of the selectors.
        progress: called with a line for each prompt.
        stride: steps that a choice is used for.
    """
    hits = dict.fromkeys((*SELECTORS, DENSE), 0)
    for number, passkey in enumerate(passkeys, start=1):
        progress(f"pass-key {number} of {len(passkeys)}")
        context = builder.fill(passkey.prompt[:-1])
        hits[DENSE] += _finds(context, passkey, None, None)
        for selector in SELECTORS:
            ranking = ranking_of(selector, context)
            hits[selector] += _finds(context, passkey, ranking, budget, stride)
    return hits


def _finds(
    context: Context,
    passkey: Passkey,
    ranking: Ranking | None,
    budget: Budget | None,
    stride: int = 1,
) -> bool:
    window = [passkey.prompt[-1], *passkey.answer[:-1]]
    logits = run_window(context, window, ranking, budget, stride).logits
    return logits.argmax(-1).tolist() == list(passkey.answer)


def copy_perplexity(
    context: Context,
    token_ids: Sequence[int],
    ranking: Ranking | None = None,
    budget: Budget | None = None,
    stride: int = 1,
) -> float | None:
    """Perplexity of a passage's second occurrence, of all but its first tokens.

    Args:
        context: of `token_ids`, with room for the passage behind them.
        token_ids: of the context; the passage is that at a third of it.
        ranking: what to choose by; None reads everything.
        budget: how much to read.
        stride: steps that a choice is used for.

    Returns:
        None where the context is too short to recur in.
    """
    first = context.num_tokens // 3
    passage = list(token_ids[first : first + COPY_TOKENS])
    if first + COPY_TOKENS > context.num_tokens:
        return None
    logits = run_window(context, passage[:-1], ranking, budget, stride).logits
    said = torch.log_softmax(logits[COPY_LEAD - 1 :], -1)
    targets = torch.tensor(passage[COPY_LEAD:]).unsqueeze(1)
    return float((-said.gather(1, targets).mean()).exp())
