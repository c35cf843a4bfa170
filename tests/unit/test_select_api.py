"""What a caller may write in a request, and what is refused in words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ucm.errors import InvalidArgumentError
from ucm.kernels.block_scores import Budget
from ucm.select_api import SelectMode, SelectRequest
from ucm.testing.selections import SELECT_LAYOUT, queries_of, request_of


@pytest.mark.parametrize("mode", SelectMode)
def test_a_mode_may_be_a_plain_word(mode: SelectMode) -> None:
    word: Any = mode.value
    request = SelectRequest((0,), queries_of(1), Budget(ratio=0.5), mode=word)
    assert request.mode is mode
    request.check(SELECT_LAYOUT, 4)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"mode": "x"}, "'x' is not known; use one of shared, per_head"),
        ({"mode": None}, "use one of shared, per_head"),
        ({"budget": 0.3}, r"Budget\(ratio=0.3\)"),
        ({"budget": 64}, r"Budget\(tokens=64\)"),
        ({"budget": "0.3"}, "a budget is a Budget"),
        ({"budget": None}, "a budget is a Budget"),
    ],
)
def test_what_is_no_mode_or_budget_is_refused(change: dict[str, Any], hint: str) -> None:
    request = dataclasses.replace(request_of(), **change)
    with pytest.raises(InvalidArgumentError, match=hint):
        request.check(SELECT_LAYOUT, 4)
