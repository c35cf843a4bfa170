"""Options that several commands take, and the configuration they lead to.

Where a default is a setting, help names the setting: `ucm config show --origin` has its value.
"""

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
    Path | None,
    typer.Option(
        "--socket",
        metavar="SOCKET",
        help="The daemon's socket, which `ucm serve` prints. Default: service.socket_path.",
    ),
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="FOLDER",
        help="The daemon's data folder; none for memory only. Default: nvme.path.",
    ),
]
FolderOption = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        "--store",
        metavar="FOLDER",
        help="A data folder that no daemon has open, to do without one. Default: the daemon.",
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        "--socket",
        "--store",
        metavar="SOCKET|FOLDER",
        help="A daemon's socket, which `ucm serve` prints, or a data folder that no daemon has "
        "open. Default: no cache.",
    ),
]
DEFAULT_MODEL = "smollm2-135m"
ModelOption = Annotated[
    str,
    typer.Option(
        "--model", metavar="NAME|PATH", help="A model's folder or GGUF file, or its name."
    ),
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
