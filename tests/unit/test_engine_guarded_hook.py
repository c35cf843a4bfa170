"""The guard around a hook: no defect of a hook ends the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from ucm.engine.guarded_hook import GuardedHook
from ucm.engine.hook import LoadRequest, LoadStart, LoadState, StepReport, StoreRequest
from ucm.engine.layer_clock import LayerClock
from ucm.errors import TierUnavailableError
from ucm.hashing import Encodable


def no_hold(_block_ids: Sequence[int]) -> Callable[[], None]:
    raise AssertionError("nothing is written here")


class BrokenHook:
    """Attaches, then raises the same error from every call."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def attach(self, kv_pool: torch.Tensor) -> None:
        """See `KvHook.attach`."""

    def match(
        self, token_ids: Sequence[int], num_local_tokens: int, extra_keys: Sequence[Encodable] = ()
    ) -> int:
        """See `KvHook.match`."""
        raise self._error

    def start_load(self, request: LoadRequest) -> LoadStart:
        """See `KvHook.start_load`."""
        raise self._error

    def load_state(self, request_id: str) -> LoadState:
        """See `KvHook.load_state`."""
        raise self._error

    def wait_layer(self, layer: int, request_ids: Sequence[str]) -> Sequence[int]:
        """See `KvHook.wait_layer`."""
        raise self._error

    def claim(self, request_id: str, first_block: int, last_block: int) -> int:
        """See `KvHook.claim`."""
        raise self._error

    def wait_some(self, timeout_s: float) -> None:
        """See `KvHook.wait_some`."""
        raise self._error

    def end_load(self, request_id: str) -> int:
        """See `KvHook.end_load`."""
        raise self._error

    def should_swap_out(self, num_tokens: int) -> bool:
        """See `KvHook.should_swap_out`."""
        raise self._error

    def observe_step(self, report: StepReport) -> None:
        """See `KvHook.observe_step`."""
        raise self._error

    def store(self, request: StoreRequest) -> None:
        """See `KvHook.store`."""
        raise self._error

    def finish(self, request_id: str) -> None:
        """See `KvHook.finish`."""
        raise self._error


class DeafHook(BrokenHook):
    """Has what it is asked for, but was written before chunks."""

    def match(self, token_ids: Sequence[int], num_local_tokens: int) -> int:  # type: ignore[override]
        """See `KvHook.match`."""
        return len(token_ids)

    def store(self, request: StoreRequest) -> None:
        """See `KvHook.store`."""
        raise AssertionError("it would keep a chunk under the name of a prompt")


def test_a_hook_that_knows_no_extra_keys_has_no_chunks() -> None:
    """What it would find by its tokens alone is a prompt's."""
    hook: Any = DeafHook(TypeError())
    guard = GuardedHook(hook, torch.zeros(1), block_tokens=4)
    extra_keys = ("ucm.chunk", bytes(32))
    assert guard.match_blocks(list(range(8)), 0, 2, extra_keys) == 0
    assert guard.stats.errors == 1
    released: list[bool] = []
    request = StoreRequest(
        request_id="a",
        token_ids=range(8),
        first_block=0,
        block_ids=(0, 1),
        release=lambda: released.append(True),
        layers=LayerClock.finished(2),
        extra_keys=extra_keys,
    )
    guard.store(request)
    assert (released, guard.stats.offered_blocks) == ([True], 0)


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
    load = LoadRequest(
        request_id="r", token_ids=tokens, first_block=0, block_ids=(0, 1), hold=no_hold
    )
    store = StoreRequest(
        request_id="r",
        token_ids=tokens,
        first_block=0,
        block_ids=(0, 1),
        release=lambda: released.append(1),
        layers=LayerClock.finished(1),
    )
    assert guard.match_blocks(tokens, 0, 2) == 0
    assert guard.start_load(load).num_blocks == 0
    assert guard.load_state("r") == LoadState(is_done=True)
    assert list(guard.wait_layer(0, ["r", "s"])) == [0, 0]
    assert guard.claim("r", 1, 2) == 1
    guard.wait_some(1.0)
    guard.store(store)
    assert released == [1]
    assert guard.should_swap_out(8) is False
    guard.observe_step(StepReport(seconds=1.0, stall_s=0.0, parts=(), num_decodes=1))
    guard.finish("r")
    assert guard.end_load("r") is None
    assert guard.stats.errors == 11
    assert guard.match_blocks(tokens, 0, 2) == 0
    assert guard.stats.errors == 11, "who cannot end a load is not asked for another"
