"""`ucm collection add | ls | rm | expire`: documents whose chunks a store keeps; deleting them."""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

import ucm
from ucm.collection_api import check_time
from ucm.errors import ConfigError, InvalidArgumentError, UcmError
from ucm.plurals import counted

from . import collection_add
from .cache_choice import check_folder_is_ours, socket_or_folder
from .console import ExitCode, print_json, table_console
from .option_class import takes_options
from .options import ConfigOption, FolderOption, JsonOption, SocketOption, loaded_config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ucm.collection_api import CollectionApi, CollectionInfo, DocumentInfo, RemoveAnswer

command = typer.Typer(
    help="Documents whose chunks are kept.", no_args_is_help=True, add_completion=False
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The collection.")]
DocumentsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="DOCUMENT...", help="Documents of it, by id.")
]
AllOption = Annotated[bool, typer.Option("--all", help="All documents of the collection.")]

_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@command.callback()
def _group() -> None:
    """Documents whose chunks are kept."""


collection_add.add_to(command)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Where:
    """Which store, and how to answer."""

    socket: SocketOption = None
    cache: FolderOption = None
    config: ConfigOption = None
    as_json: JsonOption = False


@contextlib.contextmanager
def _connect(where: _Where) -> Iterator[CollectionApi]:
    """The collections of a daemon's store, or of a folder that no daemon has open.

    Raises:
        ConfigError: both are named, or the folder is not there or no data folder.
    """
    socket, folder = socket_or_folder(where.socket, where.cache)
    if folder is None:
        from ucm.admin import AdminClient

        found = loaded_config(where.config, service__socket_path=socket)
        with AdminClient(found.config.service.socket_path) as client:
            yield client.collections
        return
    if not folder.is_dir():
        raise ConfigError(f"--cache {folder}: no such folder; --socket names a daemon")
    check_folder_is_ours(folder)
    with ucm.open(folder) as store:
        yield store.collections


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listing(_Where):
    """What `ls` is asked for."""

    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A collection; all if left out.")
    ] = None


@command.command("ls")
@takes_options(_Listing)
def list_command(options: _Listing) -> None:
    """List collections, or the documents of one."""
    with _connect(options) as collections:
        if options.name is None:
            _list_collections(collections, as_json=options.as_json)
        else:
            _list_documents(collections, options.name, as_json=options.as_json)


def _list_collections(collections: CollectionApi, *, as_json: bool) -> None:
    found, deletions = collections.list_collections(), collections.deletions()
    if as_json:
        print_json(
            {"collections": [asdict(each) for each in found], "deletions": asdict(deletions)}
        )
        return
    console = table_console()
    console.print(_collections_table(found))
    console.print(
        f"{deletions.num_waiting} deleted blocks wait to be erased, "
        f"{deletions.num_barred} may not be stored again"
    )
    for problem in deletions.problems:
        console.print(f"problem: {problem}", style="bold red", markup=False)


def _collections_table(found: tuple[CollectionInfo, ...]) -> Table:
    table = Table("name", "version", "documents", "chunks", "blocks", "tokens", "made", box=None)
    for each in found:
        numbers = (each.version, each.num_documents, each.num_chunks, each.num_blocks)
        table.add_row(
            each.name, *map(str, numbers), str(each.num_tokens), _time_text(each.created_s)
        )
    return table


def _list_documents(collections: CollectionApi, name: str, *, as_json: bool) -> None:
    found = sorted(collections.list_documents(name), key=lambda each: (each.id, each.namespace))
    if as_json:
        print_json({"collection": name, "documents": [asdict(each) for each in found]})
        return
    table = Table("version", "namespace", "chunks", "tokens", "added", "expires", box=None)
    table.add_column("document", overflow="fold")
    for each in found:
        table.add_row(*_document_texts(each))
    console = table_console()
    console.print(table)
    console.print(counted(len(found), "document"))


def _document_texts(each: DocumentInfo) -> tuple[str, ...]:
    return (
        str(each.version),
        each.namespace.hex()[:8],
        str(each.num_chunks),
        str(each.num_tokens),
        _time_text(each.added_s),
        _time_text(each.expires_s) if each.expires_s else "never",
        each.id.replace("[", r"\["),
    )


