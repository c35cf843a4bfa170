"""The engine's side of `KvHook`: no failure of a hook reaches the step loop.

A hook that raises has failed that call: a match counts as 0 tokens, a load's blocks as lost, a
store as not taken (it must not have kept `release`, which the engine calls in its stead). Answers
are clamped to what was asked for. A hook that cannot attach is not used at all. One that fails to
end a load may still be writing: it gets no further load, and its blocks are never used again.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ucm.errors import UcmError
from ucm.hashing import Encodable

from .hook import (
    KvHook,
    LoadRequest,
    LoadStart,
    LoadState,
    StepReport,
    StoreRequest,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")

HOOK_ERRORS = (
    *(UcmError, OSError, RuntimeError, ValueError, LookupError, TypeError),
    *(AttributeError, ArithmeticError, BufferError, MemoryError),
)
"""What a hook may fail with: its own errors, and those of a defect in it."""


@dataclass(slots=True)
class HookStats:
    """What a hook was asked for and gave, over the engine's life."""

    errors: int = 0
    """Calls that raised."""
    matched_tokens: int = 0
    """Promised by `match`, beyond what the pool held."""
    loaded_tokens: int = 0
    offered_blocks: int = 0


class GuardedHook:
    """Calls a hook; see the module. With no hook, every call does nothing."""

    def __init__(self, hook: KvHook | None, kv_pool: torch.Tensor, block_tokens: int) -> None:
        """Attach `hook`, once; a hook that fails to is left out."""
        self.stats = HookStats()
        self._block_tokens = block_tokens
        self._can_load = True
        self._hook = hook
        if hook is not None and not self._tell(lambda: hook.attach(kv_pool)):
            self._hook = None

    @property
    def is_attached(self) -> bool:
        """Whether there is a hook that works."""
        return self._hook is not None

    def match_blocks(
        self,
        token_ids: Sequence[int],
        num_local: int,
        num_usable: int,
        extra_keys: Sequence[Encodable] = (),
    ) -> int:
        """Blocks, from the chain's start, that a load could make present.

        Args:
            token_ids: all tokens.
            num_local: blocks that the pool holds.
            num_usable: blocks that may come from outside at all.
            extra_keys: what else changed the blocks' bytes; see `KvHook`.

        Returns:
            `num_local` to `num_usable`.
        """
        hook, size = self._hook, self._block_tokens
        if hook is None or not self._can_load or num_local >= num_usable:
            return num_local
        num_tokens = self._ask(lambda: hook.match(token_ids, num_local * size, extra_keys), 0)
        num_blocks = max(num_local, min(num_tokens // size, num_usable))
        self.stats.matched_tokens += (num_blocks - num_local) * size
        return num_blocks

    def start_load(self, request: LoadRequest) -> LoadStart:
        """Begin a load; of 0 blocks when the hook fails. The answer is the hook's, unchecked."""
        hook = self._hook
        nothing = LoadStart(first_block=request.first_block, num_blocks=0)
        return nothing if hook is None else self._ask(lambda: hook.start_load(request), nothing)

    def load_state(self, request_id: str) -> LoadState:
        """How far a load is; done when the hook fails to say."""
        hook = self._hook
        gone = LoadState(is_done=True)
        return gone if hook is None else self._ask(lambda: hook.load_state(request_id), gone)

    def wait_layer(self, layer: int, request_ids: Sequence[str]) -> Sequence[int]:
        """Wait for a layer's slabs; 0 good blocks each when the hook fails to answer."""
        hook = self._hook
        lost = [0] * len(request_ids)
        if hook is None:
            return lost
        counts = self._ask(lambda: list(hook.wait_layer(layer, request_ids)), lost)
        return [max(0, count) for count in counts] if len(counts) == len(lost) else lost

    def claim(self, request_id: str, first_block: int, last_block: int) -> int:
        """Take blocks over from a load; none of them when the hook fails to answer."""
        hook = self._hook
        if hook is None:
            return first_block
        end = self._ask(lambda: hook.claim(request_id, first_block, last_block), first_block)
        return max(first_block, min(end, last_block))

    def wait_some(self, timeout_s: float) -> None:
        """Wait for any load's progress."""
        hook = self._hook
        if hook is not None:
            self._tell(lambda: hook.wait_some(timeout_s))

    def end_load(self, request_id: str) -> int | None:
        """End a load.

        Returns:
            Good blocks; None when the hook failed, so that nobody knows what it still writes to.
        """
        hook = self._hook
        if hook is None:
            return None
        unknown = -1
        num_good = self._ask(lambda: max(0, hook.end_load(request_id)), unknown)
        if num_good == unknown:
            self._can_load = False
            return None
        return num_good

    def should_swap_out(self, num_tokens: int) -> bool:
        """Whether a preempted sequence's blocks are worth to be offered first."""
        hook = self._hook
        return hook is not None and self._ask(lambda: hook.should_swap_out(num_tokens), False)

    def observe_step(self, report: StepReport) -> None:
        """Tell the hook what a pass took."""
        hook = self._hook
        if hook is not None:
            self._tell(lambda: hook.observe_step(report))

    def store(self, request: StoreRequest) -> None:
        """Offer new full blocks; they are released here when the hook raises.

        A hook that knows no extra keys is not offered a chunk: it would keep it under a prompt's.
        """
        hook = self._hook
        if hook is not None and request.extra_keys and not _knows_extra_keys(hook):
            hook = None
        if hook is None or not self._tell(lambda: hook.store(request)):
            request.release()
            return
        self.stats.offered_blocks += len(request.block_ids)

    def finish(self, sequence_id: str) -> None:
        """Tell the hook that a sequence left the engine."""
        hook = self._hook
        if hook is not None:
            self._tell(lambda: hook.finish(sequence_id))

    def _ask(self, method: Callable[[], T], default: T) -> T:
        try:
            return method()
        except HOOK_ERRORS as error:
            self._count(error)
            return default

    def _tell(self, method: Callable[[], None]) -> bool:
        try:
            method()
        except HOOK_ERRORS as error:
            self._count(error)
            return False
        return True

    def _count(self, error: Exception) -> None:
        self.stats.errors += 1
        level = logging.WARNING if self.stats.errors == 1 else logging.DEBUG
        logger.log(level, "KV hook failed, going on without it for this call: %s", error)


def _knows_extra_keys(hook: KvHook) -> bool:
    """Whether its chains tell a chunk from a prompt, going by what it takes to look one up."""
    try:
        inspect.signature(hook.match).bind((), 0, ())
    except (TypeError, ValueError):
        return False
    return True
