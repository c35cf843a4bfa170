"""The engine's side of `KvHook`: no failure of a hook reaches the step loop.

A hook that raises has failed that call: a match or a load counts as 0 tokens, a store as not taken
(it must not have kept `release`, which the engine calls in its stead). Answers are clamped to what
was asked for. A hook that cannot attach is not used at all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ucm.errors import UcmError

from .hook import KvHook, LoadRequest, StoreRequest

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

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
        self._hook = hook
        if hook is not None and not self._tell(lambda: hook.attach(kv_pool)):
            self._hook = None

    @property
    def is_attached(self) -> bool:
        """Whether there is a hook that works."""
        return self._hook is not None

    def match_blocks(self, token_ids: Sequence[int], num_local: int, num_usable: int) -> int:
        """Blocks, from the chain's start, that a load could make present.

        Args:
            token_ids: all tokens.
            num_local: blocks that the pool holds.
            num_usable: blocks that may come from outside at all.

        Returns:
            `num_local` to `num_usable`.
        """
        hook, size = self._hook, self._block_tokens
        if hook is None or num_local >= num_usable:
            return num_local
        num_tokens = self._ask(lambda: hook.match(token_ids, num_local * size))
        num_blocks = max(num_local, min(num_tokens // size, num_usable))
        self.stats.matched_tokens += (num_blocks - num_local) * size
        return num_blocks

    def load(self, request: LoadRequest) -> int:
        """Fill blocks; returns how many leading ones are complete and verified."""
        hook = self._hook
        if hook is None:
            return 0
        num_blocks = self._ask(lambda: hook.load(request))
        num_blocks = max(0, min(num_blocks, len(request.block_ids)))
        self.stats.loaded_tokens += num_blocks * self._block_tokens
        return num_blocks

    def store(self, request: StoreRequest) -> None:
        """Offer new full blocks; they are released here when the hook raises."""
        hook = self._hook
        if hook is None or not self._tell(lambda: hook.store(request)):
            request.release()
            return
        self.stats.offered_blocks += len(request.block_ids)

    def finish(self, sequence_id: str) -> None:
        """Tell the hook that a sequence left the engine."""
        hook = self._hook
        if hook is not None:
            self._tell(lambda: hook.finish(sequence_id))

    def _ask(self, method: Callable[[], int]) -> int:
        try:
            return method()
        except HOOK_ERRORS as error:
            self._count(error)
            return 0

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
