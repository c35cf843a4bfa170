"""A command with many options takes them as one frozen dataclass.

@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    size: Annotated[int, typer.Option(help="...")] = 3

@command.command()
@takes_options(Options)
def run(options: Options) -> None: ...
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

Options = TypeVar("Options")


def takes_options(kind: type[Options]) -> Callable[[Callable[[Options], None]], Any]:
    """Turn a function of one dataclass into one that typer reads an option a field from.

    Args:
        kind: a dataclass whose fields are annotated as typer's parameters; what has no default
            must be given.
    """
    assert dataclasses.is_dataclass(kind)
    hints = get_type_hints(kind, include_extras=True)
    parameters = [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty
            if item.default is dataclasses.MISSING
            else item.default,
            annotation=hints[item.name],
        )
        for item in dataclasses.fields(kind)
    ]

    def decorate(function: Callable[[Options], None]) -> Any:
        def run(**values: Any) -> None:
            function(kind(**values))

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__annotations__ = {item.name: item.annotation for item in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate
