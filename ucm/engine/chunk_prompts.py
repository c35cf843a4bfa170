"""Prompts with documents: the same opening in front of all, so that their chunks can be shared.

    | opening: template, instruction | chunk | gap | chunk | ... | gap, question, end of template |
    | the sink prefix is its start,  | kept  |     | kept  |     | computed                       |
    | and a context                  |

A chunk is encoded behind the opening and, where there is one, a context: a sample of texts like the
documents, which is in no prompt (`ucm.reuse.encoding_context`).

A chunk's blocks are named by what they were encoded behind, so who stores chunks and who uses them
must build their prompts here with the same arguments. Texts are encoded each for itself and as
plain text: nothing that a document says ends its own part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ucm.errors import ConfigError, InvalidArgumentError
from ucm.reuse.segments import Chunk, ChunkSpace, Segment, SegmentedPrompt, Text, split_document

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

INSTRUCTION = "Use these documents to answer.\n\n"
"""Says what follows, and gives templates without a system prompt a sink prefix."""
GAP = "\n\n"
"""Between documents, and before the question; computed with each prompt."""
CHUNK_TOKENS = 512
"""Longest chunk; the shortest but for short documents and their ends is half of it."""
MAX_OPENING_TOKENS = 64
"""A longer opening is not repeated in front of every chunk: its start serves as well."""

_PLACE = "[[documents]]"


class ChunkPrompts:
    """Makes prompts of one form for one tokenizer; see the module."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        is_chat: bool = True,
        instruction: str = INSTRUCTION,
        context: Sequence[int] = (),
    ) -> None:
        """Encode what all prompts have in common.

        Args:
            tokenizer: the model's.
            is_chat: whether to use its chat template.
            instruction: stands in front of the documents.
            context: tokens that chunks are encoded behind, besides: a sample of texts like the
                documents (`sample_context`), always the same one.

        Raises:
            ConfigError: there is no template, or one that does not show the user's text once.
        """
        head, tail = _template_around(tokenizer) if is_chat else ("", "")
        self._tokenizer = tokenizer
        self._opening = (*tokenizer.encode(head), *tokenizer.encode_plain(instruction))
        self._gap = tuple(tokenizer.encode_plain(GAP))
        self._tail = tuple(tokenizer.encode_template(tail))
        self._context = tuple(context)

    @property
    def sink_tokens(self) -> tuple[int, ...]:
        """What chunks are to be encoded behind: `ReuseOptions.sink_tokens`."""
        return (*self._opening[:MAX_OPENING_TOKENS], *self._context)

    def chunks_of(
        self, text: str, space: ChunkSpace, chunk_tokens: int = CHUNK_TOKENS
    ) -> list[Chunk]:
        """A document, cut into chunks.

        Args:
            text: the document.
            space: `Engine.chunk_space` of the engine that is to use them.
            chunk_tokens: longest chunk.

        Raises:
            InvalidArgumentError: an empty text, or chunks that cannot be.
        """
        return split_document(self._tokenizer.encode_plain(text), space, chunk_tokens)

    def prompt(self, chunks: Sequence[Chunk], question: str) -> SegmentedPrompt:
        """What is asked about chunks, in the order that they shall stand in.

        Raises:
            InvalidArgumentError: an empty question, chunks that do not go together, or more tokens
                than the model has positions.
        """
        if not question.strip():
            raise InvalidArgumentError("the question is empty")
        segments: list[Segment] = [Text(self._opening)]
        for number, chunk in enumerate(chunks):
            segments += [Text(self._gap), chunk] if number else [chunk]
        asked = self._tokenizer.encode_plain(GAP + question)
        return SegmentedPrompt([*segments, Text((*asked, *self._tail))])


def _template_around(tokenizer: Tokenizer) -> tuple[str, str]:
    """What a chat template puts before and behind a user's first message."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": _PLACE}])
    if text.count(_PLACE) != 1:
        raise ConfigError(
            "the model's chat template does not show the user's text once and unchanged, so "
            "documents cannot be placed in it; do without a template"
        )
    head, _, tail = text.partition(_PLACE)
    return head, tail
