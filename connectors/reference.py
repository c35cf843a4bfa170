"""`KvHook` of the reference engine: its paged pool on one side, a cache session on the other.

The pool holds slabs in the canonical layout, so a block is copied as it is, some layers at a time,
and its checksums are taken right behind the copy, while the slabs are still in the core's cache. A
slab (48 KiB for SmolLM2-135M in fp32) is long enough for memcpy; several of a block go in one call
because each call takes the interpreter twice. Loading goes layer by layer, by the session's
readers, straight into the pool.

Envelope: 96 blocks of 30 slabs, 142 MB, copied and verified on one thread of a busy machine: slab
by slab 50 ms, in merged runs of 8 blocks 53 ms, with torch's copy_ 107 (one run) to 429 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ucm.api import SlabChecksums
from ucm.checksum import CACHED_BYTES, checksum
from ucm.engine.hook import LoadRequest, LoadStart, LoadState, StepReport, StoreRequest
from ucm.engine.layer_clock import LayerClock
from ucm.errors import ConfigError, LayoutMismatchError, TierUnavailableError
from ucm.hashing import Encodable, NamespaceSpec
from ucm.layout import KvDtype, KvLayout

from .session import CacheSession, LoadOffer, StoreOffer

if TYPE_CHECKING:
    from ucm.engine.config import ModelConfig


WAKEUP_BYTES = 2 << 20
"""The thread that copies new blocks out does not wake up during a pass for less."""

ByteArray = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


_DTYPES = {"fp32": KvDtype.FLOAT32, "bf16": KvDtype.BFLOAT16}


def kv_dtype(name: str) -> KvDtype:
    """The element type of KV that the engine computes in `fp32` or `bf16`.

    Raises:
        ConfigError: another name.
    """
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported; use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def namespace_spec(
    config: ModelConfig,
    *,
    weights_digest: str,
    dtype: KvDtype,
    block_tokens: int,
    tenant: str = "",
    salt: str = "",
) -> NamespaceSpec:
    """Identity of the KV that the reference engine computes for a model.

    Args:
        config: the model's shape and constants.
        weights_digest: SHA-256 of the weights' files.
        dtype: of the computation and of the KV.
        block_tokens: tokens a block.
        tenant: who may see the blocks.
        salt: separates users of one tenant.
    """
    kinds = {1: "mqa", config.num_heads: "mha"}
    return NamespaceSpec(
        layout=config.kv_layout(block_tokens, dtype),
        model_id=config.name,
        # The norms' epsilon is in no tensor, but in every byte of KV.
        weights_digest=f"{weights_digest},rms_norm_eps={config.rms_norm_eps!r}",
        tenant=tenant,
        salt=salt,
        rope_kind="half_split",
        rope_base=config.rope_base,
        rope_scaling=config.rope_scaling_text,
        attention_kind=kinds.get(config.num_kv_heads, "gqa"),
    )


class _PoolTarget:
    """The slabs of some of the pool's blocks; see `SlabTarget`."""

    def __init__(self, pool: ByteArray, block_ids: Sequence[int]) -> None:
        self._pool = pool
        self._block_ids = block_ids

    def view(self, layer: int, index: int) -> memoryview:
        """See `SlabTarget.view`."""
        slab: memoryview = self._pool[layer, self._block_ids[index]].data
        return slab


