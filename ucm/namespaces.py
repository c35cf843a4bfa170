"""Open namespaces: an index and two tiers each, under one budget of host memory.

An arena is sealed and cannot give pages back, so what counts against the budget is the part of it
that was ever touched. When a namespace needs room that others hold, one that nobody has open and
nothing uses is closed whole; what it has on NVMe stays and is found again at its next opening.
`Shares` says how far a tenant's namespaces may grow: at its quota one evicts its own blocks, and
what is reserved for a tenant is never touched by another. Between tenants (or namespaces of one)
without reservations whoever comes first keeps what it touched until it is closed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from ucm.storage.io_choice import IoChoice, open_file_io
from ucm.storage.memory import MemoryTier
from ucm.storage.prefault import STEP_BYTES
from ucm.storage.throttled_io import ThrottledIo, bucket_of
from ucm.storage.tier import SlotId, Tier

from .api import SlabChecksums
from .block_index import BlockIndex
from .clock import Clock, SystemClock
from .config import Config
from .errors import CapacityError, LayoutMismatchError, TierUnavailableError, UcmError
from .eviction import Watermarks
from .eviction_policies import policies_of
from .hashing import NamespaceSpec
from .layout import KvLayout
from .metrics import Metrics
from .placement import Victim, evict
from .shares import memory_shares, nvme_shares
from .summaries import SummaryBudget, SummaryShelf
from .types import BlockKey, LoadStatus, NamespaceId, SessionId, SummaryKind, TierKind

_log = logging.getLogger(__name__)


class PromotionWait(Protocol):
    """Who wants to know how promotions go. Called under the manager's lock only."""

    def advance(self, row: int, num_layers: int, checksums: SlabChecksums) -> None:
        """The leading `num_layers` slabs of a block are in its slot and verified."""

    def settle(self, row: int, failure: LoadStatus | None) -> None:
        """One promotion ended, well (None) or badly."""

    def publish(self) -> None:
        """What was said since the last time is complete for now."""


class LoadWait:
    """A caller that waits for promotions. Changed under the manager's lock only."""

    def __init__(self) -> None:
        self.pending: set[int] = set()
        self.failed: dict[int, LoadStatus] = {}
        self.done = threading.Event()

    def settle(self, row: int, failure: LoadStatus | None) -> None:
        """One promotion ended, well (None) or badly."""
        self.pending.discard(row)
        if failure is not None:
            self.failed[row] = failure
        if not self.pending:
            self.done.set()

    def advance(self, row: int, num_layers: int, checksums: SlabChecksums) -> None:
        """See `PromotionWait.advance`: only whole blocks count here."""

    def publish(self) -> None:
        """See `PromotionWait.publish`."""


@dataclass(slots=True, eq=False)
class Promotion:
    """One block on its way from NVMe to memory; loads of the same block share it."""

    row: int
    key: BlockKey
    source: SlotId
    target: SlotId
    session: SessionId
    """Who asked first; its credit pays for the read."""
    waits: list[PromotionWait] = field(default_factory=list)
    num_layers: int = 0
    """Leading slabs that are in place and verified."""
    checksums: SlabChecksums = ()
    """Of its slabs, once `num_layers` is not 0."""


@dataclass(slots=True, eq=False)
class Detached:
    """Copies of a block that was deleted: out of the index, and not erased yet."""

    key: BlockKey
    row: int
    """The block's row, which leases hold; NO_ROW when none did."""
    copies: dict[TierKind, SlotId]


@dataclass(slots=True, eq=False)
class Namespace:
    """One open namespace. All but the tiers is changed under the manager's lock only."""

    id: NamespaceId
    layout: KvLayout
    index: BlockIndex
    memory: MemoryTier
    nvme: Tier | None
    tenant: str = ""
    model_id: str = ""
    memory_shortage: str = ""
    """Why it gets less memory than its part, for an operator; empty when it has what it asks."""
    nvme_shortage: str = ""
    """As for memory, of NVMe."""
    shrink_retry_us: int = 0
    """When it may be asked for a segment again."""
    problem: str = ""
    """What is wrong with its NVMe tier, for an operator; empty when all is well."""
    full_at_slots: int = -1
    """Slots that its NVMe tier had when the disk was found full; -1 when it was not."""
    promotions: dict[int, Promotion] = field(default_factory=dict)
    undeleted: list[Victim] = field(default_factory=list)
    """Copies that left the index and are still on NVMe; the next commit deletes them."""
    barred: set[BlockKey] = field(default_factory=set)
    """Blocks of deleted documents: no store brings them back."""
    doomed: dict[BlockKey, int] = field(default_factory=dict)
    """Those of them that may still be somewhere, by the number of their deletion."""
    detached: list[Detached] = field(default_factory=list)
    """Deleted copies that wait for the end of a lease, or for the next commit."""
    handed_slots: int = 0
    """Arena slots that were ever handed out."""
    touched_slots: int = 0
    """Those, and the ones made real ahead of their use: they cost memory."""
    pinned: Counter[int] = field(default_factory=Counter)
    """Rows that pin leases keep in memory, with the number of such leases."""
    summaries: SummaryShelf | None = None
    """What is known of its blocks without them; None when nobody asked for summaries."""
    in_place: Counter[int] = field(default_factory=Counter)
    """Rows that clients read in their slots on NVMe now, with the number of such leases."""
    num_sessions: int = 0
    num_leases: int = 0
    num_writing: int = 0
    """Blocks queued for NVMe."""
    num_copying: int = 0
    """Stores that copy from staging, and loads that re-verify, now."""
    last_use_us: int = 0

    @property
    def idle(self) -> bool:
        """Whether nobody has it open and nothing is in flight, so that it may be closed."""
        held = self.num_sessions or self.num_leases or self.num_writing or self.num_copying
        return not held and not self.promotions

    @property
    def touched_bytes(self) -> int:
        """Host memory that its arena costs."""
        return self.touched_slots * self.layout.block_bytes


