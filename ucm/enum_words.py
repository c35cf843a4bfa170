"""A word of an enumeration, as callers write it: its member, or the plain string.

An enumeration of ours is made of words (`"gsa-k4"`), and a caller may well give the word itself. It
becomes the member once, where it enters; inside, identity (`kind is SummaryKind.BOX`) then holds.
"""

from __future__ import annotations

import enum
from typing import TypeVar

from .errors import InvalidArgumentError, UcmError

Words = TypeVar("Words", bound=enum.StrEnum)


def word_of(
    words: type[Words], given: object, what: str, error: type[UcmError] = InvalidArgumentError
) -> Words:
    """The member of `words` that `given` is, or spells.

    Args:
        words: the enumeration.
        given: a member, or text.
        what: what the word is for, for the message.
        error: what a word that is none is refused with.

    Raises:
        UcmError: an `error` that names the words there are.
    """
    for word in words:
        if word == given:
            return word
    raise error(f"{what} {given!r} is not known; use one of {', '.join(words)}")
