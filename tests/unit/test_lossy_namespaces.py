"""The whole store with a codec: who shares what, which copy is read, what is encoded again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ucm.api import NamespaceHandle
from ucm.checksum import block_checksums, verify
from ucm.clock import SimClock
from ucm.config import MIB, Config, MemoryConfig, NvmeConfig, ServiceConfig
from ucm.embedded import EmbeddedCache
from ucm.hashing import NamespaceSpec, chain_keys
from ucm.layout import KvDtype, KvLayout
from ucm.manager import Manager
from ucm.shrink import Shrinking
from ucm.storage.codec_values import from_float, to_float
from ucm.storage.codecs import codec_named
from ucm.storage.encoding import block_words
from ucm.storage.format import HEADER_BYTES, compact_payload_bytes
from ucm.storage.nvme import NvmeTier
from ucm.types import ROOT_KEY, BlockKey, StoreStatus, TierKind

LAYOUT = KvLayout(num_layers=4, num_kv_heads=2, head_dim=32, block_tokens=16, dtype=KvDtype.FLOAT32)
SPEC = NamespaceSpec(layout=LAYOUT, model_id="m", weights_digest="0" * 64, accepts_lossy=True)
HALF_SPEC = dataclasses.replace(SPEC, layout=dataclasses.replace(LAYOUT, dtype=KvDtype.BFLOAT16))
"""In bfloat16, what a lossy codec made changes once more when it is coded again."""
NUM_BLOCKS = 12


class Store:
    """An embedded store over a folder; memory for a few blocks only."""

    def __init__(
        self, folder: Path, codec: str, *, disk: tuple[int, int] = (8 * MIB, 1 * MIB)
    ) -> None:
        self.config = Config(
            service=ServiceConfig(staging_bytes=1 * MIB),
            memory=MemoryConfig(capacity_bytes=64 * LAYOUT.block_bytes),
            nvme=NvmeConfig(
                path=folder,
                codec=codec,
                capacity_bytes=disk[0],
                segment_bytes=disk[1],
                io_threads=2,
            ),
        )
        self.open()

    def open(self) -> None:
        self.manager = Manager(self.config, clock=SimClock())
        self.cache = EmbeddedCache(self.manager)

    def restart(self) -> None:
        self.cache.close()
        self.open()

    def put(self, handle: NamespaceHandle, blocks: dict[BlockKey, bytes]) -> None:
        lease = self.cache.prepare_store(handle.id, ROOT_KEY, list(blocks))
        sums = {}
        for slot in lease.slots:
            assert slot.data is not None
            slot.data[:] = blocks[slot.key]
            sums[slot.key] = block_checksums(handle.layout, slot.data)
        statuses = self.cache.complete_store(lease.id, sums)
        assert set(statuses) == {StoreStatus.ACCEPTED}

    def get(self, handle: NamespaceHandle, keys: list[BlockKey]) -> list[bytes]:
        """What a client sees: copied, then verified against the lease's checksums."""
        lease = self.cache.prepare_load(handle.id, keys, timeout_s=10)
        found = []
        for block in lease.blocks[: lease.num_ready]:
            assert block.data is not None
            data = bytes(block.data)
            assert verify(handle.layout, memoryview(data), block.checksums)
            found.append(data)
        self.cache.complete_load(lease.id)
        return found

    def tier(self, handle: NamespaceHandle) -> NvmeTier:
        for namespace in self.manager._state.namespaces:
            if namespace.id == handle.id:
                assert isinstance(namespace.nvme, NvmeTier)
                return namespace.nvme
        raise AssertionError("not open")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    made = Store(folder, "int8")
    yield made
    made.cache.close()


