"""What the manager answers: grants (names, offsets and checksums, never bytes) and its status.

The daemon sends grants over gRPC, and its clients turn them into views of the descriptors that the
door passed; embedded mode turns them into views at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from .api import SlabChecksums
from .types import BlockKey, LeaseId, LoadStatus, NamespaceId, StoreStatus, TierKind


@dataclass(frozen=True, slots=True)
class LoadGrant:
    """One key of a load: where its bytes lie in the namespace's arena."""

    key: BlockKey
    status: LoadStatus
    tier: TierKind | None = None
    """Where it was found when the load was prepared; None unless READY."""
    offset: int = -1
    """Byte offset of the block in the arena; -1 unless READY."""
    checksums: SlabChecksums = ()


@dataclass(frozen=True, slots=True)
class LoadGrants:
    """A load lease: one entry for every key asked for, in order."""

    lease_id: LeaseId
    blocks: tuple[LoadGrant, ...]
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
    """How it reaches its device: `posix`, `kvikio-compat` or `gds`; empty for memory."""
    io_reason: str = ""
    """Why so."""


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
