"""What the manager answers: grants (names, offsets and checksums, never bytes) and its status.

The daemon sends grants over gRPC, and its clients turn them into views of the descriptors that the
door passed; embedded mode turns them into views at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .api import LoadedBlock, SlabChecksums
from .types import BlockKey, LeaseId, LoadStatus, NamespaceId, StoreStatus, TierKind


@dataclass(frozen=True, slots=True)
class LoadGrants:
    """A load lease, in columns: objects for each block would cost more than the plan.

    The READY blocks are the first ones, and only they have a tier, an offset and checksums.
    """

    lease_id: LeaseId
    statuses: tuple[LoadStatus, ...]
    """One for every key asked for, in order."""
    tiers: tuple[TierKind, ...]
    """Where each READY block was found when the load was prepared."""
    offsets: tuple[int, ...]
    """Byte offset of each READY block in the namespace's arena."""
    checksums: bytes
    """Of the READY blocks, packed as they travel: see `ucm.wire.checksums_from_wire`."""
    timeout_s: float

    def loaded_blocks(
        self, keys: Sequence[BlockKey], views: Sequence[memoryview], sums: Sequence[SlabChecksums]
    ) -> tuple[LoadedBlock, ...]:
        """The lease's blocks for a client.

        Args:
            keys: those asked for.
            views: bytes of the READY blocks, read-only.
            sums: their checksums.
        """
        num_ready = len(views)
        ready = map(LoadedBlock, keys, self.statuses, self.tiers, views, sums)
        others = map(LoadedBlock, keys[num_ready:], self.statuses[num_ready:])
        return (*ready, *others)


@dataclass(frozen=True, slots=True)
class StoreGrant:
    """One key of a store: where its bytes go in the session's staging arena."""

    key: BlockKey
    status: StoreStatus
    offset: int = -1
    """Byte offset in the staging arena; -1 unless WANTED."""


@dataclass(frozen=True, slots=True)
class StoreGrants:
    """A store lease: one entry for every key offered, in order."""

    lease_id: LeaseId
    slots: tuple[StoreGrant, ...]
    timeout_s: float
    summary_bytes: int = 0
    """Length of the encoded summary that may be written behind each WANTED block, at its offset
    and `layout.block_bytes`; 0 when the session opened the namespace without summaries."""


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One tier over all namespaces."""

    kind: TierKind
    used_bytes: int
    capacity_bytes: int
    num_blocks: int
    quarantined_slots: int
    writable: bool
    reason: str
    """Why it takes no writes; empty when it does."""
    io: str = ""
    """How it reaches its device: `posix`, `pinned`, `kvikio-compat` or `gds`; empty for memory."""
    io_reason: str = ""
    """Why so."""


@dataclass(frozen=True, slots=True)
class ShareStatus:
    """What a namespace costs in one tier, and what its tenant may hold there in all."""

    kind: TierKind
    held_bytes: int
    """Memory that was ever touched, or disk space of segments."""
    quota_bytes: int
    """0 is no limit."""
    reserved_bytes: int


@dataclass(frozen=True, slots=True)
class NamespaceStatus:
    """One open namespace."""

    id: NamespaceId
    num_blocks: int
    memory_blocks: int
    nvme_blocks: int
    block_bytes: int
    num_sessions: int
    problem: str
    """What is wrong with its NVMe tier; empty when all is well."""
    tenant: str = ""
    shares: tuple[ShareStatus, ...] = ()
    """One for each tier."""
    pinned_bytes: int = 0
    """Kept in memory by pin leases."""
    model_id: str = ""
    dtype: str = ""
    """Of keys and values."""
    codec: str = ""
    """Of what is written to NVMe; empty without that tier."""


@dataclass(frozen=True, slots=True)
class ManagerStatus:
    """A snapshot of the whole store."""

    state: str
    """`serving`, `draining` or `closed`."""
    num_sessions: int
    num_leases: int
    leased_bytes: int
    write_queue_blocks: int
    write_queue_bytes: int
    tiers: tuple[TierStatus, ...]
    namespaces: tuple[NamespaceStatus, ...]
    problems: tuple[str, ...]
    """What an operator should know, one clear line each; empty when all is well."""
    rejected_admissions: int = 0
    """Times that a block was stored or loaded and `nvme.admission` kept it from NVMe."""
