"""The NVMe tier: one namespace's blocks in slots of preallocated files.

Envelope: slots that lie together are one preadv straight into the callers' memory, or one pwritev
from it; a write is then, once a batch, an fdatasync for each segment touched and one index commit
(two flushes). Bytes move once; the checksum reads them once more. The device is the limit.

    write    slabs and header -> fdatasync -> index commit -> readable        (a crash: not there)
    delete   index commit -> header blanked, fdatasync -> slot free           (a crash: not there)
    rewrite  only of a free slot, so its old record is durably gone before

Nothing is locked while bytes move but a segment during its own sync. A block's place is checked
against its header (key, generation, namespace, slot) and every slab against its checksum on each
read; what does not match is a miss, and the slot is quarantined.

The caller keeps `data` unchanged until `write` returned: it goes to the device without a copy.
If it did change after it was verified, reads find out by the checksums.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import TYPE_CHECKING

from ucm import checksum
from ucm.errors import (
    CapacityError,
    ConfigError,
    InvalidArgumentError,
    LayoutMismatchError,
    TierUnavailableError,
    UcmError,
)
from ucm.types import BlockKey, NamespaceId, SummaryKind, TierKind

from .budget import IdleSegments, SegmentBudget
from .codecs import codec_named, codec_of
from .encoded_io import slot_io_for
from .erase import Eraser
from .extents import ExtentTable
from .file_io import PosixFileIo
from .folder import (
    WantedNamespace,
    adopt,
    check_folder,
    drop_segment,
    find_or_create,
    list_namespaces,
    lock_folder,
    survey,
)
from .format import effective_codec
from .index import IndexRecord
from .integrity import find_problems
from .recovery import NamespaceFiles, append_segment, order_by_chain, recover
from .segments import Segments
from .shrink import Shrinker
from .slots import SlotState
from .summary_areas import areas_of
from .tier import IoStatus, ReadOutcome, SlotId, TierEntry, TierUsage

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from ucm.config import NvmeConfig
    from ucm.layout import KvLayout
    from ucm.shares import Shares

    from .budget import TenantBudget
    from .file_io import FileIo
    from .recovery import Recovered
    from .tier import SlotRead, SlotWrite

log = logging.getLogger(__name__)


class NvmeTier:
    """`Tier` over a namespace's segment files and index. Made by `NvmeStore`."""

    def __init__(self, files: NamespaceFiles, recovered: Recovered, budget: TenantBudget) -> None:
        self.tenant = budget.tenant
        """Whose quota its segments count against."""
        self._files = files
        self._superblock = files.superblock
        self._layout = files.superblock.layout
        self._segments = files.segments
        self._slot_io = slot_io_for(files.superblock, files.segments, files.io)
        self._index = recovered.index
        self._slots = recovered.slots
        self.shrinker = Shrinker(files.segments, recovered.slots, recovered.index, budget)
        """See `Tier.shrinker`."""
        self.eraser = Eraser(files, recovered.slots, self._retire)
        """See `Tier.eraser`."""
        self.extents = ExtentTable(files, recovered.slots, self._quarantine)
        """See `Tier.extents`."""
        self.summaries = areas_of(files, recovered.slots)
        """See `Tier.summaries`."""
        self.was_rebuilt = recovered.was_rebuilt
        """Whether this opening had to make a new index from the slot headers."""
        self._unchanged = recovered.table
        """What is in the tier, until somebody asks or changes it."""
        self._last_generation = recovered.last_generation
        self._has_epoch = False
        self.is_closed = False
        """Whether `close` or `abort` was called."""
        self._generation_lock = threading.Lock()
        self._grow_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"NvmeTier({self._files.folder.name[:8]}, {self._slots!r})"

    @property
    def kind(self) -> TierKind:
        """See `Tier.kind`."""
        return TierKind.NVME

    @property
    def layout(self) -> KvLayout:
        """See `Tier.layout`."""
        return self._layout

    @property
    def file_bytes(self) -> int:
        """Disk space of its segments."""
        return self._segments.file_bytes

    def entries(self) -> Iterable[TierEntry]:
        """See `Tier.entries`. Nothing stays in memory: a second call reads the index again."""
        table, self._unchanged = self._unchanged, None
        return self._read_entries() if table is None or self.is_closed else table

    def _read_entries(self) -> Iterator[TierEntry]:
        records = [item for item in self._index.records() if isinstance(item, IndexRecord)]
        readable = [item for item in records if self._slots.state(item.slot) is SlotState.USED]
        for record in order_by_chain(readable)[0]:
            yield TierEntry(record.key, record.parent, record.slot)

    def allocate(self, count: int, *, full: bool = False) -> list[SlotId]:
        """See `Tier.allocate`. May create a segment, which blocks on the disk."""
        self._segments.look_for_room()
        full = full and self._superblock.has_compact_slots
        slots = self._slots.allocate(count, full=full)
        while len(slots) < count and self._grow(full=full):
            slots += self._slots.allocate(count - len(slots), full=full)
        if len(slots) < count and self._superblock.has_compact_slots and not full:  # they take all
            slots += self._slots.allocate(count - len(slots), full=True)
        return slots

    def free(self, slots: Sequence[SlotId]) -> None:
        """See `Tier.free`."""
        self._slots.change(slots, SlotState.ALLOCATED, SlotState.FREE)

    def write(self, items: Sequence[SlotWrite]) -> list[IoStatus]:
        """See `Tier.write`. Durable; FULL and IO_ERROR leave nothing visible."""
        states = self._slots.states(item.slot for item in items)
        for item, state in zip(items, states, strict=True):
            checksum.check_block_length(self._layout, item.data)
            if state in (SlotState.FREE, SlotState.USED):
                raise InvalidArgumentError(f"slot {item.slot} was not allocated to be written")
        if not items or not self._index.is_usable:
            return [IoStatus.IO_ERROR] * len(items)
        self._unchanged = None
        try:
            first_generation = self._take_generations(len(items))
        except UcmError as error:
            return [_status_of(error)] * len(items)
        generations = range(first_generation, first_generation + len(items))
        statuses = self._slot_io.write(items, generations)
        self._sync(items, statuses)
        self._commit(items, generations, statuses)
        return statuses

    def read(self, items: Sequence[SlotRead]) -> list[ReadOutcome]:
        """See `Tier.read`. `into` holds garbage where the outcome is not OK."""
        for item in items:
            checksum.check_block_length(self._layout, item.into)
        states = self._slots.states(item.slot for item in items)
        outcomes = [ReadOutcome(self._status(*each)) for each in zip(items, states, strict=True)]
        readable = [i for i, state in enumerate(states) if state is SlotState.USED]
        generations = self._slots.generations([items[i].slot for i in readable])
        results = self._slot_io.read([items[i] for i in readable], generations)
        for i, generation, outcome in zip(readable, generations, results, strict=True):
            outcomes[i] = outcome
            if outcome.status is IoStatus.CORRUPT:
                self._quarantine(items[i].slot, items[i].key, generation)
        return outcomes

    def delete(self, items: Sequence[tuple[SlotId, BlockKey]]) -> None:
        """See `Tier.delete`. Items that are not in the tier are ignored."""
        used = [item for item in items if self._slots.state(item[0]) is SlotState.USED]
        if not used:
            return
        self._unchanged = None
        try:
            gone = self._index.delete(used)
        except UcmError as error:
            raise TierUnavailableError(
                f"{len(used)} blocks cannot be deleted durably: {error}"
            ) from error
        self._release(gone)

    def usage(self) -> TierUsage:
        """See `Tier.usage`. Free slots include what the budget still allows; asks no disk."""
        slots = self._slots
        return TierUsage(
            used_slots=slots.count(SlotState.USED) + slots.count(SlotState.ALLOCATED),
            free_slots=slots.count(SlotState.FREE) + self._segments.growable_slots(),
            quarantined_slots=slots.count(SlotState.QUARANTINED),
            slot_bytes=self._superblock.slot_bytes,
            disk_is_full=self._segments.disk_is_full,
            held_bytes=self.file_bytes,
            codec=codec_of(self._superblock.codec).name,
        )

    def check_integrity(self) -> list[str]:
        """See `Tier.check_integrity`. Compares every record with the slot table; call it idle."""
        return find_problems(self._index, self._slots, self._segments)

    def close(self) -> None:
        """See `Tier.close`."""
        self.is_closed = True
        try:
            self._index.close(clean=True)
        except UcmError as error:
            log.warning("%r: no clean end, the next opening verifies: %s", self, error)
        self._segments.close()

    def abort(self) -> None:
        """Release everything without a clean end, as a crash would. Idempotent."""
        self.is_closed = True
        self._index.close(clean=False)
        self._segments.close()

    def _grow(self, *, full: bool) -> bool:
        """Make sure that there may be free slots: of several callers, one adds a segment."""
        with self._grow_lock:
            if self._slots.has_free(full=full):
                return True
            segment = self._segments.bring_back(full=full)
            if segment >= 0:
                self.shrinker.give_up(segment)
            elif self._segments.grow(full=full):
                append_segment(self._slots, self._segments, self._segments.num_segments - 1)
            return self._slots.has_free(full=full)

    def _status(self, item: SlotRead, state: SlotState) -> IoStatus:
        """Why a slot cannot be read; OK if it can."""
        if state is SlotState.USED:
            return IoStatus.OK
        is_lost = item.slot < len(self._slots) and self._segments.locate(item.slot) is None
        return IoStatus.IO_ERROR if is_lost else IoStatus.CORRUPT

    def _take_generations(self, count: int) -> int:
        """The first of `count` fresh generations; durably begins an epoch before the first."""
        with self._generation_lock:
            if not self._has_epoch:
                self._last_generation = self._index.begin_epoch(self._last_generation)
                self._has_epoch = True
            first = self._last_generation + 1
            self._last_generation += count
            return first

    def _sync(self, items: Sequence[SlotWrite], statuses: list[IoStatus]) -> None:
        """Make the transferred items durable; those in a segment that fails are IO_ERROR."""
        written = {
            self._segments.segment_of(item.slot)
            for item, status in zip(items, statuses, strict=True)
            if status is IoStatus.OK
        }
        failed = self._segments.sync(written)
        for segment in failed:
            self._retire(segment)
        for position, item in enumerate(items if failed else ()):
            if self._segments.segment_of(item.slot) in failed:
                statuses[position] = IoStatus.IO_ERROR

    def _commit(
        self,
        items: Sequence[SlotWrite],
        generations: Sequence[int],
        statuses: list[IoStatus],
    ) -> None:
        """Make the durable items visible: in the index, all or none, then in the slot table."""
        good = [position for position, status in enumerate(statuses) if status is IoStatus.OK]
        if not good:
            return
        records = [
            IndexRecord(items[i].key, items[i].parent, items[i].slot, generations[i]) for i in good
        ]
        try:
            replaced = self._index.put(records)
        except UcmError as error:
            log.warning("%r: %d blocks could not be committed: %s", self, len(good), error)
            for position in good:
                statuses[position] = _status_of(error)
            if not self._index.is_usable:  # the records may be durable: their blocks must stay
                self._slots.quarantine([record.slot for record in records])
            return
        slots = [record.slot for record in records]
        self._slots.set_generations(slots, [record.generation for record in records])
        used = set(self._slots.change(slots, SlotState.ALLOCATED, SlotState.USED))
        for position in good:
            if items[position].slot not in used:  # its segment was retired meanwhile
                statuses[position] = IoStatus.IO_ERROR
        self._release([record.slot for record in replaced])

    def _release(self, slots: Sequence[SlotId]) -> None:
        """Blank the headers of slots without a record, durably, then let them be reused.

        Without the blank header a rebuild of the index would bring the block back.
        """
        held = self._slots.change(slots, SlotState.USED, SlotState.ALLOCATED)
        self._slot_io.blank(held)
        for segment in self._segments.sync({self._segments.segment_of(slot) for slot in held}):
            self._retire(segment)
        self.free(held)

    def _retire(self, segment: int) -> None:
        """A sync failed: the segment's blocks are missing from now on."""
        self._unchanged = None
        self._slots.quarantine([SlotId(slot) for slot in self._segments.slots_of(segment)])
        try:
            self._index.retire(segment, "fdatasync failed")
        except UcmError as error:
            log.warning("%r: segment %04d is retired in memory only: %s", self, segment, error)

    def _quarantine(self, slot: SlotId, key: BlockKey, generation: int) -> None:
        """Bar a slot that does not hold what the index says; not one that was asked wrongly."""
        self._unchanged = None
        try:
            record = self._index.find(key)
            if record is None or (record.slot, record.generation) != (slot, generation):
                return  # deleted or rewritten meanwhile, or another block's slot
            if not self._slots.change([slot], SlotState.USED, SlotState.QUARANTINED):
                return
            log.warning("%r: slot %d is damaged: quarantined", self, slot)
            self._index.quarantine(slot, key, "bad checksum or header")
        except UcmError as error:
            log.warning("%r: slot %d is not quarantined for good: %s", self, slot, error)


