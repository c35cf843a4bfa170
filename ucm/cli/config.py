"""`ucm config show`: every setting, its value, and where the value comes from."""

from __future__ import annotations

from dataclasses import asdict

import typer
from rich.table import Table

from .console import print_json, table_console
from .options import ConfigOption, JsonOption, SetOption, loaded_config

command = typer.Typer(
    help="Show the configuration and where it comes from.",
    no_args_is_help=True,
    add_completion=False,
)


@command.callback()
def _group() -> None:
    """Show the configuration and where it comes from."""


@command.command()
def show(
    config: ConfigOption = None,
    settings: SetOption = None,
    origin: bool = typer.Option(False, "--origin", help="Add where each value comes from."),
    as_json: JsonOption = False,
) -> None:
    """Show the settings that `ucm serve` would run with."""
    loaded = loaded_config(config, settings)
    values = {
        f"{section}.{name}": value
        for section, fields in asdict(loaded.config).items()
        for name, value in fields.items()
    }
    if as_json:
        rows = {
            name: {"value": value, "origin": loaded.origins[name]} for name, value in values.items()
        }
        print_json(rows if origin else values)
        return
    table = Table("setting", "value", *(["origin"] if origin else []), box=None)
    for name, value in values.items():
        table.add_row(name, str(value), *([loaded.origins[name]] if origin else []))
    table_console().print(table)
