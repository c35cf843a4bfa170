"""Texts for the benchmark of reuse at any position: our own, or those of anybody's folder.

What ours are made of is on every machine that the product is installed on:

    name        tokens   text                                                        licence
    prose        3,300   the demo's handbook and how it began, see `gsa_texts`       of this project
    types        8,900   Python's reference: the standard types                      PSF-2.0
    textwrap     4,800   `textwrap.py` of Python's standard library                  PSF-2.0
    apache       2,200   the Apache licence 2.0, as `safetensors` brings it          Apache-2.0
    import       2,100   Python's reference: the import statement                    PSF-2.0
    statistics  14,600   `statistics.py` of Python's standard library                PSF-2.0
    german       3,700   a story in German, see `gsa_texts`                          of this project
    formats      6,300   Python's reference: format strings                          PSF-2.0
    python       3,800   Python's licences, as `typing_extensions` brings them       PSF-2.0
    random       8,200   `random.py` of Python's standard library                    PSF-2.0
    debugger     5,200   Python's reference: the debugger                            PSF-2.0
    fractions    7,300   `fractions.py` of Python's standard library                 PSF-2.0

A package that was installed without its licence is read as another chapter of Python's reference,
and the result says so in `warnings`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from ucm.errors import ConfigError
from ucm.text_files import name_of

from .gsa_documents import Document, Encoder, handbook, read_text
from .gsa_texts import CLOCKMAKER

MAX_CHARACTERS = 1 << 16
"""Of a text; more tokens than the longest prompt has."""
MAX_FILES = 200
"""Of a folder, in the order of their names."""
SHORT_TOKENS = 1024
"""No prompt of chunks that follow each other can be cut from a shorter text, or hardly one."""
JOINED_TOKENS = 4096
"""Of a text that is made of such files: more than the longest prompt's chunks."""
SPARE_TOPICS = {"safetensors": "compound", "typing_extensions": "specialnames"}
"""What is read where a package came without its licence."""

Warn = Callable[[str], None]


def own_texts(encoder: Encoder, warn: Warn) -> list[Document]:
    """The texts of the module's table, in its order.

    Args:
        encoder: of the model.
        warn: called with a line for each text that is another one than the table says.
    """
    return [_document(name, make(warn), encoder) for name, make in SOURCES.items()]


def folder_texts(folder: Path, encoder: Encoder, warn: Warn) -> list[Document]:
    """Every file of UTF-8 text below a folder, hidden ones left out, in the order of their paths.

    Where all are too short to be cut into chunks, neighbours are joined.

    Args:
        folder: to search, with all folders in it.
        encoder: of the model.
        warn: called with a line for each file that is not used, and why.

    Raises:
        ConfigError: it is no folder, cannot be read, or holds no text.
    """
    found = []
    for path in _files(folder, warn):
        name = name_of(path, folder)
        try:
            text = read_text(path, "--documents")
        except ConfigError as error:
            warn(f"left out: {error}")
            continue
        if text.strip():
            found.append(_document(name, text, encoder))
        else:
            warn(f"left out: {name} is empty")
    if not found:
        raise ConfigError(f"--documents {folder}: no text in it; put files of UTF-8 text there")
    if len(found) > 1 and all(len(each.token_ids) < SHORT_TOKENS for each in found):
        warn(f"all {len(found)} files are short: neighbours are read as one text")
        return list(_joined(found))
    return found


def _joined(texts: Sequence[Document]) -> Iterator[Document]:
    """Neighbours, joined to texts of at least `JOINED_TOKENS`, but for the last."""
    names: list[str] = []
    token_ids: list[int] = []
    for text in texts:
        names.append(text.name)
        token_ids += text.token_ids
        if len(token_ids) >= JOINED_TOKENS:
            yield Document(f"{names[0]} to {names[-1]}", tuple(token_ids))
            names, token_ids = [], []
    if names:
        yield Document(f"{names[0]} to {names[-1]}", tuple(token_ids))


def check_folder(folder: Path) -> None:
    """See that a folder can be read and holds a file, before a model is loaded.

    Raises:
        ConfigError: it does not.
    """
    if not any(True for _ in _files(folder, lambda _line: None)):
        raise ConfigError(f"--documents {folder}: no file in it; put files of UTF-8 text there")


def _files(folder: Path, warn: Warn) -> Iterator[Path]:
    try:
        if not folder.is_dir():
            raise ConfigError(f"--documents {folder}: no such folder; name one that holds texts")
        paths = sorted(path for path in folder.rglob("*") if _is_visible(path, folder))
    except OSError as error:
        raise ConfigError(f"--documents {folder}: {error.strerror or error}") from error
    if len(paths) > MAX_FILES:
        warn(f"{folder} has {len(paths)} files: the first {MAX_FILES} are read")
    yield from paths[:MAX_FILES]


def _is_visible(path: Path, folder: Path) -> bool:
    names = path.relative_to(folder).parts
    return path.is_file() and not any(name.startswith(".") for name in names)


def _document(name: str, text: str, encoder: Encoder) -> Document:
    return Document(name, tuple(encoder.encode(text[:MAX_CHARACTERS])))


def _prose(_warn: Warn) -> str:
    return handbook()


def _german(_warn: Warn) -> str:
    return CLOCKMAKER


def _topic(name: str, _warn: Warn) -> str:
    from pydoc_data.topics import topics

    return topics[name]


def _module(name: str, _warn: Warn) -> str:
    return inspect.getsource(importlib.import_module(name))


def _licence(package: str, warn: Warn) -> str:
    for path in _licence_files(package):
        if path.is_file():
            return read_text(path, "licence")
    spare = SPARE_TOPICS[package]
    warn(f"{package} is installed without its licence: Python's reference on {spare} instead")
    return _topic(spare, warn)


def _licence_files(package: str) -> Iterator[Path]:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        if "dist-info" in file.parts[0] and file.name.startswith("LICEN"):
            yield Path(str(file.locate()))


SOURCES: Mapping[str, Callable[[Warn], str]] = {
    "prose": _prose,
    "types": partial(_topic, "types"),
    "textwrap": partial(_module, "textwrap"),
    "apache": partial(_licence, "safetensors"),
    "import": partial(_topic, "import"),
    "statistics": partial(_module, "statistics"),
    "german": _german,
    "formats": partial(_topic, "formatstrings"),
    "python": partial(_licence, "typing_extensions"),
    "random": partial(_module, "random"),
    "debugger": partial(_topic, "debugger"),
    "fractions": partial(_module, "fractions"),
}
