"""Write-behind: accepted blocks go to NVMe in batches, parents never after their children.

    queue    lock: the block and every ancestor that is not durable, if the queue has room
    commit   lock: who may be written, who makes room | delete, allocate, write | lock: settle

One batch at a time writes and deletes on NVMe, so a key's deletion and its next write cannot
overtake each other. A block in the queue is in flight: it keeps its memory slot. A block that is
dropped from the queue stays in memory and is counted; a later child takes it along again. So does
one that `nvme.admission` rejects; no flush waits for it, but its next use may admit it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from ucm.storage.tier import IoStatus, SlotId, SlotWrite

from .admission import admission_of
from .block_columns import NO_ROW, WRITING
from .config import NvmeConfig
from .errors import CapacityError, TierUnavailableError, UcmError
from .eviction import Watermarks
from .manager_state import US_PER_S, ManagerState
from .namespaces import Namespace
from .placement import Victim, evict, plan_commit, plan_flush
from .plurals import counted
from .shrink import Delete, Shrinking
from .transfer import CommitLimits, GroupCommit, TransferPool
from .types import BlockKey, NamespaceId, TierKind

_log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 5.0
"""How often a store is let through to a disk that refused writes."""

_REFUSALS = {
    IoStatus.FULL: "the disk is full",
    IoStatus.IO_ERROR: "the disk fails writes",
}


class DiskHealth:
    """Whether the disk takes writes. Pure; guarded by the manager's lock."""

    def __init__(self) -> None:
        self.reason = ""
        self.lacks_room = False
        """Whether room on the disk may be what is missing."""
        self._retry_at_us = 0

    @property
    def writable(self) -> bool:
        """Whether the last write succeeded (or none was tried)."""
        return not self.reason

    def refuse(self, reason: str, now_us: int, *, lacks_room: bool = False) -> None:
        """A write failed: stores stop until the next probe."""
        self.reason = reason
        self.lacks_room = self.lacks_room or lacks_room
        self._retry_at_us = now_us + int(PROBE_INTERVAL_S * US_PER_S)

    def recover(self) -> None:
        """A write succeeded."""
        self.reason, self.lacks_room = "", False

    def admits_store(self, now_us: int) -> bool:
        """Whether a store may come in; on a disk that refused, one in each interval as a probe."""
        if not self.reason:
            return True
        if now_us < self._retry_at_us:
            return False
        self._retry_at_us = now_us + int(PROBE_INTERVAL_S * US_PER_S)
        return True


