"""Prompts for the benchmark of reuse at any position, cut from texts.

    | prefix | chunk | chunk | ... | chunk | window of text, or a question, or a passage again |

kind     chunks                                                  the window
cont     one text, cut in pieces: each goes on where the last    goes on where the last chunk ends
         one ended
rag      pieces of different texts (of different places of       goes on where one of the chunks
         them, where there are too few texts)                    ends, not the last

A chunk holds one fact (`rag_facts`), at the end of the line that is nearest to a place drawn by
chance; text that made room for it comes in the next chunk. Chunks are encoded behind the *sink*: a
system prompt, and the ends of four of the texts (`ucm.reuse.encoding_context`), of which prompts
have nothing. Every third prompt begins with that system prompt, others with more, or another text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from ucm.errors import ConfigError
from ucm.reuse.encoding_context import CONTEXT_TOKENS, piece_lengths, sample_context

from .gsa_documents import Document, Encoder
from .rag_facts import Fact, Question, ask, asked, make_facts

SINK = "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n"
PREFIXES = (
    SINK + "<|im_start|>user\nRead the passages below. Some hold a note to remember.\n\n",
    SINK,
    "The archive of the harbour office. What follows was found in one box, in this order.\n\n",
)
COPY_TOKENS = 64
"""Of the passage that recurs."""
COPY_LEAD = 16
"""Of its tokens, those that only show which passage it is."""
QUESTION_TOKENS = 128
"""More than a question and its answer have."""
LONG_TEXT = 1536
"""Tokens; of a shorter one prompts may have all, and the context nothing."""
RAG_STRIDE = 3
"""Places that the next prompt of that kind begins further on."""
CONT, RAG = "cont", "rag"


@dataclass(frozen=True, slots=True)
class Shape:
    """How a prompt is cut."""

    kind: str
    num_chunks: int
    chunk_tokens: int

    def __str__(self) -> str:
        """For people."""
        return f"{self.kind}, {self.num_chunks} chunks of {self.chunk_tokens} tokens"


SHAPES = (
    Shape(CONT, 4, 256),
    Shape(RAG, 4, 256),
    Shape(CONT, 6, 448),
    Shape(RAG, 5, 384),
    Shape(CONT, 5, 300),
    Shape(RAG, 3, 500),
    Shape(CONT, 8, 384),
    Shape(RAG, 8, 320),
)
"""Of a full run. Chunks of 300 and 500 end within a block: their tails are computed."""
LEAST_SHAPES = {kind: Shape(kind, 3, 256) for kind in (CONT, RAG)}
"""Tried where a text is too short for the shape that was asked for."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, in tokens."""

    name: str
    kind: str
    sink: tuple[int, ...]
    prefix: tuple[int, ...]
    chunks: tuple[tuple[int, ...], ...]
    window: tuple[int, ...]
    """Text that follows; its last token is only a target."""
    questions: tuple[Question, ...]
    passage: tuple[int, ...]
    """A piece of a chunk, to recur."""

    @property
    def context(self) -> tuple[int, ...]:
        """Prefix and chunks."""
        return self.prefix + tuple(token for chunk in self.chunks for token in chunk)

    @property
    def starts(self) -> list[int]:
        """Position of each chunk."""
        found = [len(self.prefix)]
        for chunk in self.chunks[:-1]:
            found.append(found[-1] + len(chunk))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """What prompts are made of besides text."""

    shapes: tuple[Shape, ...] = SHAPES
    window_tokens: int = 96
    num_questions: int | None = None
    """For each prompt, at most; None: one for every chunk but the first."""
    context_tokens: int = CONTEXT_TOKENS
    """Of texts, which chunks are encoded behind and prompts then have nothing of."""


