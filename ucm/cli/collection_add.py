"""`ucm collection add`: text files, prefilled and registered as documents of a collection."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import ucm
from ucm import model_hub
from ucm.collection_api import CollectionApi, check_collection_name
from ucm.errors import TierUnavailableError
from ucm.plurals import counted
from ucm.sockets import check_socket_path
from ucm.text_files import (
    DEFAULT_ENCODING,
    SkippedFile,
    SkipReason,
    TextFile,
    check_encoding,
    find_files,
    read_text,
)

from .cache_choice import (
    check_folder_is_ours,
    daemon_factory,
    say_loading,
    sessions_of,
    socket_or_folder,
)
from .console import ExitCode, print_json
from .option_class import takes_options
from .options import (
    DEFAULT_MODEL,
    ConfigOption,
    FolderOption,
    JsonOption,
    ModelOption,
    SocketOption,
    loaded_config,
)
from .progress import ByteProgress
from .reuse_flags import CONTEXT_HELP, document_prompts
from .termination import unwinding_on_sigterm

if TYPE_CHECKING:
    from ucm.api import CacheApi
    from ucm.connectors.collection_ingest import CollectionIngest, Ingested

DEADLINE_S = 30.0
"""Nobody waits for a first token here: the cache may take its time."""
INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended."""
_HARMLESS = frozenset({SkipReason.BINARY, SkipReason.EMPTY, SkipReason.SPECIAL})
"""What any folder of documents has in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddOptions:
    """What the command line asks for."""

    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The collection; made if there is none.")
    ]
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", help="Text files, and folders with all below them."),
    ]
    socket: SocketOption = None
    cache: FolderOption = None
    model: ModelOption = DEFAULT_MODEL
    dtype: Annotated[str, typer.Option(help="fp32 or bf16; the same as when asking.")] = "fp32"
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="How it will be asked; see `ucm generate`.")
    ] = True
    context: Annotated[Path | None, typer.Option(metavar="FILE", help=CONTEXT_HELP)] = None
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Call documents by their paths from here; default: by absolute paths.",
        ),
    ] = None
    encoding: Annotated[str, typer.Option(metavar="NAME", help="Of all the files.")] = (
        DEFAULT_ENCODING
    )
    accept_lossy: Annotated[
        bool, typer.Option("--accept-lossy", help="As with `ucm generate`: another namespace.")
    ] = False
    expires: Annotated[
        str, typer.Option(metavar="WHEN", help="Delete them in 90s, 30m, 12h or 7d, or never.")
    ] = "never"
    config: ConfigOption = None
    as_json: JsonOption = False


@takes_options(AddOptions)
def add_command(options: AddOptions) -> None:
    """Prefill documents, store them, and register them under their names.

    What the collection knows already is left alone; a document of another content replaces that of
    the same name. After Ctrl-C the same command goes on where it stopped. Exits with 1 when a file
    that may be a document could not be taken, nothing was taken, or the cache kept not all of it.
    """
    check_collection_name(options.name)
    check_encoding(options.encoding)
    _expiry(options)
    files, skipped = find_files(options.paths, options.root)
    model = model_hub.resolve(options.model)
    log = _Log(collection=options.name, quiet=options.as_json)
    for each in skipped:
        log.skip(each)
    with unwinding_on_sigterm(), ByteProgress(quiet=options.as_json) as progress:
        try:
            with _opened(model, options) as ingest:
                _add_all(ingest, files, options, _Report(log, progress))
        except KeyboardInterrupt:
            log.is_interrupted = True
    log.show()
    if log.exit_code:
        raise typer.Exit(log.exit_code)


@dataclass(frozen=True, slots=True)
class _Report:
    """Where it is told what is done."""

    log: _Log
    progress: ByteProgress


def _add_all(
    ingest: CollectionIngest, files: list[Path], options: AddOptions, report: _Report
) -> None:
    log, progress = report.log, report.progress
    total = sum(_size_of(file) for file in files)
    done = 0
    for file in files:
        found = read_text(file, options.root, options.encoding)
        if isinstance(found, SkippedFile):
            log.skip(found)
        else:
            log.add(ingest.add(found.name, found.text, _advance(progress, found, done, total)))
        done += _size_of(file)
        progress.update("documents", min(done, total), total)


def _size_of(file: Path) -> int:
    with contextlib.suppress(OSError):
        return file.stat().st_size
    return 0


def _advance(
    progress: ByteProgress, file: TextFile, done_bytes: int, total_bytes: int
) -> Callable[[int], None]:
    """Tokens of a document, shown as its bytes; how many it has is not known beforehand."""
    bytes_per_token = 4
    num_bytes = 0

    def advance(num_tokens: int) -> None:
        nonlocal num_bytes
        num_bytes = min(file.num_bytes, num_bytes + num_tokens * bytes_per_token)
        progress.update("documents", min(done_bytes + num_bytes, total_bytes), total_bytes)

    return advance


@contextlib.contextmanager
def _opened(model: Path, options: AddOptions) -> Iterator[CollectionIngest]:
    """An engine over the store, and its registry."""
    from ucm.connectors.cached_engine import CachedEngineOptions, open_engine
    from ucm.connectors.collection_ingest import CollectionIngest
    from ucm.connectors.session import SessionOptions
    from ucm.engine.engine import EngineOptions
    from ucm.engine.loading import load_model
    from ucm.reuse.options import ReuseOptions

    with _store(options) as (factory, collections):
        say_loading(model)
        loaded = load_model(model, options.dtype)
        prompts = document_prompts(loaded.tokenizer, is_chat=options.chat, context=options.context)
        settings = CachedEngineOptions(
            engine=EngineOptions(reuse=ReuseOptions(sink_tokens=prompts.sink_tokens)),
            session=SessionOptions(deadline_s=DEADLINE_S, store_delay_s=0.0),
            accepts_lossy=options.accept_lossy,
        )
        with open_engine(loaded, factory, settings) as cached:
            yield CollectionIngest(
                cached, collections, options.name, prompts, expires_s=_expiry(options)
            )


def _expiry(options: AddOptions) -> float:
    """UNIX time; 0: never."""
    from .collection import parse_when

    return parse_when(options.expires, time.time())


@contextlib.contextmanager
def _store(options: AddOptions) -> Iterator[tuple[Callable[[], CacheApi], CollectionApi]]:
    """How the engine connects to a store, and the store's collections.

    Raises:
        TierUnavailableError: no daemon listens there.
        ConfigError: both a daemon and a folder are named, what is neither, or a folder of
            other things.
    """
    socket, folder = socket_or_folder(options.socket, options.cache)
    if folder is not None:
        check_folder_is_ours(folder)
        with ucm.open(folder) as store:
            yield sessions_of(store), store.collections
        return
    from ucm.admin import AdminClient

    found = loaded_config(options.config, service__socket_path=socket)
    path = found.config.service.socket_path
    check_socket_path(path)
    if not path.is_socket():
        raise TierUnavailableError(
            f"no daemon listens at {path}; start it with `ucm serve --socket {path}`, name another "
            "with --socket, or use a folder without a daemon with --cache"
        )
    with AdminClient(path, timeout_s=DEADLINE_S) as admin:
        yield daemon_factory(path, DEADLINE_S), admin.collections


@dataclass(slots=True, kw_only=True)
class _Log:
    """What was done, told as it happens and in the end."""

    collection: str
    quiet: bool
    is_interrupted: bool = False
    added: list[Ingested] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)
    refused: list[Ingested] = field(default_factory=list)

    def skip(self, file: SkippedFile) -> None:
        self.skipped.append(file)
        self._say("skipped", file.name, file.detail)

    def add(self, done: Ingested) -> None:
        if done.outcome == "skipped":
            self.refused.append(done)
            self._say("skipped", done.name, done.detail)
            return
        self.added.append(done)
        self._say(done.outcome.value, done.name, _words(done))

    def _say(self, what: str, name: str, detail: str) -> None:
        if not self.quiet:
            print(f"{what:<9} {name}: {detail}")

    @property
    def exit_code(self) -> int:
        if self.is_interrupted:
            return INTERRUPTED
        is_worse = any(file.reason not in _HARMLESS for file in self.skipped) or self.refused
        is_short = any(done.stored.num_unstored for done in self.added)
        is_fine = self.added and not is_worse and not is_short
        return ExitCode.DONE if is_fine else ExitCode.CHECK_FAILED

    def show(self) -> None:
        counts = Counter(done.outcome.value for done in self.added)
        counts["skipped"] = len(self.skipped) + len(self.refused)
        if not self.quiet:
            self._show_text(counts)
            return
        documents = [_as_dict(done) for done in (*self.added, *self.refused)]
        documents += [
            {"name": file.name, "outcome": "skipped", "reason": file.reason, "detail": file.detail}
            for file in self.skipped
        ]
        print_json(
            {
                "collection": self.collection,
                "version": max((done.version for done in self.added), default=None),
                **{outcome: counts[outcome] for outcome in ("new", "known", "replaced", "skipped")},
                "interrupted": self.is_interrupted,
                "documents": documents,
            }
        )

    def _show_text(self, counts: Counter[str]) -> None:
        stored = [done.stored for done in self.added]
        outcomes = ("new", "known", "replaced", "skipped")
        print(
            f"{self.collection}: {', '.join(f'{counts[each]} {each}' for each in outcomes)}; "
            f"{counted(sum(each.num_computed for each in stored), 'chunk')} of "
            f"{counted(sum(each.num_computed_tokens for each in stored), 'token')} computed, "
            f"{sum(each.num_known for each in stored)} found there"
        )
        if any(file.reason is SkipReason.ENCODING for file in self.skipped):
            print("--encoding names the encoding of all files; add those of another one by one")
        if any(each.num_unstored for each in stored):
            print("the cache did not keep all of it: see `ucm status`, and whether it is too small")
        if self.is_interrupted:
            print("interrupted: the same command goes on where this one stopped")


def _words(done: Ingested) -> str:
    """What became of a document, for people."""
    stored = done.stored
    text = f"{counted(done.num_tokens, 'token')} in {counted(done.num_chunks, 'chunk')}"
    if stored.num_computed:
        text += f", {stored.num_computed} computed"
    if stored.num_unstored:
        text += f", {stored.num_unstored} NOT STORED"
    if done.num_tail_tokens == done.num_tokens:
        text += ", too short for a block: computed with each request"
    deletion = done.deletion
    if deletion.num_blocks:
        text += f"; {counted(deletion.num_blocks, 'block')} of what it replaces deleted"
    if deletion.num_waiting:
        text += f", {deletion.num_waiting} of them when their readers are done"
    return text


def _as_dict(done: Ingested) -> dict[str, object]:
    return dataclasses.asdict(done)


def add_to(group: typer.Typer) -> None:
    """Make this a command of `ucm collection`."""
    group.command("add")(add_command)
