"""A prompt in segments: text that is computed where it stands, chunks that are reused.

    segments   | text (prefix) | chunk   | chunk   | text? | chunk   | text (query) |
    positions  0               start                                 stop           T
    a chunk    | full blocks, from the cache | tail, computed |

It begins with text, which the first chunk stands behind (the sink prefix, or more), and ends with
text, whose last token the answer follows. What a chunk has beyond its last full block is computed
with the request; so is a chunk shorter than a block. Chunks of one prompt are of one `ChunkSpace`.

Everything here is immutable and holds tokens only; no reprs show them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ucm.errors import InvalidArgumentError

from .chunks import MIN_SINK_TOKENS, as_tokens, chunk_extra_keys, chunk_keys

if TYPE_CHECKING:
    from ucm.hashing import Encodable
    from ucm.types import BlockKey, NamespaceId

UNLIMITED = 2**31


@dataclass(frozen=True, slots=True)
class ChunkSpace:
    """Where chunks mean the same: one model, one sink prefix, one block size."""

    model: bytes
    """Fingerprint of the model and of how it places positions."""
    sink_tokens: tuple[int, ...] = field(repr=False)
    """Tokens that every chunk is encoded behind; their rows are dropped."""
    block_tokens: int
    max_positions: int = UNLIMITED
    """Positions that the model has; a chunk and its sink prefix must fit, and so must a prompt."""

    def __post_init__(self) -> None:
        sink_tokens = as_tokens(self.sink_tokens, "the sink prefix")
        object.__setattr__(self, "sink_tokens", sink_tokens)
        if len(self.sink_tokens) < MIN_SINK_TOKENS:
            raise InvalidArgumentError(
                f"a sink prefix of {len(self.sink_tokens)} tokens is too short; give at least "
                f"{MIN_SINK_TOKENS}, for example the system prompt"
            )
        if self.block_tokens < 1:
            raise InvalidArgumentError(f"a block has at least one token, not {self.block_tokens}")
        if self.base_position + self.block_tokens > self.max_positions:
            raise InvalidArgumentError(
                f"a sink prefix of {self.base_position} tokens leaves no room for a block of "
                f"{self.block_tokens} in {self.max_positions} positions; take a shorter one"
            )

    @property
    def base_position(self) -> int:
        """Position that the stored keys of a chunk's first token are rotated to."""
        return len(self.sink_tokens)

    @property
    def extra_keys(self) -> tuple[Encodable, ...]:
        """What tells these chunks' blocks from all others with the same tokens."""
        return chunk_extra_keys(self.sink_tokens)

    def difference(self, other: ChunkSpace) -> str:
        """What keeps a chunk of `other` from being used here, for people; empty: nothing."""
        if self.model != other.model:
            return f"of another model ({other.model.hex()[:12]}, not {self.model.hex()[:12]})"
        if self.sink_tokens != other.sink_tokens:
            return (
                f"encoded behind another sink prefix ({other.base_position} tokens, here "
                f"{self.base_position})"
            )
        if self.block_tokens != other.block_tokens:
            return f"of blocks of {other.block_tokens} tokens, not {self.block_tokens}"
        return ""


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens that are computed where they stand."""

    token_ids: tuple[int, ...] = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", _segment_tokens(self.token_ids, "a text segment"))

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens whose KV is kept, and placed where they stand."""

    token_ids: tuple[int, ...] = field(repr=False)
    space: ChunkSpace

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", _segment_tokens(self.token_ids, "a chunk"))
        room = self.space.max_positions - self.space.base_position
        if len(self.token_ids) > room:
            raise InvalidArgumentError(
                f"a chunk of {len(self.token_ids)} tokens; behind its sink prefix of "
                f"{self.space.base_position} the model's {self.space.max_positions} positions "
                f"leave {room}: cut it with ucm.reuse.split_document"
            )

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_blocks(self) -> int:
        """Full blocks: what is kept."""
        return len(self.token_ids) // self.space.block_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Tokens in them; those behind are computed with each request."""
        return self.num_blocks * self.space.block_tokens

    def keys(self, namespace: NamespaceId) -> list[BlockKey]:
        """What its full blocks are called in a store's namespace, in order."""
        space = self.space
        return chunk_keys(namespace, self.token_ids, space.block_tokens, space.sink_tokens)


Segment = Text | Chunk


