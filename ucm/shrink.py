"""Giving disk space back: empty the emptiest segment of a namespace and delete it.

    excess   above its tenant's quota or, together with others, above a capacity that was lowered
    sharing  another open namespace holds less than an equal part, needs room and finds none

Evicting by the policy makes room for what is in the segment, then it moves there, a few blocks at a
time. A block is in flight while it moves: a load that comes just then does not find it. What moves
is verified by its checksums when it is read and again when it is written. Whatever fails, the rest
stays where it is and the segment stays.

Runs on the thread that commits writes, so nothing else writes or deletes on NVMe meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from ucm.storage.file_io import aligned_buffer
from ucm.storage.shrink import Shrinker
from ucm.storage.tier import IoStatus, ReadOutcome, SlotId, SlotRead, SlotWrite, TierEntry

from .block_columns import NO_ROW, PROMOTING
from .errors import UcmError
from .manager_state import US_PER_S, ManagerState
from .namespaces import Namespace
from .placement import Victim, evict
from .types import BlockKey, TierKind

_log = logging.getLogger(__name__)

BLOCKS_PER_MOVE = 8
"""Blocks that are in flight, and in a buffer of their own, at once."""
RETRY_S = 5.0
"""After a segment could not be emptied (loads hold its blocks): how long until the next attempt."""

Delete = Callable[[Namespace, list[Victim]], list[Victim]]
"""Deletes copies that have left the index; returns those that are still there."""


class Shrinking:
    """Which namespace gives a segment back, and how. One thread: the one that commits."""

    def __init__(self, state: ManagerState, delete: Delete) -> None:
        self._state = state
        self._delete = delete

    def make_room(self, found: Namespace, needed: int) -> None:
        """Before a commit of `needed` blocks: end some of its excess, or help it to its part.

        One segment a commit, so that writes go on in between.
        """
        shrinker = found.nvme.shrinker if found.nvme is not None else None
        if shrinker is None:
            return
        try:
            if shrinker.has_excess():
                self._shrink(found)
            donor = self._donor(found, shrinker, needed)
            if donor is not None and self._take_from(donor):
                _log.info("namespace %s gave a segment to %s", _name(donor), _name(found))
        except (UcmError, OSError) as error:
            _log.warning("no segment could be given back: %s", error)

    def _take_from(self, donor: Namespace) -> bool:
        try:
            return self._shrink(donor)
        finally:
            with self._state.lock:
                donor.num_writing -= 1  # it may be closed again

    def wants_more(self, found: Namespace) -> bool:
        """Whether another segment of it has to go, and may go now."""
        shrinker = found.nvme.shrinker if found.nvme is not None else None
        if shrinker is None or not shrinker.is_over:
            return False
        return shrinker.num_segments > 1 and self._is_due(found)

    def _donor(self, found: Namespace, shrinker: Shrinker, needed: int) -> Namespace | None:
        """Who should give `found` a segment; it is kept open until its `num_writing` falls."""
        assert found.nvme is not None
        usage = found.nvme.usage()
        segment_bytes = self._state.config.nvme.segment_bytes
        with self._state.lock:
            found.nvme_shortage = ""
            others = [other for other in self._state.namespaces if other.nvme is not None]
            part_bytes = max(segment_bytes, self._part_bytes(found, others))
            if usage.free_slots >= needed or usage.disk_is_full:
                return None
            if usage.held_bytes + segment_bytes > part_bytes:
                return None
            rich = [
                other
                for other in others
                if other is not found and _held_bytes(other) > self._part_bytes(other, others)
            ]
            for donor in sorted(rich, key=_held_bytes, reverse=True):
                if self._is_due(donor) and shrinker.could_take_from(donor.tenant):
                    donor.num_writing += 1
                    return donor
            if rich:
                found.nvme_shortage = (
                    f"namespace {_name(found)} (tenant {found.tenant!r}) gets no disk space: what "
                    "others hold is reserved or in use; see [quota]"
                )
            return None

    def _part_bytes(self, found: Namespace, others: Sequence[Namespace]) -> int:
        """An equal part of the disk, or of its tenant's quota, among open namespaces."""
        part_bytes = self._state.config.nvme.capacity_bytes // max(1, len(others))
        quota_bytes = self._state.namespaces.nvme_shares.of(found.tenant).quota_bytes
        if not quota_bytes:
            return part_bytes
        siblings = sum(other.tenant == found.tenant for other in others)
        return min(part_bytes, quota_bytes // max(1, siblings))

    def _is_due(self, found: Namespace) -> bool:
        return self._state.clock.now_us() >= found.shrink_retry_us

    def _shrink(self, found: Namespace) -> bool:
        """Take one segment off the disk; False when that is not possible now."""
        assert found.nvme is not None
        shrinker = found.nvme.shrinker
        segment = shrinker.choose() if shrinker is not None and self._is_due(found) else -1
        if shrinker is None or segment < 0:
            return False
        shrinker.withdraw(segment)
        gone = False
        try:
            if self._empty(found, shrinker, segment) and not self._delete(found, []):
                gone = shrinker.finish(segment)
        finally:
            if not gone:
                shrinker.give_up(segment)
                found.shrink_retry_us = self._state.clock.now_us() + int(RETRY_S * US_PER_S)
        if gone:
            self._state.metrics.add("ucm_released_segments_total")
        return gone

    def _empty(self, found: Namespace, shrinker: Shrinker, segment: int) -> bool:
        """Move or evict what is in the segment; False when something has to stay."""
        entries = self._still_there(found, shrinker.blocks_in(segment))
        while entries and (lacking := len(entries) - shrinker.num_free_for(segment)) > 0:
            with self._state.lock:
                lacking -= len(found.undeleted)
                victims = evict(found.index, TierKind.NVME, lacking)
            if victims:
                self._state.metrics.add("ucm_evicted_blocks_total", len(victims), tier="nvme")
            if self._delete(found, victims) or (not victims and lacking > 0):
                return False
            shrinker.withdraw(segment)
            entries = self._still_there(found, entries)
        for start in range(0, len(entries), BLOCKS_PER_MOVE):
            if not self._move(found, entries[start : start + BLOCKS_PER_MOVE]):
                return False
            shrinker.withdraw(segment)  # what became free must not take the next ones in
        return True

    def _still_there(self, found: Namespace, entries: Sequence[TierEntry]) -> list[TierEntry]:
        index = found.index
        with self._state.lock:
            rows = [index.find(entry.key) for entry in entries]
            return [
                entry
                for entry, row in zip(entries, rows, strict=True)
                if row != NO_ROW and index.slot(row, TierKind.NVME) == entry.slot
            ]

    def _move(self, found: Namespace, entries: list[TierEntry]) -> bool:
        """Write blocks elsewhere; False when one of them stays."""
        index = found.index
        with self._state.lock:
            rows = [index.find(entry.key) for entry in entries]
            if any(row == NO_ROW or index.in_flight(row) or row in found.in_place for row in rows):
                return False  # a load, or its client, reads it just now
            for row in rows:
                index.begin_flight(row, PROMOTING)
        arrived: dict[BlockKey, SlotId] = {}
        unreadable: set[BlockKey] = set()
        try:
            arrived = self._copy(found, entries, unreadable)
        finally:
            with self._state.lock:
                for entry, row in zip(entries, rows, strict=True):
                    is_lost = entry.key in unreadable
                    self._settle_locked(found, (entry, row), arrived.get(entry.key), is_lost)
        return len(arrived) + len(unreadable) == len(entries)

    def _settle_locked(
        self, found: Namespace, moved: tuple[TierEntry, int], slot: SlotId | None, is_lost: bool
    ) -> None:
        """Record where a block is now."""
        entry, row = moved
        if slot is not None:
            found.index.move(row, TierKind.NVME, slot)
        if is_lost:
            found.index.lose(row, TierKind.NVME)
            found.undeleted.append(Victim(entry.key, entry.slot))
        found.index.end_flight(row, PROMOTING)

    def _copy(
        self, found: Namespace, entries: list[TierEntry], unreadable: set[BlockKey]
    ) -> dict[BlockKey, SlotId]:
        """Read and write blocks under the same keys; the new slots of those that arrived."""
        nvme, size_bytes = found.nvme, found.layout.block_bytes
        assert nvme is not None
        buffer = aligned_buffer(len(entries) * size_bytes)
        views = [buffer[start : start + size_bytes] for start in range(0, len(buffer), size_bytes)]
        outcomes = nvme.read(
            [
                SlotRead(entry.slot, entry.key, view, keep_payload=True)
                for entry, view in zip(entries, views, strict=True)
            ]
        )
        read = list(zip(entries, views, outcomes, strict=True))
        unreadable.update(
            each.key for each, _, outcome in read if outcome.status is not IoStatus.OK
        )
        good = [each for each in read if each[0].key not in unreadable]
        moved: dict[BlockKey, SlotId] = {}
        for full in (False, True):  # what needs a full slot gets one
            slots = nvme.allocate(len(good), full=full)
            writes = [_write_of(slot, *each) for slot, each in zip(slots, good, strict=False)]
            statuses = nvme.write(writes)
            results = {
                write.key: (write.slot, status)
                for write, status in zip(writes, statuses, strict=True)
            }
            moved |= {key: slot for key, (slot, status) in results.items() if status is IoStatus.OK}
            nvme.free([slot for slot in slots if slot not in moved.values()])
            oversize = {key for key, (_, status) in results.items() if status is IoStatus.OVERSIZE}
            good = [each for each in good if each[0].key in oversize]
        return moved


def _write_of(slot: SlotId, entry: TierEntry, view: memoryview, outcome: ReadOutcome) -> SlotWrite:
    """The write that puts a block that was read into another slot."""
    sums, is_lossy = outcome.checksums, outcome.is_lossy
    return SlotWrite(
        slot,
        entry.key,
        entry.parent,
        view,
        sums,
        is_lossy,
        payload=outcome.payload,
        summary=outcome.summary,
    )


def _held_bytes(found: Namespace) -> int:
    return found.nvme.usage().held_bytes if found.nvme is not None else 0


def _name(found: Namespace) -> str:
    return found.id.hex()[:8]
