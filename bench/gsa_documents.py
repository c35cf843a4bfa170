"""Documents for the benchmark of sparse attention: five of our own, or anybody's text file.

What they are made of is on every machine that the product is installed on:

    name     tokens   text                                                    licence
    prose     3,300   the demo's handbook and how it began, see `gsa_texts`   of this project
    code      4,000   `argparse.py` of Python's standard library              PSF-2.0
    german    3,700   a story in German, see `gsa_texts`                      of this project
    tables    4,000   ledgers and logs that a seeded generator writes         of this project
    manual    7,000   Python's reference, `pydoc_data/topics.py`              PSF-2.0

A document is cut to its number of tokens; one that ends earlier is taken whole.
"""

from __future__ import annotations

import argparse
import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ucm.errors import ConfigError

from . import demo_documents
from .gsa_texts import CLOCKMAKER, FOUNDING

MAX_FILE_BYTES = 16 << 20
"""Of a file that is named; far more than any model's context."""


class Encoder(Protocol):
    """Turns text into tokens."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text as the model reads it."""

    name: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    make: Callable[[], str]
    num_tokens: int


def own_document(name: str, encoder: Encoder, max_tokens: int) -> Document:
    """One of the documents of the module's table.

    Args:
        name: of it.
        encoder: of the model.
        max_tokens: cut to this, if the table does not say less.
    """
    limit = min(max_tokens, SOURCES[name].num_tokens)
    return Document(name, tuple(own_text(name, encoder)[:limit]))


def own_text(name: str, encoder: Encoder) -> list[int]:
    """All tokens of the text that one of our own documents is cut from."""
    return encoder.encode(SOURCES[name].make())


def read_documents(
    paths: Sequence[Path], encoder: Encoder, min_tokens: int, max_tokens: int
) -> list[Document]:
    """Anybody's text files, cut to `max_tokens`; two of one name are told apart by a number.

    Raises:
        ConfigError: a file cannot be read, is no text, or is too short.
    """
    found: dict[str, Document] = {}
    for path in paths:
        tokens = encoder.encode(read_text(path))
        if len(tokens) < min_tokens:
            raise ConfigError(
                f"--document {path}: {len(tokens)} tokens, and at least {min_tokens} are needed: "
                "name a longer text"
            )
        name, copies = path.name, 1
        while name in found:
            copies += 1
            name = f"{path.name} ({copies})"
        found[name] = Document(name, tuple(tokens[:max_tokens]))
    return list(found.values())


def check_document(path: Path) -> None:
    """See that a file is a text, before a model is loaded.

    Raises:
        ConfigError: it cannot be read or is no text.
    """
    read_text(path)


def read_text(path: Path, option: str = "--document") -> str:
    """A file of UTF-8 text, its first `MAX_FILE_BYTES`.

    Args:
        path: of it.
        option: that named it, for errors.

    Raises:
        ConfigError: it cannot be read or is no text.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror or error}") from error
    if b"\0" in content:
        raise ConfigError(f"{option} {path}: a binary file; name one of plain text in UTF-8")
    try:
        # A limit in bytes may cut the last character in two.
        return content.decode("utf-8", "strict" if len(content) < MAX_FILE_BYTES else "ignore")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{option} {path}: no UTF-8 at byte {error.start}; convert it with `iconv -t UTF-8`"
        ) from error


def handbook() -> str:
    """The demo's handbook, and how its company began."""
    chapters = [value for name, value in vars(demo_documents).items() if _is_chapter(name, value)]
    return "\n\n".join((*chapters, FOUNDING))


def _is_chapter(name: str, value: object) -> bool:
    return name.isupper() and isinstance(value, str) and value.startswith("Chapter:")


def _python_source() -> str:
    return inspect.getsource(argparse)


def _python_manual() -> str:
    from pydoc_data.topics import topics

    wanted = ("compound", "exceptions", "execmodel", "objects", "types", "import", "strings")
    return "\n\n".join(topics[name] for name in wanted if name in topics)


def _tables(seed: int = 20) -> str:
    """A ledger, a log and a stock list, in turns, with references from each to earlier ones."""
    dice = random.Random(seed)
    parts = []
    for month in range(1, 13):
        orders = [f"{month:02d}-{dice.randrange(1000, 9999)}" for _ in range(8)]
        parts += [_ledger(dice, month, orders), _log(dice, month, orders), _stock(dice, month)]
    return "\n".join(parts)


_TOWNS = ("Arden", "Brill", "Corby", "Dulas", "Esk", "Fowey", "Grane", "Hythe")
_GOODS = ("bolts", "canvas", "copper wire", "hinges", "lamp oil", "pine boards", "rope", "screws")


def _ledger(dice: random.Random, month: int, orders: Sequence[str]) -> str:
    rows = [f"## Orders of month {month}", "| order | town | goods | count | price |"]
    rows.append("|---|---|---|---:|---:|")
    for order in orders:
        count, cents = dice.randrange(1, 400), dice.randrange(50, 9000)
        town, goods = dice.choice(_TOWNS), dice.choice(_GOODS)
        rows.append(f"| {order} | {town} | {goods} | {count} | {cents / 100:.2f} |")
    return "\n".join(rows)


def _log(dice: random.Random, month: int, orders: Sequence[str]) -> str:
    states = ("received", "packed", "shipped", "delayed: no carrier", "delivered")
    rows = []
    for _ in range(6):
        day, hour, minute = dice.randrange(1, 29), dice.randrange(7, 19), dice.randrange(60)
        stamp = f"2021-{month:02d}-{day:02d}T{hour:02d}:{minute:02d}:00Z"
        rows.append(f"{stamp} INFO depot order={dice.choice(orders)} {dice.choice(states)}")
    return "\n".join(sorted(rows))


def _stock(dice: random.Random, month: int) -> str:
    rows = [f"stock,month_{month},change"]
    rows += [f"{goods},{dice.randrange(5000)},{dice.randrange(-300, 300):+d}" for goods in _GOODS]
    return "\n".join(rows)


SOURCES: Mapping[str, _Source] = {
    "prose": _Source(handbook, 4096),
    "code": _Source(_python_source, 4096),
    "german": _Source(lambda: CLOCKMAKER, 4096),
    "tables": _Source(_tables, 4096),
    "manual": _Source(_python_manual, 7168),
}
