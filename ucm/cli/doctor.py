"""`ucm doctor`: what this machine offers, what is missing, and what to do about it.

`ucm doctor kernels` is in `ucm.cli.doctor_kernels`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from ucm.errors import ConfigError
from ucm.plurals import counted

from .console import ExitCode, print_json
from .doctor_kernels import kernels_command
from .options import ConfigOption, JsonOption, SetOption, StoreOption, loaded_config

if TYPE_CHECKING:
    from ucm.doctor import Check, Diagnosis

command = typer.Typer(invoke_without_command=True, add_completion=False)
command.command("kernels")(kernels_command)

_MARKS = {"ok": "ok    ", "note": "note  ", "failed": "FAILED"}


@command.callback()
def doctor(
    context: typer.Context,
    config: ConfigOption = None,
    store: StoreOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine for the daemon as it is configured; exit code 1 when it would not do."""
    if context.invoked_subcommand is not None:
        if config or store or settings or as_json:
            name = context.invoked_subcommand
            raise ConfigError(
                f"options stand behind the command: `ucm doctor {name} --json`; {name} looks at "
                "the machine only and takes no configuration"
            )
        return
    from ucm.doctor import diagnose

    found = diagnose(loaded_config(config, settings, nvme__path=store).config)
    if as_json:
        print_json(_as_dict(found))
    else:
        _show(found)
    if not found.ok:
        raise typer.Exit(ExitCode.CHECK_FAILED)


def _as_dict(found: Diagnosis) -> dict[str, object]:
    return {
        "ok": found.ok,
        "io": found.io.kind if found.io else None,
        "io_reason": found.io.reason if found.io else None,
        "checks": [asdict(check) for check in found.checks],
    }


def _show(found: Diagnosis) -> None:
    console = Console(soft_wrap=True, highlight=False)
    width = max(len(check.name) for check in found.checks)
    for check in found.checks:
        _show_check(console, check, width)
    failed = sum(check.status == "failed" for check in found.checks)
    notes = sum(check.status == "note" for check in found.checks)
    console.print(f"{len(found.checks)} checks, {failed} failed, {counted(notes, 'note')}")


def _show_check(console: Console, check: Check, width: int) -> None:
    style = "bold red" if check.status == "failed" else None
    line = f"{_MARKS[check.status]}  {check.name:{width}}  {check.found}"
    console.print(line, style=style, markup=False)
    if check.status != "ok":
        indent = " " * (width + 10)
        console.print(f"{indent}for: {check.why}", markup=False)
        if check.advice:
            console.print(f"{indent}do:  {check.advice}", markup=False)
