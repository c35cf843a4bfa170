"""`BlockingLoads`: the loading half of `KvHook` for a hook that loads while the engine waits.

`start_load` does it all, so every load is done when the engine first asks. Right for caches that
answer from memory, and for tests; a slow one would hold up the whole batch.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field

from ucm.engine.hook import LoadRequest, LoadStart, LoadState, StepReport


@dataclass(slots=True)
class BlockingLoads(abc.ABC):
    """Turns one blocking `load` into the methods that `KvHook` wants; see the module."""

    _num_good: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    @abc.abstractmethod
    def load(self, request: LoadRequest) -> int:
        """Fill the blocks; returns how many *leading* ones are complete and verified."""

    def start_load(self, request: LoadRequest) -> LoadStart:
        """See `KvHook.start_load`; blocks as long as `load` does."""
        self._num_good[request.request_id] = self.load(request)
        return LoadStart(first_block=request.first_block, num_blocks=len(request.block_ids))

    def load_state(self, request_id: str) -> LoadState:
        """See `KvHook.load_state`."""
        return LoadState(is_done=True, num_good_blocks=self._num_good[request_id])

    def wait_layer(self, _layer: int, request_ids: Sequence[str], /) -> Sequence[int]:
        """See `KvHook.wait_layer`; nothing is left to wait for."""
        return [self._num_good[request_id] for request_id in request_ids]

    def claim(self, _request_id: str, _first_block: int, last_block: int, /) -> int:
        """See `KvHook.claim`; nothing is loaded from the back."""
        return last_block

    def wait_some(self, timeout_s: float) -> None:  # noqa: B027  nothing is under way
        """See `KvHook.wait_some`."""

    def end_load(self, request_id: str) -> int:
        """See `KvHook.end_load`."""
        return self._num_good.pop(request_id)

    def should_swap_out(self, _num_tokens: int, /) -> bool:
        """See `KvHook.should_swap_out`: it stores nothing but what it is offered anyway."""
        return False

    def observe_step(self, report: StepReport) -> None:  # noqa: B027  nothing is learnt
        """See `KvHook.observe_step`."""
