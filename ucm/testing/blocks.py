"""Tiny blocks whose bytes follow from their keys, and how a client puts and gets them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ucm.api import CacheApi, LoadLease, NamespaceHandle
from ucm.checksum import block_checksums, verify
from ucm.errors import CapacityError
from ucm.hashing import NamespaceSpec, chain_keys
from ucm.layout import KvDtype, KvLayout
from ucm.types import ROOT_KEY, BlockKey, LoadStatus, NamespaceId, StoreStatus

TINY_LAYOUT = KvLayout(
    num_layers=2, num_kv_heads=1, head_dim=8, block_tokens=4, dtype=KvDtype.FLOAT32
)
"""Blocks of two pages, 8 KiB."""


def tiny_spec(model_id: str = "tiny", layout: KvLayout = TINY_LAYOUT) -> NamespaceSpec:
    """A namespace of tiny blocks."""
    return NamespaceSpec(layout=layout, model_id=model_id, weights_digest="0" * 64)


def chain(namespace: NamespaceId, num_blocks: int, seed: int = 0) -> list[BlockKey]:
    """Keys of a chain from the root; different seeds share nothing."""
    tokens = [seed * 1_000_003 + number for number in range(num_blocks * TINY_LAYOUT.block_tokens)]
    return chain_keys(namespace, tokens, TINY_LAYOUT.block_tokens)


def content(key: BlockKey, layout: KvLayout = TINY_LAYOUT) -> bytes:
    """The one right content of a block: every slab differs, the padding is zero."""
    padding = bytes(layout.slab_stride_bytes - layout.slab_bytes)
    slabs = (
        hashlib.shake_128(key + bytes([number % 256])).digest(layout.slab_bytes)
        for number in range(layout.num_layers)
    )
    return b"".join(slab + padding for slab in slabs)


def meaning(data: bytes | memoryview, layout: KvLayout = TINY_LAYOUT) -> bytes:
    """The block with its padding blanked: what lies there carries no meaning."""
    padding = bytes(layout.slab_stride_bytes - layout.slab_bytes)
    slabs = (bytes(data[layout.slab_slice(layer)]) for layer in range(layout.num_layers))
    return b"".join(slab + padding for slab in slabs)


def put(
    cache: CacheApi, handle: NamespaceHandle, keys: Sequence[BlockKey], parent: BlockKey = ROOT_KEY
) -> tuple[StoreStatus, ...]:
    """Store the blocks of a chain behind `parent`; returns what became of each."""
    lease = cache.prepare_store(handle.id, parent, keys)
    checksums = {}
    for slot in lease.slots:
        if slot.data is not None:
            slot.data[:] = content(slot.key, handle.layout)
            checksums[slot.key] = block_checksums(handle.layout, slot.data)
    return cache.complete_store(lease.id, checksums)


@contextmanager
def loaded(
    cache: CacheApi, handle: NamespaceHandle, keys: Sequence[BlockKey], timeout_s: float = 5.0
) -> Iterator[LoadLease]:
    """A load lease for the time of a `with` block; comes again when refused, until the time-out."""
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            lease = cache.prepare_load(handle.id, keys, timeout_s=timeout_s)
            break
        except CapacityError as error:
            if time.monotonic() + error.retry_after_s > end_s:
                raise
            time.sleep(error.retry_after_s)
    try:
        yield lease
    finally:
        cache.complete_load(lease.id)


def get(
    cache: CacheApi, handle: NamespaceHandle, keys: Sequence[BlockKey], timeout_s: float = 5.0
) -> list[bytes]:
    """Copy out the leading READY blocks, as a client does: copy first, then verify.

    Returns:
        Their bytes, the padding blanked.

    Raises:
        AssertionError: bytes that fail their checksum under a live lease.
    """
    with loaded(cache, handle, keys, timeout_s) as lease:
        blocks = lease.blocks[: lease.num_ready]
        found = []
        for block in blocks:
            assert block.data is not None
            assert block.status is LoadStatus.READY
            data = bytes(block.data)
            assert verify(handle.layout, memoryview(data), block.checksums), block.key.hex()
            found.append(meaning(data, handle.layout))
    return found