@dataclass(frozen=True, slots=True)
class PlacedChunk:
    """A chunk where it stands in a prompt: positions `start` to `stop` - 1."""

    chunk: Chunk
    start: int

    @property
    def stop(self) -> int:
        """End of its tokens."""
        return self.start + len(self.chunk)

    @property
    def cached_stop(self) -> int:
        """End of its full blocks."""
        return self.start + self.chunk.num_cached_tokens

    @property
    def shift(self) -> int:
        """How far its stored keys have to be moved; any sign."""
        return self.start - self.chunk.space.base_position


@dataclass(frozen=True, slots=True)
class SegmentedPrompt:
    """A request in segments; see the module. Without a chunk it is an ordinary prompt."""

    segments: Sequence[Segment]
    token_ids: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Of all segments."""
    spans: tuple[PlacedChunk, ...] = field(init=False, repr=False, compare=False)
    """The chunks, ascending."""

    def __post_init__(self) -> None:
        segments = tuple(self.segments)
        _check_order(segments)
        _check_one_space(segments)
        object.__setattr__(self, "segments", segments)
        object.__setattr__(self, "token_ids", tuple(_tokens_of(segments)))
        object.__setattr__(self, "spans", tuple(_place(segments)))
        if self.spans and len(self.token_ids) > self.spans[0].chunk.space.max_positions:
            raise InvalidArgumentError(
                f"a prompt of {len(self.token_ids)} tokens; the model has "
                f"{self.spans[0].chunk.space.max_positions} positions: give fewer or shorter chunks"
            )

    @classmethod
    def from_spans(
        cls, token_ids: Sequence[int], spans: Sequence[tuple[int, int]], space: ChunkSpace
    ) -> SegmentedPrompt:
        """A prompt of which some parts are chunks.

        Args:
            token_ids: all of it.
            spans: (start, stop) of each chunk, ascending, disjoint, none of them empty; text
                before the first and behind the last.
            space: the chunks'.

        Raises:
            InvalidArgumentError: spans that are none of that, or a segment that cannot be.
        """
        _check_spans(spans, len(token_ids))
        segments: list[Segment] = []
        at = 0
        for start, stop in spans:
            if start > at:
                segments.append(Text(tuple(token_ids[at:start])))
            segments.append(Chunk(tuple(token_ids[start:stop]), space))
            at = stop
        return cls([*segments, Text(tuple(token_ids[at:]))])

    @classmethod
    def split(
        cls, token_ids: Sequence[int], separator_ids: Sequence[int], space: ChunkSpace
    ) -> SegmentedPrompt:
        """A prompt that is cut where its separator stands: prefix, chunks, query.

        The separator is a mark, not text: the model never sees it. Take tokens that no text has,
        such as a reserved token of the tokenizer.

        Args:
            token_ids: with separators; without any, all of it is text.
            separator_ids: the tokens that are one separator; at least one.
            space: the chunks'.

        Raises:
            InvalidArgumentError: no separator given, or two with nothing between them, or one at
                the very beginning or end.
        """
        if not separator_ids:
            raise InvalidArgumentError("no separator; give the tokens that stand between segments")
        pieces = list(_pieces(tuple(token_ids), tuple(separator_ids)))
        for number, piece in enumerate(pieces):
            if not piece:
                raise InvalidArgumentError(
                    f"segment {number} of {len(pieces)} is empty: put separators between prefix, "
                    "chunks and query only, one at a time"
                )
        prefix, *chunks = pieces
        if not chunks:
            return cls([Text(prefix)])
        query = chunks.pop()
        return cls([Text(prefix), *(Chunk(piece, space) for piece in chunks), Text(query)])

    @property
    def start(self) -> int:
        """Where the first chunk begins; the prompt's end without one."""
        return self.spans[0].start if self.spans else len(self.token_ids)

    @property
    def stop(self) -> int:
        """Where the last chunk ends, its tail included; the prompt's end without one."""
        return self.spans[-1].stop if self.spans else len(self.token_ids)

    def __len__(self) -> int:
        return len(self.token_ids)

    def check_space(self, space: ChunkSpace) -> None:
        """Refuse chunks that mean something else to an engine.

        Raises:
            InvalidArgumentError: they are of another model, behind another sink prefix, or of
                another block size than `space`.
        """
        for number, span in enumerate(self.spans):
            difference = space.difference(span.chunk.space)
            if difference:
                raise InvalidArgumentError(
                    f"chunk {number} is {difference}: make it with the engine that shall use it"
                )