class ReferenceConnector:
    """Fills the reference engine's pool from a cache and stores what the engine computes."""

    def __init__(self, session: CacheSession) -> None:
        self.session = session
        self._pool: ByteArray | None = None
        self._loads: dict[str, LoadStart] = {}

    def attach(self, kv_pool: torch.Tensor) -> None:
        """See `KvHook.attach`.

        Raises:
            LayoutMismatchError: the pool's slabs are not those of the session's namespace.
            ConfigError: the pool is not in host memory.
        """
        self._pool = pool_bytes(kv_pool, self.session.spec.layout)

    def match(
        self, token_ids: Sequence[int], num_local_tokens: int, extra_keys: Sequence[Encodable] = ()
    ) -> int:
        """See `KvHook.match`."""
        block_tokens = self.session.spec.layout.block_tokens
        num_local = num_local_tokens // block_tokens
        return self.session.match(token_ids, num_local, extra_keys) * block_tokens

    def start_load(self, request: LoadRequest) -> LoadStart:
        """See `KvHook.start_load`."""
        pool, first, block_ids = self._pool, request.first_block, tuple(request.block_ids)
        decision = None
        if pool is not None:
            offer = LoadOffer(
                request_id=request.request_id,
                token_ids=request.token_ids,
                blocks=range(first, first + len(block_ids)),
                target=_PoolTarget(pool, block_ids),
                hold=lambda places: request.hold([block_ids[place] for place in places]),
                extra_keys=request.extra_keys,
                whole=request.whole,
                is_alone=request.is_alone,
            )
            decision = self.session.start_load(offer)
        if decision is None:
            return LoadStart(first_block=first, num_blocks=0)
        load = LoadStart(first_block=first, num_blocks=decision.num_blocks, order=decision.order)
        self._loads[request.request_id] = load
        return load

    def load_state(self, request_id: str) -> LoadState:
        """See `KvHook.load_state`."""
        load, state = self._loads[request_id], self.session.loads.state(request_id)
        return LoadState(
            is_done=state.is_done,
            num_good_blocks=state.num_good,
            num_layers_ready=state.num_layers_ready,
            bytes_left=state.bytes_left,
            stall_s=state.stall_s,
            first_ready_block=load.first_block + load.num_blocks - state.num_from_back,
        )

    def wait_layer(self, layer: int, request_ids: Sequence[str], /) -> Sequence[int]:
        """See `KvHook.wait_layer`."""
        return [self.session.loads.wait_layer(layer, each) for each in request_ids]

    def claim(self, request_id: str, first_block: int, last_block: int, /) -> int:
        """See `KvHook.claim`."""
        start = self._loads[request_id].first_block
        end = self.session.loads.claim(request_id, first_block - start, last_block - start)
        return start + end

    def wait_some(self, timeout_s: float) -> None:
        """See `KvHook.wait_some`."""
        self.session.loads.wait_some(timeout_s)

    def end_load(self, request_id: str) -> int:
        """See `KvHook.end_load`."""
        del self._loads[request_id]
        return self.session.loads.end(request_id)

    def should_swap_out(self, num_tokens: int, /) -> bool:
        """See `KvHook.should_swap_out`."""
        return self.session.should_swap_out(num_tokens)

    def observe_step(self, report: StepReport) -> None:
        """See `KvHook.observe_step`."""
        self.session.loads.observe_pass(report)

    def store(self, request: StoreRequest) -> None:
        """See `KvHook.store`."""
        pool = self._pool
        if pool is None:
            request.release()
            return
        block_ids = request.block_ids

        def fill(indexes: Sequence[int], slots: Sequence[memoryview]) -> list[SlabChecksums]:
            blocks = [(block_ids[i], slot) for i, slot in zip(indexes, slots, strict=True)]
            return self._copy_out(pool, blocks, request.layers)

        offer = StoreOffer(
            request_id=request.request_id,
            token_ids=request.token_ids,
            blocks=range(request.first_block, request.first_block + len(block_ids)),
            fill=fill,
            release=request.release,
            extra_keys=request.extra_keys,
        )
        self.session.store(offer)

    def finish(self, request_id: str) -> None:
        """See `KvHook.finish`."""
        self.session.finish(request_id)

    def _copy_out(
        self, pool: ByteArray, blocks: Sequence[tuple[int, memoryview]], layers: LayerClock
    ) -> list[SlabChecksums]:
        """Copy blocks out of the pool, layers at a time behind the pass that computes them.

        Returns:
            For each block the checksums of what the pool holds.

        Raises:
            TierUnavailableError: the pass failed, or did not end in time.
        """
        layout = self.session.spec.layout
        targets = [(block_id, _slabs_of(slot, layout)) for block_id, slot in blocks]
        sums: list[list[int]] = [[] for _ in blocks]
        for first, last in _pieces(layout.num_layers, _layers_a_wakeup(layout, len(blocks))):
            if not layers.wait(last - 1, self.session.options.deadline_s):
                raise TierUnavailableError(f"layer {last - 1} of a pass was not computed: dropped")
            for (block_id, slabs), of_block in zip(targets, sums, strict=True):
                of_block.extend(_copy_slabs(pool[first:last, block_id], slabs[first:last]))
        return [tuple(of_block) for of_block in sums]


def _layers_a_wakeup(layout: KvLayout, num_blocks: int) -> int:
    return max(1, WAKEUP_BYTES // (num_blocks * layout.slab_bytes))


def _copy_slabs(source: ByteArray, target: ByteArray) -> list[int]:
    """Copy slabs, [n, slab_bytes] each, and checksum the source while it is in the core's cache."""
    sums: list[int] = []
    for first, last in _pieces(len(source), max(1, CACHED_BYTES // source.shape[1])):
        target[first:last] = source[first:last]
        sums += [checksum(slab.data) for slab in source[first:last]]
    return sums


def _pieces(count: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, count)) for first in range(0, count, size)]


def pool_bytes(kv_pool: torch.Tensor, layout: KvLayout) -> ByteArray:
    """The pool as [num_layers, num_blocks, slab_bytes] uint8, sharing its memory.

    Raises:
        LayoutMismatchError: its slabs do not have the layout's shape and dtype.
        ConfigError: it is not in host memory.
    """
    if kv_pool.device.type != "cpu":
        raise ConfigError(f"this connector serves a pool in host memory, not on {kv_pool.device}")
    num_layers, num_blocks, *slab = kv_pool.shape
    dtype = str(kv_pool.dtype).removeprefix("torch.")
    same = (num_layers, tuple(slab), dtype) == (
        *(layout.num_layers, layout.slab_shape),
        layout.dtype.value,
    )
    if not same or not kv_pool.is_contiguous():
        raise LayoutMismatchError(
            f"the pool is {tuple(kv_pool.shape)} of {dtype}, the namespace has {layout}"
        )
    flat: ByteArray = kv_pool.view(-1).view(torch.uint8).numpy()
    return flat.reshape(num_layers, num_blocks, layout.slab_bytes)


def _slabs_of(block: memoryview, layout: KvLayout) -> ByteArray:
    """A block's slabs as [num_layers, slab_bytes], padding left out, sharing its memory."""
    flat = np.frombuffer(block, dtype=np.uint8)
    return flat.reshape(layout.num_layers, layout.slab_stride_bytes)[:, : layout.slab_bytes]
