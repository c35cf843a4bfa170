"""`KvHook`: where something outside the engine may fill the KV pool and read from it.

The engine calls the hook from its step loop and never imports a cache. The contract:

    admission   hook.match(tokens)        how many leading tokens could be loaded (side-effect free)
                hook.load(request)        fills pool blocks, returns how many leading ones are good
    each step   hook.store(request)       new full blocks; returns at once, copies behind the step
    end         hook.finish(request_id)   the request left the engine, for whatever reason

No method may raise into the engine: a failure is 0 tokens, or nothing stored. `load` may block,
but never past the hook's own deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """Pool blocks of one request to fill from outside.

    The blocks belong to this request alone, nobody else reads them before `load` returns.
    """

    request_id: str
    token_ids: Sequence[int]
    """All prompt tokens, from position 0."""
    first_block: int
    """Index in the request's chain of `block_ids[0]`; the blocks before it are in the pool."""
    block_ids: Sequence[int]
    """Pool blocks to fill, for the chain's blocks `first_block, first_block + 1, ...`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRequest:
    """Newly full, immutable pool blocks of one request."""

    request_id: str
    token_ids: Sequence[int]
    """All tokens from position 0 up to the end of the last block in `block_ids`."""
    first_block: int
    block_ids: Sequence[int]
    release: Callable[[], None]
    """Call exactly once, from any thread, when the blocks were copied or dropped; until then the
    engine does not reuse them."""


class KvHook(Protocol):
    """Fills and drains the engine's KV pool; see the module for the order of calls."""

    def attach(self, kv_pool: torch.Tensor) -> None:
        """Called once before anything else.

        Args:
            kv_pool: [num_layers, num_blocks, 2, num_kv_heads, block_tokens, head_dim], contiguous,
                the engine's whole pool. Keys are post-RoPE.
        """

    def match(self, token_ids: Sequence[int], num_local_tokens: int) -> int:
        """Leading tokens of `token_ids` that `load` could make present.

        Args:
            token_ids: all prompt tokens.
            num_local_tokens: what the pool already holds, a multiple of the block size.

        Returns:
            A multiple of the block size, at least `num_local_tokens`; below or equal to it means
            nothing to load.
        """

    def load(self, request: LoadRequest) -> int:
        """Fill the blocks; returns how many *leading* ones are complete and verified."""

    def store(self, request: StoreRequest) -> None:
        """Take new full blocks; returns at once, dropping them rather than waiting.

        Blocks that the hook has seen before may be offered again. Should it raise all the same, it
        must not have kept `release`: the engine then calls it.
        """

    def finish(self, request_id: str) -> None:
        """The request is done, cancelled or preempted."""
