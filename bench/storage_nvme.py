"""NVMe: `NvmeTier` with checksums on against the disk's ceiling, for each size of slab.

A round, on one file system: fio's best settings, then our durable store (until `write` returned:
slots, fdatasync, index) and our load (`read`: every slab verified) of as many bytes, then the same
end to end through a whole store in this process: put, `flush`, restart, load to the client's own
memory. The tier reads into and writes from an `Arena`, as in a daemon. Slots are overwritten from
the second round on, as fio overwrites its file. Reads bypass the page cache on both sides. What was
loaded is compared outside the timed part.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import ucm
from ucm import checksum
from ucm.api import NamespaceHandle
from ucm.config import MIB, Config, MemoryConfig, NvmeConfig
from ucm.layout import KvLayout, round_up
from ucm.storage.arena import Arena, ArenaKind
from ucm.storage.format import HEADER_BYTES
from ucm.storage.nvme import NvmeStore
from ucm.storage.tier import IoStatus, SlotId, SlotRead, SlotWrite
from ucm.types import ROOT_KEY, BlockKey, StoreStatus

from .storage_ceilings import Scout, Target
from .storage_measure import (
    GB,
    SLAB_LAYOUTS,
    Plan,
    Progress,
    Result,
    Samples,
    Task,
    best,
    gb_s,
    interleave,
    medians,
    rounded,
)
from .storage_payload import (
    WIPED,
    Audit,
    BlockBuffer,
    Payload,
    bench_chain,
    bench_spec,
    copy_verified,
    fill_slot,
    require,
)

if TYPE_CHECKING:
    from ucm.embedded import EmbeddedCache

LEASE_BYTES = 64 * MIB
"""End to end, blocks are put and loaded in leases of this size."""

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmePlan:
    """How NVMe is measured."""

    scout: Scout
    rounds: Plan
    whole_store_once: bool
    """Run the whole store once, not in every round."""
    progress: Progress


def measure_nvme(
    folder: Path,
    slab: str,
    size_bytes: int,
    plan: NvmePlan,
    audit: Audit,
) -> Result:
    """One slab size.

    Args:
        folder: empty, on the file system to measure; left empty.
        slab: a name of `SLAB_LAYOUTS`.
        size_bytes: moved in each round on each side.
        plan: how long, and against what.
        audit: counts what was read wrongly.
    """
    layout = SLAB_LAYOUTS[slab]
    num_blocks = max(2, size_bytes // layout.block_bytes)
    tier = TierBench(folder / "tier", layout, num_blocks, audit)
    try:
        tier.store()  # makes the file that is read
        target = Target(tier.segment_path, folder / "ceiling.bin", tier.nbytes)
        trials = plan.scout.find(target, layout.slab_bytes, layout.block_bytes)
        plan.progress(f"nvme {slab}: {', '.join(trial.name for trial in trials)} beside ours")
        whole = WholeStore(folder / "store", layout, num_blocks, audit)
        whole.max_rounds = plan.rounds.repeats + 1
        tasks: list[Task] = [
            lambda: plan.scout.ceiling.measure(target, trials),
            lambda: {"store": tier.store()},
            tier.load,
        ]
        if plan.whole_store_once:
            samples = interleave(tasks, plan.rounds)
            samples |= {name: [value] for name, value in whole.round_trip().items()}
        else:
            samples = interleave([*tasks, whole.round_trip], plan.rounds)
    finally:
        tier.close()
        shutil.rmtree(folder, ignore_errors=True)
    return {**_result(samples, num_blocks, layout), "huge_pages_mib": tier.huge_bytes // MIB}


def _result(samples: Samples, num_blocks: int, layout: KvLayout) -> Result:
    middle = medians(samples)
    read_name, read = best({n: v for n, v in middle.items() if n.startswith("read:")})
    write_name, write = best({n: v for n, v in middle.items() if n.startswith("write:")})
    figures = {
        "load_ratio": middle["load"] / read,
        "store_ratio": middle["store"] / write,
        "load_gb_s": middle["load"],
        "store_gb_s": middle["store"],
        "ceiling_read_gb_s": read,
        "ceiling_write_gb_s": write,
        "cpu_s_per_gb": middle["cpu_s_per_gb"],
        "end_to_end_load_gb_s": middle["end_to_end_load"],
        "end_to_end_store_gb_s": middle["end_to_end_store"],
        "end_to_end_load_ratio": middle["end_to_end_load"] / read,
        "end_to_end_store_ratio": middle["end_to_end_store"] / write,
        "end_to_end_cpu_s_per_gb": middle["end_to_end_cpu_s_per_gb"],
    }
    settings = {n: round(v, 3) for n, v in sorted(middle.items()) if ":" in n}
    return {
        **rounded(figures),
        "n": len(samples["load"]),
        "end_to_end_n": len(samples["end_to_end_load"]),
        "blocks": num_blocks,
        "block_bytes": layout.block_bytes,
        "ceiling_read": read_name.partition(":")[2],
        "ceiling_write": write_name.partition(":")[2],
        "ceilings_gb_s": settings,
    }


class ArenaBuffer:
    """All slots of an arena of its own, prefaulted."""

    def __init__(self, layout: KvLayout, num_blocks: int) -> None:
        self._arena = Arena(layout, num_blocks, ArenaKind.READ_ONLY)
        self._arena.prefault(num_blocks)
        self._arena.wait_prefaulted(TIMEOUT_S)
        self.blocks = [self._arena.view(n) for n in self._arena.slots.allocate(num_blocks)]
        self.nbytes = self._arena.size_bytes
        self.wipe()  # without prefaulting this is the first touch

    @property
    def huge_bytes(self) -> int:
        """See `Arena.huge_bytes`."""
        return self._arena.huge_bytes

    def wipe(self) -> None:
        """See `BlockBuffer.wipe`."""
        for block in self.blocks:
            np.frombuffer(block, np.uint8)[:] = WIPED

    def close(self) -> None:
        """Give the memory back."""
        self._arena.close()


class TierBench:
    """`num_blocks` blocks in one segment of an `NvmeTier`, stored and loaded as one batch."""

    def __init__(self, folder: Path, layout: KvLayout, num_blocks: int, audit: Audit) -> None:
        self._audit = audit
        self._payload = Payload(layout)
        spec = bench_spec(layout)
        namespace = spec.fingerprint()
        segment = round_up(num_blocks * (layout.block_bytes + HEADER_BYTES), MIB)
        config = NvmeConfig(path=folder, capacity_bytes=segment, segment_bytes=segment)
        self._store = NvmeStore(config)
        self._tier = self._store.open_namespace(namespace, layout)
        self.segment_path = next(folder.glob(f"ns/{namespace.hex()}"), folder) / "segments/0000.seg"
        self.keys = bench_chain(namespace, layout, num_blocks)
        self._source, self._target = (ArenaBuffer(layout, num_blocks) for _ in range(2))
        for key, block in zip(self.keys, self._source.blocks, strict=True):
            self._payload.fill(key, block)
        self._sums = [checksum.block_checksums(layout, block) for block in self._source.blocks]
        self._slots: list[SlotId] = []

    @property
    def nbytes(self) -> int:
        """Of all blocks."""
        return self._source.nbytes

    @property
    def huge_bytes(self) -> int:
        """Of what is read into, what has 2 MiB pages."""
        return self._target.huge_bytes

    def store(self) -> float:
        """Write everything over what was there; GB/s until it is durable."""
        if self._slots:
            self._tier.delete(list(zip(self._slots, self.keys, strict=True)))
        self._slots = self._tier.allocate(len(self.keys))
        require(len(self._slots) == len(self.keys), "the tier has no room")
        parents = [ROOT_KEY, *self.keys[:-1]]
        columns = (self._slots, self.keys, parents, self._source.blocks, self._sums)
        items = [SlotWrite(*row) for row in zip(*columns, strict=True)]
        begin = time.perf_counter()
        statuses = self._tier.write(items)
        rate = gb_s(self.nbytes, begin)
        require(set(statuses) == {IoStatus.OK}, f"writes ended with {set(statuses)}")
        return rate

    def load(self) -> Mapping[str, float]:
        """Read and verify everything; GB/s and CPU time."""
        self._target.wipe()
        columns = (self._slots, self.keys, self._target.blocks)
        items = [SlotRead(*row) for row in zip(*columns, strict=True)]
        cpu, begin = time.process_time(), time.perf_counter()
        outcomes = self._tier.read(items)
        rate, cpu = gb_s(self.nbytes, begin), time.process_time() - cpu
        require(all(o.status is IoStatus.OK for o in outcomes), "a block could not be read")
        self._audit.check(self._payload, self.keys, self._target.blocks)
        return {"load": rate, "cpu_s_per_gb": cpu / (self.nbytes / GB)}

    def close(self) -> None:
        """End the store."""
        self._store.close()
        self._source.close()
        self._target.close()


class WholeStore:
    """A whole store in this process, as an engine uses it: leases, arenas, write-behind."""

    def __init__(self, folder: Path, layout: KvLayout, num_blocks: int, audit: Audit) -> None:
        self._folder = folder
        self._layout = layout
        self._spec = bench_spec(layout, "whole")
        self._audit = audit
        self._payload = Payload(layout)
        self._num_blocks = num_blocks
        self._buffer = BlockBuffer(layout, num_blocks)
        self._rounds = 0
        self.max_rounds = 2
        """Room on the disk is for so many."""

    @property
    def nbytes(self) -> int:
        """Of all blocks."""
        return self._buffer.nbytes

    def round_trip(self) -> Mapping[str, float]:
        """Put new blocks until they are durable; restart; load them from the disk."""
        namespace = self._spec.fingerprint()
        keys = bench_chain(namespace, self._layout, self._num_blocks, seed=self._rounds)
        self._rounds += 1
        for key, block in zip(keys, self._buffer.blocks, strict=True):
            self._payload.fill(key, block)
        with ucm.open(self._folder, self._config()) as cache:
            handle = cache.open_namespace(self._spec)
            store = self._store(cache, handle, keys)
        self._buffer.wipe()
        with ucm.open(self._folder, self._config()) as cache:
            handle = cache.open_namespace(self._spec)
            load, cpu = self._load(cache, handle, keys)
        self._audit.check(self._payload, keys, self._buffer.blocks)
        return {
            "end_to_end_store": store,
            "end_to_end_load": load,
            "end_to_end_cpu_s_per_gb": cpu / (self.nbytes / GB),
        }

    def _config(self) -> Config:
        segment = round_up(self.nbytes + self._num_blocks * HEADER_BYTES, MIB)
        return Config(
            memory=MemoryConfig(capacity_bytes=self.nbytes * 5 // 4 + 64 * MIB),
            nvme=NvmeConfig(
                capacity_bytes=(self.max_rounds * 5 // 4 + 2) * segment,  # nothing is evicted
                segment_bytes=segment,
                write_queue_bytes=2 * self.nbytes,
            ),
        )

    def _leases(self) -> list[range]:
        size = max(1, LEASE_BYTES // self._layout.block_bytes)
        starts = range(0, self._num_blocks, size)
        return [range(start, min(start + size, self._num_blocks)) for start in starts]

    def _store(self, cache: EmbeddedCache, handle: NamespaceHandle, keys: list[BlockKey]) -> float:
        begin = time.perf_counter()
        for part in self._leases():
            parent = keys[part.start - 1] if part.start else ROOT_KEY
            lease = cache.prepare_store(handle.id, parent, [keys[n] for n in part])
            sums = {}
            for number, slot in zip(part, lease.slots, strict=True):
                sums[slot.key] = fill_slot(self._layout, slot, self._buffer.blocks[number])
            statuses = cache.complete_store(lease.id, sums)
            require(set(statuses) == {StoreStatus.ACCEPTED}, f"stores ended with {set(statuses)}")
        require(cache.flush(timeout_s=TIMEOUT_S), "the store did not flush")
        return gb_s(self.nbytes, begin)

    def _load(
        self, cache: EmbeddedCache, handle: NamespaceHandle, keys: list[BlockKey]
    ) -> tuple[float, float]:
        """GB/s and CPU seconds."""
        cpu, begin = time.process_time(), time.perf_counter()
        cache.prefetch(handle.id, keys)
        for part in self._leases():
            wanted = [keys[n] for n in part]
            lease = cache.prepare_load(handle.id, wanted, timeout_s=TIMEOUT_S)
            for number, block in zip(part, lease.blocks, strict=True):
                copy_verified(self._layout, block, self._buffer.blocks[number])
            cache.complete_load(lease.id)
        rate = gb_s(self.nbytes, begin)
        return rate, time.process_time() - cpu
