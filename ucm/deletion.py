"""Deleting blocks from every tier of an open namespace: never under a reader, never half.

    hide     lock: a doomed block, and all behind it in its chain, leaves the index: a miss from now
             on. One that a transfer moves just now is only hidden, and leaves when that has ended.
    memory   no lock: zeros over the slot | lock: the slot is free     when no lease holds it
             likewise free slots in which eviction or a transfer that failed left it
    NVMe     index, headers, then the bytes (`storage.erase`)          likewise
    settle   what has no copy left anywhere is noted as erased, durably

A block that a lease holds is hidden at once and erased when the last lease has ended; its row stays
until then, without copies. A pin, or a store that follows it, keeps a block from being evicted, not
from being deleted. A write that is queued is not made; one that is under way ends, and its copy
goes with the others. A load that is reading the block ends with it, then the block goes.

`finish` runs on the thread that commits writes, because it alone may free slots of NVMe; without
NVMe on any thread. Everything is repeated until nothing is left: whatever is cut short (a crash, a
sick disk) is found again, because a doomed key stays doomed in the registry.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ucm.storage.tier import SlotId

from .block_columns import NO_ROW
from .errors import TierUnavailableError, UcmError
from .leases import LeaseKind
from .manager_state import ManagerState
from .namespaces import Detached, Namespace
from .placement import Victim
from .shrink import Delete
from .types import BlockKey, TierKind


@dataclass(frozen=True, slots=True)
class Round:
    """One attempt to erase what is doomed in a namespace."""

    batch: dict[BlockKey, int]
    """What was doomed when it began, by number."""
    problem: str
    """Why something could not be erased; empty when all could."""


class Deletions:
    """The deeds of deletion in one manager. Thread-safe where not named `_locked`."""

    def __init__(self, state: ManagerState) -> None:
        """Begin idle."""
        self._state = state
        self._one_round = threading.Lock()

    # -------------------------------------------------------------- hiding

    def hide_locked(self, found: Namespace) -> None:
        """Take every doomed block out of the index, with all behind it; what moves is hidden."""
        index = found.index
        rows = [row for key in found.doomed if (row := index.find(key)) != NO_ROW]
        if not rows:
            return
        rows = index.with_descendants(rows)
        self._unpin_locked(found, set(rows))
        for row in rows:
            index.hide(row, is_hidden=index.in_flight(row))
            if index.in_flight(row) or not index.resident(row):
                continue
            key, is_held = index.key(row), index.pins(row) > 0
            copies = {tier: index.slot(row, tier) for tier in TierKind if index.has(row, tier)}
            for tier in copies:
                index.lose(row, tier)
            found.detached.append(Detached(key, row if is_held else NO_ROW, copies))
            if found.summaries is not None:
                found.summaries.forget(key)

    def show_locked(self, found: Namespace, keys: Iterable[BlockKey]) -> None:
        """Let blocks be found again that are not deleted any more, with all behind them."""
        index = found.index
        rows = [row for key in keys if (row := index.find(key)) != NO_ROW]
        for row in index.with_descendants(rows):
            index.hide(row, is_hidden=False)
        self.hide_locked(found)

    def _unpin_locked(self, found: Namespace, rows: set[int]) -> None:
        """Let pins and stores go of rows: they keep blocks from eviction, nobody reads there."""
        leases = self._state.leases
        for lease in [*leases.of_kind(LeaseKind.PIN), *leases.of_kind(LeaseKind.STORE)]:
            gone = [row for row in lease.rows if row in rows]
            if lease.namespace != found.id or not gone:
                continue
            lease.rows = [row for row in lease.rows if row not in rows]
            if lease.kind is LeaseKind.PIN:
                lease.num_bytes = len(lease.rows) * found.layout.block_bytes
                found.pinned -= Counter(gone)
            found.index.unpin_all(gone)

    def has_work_locked(self, found: Namespace) -> bool:
        """Whether a round would get further now: something is left that no lease holds."""
        if not found.detached:
            return bool(found.doomed)
        if found.undeleted or not all(is_held(found, each) for each in found.detached):
            return True
        index = found.index
        rows = (index.find(key) for key in found.doomed)
        return any(
            row != NO_ROW and index.resident(row) and not index.in_flight(row) for row in rows
        )

    # -------------------------------------------------------------- erasing

    def finish(self, found: Namespace, delete: Delete | None) -> Round:
        """Erase what can be. Blocks on the disk.

        Args:
            found: the namespace.
            delete: how copies on NVMe are deleted, on the thread that commits; None in a store
                without NVMe.
        """
        with self._one_round:
            with self._state.lock:
                self.hide_locked(found)
                batch = dict(found.doomed)
                found.num_copying += 1
            problem = ""
            try:
                self._erase_in_memory(found)
                self._erase_on_nvme(found, batch, delete)
            except (UcmError, OSError) as error:
                problem = str(error)
            finally:
                with self._state.lock:
                    found.num_copying -= 1
                    self._state.copied.notify_all()
            return Round(batch, problem)

    def _erase_in_memory(self, found: Namespace) -> None:
        """Zeros over every slot that nobody reads any more."""
        with self._state.lock:
            free = [each for each in found.detached if not is_held(found, each)]
            slots = [
                (slot, each.key)
                for each in free
                if (slot := each.copies.pop(TierKind.MEMORY, None)) is not None
            ]
            gone = {*(each.key for each in found.detached), *found.doomed}
        found.memory.erase([slot for slot, _ in slots])
        found.memory.erase_left(gone)
        with self._state.lock:
            found.memory.delete(slots)
            found.detached[:] = [each for each in found.detached if each.copies]

    def _erase_on_nvme(
        self, found: Namespace, batch: Iterable[BlockKey], delete: Delete | None
    ) -> None:
        """Index, headers and bytes of what nobody reads any more."""
        nvme = found.nvme
        if nvme is None or delete is None:
            return
        victims: list[Victim] = []
        with self._state.lock:
            for each in [each for each in found.detached if not is_held(found, each)]:
                slot = each.copies.pop(TierKind.NVME, None)
                if slot is not None:
                    victims.append(Victim(each.key, SlotId(slot)))
            found.detached[:] = [each for each in found.detached if each.copies]
        if delete(found, victims):
            raise TierUnavailableError(
                f"namespace {found.id.hex()[:8]}: the disk refuses to delete blocks"
            )
        if nvme.eraser is not None and batch:
            nvme.eraser.erase(set(batch))

    def left_locked(self, found: Namespace) -> set[BlockKey]:
        """Keys of which something is left: held, in flight, or refused by the disk."""
        left = {each.key for each in found.detached}
        left.update(victim.key for victim in found.undeleted)
        left.update(key for key in found.doomed if found.index.find(key) != NO_ROW)
        with contextlib.suppress(StopIteration):
            next(key for key in left if key not in found.doomed)
            left.update(found.doomed)  # a block behind one of them is left: they wait for it
        return left


def is_held(found: Namespace, each: Detached) -> bool:
    """Whether a lease still holds a block that was hidden."""
    index = found.index
    return each.row != NO_ROW and index.find(each.key) == each.row and index.pins(each.row) > 0
