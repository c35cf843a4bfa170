"""The sample of texts that chunks are encoded behind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.reuse.encoding_context import (
    CONTEXT_TOKENS,
    LARGEST_SHARE,
    NUM_PIECES,
    piece_lengths,
    sample_context,
)

PIECE = CONTEXT_TOKENS // NUM_PIECES
LONG = int(PIECE / LARGEST_SHARE)


def test_ends_of_texts_that_lie_far_apart() -> None:
    texts = [[number] * (LONG - 1) + [100 + number] for number in range(2 * NUM_PIECES)]
    pieces = [(number,) * (PIECE - 1) + (100 + number,) for number in range(0, 2 * NUM_PIECES, 2)]
    assert sample_context(texts) == tuple(token for piece in pieces for token in piece)


def test_a_text_too_short_for_a_piece_gives_none_where_others_do() -> None:
    lengths = [10, *[LONG] * NUM_PIECES, LONG - 6]
    assert piece_lengths(lengths) == dict.fromkeys(range(1, 1 + NUM_PIECES), PIECE)


def test_of_short_texts_the_longest_give_a_share() -> None:
    assert piece_lengths([60, 6, 600, 12, 5, 6]) == {0: 10, 1: 1, 2: 100, 3: 2}
    assert piece_lengths([60]) == {0: 10}
    assert sample_context([range(5), []]) == ()


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_no_context(num_tokens: int) -> None:
    assert sample_context([range(10_000)] * 3, num_tokens) == ()


@given(st.lists(st.integers(0, 5_000), max_size=12), st.integers(0, 1_000))
def test_pieces_are_few_and_leave_most_of_a_text(lengths: list[int], num_tokens: int) -> None:
    pieces = piece_lengths(lengths, num_tokens)
    assert list(pieces) == sorted(pieces)
    assert len(pieces) <= NUM_PIECES
    assert sum(pieces.values()) <= num_tokens
    assert all(0 < count <= lengths[i] * LARGEST_SHARE for i, count in pieces.items())
