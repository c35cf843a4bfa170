"""Facts that hide in chunks, and questions for them.

A prompt's facts say the same of different places, one in each chunk, so that an answer can be mixed
up. A question stands behind two others that are answered, about other chunks:

    Question: What is the door code of the Arden archive?
    Answer: 4711
    Question: What is the door code of the Brill archive?
    Answer: 9025
    Question: What is the door code of the Corby archive?
    Answer:                                                  <- what follows is scored

Places, people and numbers are made up.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .gsa_documents import Encoder

NUM_SHOTS = 2
"""Questions that are answered before the one that is asked."""
PLACES = (
    *("Arden", "Brill", "Corby", "Dulas", "Esker", "Fowey", "Grane", "Hythe"),
    *("Ilford", "Jarrow", "Kelso", "Lydd"),
)
NAMES = (
    *("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry"),
    *("Irene", "Jonas", "Karen", "Lukas"),
)
SURNAMES = (
    *("Baker", "Carter", "Dixon", "Ellis", "Foster", "Grant", "Hughes", "Irving"),
    *("Jenkins", "Keller", "Lambert", "Morris"),
)


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that is so in one place."""

    statement: str
    """Sentence that says it."""
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Question:
    """Tokens of one question and of its answer."""

    token_ids: tuple[int, ...]
    """The answered ones before it included."""
    gold: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Relation:
    statement: str
    question: str


RELATIONS = (
    _Relation(
        "Remember: the door code of the {place} archive is {answer}.",
        "What is the door code of the {place} archive?",
    ),
    _Relation(
        "Remember: the keeper of the {place} lighthouse is {answer}.",
        "Who is the keeper of the {place} lighthouse?",
    ),
    _Relation(
        "Remember: the morning ferry to {place} leaves at {answer}.",
        "When does the morning ferry to {place} leave?",
    ),
)


def make_facts(count: int, seed: int) -> list[Fact]:
    """As many facts of one relation, about different places, up to the number of `PLACES`.

    Args:
        count: of facts.
        seed: of everything; every second one has the next relation.
    """
    dice = random.Random(seed)
    kind = seed // 2 % len(RELATIONS)
    people = zip(dice.sample(NAMES, count), dice.sample(SURNAMES, count), strict=True)
    values = (
        [str(number) for number in dice.sample(range(1000, 10_000), count)],
        [" ".join(person) for person in people],
        [f"{hour}:{dice.randrange(10, 60)}" for hour in _hours(dice, count)],
    )[kind]
    places = dice.sample(PLACES, count)
    return [
        _fact(RELATIONS[kind], place, value) for place, value in zip(places, values, strict=True)
    ]


def _hours(dice: random.Random, count: int) -> list[int]:
    return [dice.randrange(4, 12) for _ in range(count)]


def _fact(relation: _Relation, place: str, answer: str) -> Fact:
    return Fact(
        relation.statement.format(place=place, answer=answer),
        relation.question.format(place=place),
        answer,
    )


def ask(facts: Sequence[Fact], index: int, encoder: Encoder) -> Question:
    """A question for one of the facts, behind answered ones for the two that follow it.

    Args:
        facts: of a prompt, at least three.
        index: of the fact that is asked for.
        encoder: of the model.
    """
    shots = [facts[(index + step) % len(facts)] for step in range(NUM_SHOTS, 0, -1)]
    lines = [f"Question: {shot.question}\nAnswer: {shot.answer}\n" for shot in shots]
    text = "\n\n" + "".join(lines) + f"Question: {facts[index].question}\nAnswer:"
    gold = encoder.encode(f" {facts[index].answer}")
    return Question(tuple(encoder.encode(text)), tuple(gold))


def asked(num_facts: int, num_questions: int | None = None) -> list[int]:
    """Which facts are asked for: spread evenly, the last first, the first chunk's never.

    The first chunk is the one that nothing can stand before but the prefix.

    Args:
        num_facts: of a prompt.
        num_questions: at most; None asks for all but the first.
    """
    most = num_facts - 1
    count = most if num_questions is None else min(num_questions, most)
    return [num_facts - 1 - step * (num_facts - 1) // count for step in range(count)]
