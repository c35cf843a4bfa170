"""One block, two blocks."""

from __future__ import annotations

from ucm.plurals import counted


def test_one_is_no_plural() -> None:
    assert [counted(number, "block") for number in (0, 1, 2)] == ["0 blocks", "1 block", "2 blocks"]
    assert counted(1522, "token") == "1,522 tokens"
    assert counted(2, "mode switch", "es") == "2 mode switches"
    assert counted(1, "mode switch", "es") == "1 mode switch"
