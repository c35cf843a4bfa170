"""The demo's prompts: a shared system prompt, chapters in another order each time, a question.

    prompt 1   | system | crew weather fares galley animals safety fleet LUGGAGE | question |
    prompt 2   | system | animals fleet luggage weather safety crew fares GALLEY | question |
    prompt 3   | system | galley fares luggage fleet crew weather animals SAFETY | question |
               only | system | is a prefix of all; a smaller context leaves out the first chapters

Chapters come back in several prompts, but never at the same place behind the same text, so a
prefix cache can use none of one prompt's blocks for another, beyond the system prompt's.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import demo_documents as library


@dataclass(frozen=True, slots=True)
class DemoPrompt:
    """One question over some chapters."""

    name: str
    chapters: tuple[str, ...]
    """The chapter that answers is the last one."""
    question: str

    def messages(self, num_chapters: int) -> list[dict[str, str]]:
        """The chat's messages, with the last `num_chapters` chapters only."""
        context = "\n\n".join(self.chapters[-num_chapters:])
        user = f"{context}\n\nQuestion: {self.question}"
        return [
            {"role": "system", "content": library.SYSTEM_PROMPT},
            {"role": "user", "content": user},
        ]


PROMPTS: tuple[DemoPrompt, ...] = (
    DemoPrompt(
        "luggage",
        (
            *(library.CREW, library.WEATHER, library.FARES, library.GALLEY),
            *(library.ANIMALS, library.SAFETY, library.FLEET, library.LUGGAGE),
        ),
        "How long is lost property kept?",
    ),
    DemoPrompt(
        "galley",
        (
            *(library.ANIMALS, library.FLEET, library.LUGGAGE, library.WEATHER),
            *(library.SAFETY, library.CREW, library.FARES, library.GALLEY),
        ),
        "What is the best known dish of the restaurant?",
    ),
    DemoPrompt(
        "safety",
        (
            *(library.GALLEY, library.FARES, library.LUGGAGE, library.FLEET),
            *(library.CREW, library.WEATHER, library.ANIMALS, library.SAFETY),
        ),
        "What is the alarm for leaving the ship?",
    ),
)