def _status_of(error: UcmError) -> IoStatus:
    return IoStatus.FULL if isinstance(error, CapacityError) else IoStatus.IO_ERROR


class NvmeStore:
    """A data folder: its lock, its namespaces, the budget of segments that they share.

    Thread-safe. Opening blocks on the disk.
    """

    def __init__(
        self, config: NvmeConfig, io: FileIo | None = None, *, shares: Shares | None = None
    ) -> None:
        """Take the folder.

        Args:
            config: limits and the path.
            io: how block data is read and written; `PosixFileIo` when None. The store closes it.
            shares: quotas and reservations of tenants; none when None.

        Raises:
            ConfigError: no path, or no such codec; the folder is another user's, world-writable,
                of another format version, or in use by another process; or the capacity is below
                one segment.
            CapacityError, TierUnavailableError: the folder cannot be made or read.
        """
        if config.path is None:
            raise ConfigError("nvme.path is not set: give the NVMe tier a data folder")
        if config.capacity_bytes < config.segment_bytes:
            raise ConfigError(
                f"nvme.capacity_bytes {config.capacity_bytes} is below nvme.segment_bytes "
                f"{config.segment_bytes}: raise the first or lower the second"
            )
        self._config = config
        self._codec = codec_named(config.codec)
        self._root = config.path / "ns"
        self._lock = threading.Lock()
        self._tiers: dict[NamespaceId, NvmeTier] = {}
        check_folder(config.path)
        self._lock_fd = lock_folder(config.path)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(os.close, self._lock_fd)
            self._budget = self._survey(shares)
            on_failure.pop_all()
        self._io = PosixFileIo(config.io_threads) if io is None else io

    def __repr__(self) -> str:
        return f"NvmeStore({self._config.path}, {len(self._tiers)} open)"

    def namespaces(self) -> list[NamespaceId]:
        """Ids of all namespaces on the disk, open or not."""
        return list_namespaces(self._root)

    def open_namespace(
        self,
        namespace: NamespaceId,
        layout: KvLayout,
        tenant: str = "",
        *,
        accepts_lossy: bool = False,
        summary: SummaryKind | None = None,
    ) -> NvmeTier:
        """Open a namespace, recovering it if need be, or create it. Its bytes are `tenant`'s.

        Opened twice it is the same tier, unless that was closed meanwhile.

        Args:
            namespace: its id.
            layout: of its blocks.
            tenant: who its bytes count for.
            accepts_lossy: whether a new one may lose precision to a codec.
            summary: what a new one keeps room for; an old one keeps what it has.

        Raises:
            LayoutMismatchError: it exists with another layout.
            ConfigError: a block does not fit a segment.
            CorruptionError: its superblock is damaged; `ucm fsck --repair` moves it aside.
            CapacityError, TierUnavailableError: the disk is full or failing; the store is closed.
        """
        with self._lock:
            if self._lock_fd < 0:  # another process may have the folder by now
                raise TierUnavailableError(f"the data folder {self._config.path} is closed")
            tier = self._tiers.get(namespace)
            if tier is None or tier.is_closed:
                codec = effective_codec(self._codec, layout, accepts_lossy=accepts_lossy)
                wanted = WantedNamespace(
                    namespace=namespace,
                    layout=layout,
                    codec=codec,
                    segment_bytes=self._config.segment_bytes,
                    summary=summary,
                )
                tier = self._tiers[namespace] = self._open(wanted, tenant)
        if tier.layout != layout:
            raise LayoutMismatchError(
                f"namespace {namespace.hex()[:8]} holds blocks of {tier.layout}, not of {layout}"
            )
        return tier

    def close(self) -> None:
        """Close every namespace cleanly and free the folder. Idempotent."""
        self._end(NvmeTier.close)

    def abort(self) -> None:
        """Free the folder without a clean end, as a crash would. Idempotent."""
        self._end(NvmeTier.abort)

    def _end(self, end_tier: Callable[[NvmeTier], None]) -> None:
        with self._lock:
            for tier in self._tiers.values():
                end_tier(tier)
            self._tiers.clear()
            self._io.close()
            if self._lock_fd >= 0:
                os.close(self._lock_fd)
            self._lock_fd = -1

    def _survey(self, shares: Shares | None) -> SegmentBudget:
        """Count what is there."""
        idle = IdleSegments(self._idle_bytes, self._drop_idle)
        budget = SegmentBudget(self._config.capacity_bytes, shares=shares, idle=idle)
        for tenant, size_bytes in survey(self._root):
            budget.count_existing(tenant, size_bytes)
        return budget

    def _idle_bytes(self) -> dict[str, int]:
        idle_bytes = self._budget.used_bytes_by_tenant()
        for tier in list(self._tiers.values()):
            if not tier.is_closed:
                idle_bytes[tier.tenant] = idle_bytes.get(tier.tenant, 0) - tier.file_bytes
        return idle_bytes

    def _drop_idle(self, tenants: Collection[str]) -> tuple[str, int]:
        with self._lock:
            in_use = {name for name, tier in self._tiers.items() if not tier.is_closed}
            return ("", 0) if self._lock_fd < 0 else drop_segment(self._root, in_use, tenants)

    def _open(self, wanted: WantedNamespace, tenant: str) -> NvmeTier:
        folder = self._root / wanted.namespace.hex()
        superblock = find_or_create(folder, wanted, self._io)
        budget = self._budget.of(tenant)
        for old, size_bytes in adopt(folder, superblock, tenant, self._io):
            self._budget.release(old, size_bytes)
            budget.count_existing(size_bytes)
        with contextlib.ExitStack() as on_failure:
            segments = Segments(folder / "segments", superblock, self._io, budget)
            on_failure.callback(segments.close)
            files = NamespaceFiles(
                folder=folder,
                superblock=superblock,
                segments=segments,
                io=self._io,
                index_map_bytes=self._config.index_map_bytes,
            )
            tier = NvmeTier(files, recover(files), budget)
            on_failure.pop_all()
        return tier