def _time_text(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Removal(_Where):
    """What `rm` is asked for."""

    name: NameArgument
    documents: DocumentsArgument = None
    whole: AllOption = False
    timeout_s: Annotated[
        float,
        typer.Option("--timeout", min=0.0, max=60.0, help="Seconds to wait for readers' leases."),
    ] = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expiry(_Where):
    """What `expire` is asked for."""

    name: NameArgument
    when: Annotated[
        str,
        typer.Argument(metavar="WHEN", help="In how long (90s, 30m, 12h, 7d), `now`, or `never`."),
    ]
    documents: DocumentsArgument = None
    whole: AllOption = False


@command.command("rm")
@takes_options(_Removal)
def remove_command(options: _Removal) -> None:
    """Delete documents, with their blocks from every tier; exit code 1 when some still wait.

    What a reader holds goes when its last lease ends, also after a crash of the daemon.
    """
    ids = _chosen(options.documents, whole=options.whole)
    with _connect(options) as collections:
        answer = collections.remove(options.name, ids, timeout_s=options.timeout_s)
        problems = collections.deletions().problems
        meant = {} if options.as_json else _meant(collections, options.name, answer.missing)
    if options.as_json:
        print_json({"collection": options.name, **asdict(answer), "problems": problems})
    else:
        _show_removal(answer, problems)
        for each in answer.missing:
            hint = f"did you mean {meant[each]}? See" if each in meant else "see"
            line = f"no such document: {each}; {hint} `ucm collection ls {options.name}`"
            Console(soft_wrap=True, highlight=False).print(line, markup=False)
    if answer.deletion.num_waiting or answer.missing:
        raise typer.Exit(ExitCode.CHECK_FAILED)


def _meant(collections: CollectionApi, name: str, missing: tuple[str, ...]) -> dict[str, str]:
    """Documents by the relative paths that they were asked for by: `add` names absolute ones."""
    if not missing:
        return {}
    try:
        known = {each.id for each in collections.list_documents(name)}
    except UcmError:  # nothing is left of the collection; and it is only a hint
        return {}
    paths = {each: str(Path(each).absolute()) for each in missing}
    return {each: path for each, path in paths.items() if path in known}


def _show_removal(answer: RemoveAnswer, problems: tuple[str, ...]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    deletion = answer.deletion
    erased = deletion.num_blocks - deletion.num_waiting
    console.print(
        f"{counted(answer.num_documents, 'document')} deleted: {counted(erased, 'block')} erased, "
        f"{deletion.num_waiting} waiting for the end of a lease or the disk, "
        f"{deletion.num_kept} kept because other documents have the same"
    )
    for problem in problems:
        console.print(f"problem: {problem}", style="bold red", markup=False)


@command.command("expire")
@takes_options(_Expiry)
def expire_command(options: _Expiry) -> None:
    """Have documents deleted at some time, as `rm` would do it then.

    Exits with 1 when the collection has not all that were named.
    """
    at_s = parse_when(options.when, time.time())
    ids = _chosen(options.documents, whole=options.whole)
    with _connect(options) as collections:
        count = collections.expire(options.name, ids, at_s)
    if options.as_json:
        print_json({"collection": options.name, "num_documents": count, "expires_s": at_s})
    else:
        text = f"to expire at {_time_text(at_s)} UTC" if at_s else "never to expire"
        print(f"{counted(count, 'document')} set {text}")
    if ids and count < len(set(ids)):
        raise typer.Exit(ExitCode.CHECK_FAILED)


def _chosen(documents: list[str] | None, *, whole: bool) -> list[str] | None:
    """The ids that are meant; None for all.

    Raises:
        InvalidArgumentError: none are named, or both ways at once.
    """
    if whole == bool(documents):
        raise InvalidArgumentError("name documents, or give --all for the whole collection")
    return None if whole else documents


def parse_when(text: str, now_s: float) -> float:
    """UNIX time of `90s`, `30m`, `12h` or `7d` from now, of `now`, or 0 for `never`.

    Raises:
        InvalidArgumentError: it is none of these, or beyond the year 9999.
    """
    if text == "never":
        return 0.0
    if text == "now":
        return now_s
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)([smhd])", text)
    if match is None:
        raise InvalidArgumentError(f"{text!a} is no time: write 90s, 30m, 12h, 7d, now or never")
    return check_time(now_s + float(match[1]) * _UNITS_S[match[2]])