class WriteBehind:
    """The queue to NVMe of one manager. Thread-safe where not named `_locked`."""

    def __init__(self, state: ManagerState, config: NvmeConfig, pool: TransferPool) -> None:
        self._state = state
        self._watermarks = Watermarks(config.high_watermark, config.low_watermark)
        self._max_queued_bytes = config.write_queue_bytes
        self._num_dropped = 0
        self._admission = admission_of(config)
        self.admits_all = config.admission == "always"
        self.num_rejected = 0
        """Times that a block was stored or loaded and not admitted."""
        self.health = DiskHealth()
        self._shrinking = Shrinking(state, self._delete)
        self.on_commit: Callable[[Namespace, Delete], None] | None = None
        """Called at the end of each commit of a namespace, on its thread."""
        limits = CommitLimits(
            max_items=config.commit_blocks,
            max_queued_bytes=config.write_queue_bytes,
            interval_s=config.commit_interval_s,
        )
        self._commits: GroupCommit[tuple[Namespace, int]] = GroupCommit(self._commit, limits, pool)
        state.metrics.set("ucm_nvme_writable", 1)

    @property
    def queued_bytes(self) -> int:
        """Bytes of accepted blocks that wait for the disk."""
        return self._commits.queued_bytes

    @property
    def num_queued(self) -> int:
        """Accepted blocks that wait for the disk."""
        return self._commits.num_queued

    def note_use(self, namespace: NamespaceId, keys: Iterable[BlockKey]) -> None:
        """A use may admit to NVMe what only memory has."""
        if not self.admits_all:
            with self._state.lock:
                found = self._state.namespaces.get_locked(namespace)
                if found is not None:
                    self.use_locked(found, keys)

    def use_locked(self, found: Namespace, keys: Iterable[BlockKey]) -> None:
        """Blocks are used again: those that only memory has may be admitted now, parents first.

        A disk that refuses writes is left alone: stores probe it.
        """
        if self.admits_all or found.nvme is None or not self.health.writable:
            return
        index = found.index
        for key in keys:
            row = index.find(key)
            if row == NO_ROW or index.in_flight(row) or index.has(row, TierKind.NVME):
                continue
            if index.has(row, TierKind.MEMORY) and not index.is_unqueued(row):
                self.enqueue_locked(found, row)

    def enqueue_locked(self, found: Namespace, row: int) -> None:
        """Queue a block that memory holds, with the ancestors that NVMe lacks; or drop it.

        A block that is wanted too seldom is not queued either.
        """
        if not self._admission.admits(found.index.key(row), self._state.clock.now_us()):
            self.num_rejected += 1
            self._state.metrics.add("ucm_rejected_admissions_total")
            return
        reason = self._offer_locked(found, row)
        if reason:
            self._drop_locked(1, reason)

    def _offer_locked(self, found: Namespace, row: int) -> str:
        """As `enqueue_locked`; why the block was not queued, empty when it was."""
        chain = plan_flush(found.index, row)
        if chain is None:
            found.index.unmark_unqueued(row)  # nobody can reach it: no flush waits for it
            return "orphan"
        for member in chain:
            try:
                self._commits.offer((found, member), found.layout.block_bytes)
            except (CapacityError, TierUnavailableError) as error:
                found.index.mark_unqueued(row)
                return "queue_full" if isinstance(error, CapacityError) else "closing"
            found.index.begin_flight(member, WRITING)
            found.num_writing += 1
        return ""

    def _drop_locked(self, count: int, reason: str) -> None:
        if count:
            self._num_dropped += count
            self._state.metrics.add("ucm_dropped_writes_total", count, reason=reason)

    def flush(self, *, timeout_s: float) -> bool:
        """Wait until all that was admitted is durable; False on time-out, or if some is not.

        Blocks that a full queue once refused are queued again, in as many turns as it takes.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with self._state.lock:
                dropped, num_left = self._num_dropped, self._requeue_locked()
                is_busy = self._commits.num_queued > 0
            left_s = max(0.0, deadline - time.monotonic())
            settled = self._commits.wait_settled(timeout_s=left_s)
            with self._state.lock:
                if not settled or dropped != self._num_dropped:
                    return False
            if not num_left:
                return True
            if not is_busy:
                return False

    def _requeue_locked(self) -> int:
        """Queue again what was dropped, if the disk takes writes; how many blocks still wait."""
        num_left = 0
        for found in self._state.namespaces:
            for row in found.index.unqueued():
                if not found.index.is_unqueued(row):
                    continue  # a descendant took it along
                if self.health.writable:
                    self._offer_locked(found, row)
                num_left += found.index.is_unqueued(row)
        return num_left

    def trim(self, found: Namespace) -> None:
        """Begin to give segments back if the namespace has too many; returns at once.

        On a disk that refuses writes nothing can move: the commit that finds it well does it.
        """
        if not self.health.writable or not self._shrinking.wants_more(found):
            return
        with self._state.lock:
            self.wake_locked(found)

    def wake_locked(self, found: Namespace) -> bool:
        """Have a commit of the namespace that need not write anything; returns at once.

        Returns:
            False when it cannot be queued: the next commit does it, or the store is closing.
        """
        try:
            self._commits.offer((found, NO_ROW), 0)
        except (CapacityError, TierUnavailableError):
            return False
        found.num_writing += 1
        return True

    def close(self, *, timeout_s: float) -> bool:
        """Write what is queued and end; False on time-out."""
        return self._commits.close(timeout_s=timeout_s)

    # ------------------------------------------------- below: on a thread of the transfer pool

    def _commit(self, batch: list[tuple[Namespace, int]]) -> None:
        by_namespace: dict[int, tuple[Namespace, list[int]]] = {}
        for found, row in batch:
            by_namespace.setdefault(id(found), (found, []))[1].append(row)
        for found, rows in by_namespace.values():
            self._commit_namespace(found, rows)

    def _commit_namespace(self, found: Namespace, queued: list[int]) -> None:
        rows = [row for row in queued if row != NO_ROW]  # NO_ROW only wants segments given back
        nvme = found.nvme
        assert nvme is not None, "only namespaces with NVMe queue writes"
        if self.health.writable:
            self._make_room(found, rows)
        with self._state.lock:
            writable, victims = self._plan_locked(found, rows)
        undeleted = {victim.key for victim in self._delete(found, victims)}
        slots = self._allocate(found, len(writable))
        items = self._items(found, writable, slots, undeleted)
        statuses = self._write(found, items)
        slots += self._write_oversize(found, items, statuses)
        failed = [status for status in _REFUSALS if status in statuses]
        for status in failed:
            count = statuses.count(status)
            reason = f"{_REFUSALS[status]} ({count} of {counted(len(items), 'block')} not written)"
            self._refuse(reason, lacks_room=status is IoStatus.FULL)
        if IoStatus.OK in statuses and not failed and len(slots) == len(writable):
            self._recover()
        for item, status in zip(items, statuses, strict=True):
            if status is IoStatus.CORRUPT:
                self._state.recheck(found, item.key)
        with self._state.lock:
            self._drop_locked(len(writable) - len(items), "no_space")
            orphans = self._settle_locked(found, items, statuses)
            for row in rows:
                found.index.mark_unqueued(row)  # unless it is on NVMe now
                found.index.end_flight(row, WRITING)
        good = [status is IoStatus.OK for status in statuses]
        written = {item.slot for item, is_good in zip(items, good, strict=True) if is_good}
        nvme.free([slot for slot in slots if slot not in written])
        self._delete(found, orphans)
        if self.on_commit is not None:
            self.on_commit(found, self._delete)
        self.trim(found)
        with self._state.lock:
            found.num_writing -= len(queued)  # last: from now on the tier may be closed

    def _make_room(self, found: Namespace, rows: list[int]) -> None:
        """Give or get a segment where that is due; the blocks' parents stay meanwhile."""
        with self._state.lock:
            parents = [found.index.parent(row) for row in rows]
            parents = [parent for parent in parents if parent != NO_ROW]
            for parent in parents:
                found.index.pin(parent)
        self._shrinking.make_room(found, len(rows))
        with self._state.lock:
            for parent in parents:
                found.index.unpin(parent)

    def _plan_locked(self, found: Namespace, rows: list[int]) -> tuple[list[int], list[Victim]]:
        """Rows to write, in order, and copies to delete before.

        What was deleted is not written; nor is what came back, while somebody still reads its
        deleted copy: writing it again would free the slot under him.
        """
        held = [row for row in rows if found.index.has(row, TierKind.MEMORY)]
        self._drop_locked(len(rows) - len(held), "lost")
        read = {each.key for each in found.detached if TierKind.NVME in each.copies}
        read -= found.barred
        writable, refused = plan_commit(found.index, _without_deleted(found, held, read))
        self._drop_locked(len(refused), "orphan")
        self._drop_locked(sum(found.index.key(row) in read for row in held), "held")
        assert found.nvme is not None
        usage = found.nvme.usage()
        if 0 <= found.full_at_slots < usage.total_slots:  # the disk has room again
            found.full_at_slots, found.problem = -1, ""
        excess = self._watermarks.excess_slots(
            used=usage.used_slots, total=usage.total_slots, needed=len(writable)
        )
        if self.health.lacks_room:  # a probe: the room it needs may be what was lacking
            excess = max(excess, len(writable))
        excess -= len(found.undeleted)  # they go first; a disk that fails must not cost them all
        parents = [found.index.parent(row) for row in writable]
        parents = [parent for parent in parents if parent != NO_ROW]
        for parent in parents:  # they must still be there when their children arrive
            found.index.pin(parent)
        victims = evict(found.index, TierKind.NVME, excess)
        for parent in parents:
            found.index.unpin(parent)
        if victims:
            self._state.metrics.add("ucm_evicted_blocks_total", len(victims), tier="nvme")
        return writable, victims

    def _delete(self, found: Namespace, victims: list[Victim]) -> list[Victim]:
        """Delete copies that have left the index; returns those that are still there."""
        with self._state.lock:
            pending, found.undeleted = found.undeleted + victims, []
        if not pending:
            return []
        assert found.nvme is not None
        try:
            found.nvme.delete([(victim.slot, victim.key) for victim in pending])
        except (UcmError, OSError) as error:
            self._refuse(f"deleting evicted blocks failed: {error}")
            with self._state.lock:
                found.undeleted = pending + found.undeleted
            return pending
        return []

    def _allocate(self, found: Namespace, count: int) -> list[SlotId]:
        """Slots to write to; fewer than the tier promised may mean that the disk is full."""
        assert found.nvme is not None
        promised = min(count, found.nvme.usage().free_slots)
        try:
            slots = found.nvme.allocate(count)
        except (UcmError, OSError) as error:
            self._refuse(f"no room on the disk: {error}", lacks_room=True)
            return []
        if len(slots) < promised and found.nvme.usage().disk_is_full:
            with self._state.lock:
                found.full_at_slots = found.nvme.usage().total_slots
                found.problem = (
                    f"namespace {found.id.hex()[:8]}: the disk is full: room for "
                    f"{counted(found.full_at_slots, 'block')}, old ones make way for new ones"
                )
            reason = f"the disk is full: room for {len(slots)} of {counted(count, 'block')}"
            self._refuse(reason, lacks_room=True)
        return slots

    def _items(
        self, found: Namespace, rows: list[int], slots: list[SlotId], skip: set[BlockKey]
    ) -> list[SlotWrite]:
        """What to write where; rows that lost their memory copy meanwhile are left out."""
        items: list[SlotWrite] = []
        with self._state.lock:
            for row, slot in zip(rows, slots, strict=False):
                if found.index.has(row, TierKind.MEMORY) and found.index.key(row) not in skip:
                    items.append(_item(found, row, slot))
        return items

    def _write(self, found: Namespace, items: list[SlotWrite]) -> list[IoStatus]:
        if not items:
            return []
        assert found.nvme is not None
        start = time.perf_counter()
        try:
            statuses = found.nvme.write(items)
        except (UcmError, OSError) as error:
            _log.warning("writing %d blocks: %s", len(items), error)
            statuses = [IoStatus.IO_ERROR] * len(items)
        metrics = self._state.metrics
        took_s = time.perf_counter() - start
        metrics.observe("ucm_io_duration_seconds", took_s, tier="nvme", op="write")
        num_bytes = len(items) * found.layout.block_bytes
        metrics.add("ucm_io_bytes_total", num_bytes, tier="nvme", op="write")
        return statuses

    def _write_oversize(
        self, found: Namespace, items: list[SlotWrite], statuses: list[IoStatus]
    ) -> list[SlotId]:
        """Write what its codec made too long once more, to full slots, as far as there are any.

        `items` and `statuses` are updated in place; returns the slots that were allocated.
        """
        positions = [i for i, status in enumerate(statuses) if status is IoStatus.OVERSIZE]
        if not positions:
            return []
        assert found.nvme is not None
        try:
            slots = found.nvme.allocate(len(positions), full=True)
        except (UcmError, OSError) as error:
            _log.warning("no full slots for %d blocks: %s", len(positions), error)
            return []
        moved = positions[: len(slots)]
        again = [replace(items[i], slot=slot) for i, slot in zip(moved, slots, strict=True)]
        written = self._write(found, again)
        for i, item, status in zip(moved, again, written, strict=True):
            items[i], statuses[i] = item, status
        return slots

    def _settle_locked(
        self, found: Namespace, items: list[SlotWrite], statuses: Sequence[IoStatus]
    ) -> list[Victim]:
        """Record what is durable now; returns what was written without its parent."""
        index = found.index
        orphans: list[Victim] = []
        flushed = 0
        for item, status in zip(items, statuses, strict=True):
            row = index.find(item.key)
            parent = index.parent(row)
            if status is not IoStatus.OK:
                self._drop_locked(1, status.value)
            elif parent == NO_ROW or index.has(parent, TierKind.NVME):
                index.place(row, TierKind.NVME, item.slot)
                flushed += 1
            else:
                orphans.append(Victim(item.key, item.slot))
        self._drop_locked(len(orphans), "orphan")
        self._state.metrics.add("ucm_flushed_blocks_total", flushed)
        return orphans

    def _refuse(self, reason: str, *, lacks_room: bool = False) -> None:
        with self._state.lock:
            now_us = self._state.clock.now_us()
            self.health.refuse(reason, now_us, lacks_room=lacks_room)
        self._state.metrics.set("ucm_nvme_writable", 0)
        _log.warning("stores stop, loads go on: %s", reason)

    def _recover(self) -> None:
        with self._state.lock:
            recovered = not self.health.writable
            self.health.recover()
        if recovered:
            self._state.metrics.set("ucm_nvme_writable", 1)
            _log.info("the disk takes writes again")


def _without_deleted(found: Namespace, rows: list[int], read: set[BlockKey]) -> list[int]:
    """Those of `rows`, parents first, that are not deleted nor in `read`, nor behind such."""
    if not found.barred and not read:
        return rows
    index = found.index
    gone = {row for row in rows if index.key(row) in found.barred or index.key(row) in read}
    for row in rows:
        if index.parent(row) in gone:
            gone.add(row)
    return [row for row in rows if row not in gone]


def _item(found: Namespace, row: int, slot: SlotId) -> SlotWrite:
    """The write of a block in memory to a slot of NVMe, with its summary if there is one."""
    index, memory, shelf = found.index, found.memory, found.summaries
    source, key, parent = index.slot(row, TierKind.MEMORY), index.key(row), index.parent_key(row)
    data, checksums = memory.view(source), memory.checksums(source)
    summary = shelf.to_store(key, checksums) if shelf is not None else b""
    is_lossy = memory.was_lossy(source)
    return SlotWrite(slot, key, parent, data, checksums, is_lossy, summary=summary)
