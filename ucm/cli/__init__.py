"""The command line. Every command takes `--json`; errors are one line that says what to do next.

Exit codes: 0 done, 1 a check failed, 2 wrong use, 3 unavailable.

A command lives in its own module under `ucm.cli`, which exposes a `typer.Typer` named `command`,
and is imported only when it is run: `ucm --help` needs neither torch nor gRPC. To add one, write
the module and add a line to `COMMANDS`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any, Final, cast

import typer
from typer.core import TyperCommand, TyperGroup

from ucm import __version__
from ucm.errors import UcmError

from .console import ExitCode, fail, print_json

COMMANDS: Final[Mapping[str, tuple[str, str]]] = {
    # name: (module with a typer.Typer named `command`, one line of help)
    "serve": ("ucm.cli.serve", "Run the daemon in the foreground."),
    "status": ("ucm.cli.status", "Show how a running daemon is doing."),
    "doctor": ("ucm.cli.doctor", "Check this machine: what works, what is missing, what to do."),
    "fsck": ("ucm.cli.fsck", "Check a data folder, and repair it."),
    "collection": (
        "ucm.cli.collection",
        "Add, list, delete and expire documents whose chunks are kept.",
    ),
    "config": ("ucm.cli.config", "Show the configuration and where it comes from."),
    "generate": ("ucm.cli.generate", "Generate text with the reference engine."),
    "demo": ("ucm.cli.demo", "Run the whole path on a real model and compare."),
    "model": ("ucm.cli.model", "Fetch models."),
    "bench": ("ucm.cli.bench", "Measure."),
}


class _LazyCommand(TyperCommand):
    """A command that is known by name and help, and imported when it is run."""

    def __init__(self, name: str, module: str, summary: str) -> None:
        super().__init__(name, help=summary)
        self._module = module

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:  # click's types; which click depends on typer's release
        loaded = typer.main.get_command(importlib.import_module(self._module).command)
        return loaded.make_context(info_name, args, parent=parent, **extra)


class _LazyGroup(TyperGroup):
    """The commands of `COMMANDS`, in the order of the table."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002  click's signature
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002  click's signature
        entry = COMMANDS.get(cmd_name)
        return _LazyCommand(cmd_name, *entry) if entry else None


app = typer.Typer(
    name="ucm",
    cls=_LazyGroup,
    help="A tiered KV-cache storage service for LLM inference engines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ucm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """A tiered KV-cache storage service for LLM inference engines."""


_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])
"""The parent of every complaint about arguments; which module has it depends on typer's release."""


def main() -> None:
    """Entry point of `ucm`; ends the process with one of the exit codes above."""
    as_json = "--json" in sys.argv
    # The engine shares cores with the daemon. OpenMP threads that spin at a barrier then wait for
    # each other's time slice: decode loses a fifth on idle cores without spinning, and all of its
    # speed on busy ones with it. libgomp reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        sys.exit(app(standalone_mode=False))
    except UcmError as error:
        sys.exit(fail(error, as_json=as_json))
    except _UsageError as error:
        error.show()
        if as_json:
            print_json({"error": "UsageError", "message": error.format_message()})
        sys.exit(ExitCode.WRONG_USE)