def some_blocks(
    handle: NamespaceHandle, count: int = NUM_BLOCKS, seed: int = 0
) -> dict[BlockKey, bytes]:
    layout = handle.layout
    tokens = [seed * 100_000 + number for number in range(count * layout.block_tokens)]
    keys = chain_keys(handle.id, tokens, layout.block_tokens)
    blocks = {}
    for number, key in enumerate(keys):
        data = memoryview(bytearray(layout.block_bytes))
        words = block_words(layout, data)
        values = np.random.default_rng(number).standard_normal(words.shape)
        from_float(values.astype(np.float32), layout.dtype, words)
        blocks[key] = bytes(data)
    return blocks


def values_of(data: bytes) -> np.ndarray:
    return to_float(block_words(LAYOUT, memoryview(data)), LAYOUT.dtype)


def is_close(data: bytes, original: bytes) -> bool:
    error = np.abs(values_of(data) - values_of(original)).max()
    return bool(0 < error < 0.02)


def test_memory_is_exact_and_the_disk_close(store: Store) -> None:
    handle = store.cache.open_namespace(SPEC)
    blocks = some_blocks(handle)
    store.put(handle, blocks)
    assert store.cache.flush(timeout_s=10)
    assert store.get(handle, list(blocks)) == list(blocks.values())
    store.restart()
    handle = store.cache.open_namespace(SPEC)
    found = store.get(handle, list(blocks))
    assert len(found) == NUM_BLOCKS
    assert all(is_close(data, blocks[key]) for key, data in zip(blocks, found, strict=True))
    assert store.get(handle, list(blocks)) == found, "the promoted copy is the same"
    assert store.manager.check_integrity() == []


@pytest.mark.parametrize("codec", ["bp-zstd", "int8", "fp8", "int4"])
def test_who_accepts_no_loss_gets_every_bit_back(folder: Path, codec: str) -> None:
    store = Store(folder, codec)
    lossless = dataclasses.replace(SPEC, accepts_lossy=False)
    handle = store.cache.open_namespace(lossless)
    blocks = some_blocks(handle)
    store.put(handle, blocks)
    assert store.cache.flush(timeout_s=10)
    store.restart()
    handle = store.cache.open_namespace(lossless)
    assert store.get(handle, list(blocks)) == list(blocks.values())
    store.cache.close()


def test_lossy_and_lossless_users_share_nothing(store: Store) -> None:
    lossy = store.cache.open_namespace(SPEC)
    lossless = store.cache.open_namespace(dataclasses.replace(SPEC, accepts_lossy=False))
    assert lossy.id != lossless.id
    blocks = some_blocks(lossy)
    store.put(lossy, blocks)
    assert store.cache.lookup(lossless.id, list(blocks)).num_blocks == 0


@pytest.mark.parametrize("codec", ["int4", "int8"])
def test_blocks_that_do_not_fit_reach_the_disk_as_they_are(folder: Path, codec: str) -> None:
    """A first block's sinks (int4) and a NaN (both): whole, bit for bit, and so their children."""
    store = Store(folder, codec)
    handle = store.cache.open_namespace(SPEC)
    blocks = some_blocks(handle)
    keys = list(blocks)
    spoilt = bytearray(blocks[keys[3]])
    spoilt[8:12] = b"\xff\xff\xff\x7f"
    blocks[keys[3]] = bytes(spoilt)
    store.put(handle, blocks)
    assert store.cache.flush(timeout_s=10)
    store.restart()
    handle = store.cache.open_namespace(SPEC)
    found = store.get(handle, keys)
    assert len(found) == NUM_BLOCKS
    is_exact = [data == blocks[key] for key, data in zip(keys, found, strict=True)]
    assert is_exact == [n == 3 or (n == 0 and codec == "int4") for n in range(NUM_BLOCKS)]
    assert store.manager.check_integrity() == []
    store.cache.close()


