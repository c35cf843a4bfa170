"""What the manager answers: grants (names, offsets and checksums, never bytes) and its status.

The daemon sends grants over gRPC, and its clients turn them into views of the descriptors that the
door passed; embedded mode turns them into views at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from .api import StoreSlot
from .select_api import SummaryLease
from .types import (
    BlockKey,
    LeaseId,
    LoadStatus,
    NamespaceId,
    StoreStatus,
    SummaryKind,
    SummaryStatus,
    TierKind,
)


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
    """Room behind each block in the staging arena for its summary; 0 when none is wanted."""


def store_slot(
    key: BlockKey, status: StoreStatus, run: memoryview | None, block_bytes: int
) -> StoreSlot:
    """One key of a store lease for a client.

    Args:
        key: of the block.
        status: what was answered for it.
        run: its bytes in the staging arena, room for the summary included; None unless WANTED.
        block_bytes: length of the block in it.
    """
    if run is None:
        return StoreSlot(key, status)
    summary = run[block_bytes:] if len(run) > block_bytes else None
    return StoreSlot(key, status, run[:block_bytes], summary)


@dataclass(frozen=True, slots=True)
class MappedGrants:
    """A lease of summaries, in columns. Only the READY keys have an offset and a content."""

    lease_id: LeaseId
    kind: SummaryKind
    statuses: tuple[SummaryStatus, ...]
    """One for every key asked for, in order."""
    offsets: tuple[int, ...]
    """Byte offset of each READY one in the memory of the namespace's summaries."""
    contents: tuple[int, ...]
    """Of what content each READY one is the summary."""
    summary_bytes: int
    """Length of each."""
    timeout_s: float


def summary_lease(grants: MappedGrants, memory: memoryview) -> SummaryLease:
    """The lease for a client.

    Args:
        grants: what was granted; as many offsets and contents as READY keys.
        memory: the namespace's summaries, read-only; every offset lies in it.
    """
    places = zip(grants.offsets, grants.contents, strict=True)
    ready = SummaryStatus.READY
    found = [next(places) if status is ready else None for status in grants.statuses]
    size = grants.summary_bytes
    return SummaryLease(
        id=grants.lease_id,
        kind=grants.kind,
        entries=tuple(memory[each[0] : each[0] + size] if each else None for each in found),
        statuses=grants.statuses,
        contents=tuple(each[1] if each else 0 for each in found),
        timeout_s=grants.timeout_s,
    )


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
