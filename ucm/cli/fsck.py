"""`ucm fsck`: check a data folder byte by byte, and repair what can be."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ucm.errors import ConfigError
from ucm.plurals import counted

from .console import ExitCode, format_bytes, print_json
from .options import ConfigOption, JsonOption, loaded_config

if TYPE_CHECKING:
    from ucm.storage.fsck import FsckFinding, FsckReport

command = typer.Typer(add_completion=False)


@command.command()
def fsck(
    path: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="The data folder. Default: nvme.path.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option("--store", metavar="FOLDER", help="The same. Default: nvme.path.")
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Mend it; blocks may be lost.")] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a data folder while no daemon runs on it; exit code 1 when damage is left."""
    from ucm.storage.fsck import check_store

    if path is not None and store is not None:
        raise ConfigError("name the data folder once, with --store or without")
    folder = path or store or loaded_config(config).config.nvme.path
    if folder is None:
        raise ConfigError("nvme.path is none: there is no data folder to check; name one")
    report = check_store(folder, repair)
    if as_json:
        print_json(_as_dict(folder, report))
    else:
        _show(folder, report, repair=repair)
    if not report.ok:
        raise typer.Exit(ExitCode.CHECK_FAILED)


def _as_dict(folder: Path, report: FsckReport) -> dict[str, object]:
    findings = [asdict(finding) | {"damage": finding.is_damage} for finding in report.findings]
    return asdict(report) | {"path": folder, "ok": report.ok, "findings": findings}


def _show(folder: Path, report: FsckReport, *, repair: bool) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for finding in report.findings:
        console.print(_line(finding), markup=False)
    console.print(
        f"{folder}: {counted(report.num_namespaces, 'namespace')}, "
        f"{counted(report.num_blocks, 'block')} whole, {format_bytes(report.num_bytes)} verified, "
        f"{counted(len(report.findings), 'finding')}"
    )
    if report.num_documents or report.num_deleted_blocks:
        console.print(
            f"{counted(report.num_documents, 'document')} with "
            f"{counted(report.num_named_blocks, 'block')}, {report.num_evicted_blocks} of them not "
            f"stored; nothing is left of {counted(report.num_deleted_blocks, 'block')} of deleted "
            "documents"
        )
    advice = _advice(report, repair=repair)
    if advice:
        console.print(advice)


def _advice(report: FsckReport, *, repair: bool) -> str:
    """What to do about damage that is left; empty when none is."""
    from ucm.storage.fsck_report import FindingKind

    left = {each.kind for each in report.findings if each.is_damage and not each.fixed}
    if not left:
        return ""
    if left == {FindingKind.VERSION}:
        return "no damage was found; what another version wrote was neither checked nor changed"
    if repair:
        return "damage is left that could not be mended: each line without [fixed] says what"
    return (
        "damage is left; `ucm fsck --repair` rebuilds an index from whole blocks, drops damaged "
        "blocks, and moves what nobody can read to quarantine/"
    )


def _line(finding: FsckFinding) -> str:
    place = " ".join(
        f"{name} {value}"
        for name, value in (
            ("namespace", finding.namespace or None),
            ("segment", finding.segment),
            ("slot", finding.slot),
            ("block", finding.key or None),
        )
        if value is not None
    )
    fixed = " [fixed]" if finding.fixed else ""
    return ": ".join(filter(None, (finding.kind.value, place, finding.what))) + fixed
