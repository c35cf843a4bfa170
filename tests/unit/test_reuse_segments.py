"""Prompts in segments: positions, two ways to make them, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.errors import InvalidArgumentError
from ucm.reuse import Chunk, ChunkSpace, Segment, SegmentedPrompt, Text, split_document

SINK = (1, 2, 3, 4, 5)
SPACE = ChunkSpace(model=b"m" * 32, sink_tokens=SINK, block_tokens=4)
OTHER_MODEL = dataclasses.replace(SPACE, model=b"n" * 32)
OTHER_SINK = dataclasses.replace(SPACE, sink_tokens=(1, 2, 3, 4, 6))
OTHER_BLOCKS = dataclasses.replace(SPACE, block_tokens=8)
SHORT = dataclasses.replace(SPACE, max_positions=32)


def chunk(*token_ids: int, space: ChunkSpace = SPACE) -> Chunk:
    return Chunk(token_ids, space)


def test_where_segments_stand() -> None:
    prompt = SegmentedPrompt(
        [Text(SINK), chunk(*range(10, 20)), Text((7,)), chunk(30, 31, 32), Text((8, 9))]
    )
    assert prompt.token_ids == (*SINK, *range(10, 20), 7, 30, 31, 32, 8, 9)
    assert (prompt.start, prompt.stop, len(prompt)) == (5, 19, 21)
    first, second = prompt.spans
    assert (first.start, first.cached_stop, first.stop, first.shift) == (5, 13, 15, 0)
    assert (second.start, second.cached_stop, second.stop, second.shift) == (16, 16, 19, 11)
    assert prompt.token_ids[first.start : first.stop] == first.chunk.token_ids


def test_without_a_chunk_all_is_text() -> None:
    prompt = SegmentedPrompt([Text((1, 2)), Text((3,))])
    assert (prompt.token_ids, prompt.spans) == ((1, 2, 3), ())
    assert (prompt.start, prompt.stop) == (3, 3)


def test_two_ways_give_the_same_prompt() -> None:
    made = SegmentedPrompt([Text(SINK), chunk(10, 11), chunk(12), Text((9,))])
    spans = SegmentedPrompt.from_spans([*SINK, 10, 11, 12, 9], [(5, 7), (7, 8)], SPACE)
    split = SegmentedPrompt.split([*SINK, 0, 0, 10, 11, 0, 0, 12, 0, 0, 9], [0, 0], SPACE)
    assert made == spans == split
    assert made.token_ids == spans.token_ids == split.token_ids


def test_a_prompt_without_separator_or_with_one_has_no_chunks() -> None:
    assert SegmentedPrompt.split([1, 2, 3], [0], SPACE) == SegmentedPrompt([Text((1, 2, 3))])
    assert SegmentedPrompt.split([1, 0, 3], [0], SPACE).segments == (Text((1,)), Text((3,)))


def test_a_part_of_a_separator_is_text() -> None:
    prompt = SegmentedPrompt.split([1, 0, 2, 0, 0, 3, 0], [0, 0], SPACE)
    assert prompt.segments == (Text((1, 0, 2)), Text((3, 0)))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "an empty text": (lambda: Text(()), "text segment is empty"),
    "an empty chunk": (chunk, "chunk is empty"),
    "text for tokens": (lambda: Text("abc"), "token ids, not of text"),  # type: ignore[arg-type]
    "fractions for tokens": (lambda: chunk(1.5), "token ids"),  # type: ignore[arg-type]
    "a token below 0": (lambda: chunk(3, -1), "-1 to 3"),
    "a token too large": (lambda: Text((2**31,)), "2147483648"),
    "no segments": (lambda: SegmentedPrompt([]), "at least one Text"),
    "a foreign segment": (lambda: SegmentedPrompt([(1, 2)]), "not a tuple"),  # type: ignore[list-item]
    "a chunk first": (lambda: SegmentedPrompt([chunk(1), Text((1,))]), "in front of it"),
    "a chunk last": (lambda: SegmentedPrompt([Text(SINK), chunk(1)]), "query behind it"),
    "two models": (
        lambda: SegmentedPrompt(
            [Text(SINK), chunk(1), chunk(1, space=OTHER_MODEL), Text((1,))],
        ),
        "chunk 1 is of another model",
    ),
    "two sinks": (
        lambda: SegmentedPrompt([Text(SINK), chunk(1), chunk(1, space=OTHER_SINK), Text((1,))]),
        "another sink prefix",
    ),
    "two block sizes": (
        lambda: SegmentedPrompt([Text(SINK), chunk(1), chunk(1, space=OTHER_BLOCKS), Text((1,))]),
        "blocks of 8 tokens, not 4",
    ),
    "a chunk longer than the model": (
        lambda: Chunk(tuple(range(28)), SHORT),
        "leave 27: cut it with",
    ),
    "a prompt longer than the model": (
        lambda: SegmentedPrompt([Text(SINK), chunk(*range(27), space=SHORT), Text((1,))]),
        "33 tokens; the model has 32 positions",
    ),
    "a short sink": (lambda: dataclasses.replace(SPACE, sink_tokens=(1, 2)), "at least 4"),
    "a sink that fills the model": (
        lambda: dataclasses.replace(SPACE, max_positions=8),
        "no room for a block",
    ),
    "blocks of nothing": (lambda: dataclasses.replace(SPACE, block_tokens=0), "at least one token"),
    "a span that is empty": (lambda: spans((5, 5)), "5 to 5 is empty"),
    "a span backwards": (lambda: spans((6, 5)), "6 to 5 is empty"),
    "a span beyond the end": (lambda: spans((5, 11)), "out of range: the prompt has 10"),
    "a span before the beginning": (lambda: spans((-5, 5)), "out of range"),
    "overlapping spans": (lambda: spans((3, 6), (5, 8)), "overlaps"),
    "spans in another order": (lambda: spans((5, 8), (1, 3)), "ascending"),
    "a span at the beginning": (lambda: spans((0, 3)), "begins or ends"),
    "a span at the end": (lambda: spans((5, 10)), "begins or ends"),
    "no separator": (lambda: SegmentedPrompt.split([1, 2], [], SPACE), "no separator"),
    "two separators": (
        lambda: SegmentedPrompt.split([1, 0, 0, 2], [0], SPACE),
        "segment 1 of 3 is empty",
    ),
    "a separator in front": (
        lambda: SegmentedPrompt.split([0, 1, 0, 2], [0], SPACE),
        "segment 0 of 3",
    ),
    "a separator behind": (lambda: SegmentedPrompt.split([1, 0], [0], SPACE), "segment 1 of 2"),
    "an empty document": (lambda: split_document([], SPACE), "empty document"),
    "chunks below two blocks": (lambda: split_document([1], SPACE, 7), "at least 8"),
}


def spans(*pairs: tuple[int, int]) -> SegmentedPrompt:
    return SegmentedPrompt.from_spans(list(range(10)), pairs, SPACE)


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_words(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(InvalidArgumentError, match=words):
        make()


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (OTHER_MODEL, "another model"),
        (OTHER_SINK, "another sink prefix"),
        (OTHER_BLOCKS, "blocks of 8"),
    ],
)
def test_an_engine_refuses_chunks_of_another_space(space: ChunkSpace, words: str) -> None:
    prompt = SegmentedPrompt([Text(SINK), chunk(1, space=space), Text((1,))])
    prompt.check_space(space)
    with pytest.raises(InvalidArgumentError, match=f"chunk 0 is .*{words}"):
        prompt.check_space(SPACE)


def test_no_repr_shows_what_is_said() -> None:
    prompt = SegmentedPrompt([Text((4711, 4712)), chunk(4713), Text((4714,))])
    shown = f"{prompt!r} {prompt.spans!r} {SPACE!r}"
    assert "471" not in shown
    assert "1, 2, 3" not in shown


token_lists = st.lists(st.integers(1, 9), min_size=1, max_size=12).map(tuple)


@given(
    prefix=token_lists,
    pieces=st.lists(st.tuples(st.booleans(), token_lists), max_size=6),
    query=token_lists,
)
def test_spans_are_where_their_tokens_are(
    prefix: tuple[int, ...], pieces: list[tuple[bool, tuple[int, ...]]], query: tuple[int, ...]
) -> None:
    middle: list[Segment] = [
        Chunk(tokens, SPACE) if is_chunk else Text(tokens) for is_chunk, tokens in pieces
    ]
    prompt = SegmentedPrompt([Text(prefix), *middle, Text(query)])
    assert [span.chunk for span in prompt.spans] == [s for s in middle if isinstance(s, Chunk)]
    at = len(prefix)
    for span in prompt.spans:
        assert at <= span.start <= span.cached_stop <= span.stop <= len(prompt)
        assert prompt.token_ids[span.start : span.stop] == span.chunk.token_ids
        at = span.stop
    assert prompt.stop <= len(prompt) - len(query) or not prompt.spans
    pairs = [(span.start, span.stop) for span in prompt.spans]
    assert SegmentedPrompt.from_spans(prompt.token_ids, pairs, SPACE).spans == prompt.spans


@given(
    num_tokens=st.integers(0, 12),
    pairs=st.lists(st.tuples(st.integers(-2, 14), st.integers(-2, 14)), max_size=4),
)
def test_any_spans_give_their_prompt_or_words(
    num_tokens: int, pairs: list[tuple[int, int]]
) -> None:
    tokens = list(range(num_tokens))
    edges = [edge for pair in pairs for edge in pair]
    is_good = num_tokens > 0 and all(start < stop for start, stop in pairs)
    is_good = is_good and edges == sorted(edges) and all(0 < edge < num_tokens for edge in edges)
    if not is_good:
        with pytest.raises(InvalidArgumentError):
            SegmentedPrompt.from_spans(tokens, pairs, SPACE)
        return
    prompt = SegmentedPrompt.from_spans(tokens, pairs, SPACE)
    assert prompt.token_ids == tuple(tokens)
    assert [(span.start, span.stop) for span in prompt.spans] == pairs


@given(prefix=token_lists, chunks=st.lists(token_lists, max_size=5), query=token_lists)
def test_splitting_is_the_inverse_of_joining(
    prefix: tuple[int, ...], chunks: list[tuple[int, ...]], query: tuple[int, ...]
) -> None:
    joined = list(prefix)
    for piece in [*chunks, query]:
        joined += [0, *piece]
    wanted = [Text(prefix), *(Chunk(piece, SPACE) for piece in chunks), Text(query)]
    assert SegmentedPrompt.split(joined, [0], SPACE).segments == tuple(wanted)


@given(num_tokens=st.integers(1, 400), chunk_tokens=st.integers(8, 70), extra=st.integers(0, 60))
def test_documents_are_cut_at_blocks(num_tokens: int, chunk_tokens: int, extra: int) -> None:
    tokens = list(range(num_tokens))
    chunks = split_document(tokens, SPACE, chunk_tokens)
    assert [token for piece in chunks for token in piece.token_ids] == tokens
    assert all(len(piece) % 4 == 0 for piece in chunks[:-1])
    most = chunk_tokens // 4 * 4
    assert all(len(piece) <= most for piece in chunks)
    assert len(chunks) == 1 or all(len(piece) >= most // 2 // 4 * 4 for piece in chunks)
    longer = split_document([*tokens, *range(extra)], SPACE, chunk_tokens)
    num_kept = max(0, len(chunks) - 2)
    assert longer[:num_kept] == chunks[:num_kept]
