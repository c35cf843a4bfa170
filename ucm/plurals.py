"""Numbers of things in messages for people: `1 block`, `2 blocks`."""

from __future__ import annotations


def counted(number: int, what: str, plural: str = "s") -> str:
    """A number and what it counts.

    Args:
        number: of them.
        what: one of them.
        plural: what its name ends in besides, unless there is one.
    """
    return f"{number:,} {what}{'' if number == 1 else plural}"
