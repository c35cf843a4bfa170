"""Blocks with keys a model could have computed, and selections made the slow way from all of them.

`reference_selection` reads every key: what a store must answer for summaries that lose nothing, and
what its estimates and bounds are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ucm.api import CacheApi, NamespaceHandle
from ucm.checksum import block_checksums
from ucm.hashing import NamespaceSpec, chain_keys
from ucm.kernels.block_scores import Budget
from ucm.kernels.summarize import summarize_blocks
from ucm.kernels.summary_record import encode_summary
from ucm.layout import KvDtype, KvLayout
from ucm.select_api import SelectMode, SelectRequest
from ucm.types import ROOT_KEY, BlockKey, StoreStatus, SummaryKind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

SELECT_LAYOUT = KvLayout(
    num_layers=3, num_kv_heads=2, head_dim=8, block_tokens=4, dtype=KvDtype.FLOAT32
)
"""Blocks of three pages."""

NUM_HEADS = 6
"""Query heads: three for each KV head."""

KIND = SummaryKind.GSA_K4


def select_spec(model_id: str = "select") -> NamespaceSpec:
    """A namespace of such blocks."""
    return NamespaceSpec(layout=SELECT_LAYOUT, model_id=model_id, weights_digest="0" * 64)


def select_chain(handle: NamespaceHandle, num_blocks: int, seed: int = 0) -> list[BlockKey]:
    """Keys of a chain from the root; different seeds share nothing."""
    tokens = range(seed * 100_000, seed * 100_000 + num_blocks * SELECT_LAYOUT.block_tokens)
    return chain_keys(handle.id, list(tokens), SELECT_LAYOUT.block_tokens)


def slabs_of(key: BlockKey) -> Floats:
    """[num_layers, 2, G, block_tokens, D]: keys and values of a block; its name decides them."""
    rng = np.random.default_rng(np.frombuffer(key, np.uint32))
    shape = (SELECT_LAYOUT.num_layers, *SELECT_LAYOUT.slab_shape)
    centre = rng.normal(scale=2.0, size=(SELECT_LAYOUT.num_layers, 2, 2, 1, 8))
    found: Floats = (centre + rng.normal(size=shape)).astype(np.float32)
    return found


def block_bytes_of(slabs: Floats) -> bytes:
    """The block as it is stored."""
    padding = bytes(SELECT_LAYOUT.slab_stride_bytes - SELECT_LAYOUT.slab_bytes)
    return b"".join(slab.tobytes() + padding for slab in slabs)


def put_blocks(
    cache: CacheApi,
    handle: NamespaceHandle,
    keys: Sequence[BlockKey],
    *,
    parent: BlockKey = ROOT_KEY,
    summaries: bool = True,
) -> tuple[StoreStatus, ...]:
    """Store the blocks of a chain behind `parent`, with their summaries or without."""
    lease = cache.prepare_store(handle.id, parent, keys)
    checksums = {}
    for slot in lease.slots:
        if slot.data is None:
            continue
        slot.data[:] = block_bytes_of(slabs_of(slot.key))
        checksums[slot.key] = block_checksums(handle.layout, slot.data)
        if summaries and slot.summary is not None and handle.summary is not None:
            records = summarize_blocks(handle.layout, handle.summary, [slot.data])[0]
            data = encode_summary(handle.layout, handle.summary, records, checksums[slot.key])
            slot.summary[: len(data)] = data
    return cache.complete_store(lease.id, checksums)


def queries_of(num_layers: int, num_queries: int = 1, seed: int = 0) -> Floats:
    """[num_layers, num_queries, NUM_HEADS, D]."""
    shape = (num_layers, num_queries, NUM_HEADS, SELECT_LAYOUT.head_dim)
    found: Floats = np.random.default_rng(seed).normal(scale=2.0, size=shape).astype(np.float32)
    return found


def request_of(
    layers: Sequence[int] = (0, 2),
    budget: Budget | None = None,
    must_blocks: Sequence[int] = (),
    mode: SelectMode = SelectMode.SHARED,
    *,
    bounds: bool = True,
) -> SelectRequest:
    """A request with two queries a layer."""
    return SelectRequest(
        layers=layers,
        queries=queries_of(len(layers), 2),
        budget=budget or Budget(ratio=0.5),
        must_blocks=must_blocks,
        mode=mode,
        bounds=bounds,
    )


def true_logits(keys: Sequence[BlockKey], layer: int, queries: Floats) -> Floats:
    """[Q, H, n, block_tokens]: q.k / sqrt(D) of every key, for queries [Q, H, D] of one layer."""
    stored = np.stack([slabs_of(key)[layer, 0] for key in keys])  # n, G, B, D
    by_head = np.repeat(stored, NUM_HEADS // SELECT_LAYOUT.num_kv_heads, axis=1)
    found: Floats = np.einsum("qhd,nhbd->qhnb", queries, by_head)
    return found / np.float32(np.sqrt(SELECT_LAYOUT.head_dim))


def true_log_mass(logits: Floats) -> Floats:
    """[Q, H, n]: log of the sum of exp over the tokens of each block."""
    top = logits.max(axis=-1)
    found: Floats = top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))
    return found
