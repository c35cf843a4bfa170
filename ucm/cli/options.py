"""Options that several commands take, and the configuration they lead to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ucm.config_loader import LoadedConfig, load_config

from .console import split_settings

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="TOML file to read instead of the usual ones."),
]
SocketOption = Annotated[
    Path | None, typer.Option("--socket", metavar="PATH", help="The daemon's gRPC socket.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Any setting; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]


def loaded_config(
    config: Path | None, settings: list[str] | None = None, **flags: str | Path | int | None
) -> LoadedConfig:
    """The configuration under a command's flags.

    Args:
        config: value of `--config`.
        settings: values of `--set`.
        flags: `section__field` -> value of the flag for it; None when it was not given.
    """
    overrides = split_settings(settings or [])
    for name, value in flags.items():
        if value is not None:
            overrides[name.replace("__", ".")] = str(value)
    return load_config(config, overrides=overrides)
