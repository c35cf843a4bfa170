"""`CacheApi`: the one seam between an engine's connector and the cache.

Two implementations pass one conformance suite: `ucm.embedded` (in process) and `ucm.client` (the
daemon, over gRPC for names and shared memory for bytes). Both are thread-safe.

A call moves names and leases; bytes move through the `memoryview`s that a lease carries:

    load   prepare_load  -> [copy out of lease.blocks[i].data, verify] -> complete_load
           begin_load    -> [`ucm.layer_reader`, layer by layer]       -> complete_load
    store  prepare_store -> [copy into lease.slots[i].data, checksum]  -> complete_store
                         or release(lease_id), at any time, in any state
    select select | select_and_load -> a plan | map_summaries -> [score in place] -> release

Who guarantees what: between prepare and complete the cache keeps the leased bytes in place and
unchanged; after the lease's deadline, or once it was completed or released, it does not, and a
reader finds out by the checksums that it verifies *after* its copy. A block is readable by others
only when its store completed with a matching checksum (`accepted`), and survives a crash only once
it is `flushed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .hashing import NamespaceSpec
from .layout import KvLayout
from .types import BlockKey, LeaseId, LoadMode, LoadStatus, NamespaceId, StoreStatus, TierKind

if TYPE_CHECKING:
    from .load_plan import LoadPlan
    from .select_api import SelectRequest, SelectResult, SummaryLease
    from .types import SummaryKind

SlabChecksums = tuple[int, ...]
"""xxh3_64 (seed 0) of each slab of a block, layer 0 first, padding excluded."""


@dataclass(frozen=True, slots=True)
class NamespaceHandle:
    """An open namespace of one session."""

    id: NamespaceId
    layout: KvLayout
    max_read_bytes_per_s: int = 0
    """What a client that reads extents itself may read in a second; 0 is no limit. Its plans carry
    the limit, and `ucm.layer_reader` keeps to it."""
    summary: SummaryKind | None = None
    """The kind of summaries that this session has of its blocks; None when it has none."""


@dataclass(frozen=True, slots=True)
class LookupResult:
    """How much of a chain is cached."""

    tiers: tuple[TierKind, ...]
    """Fastest tier of each block of the longest usable prefix; its length is the hit in blocks."""

    @property
    def num_blocks(self) -> int:
        """Length of the longest usable prefix, in blocks."""
        return len(self.tiers)


class LoadedBlock(NamedTuple):
    """One key of a load lease. A tuple, because there are many and a lease is waited for."""

    key: BlockKey
    status: LoadStatus
    tier: TierKind | None = None
    """Where it was found when the load was prepared; None unless READY."""
    data: memoryview | None = None
    """Read-only, `layout.block_bytes` long; None unless READY."""
    checksums: SlabChecksums = ()


@dataclass(frozen=True, slots=True)
class LoadLease:
    """Blocks pinned for reading, one entry for every key asked for, in order."""

    id: LeaseId
    blocks: Sequence[LoadedBlock]
    timeout_s: float
    """The cache may take the bytes back this long after `prepare_load` was answered."""

    @property
    def num_ready(self) -> int:
        """Length of the leading run of READY blocks."""
        for index, block in enumerate(self.blocks):
            if block.status is not LoadStatus.READY:
                return index
        return len(self.blocks)


@dataclass(frozen=True, slots=True)
class StoreSlot:
    """One key of a store lease."""

    key: BlockKey
    status: StoreStatus
    data: memoryview | None = None
    """Writable, `layout.block_bytes` long; None unless WANTED."""
    summary: memoryview | None = None
    """Writable: where the block's encoded summary may be put, from its first byte on, before the
    store completes; what follows it carries no meaning. None when no summary is wanted.

    Left as it is, the cache computes the summary itself, in the background and in memory: unless
    that was done before the block went to NVMe, it is gone after a restart or an eviction, and
    every selection has the block (NO_SUMMARY) until it was promoted. To be sure of one, write it:
    `ucm.kernels.summarize.summarize_blocks` of `data`, then
    `ucm.kernels.summary_record.encode_summary` with the block's `ucm.checksum.block_checksums`."""


@dataclass(frozen=True, slots=True)
class StoreLease:
    """Staging slots to fill, one entry for every key offered, in order."""

    id: LeaseId
    slots: tuple[StoreSlot, ...]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class PinLease:
    """A prefix that stays in host memory."""

    id: LeaseId
    num_blocks: int
    """Leading keys that are pinned: fewer than asked for where the chain is not cached."""
    hold_s: float
    """How long it lasts; the store may allow less than was asked for."""


