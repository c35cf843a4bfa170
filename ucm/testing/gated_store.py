"""An embedded store on a real NVMe tier whose reads a test holds back, fails or counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ucm.api import NamespaceHandle
from ucm.checksum import block_checksums
from ucm.clock import SimClock
from ucm.config import MIB, Config, MemoryConfig, NvmeConfig, ServiceConfig
from ucm.embedded import EmbeddedCache
from ucm.layout import KvLayout
from ucm.manager import Manager
from ucm.namespaces import TierFactory
from ucm.storage.format import HEADER_BYTES
from ucm.storage.nvme import NvmeStore
from ucm.types import ROOT_KEY, BlockKey, LoadMode

from .blocks import chain, content, tiny_spec
from .extent_files import PAGE_LAYOUT, GatedIo


def gated_config(path: Path, layout: KvLayout = PAGE_LAYOUT) -> Config:
    """Room for 64 blocks in memory, 240 on disk in segments of 48."""
    slot_bytes = HEADER_BYTES + layout.block_bytes
    return Config(
        service=ServiceConfig(staging_bytes=4 * MIB, drain_timeout_s=5.0),
        memory=MemoryConfig(capacity_bytes=64 * layout.block_bytes, prefault_bytes=0),
        nvme=NvmeConfig(
            path=path,
            capacity_bytes=240 * slot_bytes,
            segment_bytes=48 * slot_bytes,
            io_threads=2,
            index_map_bytes=16 * MIB,
        ),
    )


class GatedStore:
    """One session on one namespace; the gate is open until a test shuts it."""

    def __init__(self, config: Config, layout: KvLayout = PAGE_LAYOUT) -> None:
        self.config = config
        self.layout = layout
        self.clock = SimClock()
        self._open()

    def _open(self) -> None:
        self.io = GatedIo()
        self.io.open_gate()
        nvme = NvmeStore(self.config.nvme, self.io)
        self.manager = Manager(self.config, clock=self.clock, tiers=TierFactory(nvme=nvme))
        self.cache = EmbeddedCache(self.manager)
        self.handle: NamespaceHandle = self.cache.open_namespace(tiny_spec(layout=self.layout))

    def on_disk(
        self,
        num_blocks: int,
        seed: int = 0,
        content_of: Callable[[BlockKey], bytes] | None = None,
    ) -> list[BlockKey]:
        """Keys of a chain that NVMe has and memory does not: the store was opened again."""
        keys = chain(self.handle.id, num_blocks, seed)
        right = content_of or (lambda key: content(key, self.layout))
        lease = self.cache.prepare_store(self.handle.id, ROOT_KEY, keys)
        checksums = {}
        for slot in lease.slots:
            assert slot.data is not None
            slot.data[:] = right(slot.key)
            checksums[slot.key] = block_checksums(self.layout, slot.data)
        self.cache.complete_store(lease.id, checksums)
        assert self.cache.flush(timeout_s=10)
        self.cache.close()
        self._open()
        return keys

    def offsets(self, keys: list[BlockKey]) -> list[int]:
        """Where the headers of blocks lie in their segment."""
        plan = self.cache.begin_load(self.handle.id, keys, mode=LoadMode.DIRECT, timeout_s=1)
        found = [block.extent.offset for block in plan.blocks if block.extent is not None]
        self.cache.release(plan.id)
        return found

    def fail_layer(self, keys: list[BlockKey], block: int, layer: int, code: int) -> None:
        """Fail the read of one slab, where layers are read one by one."""
        offset = self.offsets(keys)[block]
        ahead = HEADER_BYTES + layer * self.layout.slab_stride_bytes if layer else 0
        self.io.codes[offset + ahead] = code

    def memory_blocks(self) -> int:
        """Slots of memory in use or handed out."""
        return self.manager.status().tiers[0].used_bytes // self.layout.block_bytes

    def close(self) -> None:
        """Let everything go, and end it."""
        self.io.open_gate()
        self.cache.close()