class NvmeStoreLike(Protocol):
    """What opens NVMe tiers; `ucm.storage.nvme.NvmeStore` is one."""

    def open_namespace(
        self,
        namespace: NamespaceId,
        layout: KvLayout,
        tenant: str = "",
        *,
        accepts_lossy: bool = False,
        summary: SummaryKind | None = None,
    ) -> Tier:
        """Open or create the namespace's tier; its bytes count as `tenant`'s.

        A new one may lose precision if that is accepted, and has room for such summaries.
        """

    def close(self) -> None:
        """Give everything back."""


@dataclass(frozen=True, slots=True)
class TierFactory:
    """How tiers are made; tests put faulty ones here."""

    memory: Callable[[KvLayout, int], MemoryTier] = MemoryTier
    nvme: NvmeStoreLike | None = None
    nvme_io: IoChoice | None = None
    """How `nvme` reaches its device; None when the maker of the store decided."""


def tiers_of(config: Config) -> TierFactory:
    """The real tiers: an arena, and the NVMe store of `config.nvme` if it has a path.

    Raises:
        ConfigError: the folder belongs to another user, format version or running daemon,
            `nvme.io` is not possible here, or the quotas cannot be kept.
    """
    if config.nvme.path is None:
        return TierFactory()
    from ucm.storage.nvme import NvmeStore  # needs LMDB, which memory alone does not

    io, choice = open_file_io(config.nvme)
    if config.nvme.max_read_bytes_per_s:
        io = ThrottledIo(io, bucket_of(config.nvme.max_read_bytes_per_s, SystemClock()))
    _log.info("NVMe tier: %s: %s", choice.kind, choice.reason)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(io.close)
        store = NvmeStore(config.nvme, io, shares=nvme_shares(config))
        on_failure.pop_all()
    return TierFactory(nvme=store, nvme_io=choice)


