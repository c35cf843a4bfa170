"""`LoadPlan`: what `CacheApi.begin_load` answers, and what a layer by layer reader works through.

    source     | bytes are               | readable                   | checksums
    MEMORY     | in `data`, the arena    | now                        | in the plan
    PROMOTING  | in `data`, the arena    | as far as `progress` says  | in `progress`
    EXTENT     | in a file, at `extent`  | now, by the client         | in the slot's header

Layer-major order, of progress as of reading: all blocks' slabs of layer 0, then all of layer 1, ...
What was copied or read is verified by its checksum *where it arrived*; a plan that has run out of
time is noticed by that, and by the key and the generation in a slot's header.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .layout import ALIGNMENT_BYTES
from .types import BlockKey, LeaseId, LoadMode, LoadStatus, NamespaceId, SourceKind, TierKind

if TYPE_CHECKING:
    from ucm.storage.throttled_io import TokenBucket

    from .api import LoadedBlock, LoadLease, SlabChecksums


class SegmentFile:
    """A file of slots that this process may read; closed with the last reference to it.

    A plan's extents hold one, so that no read ever meets a descriptor that was closed, or that
    belongs to another file by now.
    """

    def __init__(self, fd: int, *, is_direct: bool) -> None:
        """Own the descriptor `fd`; `is_direct` says that it has O_DIRECT."""
        self.fd = fd
        self.is_direct = is_direct
        weakref.finalize(self, _close, fd)


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):  # a process that forked may have closed it
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one block lies in a file, as it is."""

    file: SegmentFile
    """Keeps `fd` open."""
    slot: int
    """Number of the slot; its header says the same."""
    offset: int
    """Of the slot's header in the file, in bytes."""
    generation: int
    """The header must say the same: else the slot was reused."""
    summary_bytes: int = 0
    """Between the header and the first slab; of all extents of a plan the same."""

    @property
    def payload_offset(self) -> int:
        """Of the first slab in the file, in bytes."""
        return self.offset + ALIGNMENT_BYTES + self.summary_bytes

    @property
    def fd(self) -> int:
        """Descriptor to read from."""
        return self.file.fd

    @property
    def is_direct(self) -> bool:
        """Whether it has O_DIRECT: then offsets, lengths and addresses are multiples of 4 KiB."""
        return self.file.is_direct


@dataclass(frozen=True, slots=True)
class PlannedBlock:
    """One key of a load plan."""

    key: BlockKey
    status: LoadStatus
    """READY: it can be had by `source`; else why not."""
    source: SourceKind | None = None
    """None unless READY."""
    tier: TierKind | None = None
    """Where it was found; None unless READY."""
    data: memoryview | None = None
    """MEMORY and PROMOTING: read-only, `layout.block_bytes` long."""
    checksums: SlabChecksums = ()
    """MEMORY only."""
    extent: Extent | None = None
    """EXTENT only."""


class LoadProgress(Protocol):
    """How far the promotions of one plan are. Thread-safe. Counts never go back.

    PROMOTING blocks are numbered 0..num_blocks-1 in the order of the plan's keys.
    """

    @property
    def num_blocks(self) -> int:
        """PROMOTING blocks of the plan."""

    def num_done(self) -> int:
        """Leading slabs, layer-major, that are in the arena and verified, or given up.

        Slab number `layer * num_blocks + i` is that of PROMOTING block i.
        """

    def num_usable(self) -> int:
        """Leading PROMOTING blocks that have not failed."""

    def checksums(self, index: int) -> SlabChecksums:
        """Of PROMOTING block `index`, once its slab of layer 0 is done.

        Empty when the load has ended: they could be those of another one by now.
        """

    def wait(self, num_slabs: int, timeout_s: float) -> bool:
        """Block until `num_done() >= num_slabs`; False when time is up, or the cache is gone."""

    def close(self) -> None:
        """Look no more. Idempotent; does not end the lease."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Blocks pinned for reading layer by layer, one entry for every key asked for, in order."""

    id: LeaseId
    namespace: NamespaceId
    mode: LoadMode
    """As asked for."""
    blocks: tuple[PlannedBlock, ...]
    timeout_s: float
    """The cache may take the bytes back this long after `begin_load` was answered."""
    progress: LoadProgress | None = None
    """None when no block is PROMOTING."""
    read_limit: TokenBucket | None = None
    """Every read of an extent takes its bytes here first; None when there is no limit."""

    @property
    def summary_bytes(self) -> int:
        """Between header and payload of its extents; 0 when there are none."""
        extents = (block.extent for block in self.blocks if block.extent is not None)
        return next((extent.summary_bytes for extent in extents), 0)

    @property
    def num_ready(self) -> int:
        """Length of the leading run of READY blocks."""
        for index, block in enumerate(self.blocks):
            if block.status is not LoadStatus.READY:
                return index
        return len(self.blocks)


def plan_of_lease(lease: LoadLease, namespace: NamespaceId, mode: LoadMode) -> LoadPlan:
    """A lease of blocks that are all in memory, as a plan."""
    blocks = tuple(_planned(block) for block in lease.blocks)
    return LoadPlan(lease.id, namespace, mode, blocks, lease.timeout_s)


def _planned(block: LoadedBlock) -> PlannedBlock:
    if block.status is not LoadStatus.READY:
        return PlannedBlock(block.key, block.status)
    return PlannedBlock(
        block.key, block.status, SourceKind.MEMORY, block.tier, block.data, block.checksums
    )
