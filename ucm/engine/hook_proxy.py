"""`HookProxy`: a `KvHook` that hands every call on to another; what watches one overrides a few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ucm.hashing import Encodable

from .hook import KvHook, LoadRequest, LoadStart, LoadState, StepReport, StoreRequest

if TYPE_CHECKING:
    import torch


class HookProxy:
    """See the module, and `KvHook` for every method."""

    def __init__(self, inner: KvHook) -> None:
        self.inner = inner

    def attach(self, kv_pool: torch.Tensor) -> None:
        """See `KvHook.attach`."""
        self.inner.attach(kv_pool)

    def match(
        self, token_ids: Sequence[int], num_local_tokens: int, extra_keys: Sequence[Encodable] = ()
    ) -> int:
        """See `KvHook.match`."""
        return self.inner.match(token_ids, num_local_tokens, extra_keys)

    def start_load(self, request: LoadRequest) -> LoadStart:
        """See `KvHook.start_load`."""
        return self.inner.start_load(request)

    def load_state(self, request_id: str) -> LoadState:
        """See `KvHook.load_state`."""
        return self.inner.load_state(request_id)

    def wait_layer(self, layer: int, request_ids: Sequence[str], /) -> Sequence[int]:
        """See `KvHook.wait_layer`."""
        return self.inner.wait_layer(layer, request_ids)

    def claim(self, request_id: str, first_block: int, last_block: int, /) -> int:
        """See `KvHook.claim`."""
        return self.inner.claim(request_id, first_block, last_block)

    def wait_some(self, timeout_s: float) -> None:
        """See `KvHook.wait_some`."""
        self.inner.wait_some(timeout_s)

    def end_load(self, request_id: str) -> int:
        """See `KvHook.end_load`."""
        return self.inner.end_load(request_id)

    def store(self, request: StoreRequest) -> None:
        """See `KvHook.store`."""
        self.inner.store(request)

    def should_swap_out(self, num_tokens: int, /) -> bool:
        """See `KvHook.should_swap_out`."""
        return self.inner.should_swap_out(num_tokens)

    def observe_step(self, report: StepReport) -> None:
        """See `KvHook.observe_step`."""
        self.inner.observe_step(report)

    def finish(self, request_id: str) -> None:
        """See `KvHook.finish`."""
        self.inner.finish(request_id)