class NamespaceTable:
    """All open namespaces.

    `lock` is the manager's; methods named `_locked` need it held, the others must be called
    without it. Opening and closing do I/O under a lock of their own, taken before `lock`.
    """

    def __init__(self, config: Config, tiers: TierFactory, clock: Clock, metrics: Metrics) -> None:
        """Begin with none open.

        Raises:
            ConfigError: the quotas cannot be kept.
        """
        self.lock = threading.Lock()
        self.on_open: Callable[[Namespace], None] | None = None
        """Called under `lock` with each namespace that was opened, before anybody has it."""
        self.summary_budget = SummaryBudget(config.summaries.capacity_bytes, metrics)
        self.shares = memory_shares(config)
        self.nvme_shares = nvme_shares(config)
        self._watermarks = Watermarks(config.memory.high_watermark, config.memory.low_watermark)
        self._memory = config.memory
        self._policies = policies_of(config)
        self._max_namespaces = config.service.max_namespaces
        self._tiers = tiers
        self._clock = clock
        self._metrics = metrics
        self._opening = threading.Lock()
        self._closed = False
        self._by_id: dict[NamespaceId, Namespace] = {}

    def __iter__(self) -> Iterator[Namespace]:
        return iter(self._by_id.values())

    def get_locked(self, namespace: NamespaceId) -> Namespace | None:
        """The open namespace of that id."""
        return self._by_id.get(namespace)

    def open(
        self,
        spec: NamespaceSpec,
        use: Callable[[Namespace], None],
        summary: SummaryKind | None = None,
    ) -> Namespace:
        """Open the namespace, or find it open, and call `use` on it under the manager's lock.

        If it is new on NVMe, it is made with room for summaries of the kind `summary`.
        Blocks for as long as the recovery of its NVMe tier takes.

        Raises:
            LayoutMismatchError: it exists with another layout.
            CapacityError: too many are open and none is idle, or no memory for its arena.
            TierUnavailableError: the store is closed.
        """
        namespace = spec.fingerprint()
        with self._opening:
            with self.lock:
                if self._closed:
                    raise TierUnavailableError("the store is closed")
                found = self._by_id.get(namespace)
                if found is not None:
                    _check_layout(found, spec.layout)
                    use(found)
                    return found
                surplus = len(self._by_id) + 1 - self._max_namespaces
                idle = self._detach_idle_locked(surplus) if surplus > 0 else []
            _close(idle)
            if len(idle) < surplus:
                raise CapacityError(
                    f"{self._max_namespaces} namespaces are in use, the limit: "
                    "raise service.max_namespaces"
                )
            opened = self._open_tiers(namespace, spec, summary)
            with self.lock:
                self._by_id[namespace] = opened
                if self.on_open is not None:
                    self.on_open(opened)
                self._prefault_locked(opened)
                use(opened)  # if it raises, nobody has it open: it makes way when room is needed
            return opened

    def _open_tiers(
        self, namespace: NamespaceId, spec: NamespaceSpec, summary: SummaryKind | None
    ) -> Namespace:
        layout, tenant = spec.layout, spec.tenant
        num_slots = self.shares.limit_bytes(tenant) // layout.block_bytes
        if self.shares.of(tenant).quota_bytes and num_slots < 1:
            raise CapacityError(
                f"the memory quota of tenant {tenant!r} has no room for one block of "
                f"{layout.block_bytes} bytes: raise its memory_bytes in [quota]"
            )
        memory = self._tiers.memory(layout, num_slots)
        opened = Namespace(
            namespace,
            layout,
            BlockIndex(self._policies(layout)),
            memory,
            None,
            tenant,
            spec.model_id,
        )
        opened.last_use_us = self._clock.now_us()
        if self._tiers.nvme is None:
            return opened
        try:
            opened.nvme = self._tiers.nvme.open_namespace(
                namespace, layout, tenant, accepts_lossy=spec.accepts_lossy, summary=summary
            )
            opened.index.load(opened.nvme.entries(), TierKind.NVME)
        except LayoutMismatchError:
            memory.close()
            raise
        except (UcmError, OSError) as error:
            if opened.nvme is not None:  # it opened, but does not say what it holds
                _close_nvme(opened)
                opened.nvme, opened.index = None, BlockIndex(self._policies(layout))
            opened.problem = f"namespace {namespace.hex()[:8]} runs without NVMe: {error}"
            _log.warning("%s", opened.problem)
        return opened

    @contextlib.contextmanager
    def closed(self, namespace: NamespaceId) -> Iterator[bool]:
        """Keep a namespace closed for the length of a `with` block; False when it is open."""
        with self._opening:
            with self.lock:
                is_closed = namespace not in self._by_id
            yield is_closed

    def relieve(self, namespace: Namespace, needed_slots: int) -> None:
        """Before a load or store: close idle namespaces if the budget lacks `needed_slots`.

        Does nothing while another namespace is being opened: a load has no time for its recovery.
        """
        with self.lock:
            short = self._growable_locked(namespace) < needed_slots
            short = short and any(self._helps_locked(namespace, other) for other in self)
        if not short or not self._opening.acquire(blocking=False):
            return
        try:
            while True:
                with self.lock:
                    short = self._growable_locked(namespace) < needed_slots
                    idle = self._detach_idle_locked(1, needy=namespace) if short else []
                if not idle:
                    return
                _close(idle)
        finally:
            self._opening.release()

    def _helps_locked(self, needy: Namespace, other: Namespace) -> bool:
        """Whether closing `other` lets `needy` grow.

        Not what another tenant has reserved, and at its own quota only what is its own tenant's.
        """
        if other is needy or not other.idle:
            return False
        if other.tenant == needy.tenant:
            return True
        used_bytes = self.used_bytes_locked()
        own_bytes = used_bytes[needy.tenant]
        if self.shares.quota_room_bytes(needy.tenant, own_bytes) < needy.layout.block_bytes:
            return False
        return self.shares.spare_bytes(other.tenant, used_bytes) > 0

    def _detach_idle_locked(self, count: int, needy: Namespace | None = None) -> list[Namespace]:
        idle = [
            other
            for other in self
            if (other.idle if needy is None else self._helps_locked(needy, other))
        ]
        idle = sorted(idle, key=lambda other: other.last_use_us)[:count]
        for namespace in idle:
            del self._by_id[namespace.id]
        return idle

    def used_bytes_locked(self) -> dict[str, int]:
        """Host memory that each tenant's open namespaces cost."""
        used_bytes: dict[str, int] = {}
        for other in self:
            used_bytes[other.tenant] = used_bytes.get(other.tenant, 0) + other.touched_bytes
        return used_bytes

    def _growable_locked(self, namespace: Namespace) -> int:
        """Fresh slots that the budget and its tenant's share still allow this namespace."""
        free_bytes = self.shares.available_bytes(namespace.tenant, self.used_bytes_locked())
        return max(0, free_bytes) // namespace.layout.block_bytes

    def total_slots_locked(self, namespace: Namespace) -> int:
        """Memory slots that the namespace can use now, those that it uses included."""
        dead = namespace.memory.usage().quarantined_slots
        return namespace.touched_slots + self._growable_locked(namespace) - dead

    def take_slots_locked(self, namespace: Namespace, count: int) -> list[SlotId]:
        """Allocate up to `count` memory slots, evicting by the watermarks; fewer when held."""
        usage = namespace.memory.usage()
        total = self.total_slots_locked(namespace)
        excess = self._watermarks.excess_slots(used=usage.used_slots, total=total, needed=count)
        victims = evict(namespace.index, TierKind.MEMORY, excess)
        if victims:
            namespace.memory.delete([(victim.slot, victim.key) for victim in victims])
            self._metrics.add("ucm_evicted_blocks_total", len(victims), tier="memory")
        free = total - (usage.used_slots - len(victims))
        slots = namespace.memory.allocate(max(0, min(count, free)))
        if slots:
            namespace.handed_slots = max(namespace.handed_slots, max(slots) + 1)
            namespace.touched_slots = max(namespace.touched_slots, namespace.handed_slots)
            self._prefault_locked(namespace)
        if count:
            is_short = len(slots) < count and self._is_crowded_locked(namespace)
            namespace.memory_shortage = self._shortage_locked(namespace) if is_short else ""
        return slots

    def _is_crowded_locked(self, namespace: Namespace) -> bool:
        """Whether it holds less than an equal part of the memory because others hold more."""
        part_bytes = self.shares.capacity_bytes // max(1, len(self._by_id))
        quota_bytes = self.shares.of(namespace.tenant).quota_bytes or part_bytes
        return namespace.touched_bytes + namespace.layout.block_bytes <= min(
            part_bytes, quota_bytes
        ) and any(other.touched_bytes > part_bytes for other in self if other is not namespace)

    def _shortage_locked(self, namespace: Namespace) -> str:
        held_bytes = sum(other.touched_bytes for other in self if other is not namespace)
        return (
            f"namespace {namespace.id.hex()[:8]} (tenant {namespace.tenant!r}) gets no memory: "
            f"other open namespaces hold {held_bytes} of {self.shares.capacity_bytes} bytes and "
            "keep them until they are closed; give tenants a quota or a reservation in [quota]"
        )

    def _prefault_locked(self, namespace: Namespace) -> None:
        """Have memory made ready for the next slots, more for a namespace that uses more."""
        block_bytes, limit_bytes = namespace.layout.block_bytes, self._memory.prefault_bytes
        handed_bytes = namespace.handed_slots * block_bytes
        ahead_bytes = min(limit_bytes, max(limit_bytes // 4, handed_bytes))
        ahead_bytes = min(ahead_bytes, self._memory.capacity_bytes // 8)
        if ahead_bytes < STEP_BYTES:
            return  # the touches that it saves are not worth a thread
        allowed = namespace.touched_slots + self._growable_locked(namespace)
        target = min(allowed, namespace.handed_slots + ahead_bytes // block_bytes)
        if target > namespace.touched_slots:
            namespace.touched_slots = target
            namespace.memory.prefault(target)

    def close(self) -> None:
        """Close every tier, and the NVMe store. Nothing may be in flight."""
        with self._opening:
            with self.lock:
                self._closed = True
                namespaces = list(self._by_id.values())
                self._by_id.clear()
            _close(namespaces)
            if self._tiers.nvme is not None:
                self._tiers.nvme.close()


def _check_layout(namespace: Namespace, layout: KvLayout) -> None:
    if namespace.layout != layout:
        raise LayoutMismatchError(
            f"namespace {namespace.id.hex()[:8]} has {namespace.layout}, not {layout}"
        )


def _close(namespaces: list[Namespace]) -> None:
    for namespace in namespaces:
        namespace.memory.close()
        if namespace.summaries is not None:
            namespace.summaries.close()
        _close_nvme(namespace)


def _close_nvme(namespace: Namespace) -> None:
    try:
        if namespace.nvme is not None:
            namespace.nvme.close()
    except (UcmError, OSError) as error:
        _log.warning("closing namespace %s: %s", namespace.id.hex()[:8], error)