def split_document(
    token_ids: Sequence[int], space: ChunkSpace, chunk_tokens: int = 512
) -> list[Chunk]:
    """Cut a document into chunks whose boundaries are blocks'.

    All have `chunk_tokens` but the last two, which share what is left evenly enough that none is
    shorter than half of that in whole blocks; text that is appended changes these two at most.

    Args:
        token_ids: the document; at least one.
        space: the chunks'.
        chunk_tokens: longest chunk, rounded down to whole blocks; at least two blocks.

    Raises:
        InvalidArgumentError: no tokens, or chunks that cannot be.
    """
    size = space.block_tokens
    most = chunk_tokens // size * size
    if most < 2 * size:
        raise InvalidArgumentError(
            f"chunks of {chunk_tokens} tokens are too short for blocks of {size}; take at least "
            f"{2 * size}"
        )
    if not token_ids:
        raise InvalidArgumentError("an empty document has no chunks: leave it out")
    cuts = list(range(0, len(token_ids), most))
    last = len(token_ids) - cuts[-1]
    if len(cuts) > 1 and last < most // 2:
        cuts[-1] = cuts[-2] + (most + last) // 2 // size * size
    stops = [*cuts[1:], len(token_ids)]
    return [
        Chunk(tuple(token_ids[start:stop]), space) for start, stop in zip(cuts, stops, strict=True)
    ]


def _segment_tokens(token_ids: Sequence[int], what: str) -> tuple[int, ...]:
    tokens = as_tokens(token_ids, what)
    if not tokens:
        raise InvalidArgumentError(f"{what} is empty: leave it out")
    return tokens


def _check_order(segments: tuple[Segment, ...]) -> None:
    if not segments:
        raise InvalidArgumentError("a prompt without segments; give at least one Text")
    for segment in segments:
        if not isinstance(segment, Text | Chunk):
            raise InvalidArgumentError(
                f"a segment is a Text or a Chunk, not a {type(segment).__name__}"
            )
    if not isinstance(segments[0], Text):
        raise InvalidArgumentError(
            "the first segment is a chunk: put text in front of it, at least the sink prefix"
        )
    if not isinstance(segments[-1], Text):
        raise InvalidArgumentError(
            "the last segment is a chunk: put the query behind it, at least one token"
        )


def _check_one_space(segments: tuple[Segment, ...]) -> None:
    chunks = [segment for segment in segments if isinstance(segment, Chunk)]
    for number, chunk in enumerate(chunks):
        difference = chunks[0].space.difference(chunk.space)
        if difference:
            raise InvalidArgumentError(
                f"chunk {number} is {difference}: all chunks of a prompt are of one ChunkSpace"
            )


def _check_spans(spans: Sequence[tuple[int, int]], num_tokens: int) -> None:
    at = 0
    for start, stop in spans:
        if not 0 <= start <= num_tokens or not 0 <= stop <= num_tokens:
            raise InvalidArgumentError(
                f"chunk {start} to {stop} is out of range: the prompt has {num_tokens} tokens"
            )
        if start >= stop:
            raise InvalidArgumentError(f"chunk {start} to {stop} is empty: leave it out")
        if start < at:
            raise InvalidArgumentError(
                f"chunk {start} to {stop} overlaps the one before, which ends at {at}, or stands "
                "before it: give disjoint spans in ascending order"
            )
        at = stop
    if spans and (spans[0][0] == 0 or at == num_tokens):
        raise InvalidArgumentError(
            "a chunk begins or ends the prompt: put text before the first (at least the sink "
            "prefix) and behind the last (the query)"
        )


def _tokens_of(segments: tuple[Segment, ...]) -> Iterator[int]:
    for segment in segments:
        yield from segment.token_ids


def _place(segments: tuple[Segment, ...]) -> Iterator[PlacedChunk]:
    at = 0
    for segment in segments:
        if isinstance(segment, Chunk):
            yield PlacedChunk(segment, at)
        at += len(segment)


def _pieces(token_ids: tuple[int, ...], separator: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    begin = at = 0
    while at <= len(token_ids) - len(separator):
        if token_ids[at : at + len(separator)] != separator:
            at += 1
            continue
        yield token_ids[begin:at]
        begin = at = at + len(separator)
    yield token_ids[begin:]