class PromptMaker:
    """Cuts prompts from texts; takes another text, or another place of one, for each."""

    def __init__(
        self,
        texts: Sequence[Document],
        encoder: Encoder,
        options: PromptOptions,
        warn: Callable[[str], None],
    ) -> None:
        """Read `texts`.

        Args:
            texts: in any order.
            encoder: of the model.
            options: what prompts are made of besides.
            warn: called with a line for each prompt that is another one than asked for, or missing.
        """
        start = encoder.encode("")
        self._encoder = PlainEncoder(encoder)
        tokens = [text.token_ids for text in texts]
        spare = [each if len(each) >= LONG_TEXT else () for each in tokens]
        pieces = piece_lengths([len(each) for each in spare], options.context_tokens)
        context = sample_context(spare, options.context_tokens)
        self._sink = (*start, *self._encoder.encode(SINK), *context)
        self._prefixes = [(*start, *self._encoder.encode(prefix)) for prefix in PREFIXES]
        self._newlines = frozenset(self._encoder.encode(line)[-1] for line in ("a\n", "a\n\n"))
        self._texts = [
            replace(text, token_ids=text.token_ids[: len(text.token_ids) - pieces.get(i, 0)])
            for i, text in enumerate(texts)
        ]
        self._options = options
        self._warn = warn

    def prompts(self, max_tokens: int) -> list[Prompt]:
        """As many as there are shapes, less those that the texts are too short for.

        Args:
            max_tokens: positions that the model has; no prompt needs more.

        Raises:
            ConfigError: not one prompt could be made.
        """
        if not self._fits(LEAST_SHAPES[CONT], max_tokens):
            raise ConfigError(
                f"the model's {max_tokens} positions are too few for {LEAST_SHAPES[CONT]}"
            )
        made = [self._prompt(number, max_tokens) for number in range(len(self._options.shapes))]
        found = [prompt for prompt in made if prompt is not None]
        if not found:
            longest = max(len(text.token_ids) for text in self._texts)
            raise ConfigError(
                f"the texts are too short: one of {self._need(LEAST_SHAPES[CONT])} tokens is "
                f"needed, and the longest of {len(self._texts)} has {longest}"
            )
        return found

    def _prompt(self, number: int, max_tokens: int) -> Prompt | None:
        wanted = self._options.shapes[number]
        fitting = [
            shape for shape in (wanted, LEAST_SHAPES[wanted.kind]) if self._fits(shape, max_tokens)
        ]
        for shape in fitting:
            cut = self._cont(number, shape) if shape.kind == CONT else self._rag(number, shape)
            if cut is not None:
                if shape != wanted:
                    self._warn(f"too little text for {wanted}: {shape} instead")
                return self._assemble(number, shape, cut)
        self._warn(
            f"no prompt of {wanted}: {'too little text' if fitting else 'too long for the model'}"
        )
        return None

    def _fits(self, shape: Shape, max_tokens: int) -> bool:
        tokens = shape.num_chunks * shape.chunk_tokens + max(map(len, self._prefixes))
        return tokens + max(self._options.window_tokens + 1, QUESTION_TOKENS) <= max_tokens

    def _need(self, shape: Shape) -> int:
        return shape.num_chunks * shape.chunk_tokens + self._options.window_tokens + 1

    def _cont(self, number: int, shape: Shape) -> _Cut | None:
        """One text, another one for each prompt, or another place of it."""
        need = self._need(shape)
        long = [text for text in self._texts if len(text.token_ids) >= need]
        if not long:
            return None
        turn, index = divmod(number // 2, len(long))
        text = long[index]
        stream = iter(text.token_ids[turn * need % (len(text.token_ids) - need + 1) :])
        # Each chunk takes from the same stream, so each begins where the last one ended.
        return _Cut(text.name, [stream] * shape.num_chunks, shape.num_chunks - 1)

    def _rag(self, number: int, shape: Shape) -> _Cut | None:
        """Places of different texts as far as there are enough, then of the same ones."""
        need = shape.chunk_tokens + self._options.window_tokens + 1
        depth = max(len(text.token_ids) // need for text in self._texts)
        places = [
            (text, place * need)
            for place in range(depth)
            for text in self._texts
            if (place + 1) * need <= len(text.token_ids)
        ]
        if len(places) < shape.num_chunks:
            return None
        first = number // 2 * RAG_STRIDE
        chosen = [places[(first + i) % len(places)] for i in range(shape.num_chunks)]
        goes_on = number // 2 % (shape.num_chunks - 1)
        streams = [iter(text.token_ids[start:]) for text, start in chosen]
        return _Cut(chosen[goes_on][0].name, streams, goes_on)

    def _assemble(self, number: int, shape: Shape, cut: _Cut) -> Prompt:
        dice = random.Random(number)
        facts = make_facts(shape.num_chunks, number)
        chunks = [
            self._chunk(stream, fact, shape.chunk_tokens, dice)
            for stream, fact in zip(cut.streams, facts, strict=True)
        ]
        wanted = asked(shape.num_chunks, self._options.num_questions)
        return Prompt(
            name=f"{number + 1}:{shape.kind}:{cut.name}",
            kind=shape.kind,
            sink=self._sink,
            prefix=self._prefixes[number % len(PREFIXES)],
            chunks=tuple(chunks),
            window=tuple(islice(cut.streams[cut.goes_on], self._options.window_tokens + 1)),
            questions=tuple(ask(facts, index, self._encoder) for index in wanted),
            passage=chunks[shape.num_chunks // 2][:COPY_TOKENS],
        )

    def _chunk(
        self, stream: Iterator[int], fact: Fact, num_tokens: int, dice: random.Random
    ) -> tuple[int, ...]:
        note = self._encoder.encode(f"{fact.statement}\n")
        text = list(islice(stream, num_tokens - len(note)))
        wanted = dice.randint(min(COPY_TOKENS, len(text)), len(text))
        lines = [i + 1 for i in range(COPY_TOKENS, len(text)) if text[i] in self._newlines]
        place = min(lines, key=lambda line: abs(line - wanted), default=wanted)
        return (*text[:place], *note, *text[place:])


class PlainEncoder:
    """Text to tokens, without what a tokenizer puts before every text."""

    def __init__(self, encoder: Encoder) -> None:
        """Encode with `encoder`."""
        self._encoder = encoder
        self._num_added = len(encoder.encode(""))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added."""
        return self._encoder.encode(text)[self._num_added :]


@dataclass(frozen=True, slots=True)
class _Cut:
    """Where a prompt's text comes from."""

    name: str
    """Of the text that goes on behind the chunks."""
    streams: Sequence[Iterator[int]]
    """What each chunk takes its tokens from."""
    goes_on: int
    """The chunk whose stream the window is taken from."""
