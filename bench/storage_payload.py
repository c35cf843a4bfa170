"""What the storage benchmark stores: bytes that do not compress and that follow from their key.

    slab n of a block = base[n] XOR mask(key)[n]      base: one random block; mask: 8 bytes a slab

Two keys, two slabs, two offsets never hold the same bytes, so that a block, slab or page in a
wrong place differs in 255 of 256 bytes. Both sides of a comparison are made at memory speed, which
is what allows every byte that is loaded to be compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ucm.api import LoadedBlock, SlabChecksums, StoreSlot
from ucm.checksum import block_checksums, copy_block
from ucm.errors import CorruptionError
from ucm.hashing import NamespaceSpec, chain_keys
from ucm.layout import KvLayout
from ucm.storage.file_io import aligned_buffer
from ucm.types import BlockKey, LoadStatus, NamespaceId

WORD_BYTES = 8
WIPED = 0xA5
"""What targets hold before a load."""


def bench_spec(layout: KvLayout, name: str = "bench") -> NamespaceSpec:
    """The namespace of a layout."""
    return NamespaceSpec(layout=layout, model_id=name, weights_digest="0" * 64)


def bench_chain(
    namespace: NamespaceId, layout: KvLayout, num_blocks: int, seed: int = 0
) -> list[BlockKey]:
    """Keys of a chain from the root; different seeds share none."""
    num_tokens = num_blocks * layout.block_tokens
    tokens = np.random.default_rng(seed).integers(0, 2**31, num_tokens, np.int32)
    return chain_keys(namespace, tokens.tolist(), layout.block_tokens)


class Payload:
    """The bytes of every key of one layout, made and compared."""

    def __init__(self, layout: KvLayout) -> None:
        if layout.slab_bytes != layout.slab_stride_bytes:
            raise ValueError("the benchmark's slabs have no padding")
        self.layout = layout
        words = layout.slab_bytes // WORD_BYTES
        generator = np.random.default_rng(layout.block_bytes)
        shape = (layout.num_layers, words)
        self._base = generator.integers(0, 2**64, shape, np.uint64)
        self._expected = np.empty_like(self._base)

    def fill(self, key: BlockKey, into: memoryview) -> None:
        """Write the block of `key`."""
        np.bitwise_xor(self._base, self._masks(key), out=self._words(into))

    def wrong_bytes(self, key: BlockKey, data: memoryview) -> int:
        """How many bytes of `data` are not those of `key`. Not thread-safe."""
        np.bitwise_xor(self._base, self._masks(key), out=self._expected)
        found = self._words(data)
        if np.array_equal(found, self._expected):
            return 0
        return int(np.count_nonzero(found.view(np.uint8) != self._expected.view(np.uint8)))

    def checksums(self, data: memoryview) -> SlabChecksums:
        """Of one block."""
        return block_checksums(self.layout, data)

    def _masks(self, key: BlockKey) -> NDArray[np.uint64]:
        digest = hashlib.shake_128(key).digest(self.layout.num_layers * WORD_BYTES)
        return np.frombuffer(digest, np.uint64)[:, None]

    def _words(self, data: memoryview) -> NDArray[np.uint64]:
        return np.frombuffer(data, np.uint64).reshape(self._base.shape)


class BlockBuffer:
    """Page-aligned memory for a number of blocks, every page of it touched."""

    def __init__(self, layout: KvLayout, num_blocks: int) -> None:
        size = layout.block_bytes
        self.memory = aligned_buffer(num_blocks * size)
        np.frombuffer(self.memory, np.uint8)[:] = 1
        self.blocks = [self.memory[n * size : (n + 1) * size] for n in range(num_blocks)]

    @property
    def nbytes(self) -> int:
        """Of all blocks."""
        return self.memory.nbytes

    def wipe(self) -> None:
        """Overwrite everything, so that nothing of an earlier load can pass for this one's."""
        np.frombuffer(self.memory, np.uint8)[:] = WIPED


class Audit:
    """Counts wrong bytes over a whole run."""

    def __init__(self) -> None:
        self.wrong_bytes = 0
        self.checked_bytes = 0

    def add(self, wrong_bytes: int, checked_bytes: int) -> None:
        """Count what somebody else compared."""
        self.wrong_bytes += wrong_bytes
        self.checked_bytes += checked_bytes

    def check(
        self, payload: Payload, keys: Iterable[BlockKey], blocks: Sequence[memoryview]
    ) -> None:
        """Compare loaded blocks, byte by byte, with what was put under their keys."""
        for key, block in zip(keys, blocks, strict=True):
            self.add(payload.wrong_bytes(key, block), block.nbytes)


def copy_verified(layout: KvLayout, block: LoadedBlock, into: memoryview) -> None:
    """What a client does with a block of a lease: copy it out, then verify the copy.

    Raises:
        CorruptionError: the block is not there, or the copy fails its checksums.
    """
    require(block.status is LoadStatus.READY, f"a load ended with {block.status}")
    assert block.data is not None
    found = copy_block(layout, block.data, into)
    require(found == tuple(block.checksums), "a block failed its checksum after the copy")


def fill_slot(layout: KvLayout, slot: StoreSlot, source: memoryview) -> SlabChecksums:
    """What a client does with a slot of a lease: copy a block in; the checksums of the copy.

    Raises:
        CorruptionError: the block is not wanted.
    """
    require(slot.data is not None, f"a block was not wanted: {slot.status}")
    assert slot.data is not None
    return copy_block(layout, source, slot.data)


def require(condition: bool, what: str) -> None:
    """Stop the run when the store did not do what a figure would claim.

    Raises:
        CorruptionError: `condition` does not hold.
    """
    if not condition:
        raise CorruptionError(f"the benchmark cannot go on: {what}")