class CacheApi(Protocol):
    """A tiered block cache as a client sees it. All sizes in bytes, all times in seconds."""

    def open_namespace(
        self, spec: NamespaceSpec, *, summary: SummaryKind | None = None
    ) -> NamespaceHandle:
        """Make a namespace usable in this session; create it if it is new.

        Args:
            spec: identity of the KV.
            summary: the kind of summaries that this session wants of the blocks. It changes no
                block: sessions with other kinds, or without, share them. Whoever creates the
                namespace decides what is kept on NVMe; summaries of another kind are computed
                again when a block comes to memory. A session keeps the last kind that it named.
                The plain word ("gsa-k4") will do.

        Raises:
            InvalidArgumentError: there is no such kind of summaries.
            LayoutMismatchError: the namespace exists with another layout, or this kind cannot
                describe its blocks.
            CapacityError: the limit on open namespaces is reached.
            TierUnavailableError: the daemon does not answer.
        """

    def lookup(self, namespace: NamespaceId, keys: Sequence[BlockKey]) -> LookupResult:
        """Longest prefix of the chain `keys` of which every block is in some tier.

        Pins nothing: a later load may find less. Does not touch block data.
        """

    def prefetch(self, namespace: NamespaceId, keys: Sequence[BlockKey]) -> int:
        """Start promoting the cached prefix of `keys` to host memory; returns at once.

        Returns:
            Number of blocks whose promotion was queued (not those already there).
        """

    def prepare_load(
        self, namespace: NamespaceId, keys: Sequence[BlockKey], *, timeout_s: float
    ) -> LoadLease:
        """Pin the blocks of `keys` and bring them to host memory, for at most `timeout_s`.

        Blocks until all are ready or failed, or `timeout_s` passed; what is not ready by then has
        a status that says why. Never raises for a block: a failure is a status.
        """

    def begin_load(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        mode: LoadMode,
        timeout_s: float,
    ) -> LoadPlan:
        """Pin the blocks of `keys` and say where each is, or will be; waits for no read.

        What `mode` cannot be had for comes another way (`PlannedBlock.source` says which): blocks
        that are in memory are read there, encoded ones are promoted. Ends like any load, with
        `complete_load` or `release`; reads that the cache has not begun are cancelled then.

        Args:
            namespace: of the keys.
            keys: a chain, or a part of one.
            mode: see `LoadMode`.
            timeout_s: how long the caller expects to take, on top of an ordinary lease.
        """

    def complete_load(self, lease_id: LeaseId, corrupt: Sequence[BlockKey] = ()) -> None:
        """Give the lease back; `corrupt` names blocks whose checksum failed *after* the copy.

        The cache re-verifies what is reported and quarantines what is really bad. Completing a
        lease that has expired is not an error.
        """

    def prepare_store(
        self, namespace: NamespaceId, parent: BlockKey, keys: Sequence[BlockKey]
    ) -> StoreLease:
        """Ask which blocks of the chain `parent -> keys[0] -> keys[1] ...` are wanted.

        Returns at once. `parent` is `ROOT_KEY` or the key of the block before `keys[0]`.
        """

    def complete_store(
        self, lease_id: LeaseId, checksums: Mapping[BlockKey, SlabChecksums]
    ) -> tuple[StoreStatus, ...]:
        """Hand over the filled slots; the cache copies and verifies them before it accepts.

        Args:
            lease_id: from `prepare_store`.
            checksums: for each WANTED key that was filled; a WANTED key left out is dropped.

        Returns:
            A status for every key of the lease, in the lease's order.

        Raises:
            LeaseExpiredError: too late; nothing of the lease was stored.
        """

    def pin(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        hold_s: float = 3600.0,
        timeout_s: float,
    ) -> PinLease:
        """Keep the cached prefix of `keys` in host memory, a system prompt for instance.

        Blocks until it is there, at most `timeout_s`; what is not there by then is not pinned.
        It ends by `release`, after `hold_s`, or with the session.

        Raises:
            CapacityError: more of the namespace's memory would be pinned than is allowed.
            InvalidArgumentError: `hold_s` is not above 0.
        """

    def select(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        request: SelectRequest,
        *,
        timeout_s: float,
    ) -> SelectResult:
        """Which blocks of the chain `keys` the queries will attend to; reads no key and no value.

        Waits at most `timeout_s` for summaries that are on NVMe only; a block whose summary is not
        at hand by then is in every selection, with the status that says so.

        Args:
            namespace: opened with a kind of summaries.
            keys: a chain, or a part of one.
            request: layers, queries, budget.
            timeout_s: how long the answer may take; for scores alone it is at least 0.25 s.

        Raises:
            InvalidArgumentError: the namespace has no summaries in this session, or the request
                does not fit it; the message says what to do.
            CapacityError: too many selections are in service, or there was no time to score.
        """

    def select_and_load(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        request: SelectRequest,
        *,
        mode: LoadMode,
        timeout_s: float,
    ) -> tuple[SelectResult, LoadPlan]:
        """`select`, and `begin_load` of every block that a selection has, in one call.

        Returns:
            The selections, and the plan: one entry for each index of `SelectResult.union`. None of
            them is evicted in between. The plan ends like any other.

        Raises:
            As `select` and `begin_load`.
        """

    def map_summaries(
        self, namespace: NamespaceId, keys: Sequence[BlockKey], *, timeout_s: float
    ) -> SummaryLease:
        """Keep the encoded summaries of `keys` in place, to be scored in this process.

        Waits as `select` does. Ends by `release`, its deadline, or with the session.

        Raises:
            InvalidArgumentError: the namespace has no summaries in this session.
            CapacityError: the session holds too many leases, or too many calls wait for the disk.
        """

    def release(self, lease_id: LeaseId) -> None:
        """Drop a lease of any kind, in any state. Unknown or expired ones are ignored."""

    def flush(self, *, timeout_s: float) -> bool:
        """Wait until all that was accepted before this call is flushed; False on time-out.

        Blocks that the store's admission (`nvme.admission`) keeps from NVMe are not waited for:
        they are in memory only until they are used again.
        """

    def close(self) -> None:
        """End the session: all its leases and its staging memory go back. Idempotent."""
