"""The guard around a hook: no defect of a hook ends the engine."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ucm.engine.guarded_hook import GuardedHook
from ucm.engine.hook import LoadRequest, StoreRequest
from ucm.errors import TierUnavailableError


class BrokenHook:
    """Attaches, then raises the same error from every call."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def attach(self, kv_pool: torch.Tensor) -> None:
        """See `KvHook.attach`."""

    def match(self, token_ids: Sequence[int], num_local_tokens: int) -> int:
        """See `KvHook.match`."""
        raise self._error

    def load(self, request: LoadRequest) -> int:
        """See `KvHook.load`."""
        raise self._error

    def store(self, request: StoreRequest) -> None:
        """See `KvHook.store`."""
        raise self._error

    def finish(self, request_id: str) -> None:
        """See `KvHook.finish`."""
        raise self._error


@pytest.mark.parametrize(
    "error",
    [
        TierUnavailableError("gone"),
        TypeError("a defect"),
        AttributeError("a defect"),
        ZeroDivisionError("a defect"),
        BufferError("a defect"),
        MemoryError("no memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_kind_of_failure_is_a_miss(error: Exception) -> None:
    guard = GuardedHook(BrokenHook(error), torch.zeros(1), block_tokens=4)
    released: list[int] = []
    tokens = list(range(8))
    load = LoadRequest(request_id="r", token_ids=tokens, first_block=0, block_ids=(0, 1))
    store = StoreRequest(
        request_id="r",
        token_ids=tokens,
        first_block=0,
        block_ids=(0, 1),
        release=lambda: released.append(1),
    )
    assert guard.match_blocks(tokens, 0, 2) == 0
    assert guard.load(load) == 0
    guard.store(store)
    guard.finish("r")
    assert released == [1]
    assert guard.stats.errors == 4
