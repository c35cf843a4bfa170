"""`--help` of every command: defaults are told, and one flag means one thing."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from ucm.cli import COMMANDS

WITHOUT_DEFAULT = {
    # Nothing is done, drawn or read unless they are given.
    *("--prompt", "--prompt-file", "--chunk", "--set", "--config", "--plot", "--html"),
    *("--trace-out", "--lmcache-python"),
    # Told as "instead of ours".
    *("--document", "--documents"),
}
SAME_EVERYWHERE = ("--socket", "--model", "--config", "--json", "--set")


def every_option() -> Iterator[tuple[str, Any]]:
    """(command, option) of all commands but those that only group others."""
    for name, (module, _) in COMMANDS.items():
        command = typer.main.get_command(importlib.import_module(module).command)
        inner = getattr(command, "commands", {})
        for title, each in ((name, command), *((f"{name} {sub}", inner[sub]) for sub in inner)):
            yield from ((title, item) for item in each.params if item.opts[0].startswith("--"))


OPTIONS = list(every_option())


@pytest.mark.parametrize(
    "option",
    [item for _, item in OPTIONS],
    ids=[f"{name} {item.opts[0]}" for name, item in OPTIONS],
)
def test_an_option_tells_its_default(option: Any) -> None:
    is_switch = getattr(option, "is_flag", False)
    is_shown = option.default is not None and option.show_default
    assert (
        is_switch
        or is_shown
        or "default" in option.help.lower()
        or option.opts[0] in WITHOUT_DEFAULT
    ), option.help


def test_a_flag_means_one_thing() -> None:
    helps = defaultdict(set)
    for name, option in OPTIONS:
        if option.opts[0] in SAME_EVERYWHERE and name != "bench policy":  # a preset, not a model
            helps[option.opts[0]].add(option.help)
    assert set(helps) == set(SAME_EVERYWHERE)
    assert {flag: found for flag, found in helps.items() if len(found) > 1} == {}


def test_a_place_for_a_store_is_called_store_everywhere() -> None:
    named = {name for name, option in OPTIONS if "--store" in option.opts}
    benches = {"bench storage", "bench overlap"}
    collections = {f"collection {name}" for name in ("add", "ls", "rm", "expire")}
    assert named == {"serve", "doctor", "fsck", "generate", "demo", *benches, *collections}


def test_generate_knows_the_cache_by_the_names_that_other_commands_use() -> None:
    (option,) = [item for name, item in OPTIONS if name == "generate" and "--cache" in item.opts]
    assert set(option.opts) == {"--cache", "--socket", "--store"}