def test_a_block_that_was_lossy_once_is_not_encoded_again(store: Store) -> None:
    """Its disk copy is lost after the promotion; a new child brings it back to the disk."""
    handle = store.cache.open_namespace(SPEC)
    blocks = some_blocks(handle)
    keys = list(blocks)
    store.put(handle, dict(list(blocks.items())[:-1]))
    assert store.cache.flush(timeout_s=10)
    store.restart()
    handle = store.cache.open_namespace(SPEC)
    decoded = store.get(handle, keys[:-1])
    lose_disk_copies(store, handle, keys[:-1])
    lease = store.cache.prepare_store(handle.id, keys[-2], [keys[-1]])
    (slot,) = lease.slots
    assert slot.data is not None
    slot.data[:] = blocks[keys[-1]]
    sums = {keys[-1]: block_checksums(LAYOUT, slot.data)}
    assert store.cache.complete_store(lease.id, sums) == (StoreStatus.ACCEPTED,)
    assert store.cache.flush(timeout_s=10)
    store.restart()
    handle = store.cache.open_namespace(SPEC)
    found = store.get(handle, keys)
    assert found[:-1] == decoded
    assert is_close(found[-1], blocks[keys[-1]])


@pytest.mark.parametrize("codec", ["int8", "fp8", "int4"])
def test_a_block_may_go_through_memory_and_disk_again_and_again(folder: Path, codec: str) -> None:
    """Also when a full slot, which has no codec, is where it was in between."""
    store = Store(folder, codec)
    handle = store.cache.open_namespace(HALF_SPEC)
    blocks = some_blocks(handle)
    keys = list(blocks)
    store.put(handle, blocks)
    assert store.cache.flush(timeout_s=10)
    decoded: list[bytes] = []
    for _ in range(3):
        store.restart()
        handle = store.cache.open_namespace(HALF_SPEC)
        found = store.get(handle, keys)
        assert found == (decoded or found)
        decoded = found
        lose_disk_copies(store, handle, keys)
        (namespace,) = store.manager._state.namespaces
        assert store.manager._write_behind is not None
        with store.manager._state.lock:
            store.manager._write_behind.enqueue_locked(namespace, namespace.index.find(keys[-1]))
        assert store.cache.flush(timeout_s=10)
    assert decoded != list(blocks.values())
    store.cache.close()


@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_a_segment_can_be_given_back(folder: Path, codec: str) -> None:
    """Encoded blocks move as they are: they need no larger slots and lose nothing more."""
    compact_bytes = compact_payload_bytes(HALF_SPEC.layout, codec_named(codec))
    segment_bytes = 8 * (HEADER_BYTES + compact_bytes)
    store = Store(folder, codec, disk=(2 * segment_bytes, segment_bytes))
    handle = store.cache.open_namespace(HALF_SPEC)
    chains = [some_blocks(handle, 6, seed) for seed in (0, 1)]
    for blocks in chains:
        store.put(handle, blocks)
        assert store.cache.flush(timeout_s=10)
    lose_disk_copies(store, handle, list(chains[0]))  # two of the other stay in this segment
    store.restart()
    handle = store.cache.open_namespace(HALF_SPEC)
    before = store.get(handle, list(chains[1]))
    assert len(before) == 6
    (namespace,) = store.manager._state.namespaces
    assert store.manager._write_behind is not None
    assert Shrinking(store.manager._state, store.manager._write_behind._delete)._shrink(namespace)
    assert store.tier(handle).file_bytes == segment_bytes
    assert store.manager.metrics.value("ucm_evicted_blocks_total", tier="nvme") == 0
    store.restart()
    handle = store.cache.open_namespace(HALF_SPEC)
    assert store.get(handle, list(chains[1])) == before
    assert store.manager.check_integrity() == []
    store.cache.close()


def lose_disk_copies(store: Store, handle: NamespaceHandle, keys: list[BlockKey]) -> None:
    """Evict blocks from the disk, as its watermarks would, the last of the chain first."""
    state = store.manager._state
    (namespace,) = [found for found in state.namespaces if found.id == handle.id]
    with state.lock:
        gone = [
            (namespace.index.lose(namespace.index.find(key), TierKind.NVME), key)
            for key in reversed(keys)
        ]
    store.tier(handle).delete(gone)
