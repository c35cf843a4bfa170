"""A context for chunks: a sample of texts like them, which they are encoded behind.

    encoded   | opening | context | chunk |        the rows of the first two are dropped
    in use    | opening | other chunks | chunk | ...

A chunk that is encoded behind a few tokens has rows that were computed at a text's beginning. Where
it is used, other text stands before it, nearly always, and mostly of the same kind: other pages of
one manual, other files of one program. What that text says can't be known ahead, but what kind it
is can, and it costs nothing when prompts are served, for the rows are dropped. Text of another kind
is of little use. Measured in docs/reuse.md, argued in ADR 0016.

The context is part of the sink prefix, so of the names of chunks: with another one every chunk is
computed again. Take a sample once, and keep it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

CONTEXT_TOKENS: Final = 1024
NUM_PIECES: Final = 4
"""Texts that give a piece each; one alone would leave its own content in every chunk."""
LARGEST_SHARE: Final = 1 / 6
"""Of a text that may become a piece."""


def piece_lengths(lengths: Sequence[int], num_tokens: int = CONTEXT_TOKENS) -> Mapping[int, int]:
    """Which texts give a piece of themselves, and how long it is.

    Texts that are long enough, evenly spread over all; the longest, where too few are.

    Args:
        lengths: tokens of each text.
        num_tokens: of all pieces, at most.

    Returns:
        For some texts, in order, how many of their last tokens are the piece.
    """
    wanted = num_tokens // NUM_PIECES
    whole = [i for i, length in enumerate(lengths) if length * LARGEST_SHARE >= wanted]
    if len(whole) >= NUM_PIECES:
        chosen = [whole[number * len(whole) // NUM_PIECES] for number in range(NUM_PIECES)]
    else:
        by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        chosen = sorted(by_length[:NUM_PIECES])
    pieces = {i: min(wanted, int(lengths[i] * LARGEST_SHARE)) for i in chosen}
    return {i: count for i, count in pieces.items() if count}


def sample_context(
    texts: Sequence[Sequence[int]], num_tokens: int = CONTEXT_TOKENS
) -> tuple[int, ...]:
    """A context for chunks of these texts and others of their kind.

    Args:
        texts: in tokens, with nothing added.
        num_tokens: at most; 0 for no context.

    Returns:
        The ends of some of them; less than asked for where the texts are short.
    """
    pieces = piece_lengths([len(text) for text in texts], num_tokens)
    return tuple(token for i, count in pieces.items() for token in texts[i][-count:])
