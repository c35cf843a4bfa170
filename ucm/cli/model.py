"""`ucm model pull | ls`: models on this machine."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.table import Table

from ucm import model_hub
from ucm.model_hub import KNOWN_MODELS, HubOptions

from .console import format_bytes, print_json, table_console
from .options import JsonOption
from .progress import ByteProgress

command = typer.Typer(help="Fetch models.", no_args_is_help=True, add_completion=False)


@command.callback()
def _group() -> None:
    """Fetch models."""


@command.command("pull")
def pull_command(
    name: Annotated[
        str, typer.Argument(help="A known model, see `ucm model ls`, or hf:ORG/NAME\\[@REVISION].")
    ],
    as_json: JsonOption = False,
) -> None:
    """Fetch a model into the user's cache folder; does nothing if it is there and intact.

    HF_ENDPOINT and HF_TOKEN name another hub and an access token for `hf:` models.
    """
    hub = HubOptions(
        url=os.environ.get("HF_ENDPOINT", model_hub.DEFAULT_HUB_URL).rstrip("/"),
        token=os.environ.get("HF_TOKEN", ""),
    )
    with ByteProgress(quiet=as_json) as progress:
        model = model_hub.pull(name, progress.update, hub=hub)
    if as_json:
        print_json(model_hub.describe(model))
        return
    state = "was here already" if model.was_present else "pulled"
    print(f"{model.name} {state}: {model.path} ({format_bytes(model.size_bytes)})")


@command.command("ls")
def list_command(as_json: JsonOption = False) -> None:
    """List the models that are here and those that `pull` knows by name."""
    present = {model.name: model for model in model_hub.local_models()}
    if as_json:
        described = [model_hub.describe(model) for model in present.values()]
        print_json({"models": described, "known": sorted(KNOWN_MODELS)})
        return
    table = Table("name", "size", box=None)
    for title in ("where", "from"):
        table.add_column(title, overflow="fold")
    for model in present.values():
        origin = f"{model.source} ({model.revision})"
        table.add_row(model.name, format_bytes(model.size_bytes), str(model.path), origin)
    for known in KNOWN_MODELS.values():
        if known.name not in present:
            origin = f"{known.summary}, {known.licence}"
            table.add_row(known.name, format_bytes(known.size_bytes), "not pulled", origin)
    table_console().print(table)
