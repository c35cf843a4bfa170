"""A second look at blocks that a client found corrupt: what is really bad leaves the index.

Copies in memory are looked at on the calling thread, those on NVMe by a transfer thread, which a
sick disk may hold up; the call that reported them waits for that a little and then goes on. While
it lasts, the lease still pins the blocks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection

from ucm.storage.file_io import aligned_buffer
from ucm.storage.tier import IoStatus, SlotId, SlotRead

from .block_columns import NO_ROW, PROMOTING
from .errors import CapacityError, TierUnavailableError, UcmError
from .leases import Lease
from .manager_state import ManagerState
from .namespaces import Namespace
from .placement import Victim
from .transfer import Priority, TransferPool
from .types import BlockKey, TierKind

_log = logging.getLogger(__name__)

PATIENCE_S = 1.0
"""How long a report waits for the disk: a healthy one reads a thousand blocks meanwhile."""


def recheck_and_end(
    state: ManagerState,
    pool: TransferPool,
    found: Namespace,
    lease: Lease,
    suspects: Collection[BlockKey],
) -> None:
    """Re-verify suspects of a lease that was taken out of the table, then undo it.

    The caller has counted itself in `found.num_copying`, which falls at the end: the store is not
    closed before.
    """
    with state.lock:
        in_place = {found.index.key(row) for row in lease.in_place}
    for key in set(suspects) - in_place:
        state.recheck(found, key)
    on_disk = sorted(set(suspects) & in_place)
    done = threading.Event()

    def work() -> None:
        try:
            for key in on_disk:
                _recheck_on_nvme(state, found, key)
        finally:
            _end(state, found, lease)
            done.set()

    if not on_disk:
        work()
        return
    try:
        pool.submit(Priority.LOAD, work, weight=len(on_disk))
    except (CapacityError, TierUnavailableError) as error:
        _log.warning("%d blocks are not looked at again: %s", len(on_disk), error)
        _end(state, found, lease)
        return
    done.wait(PATIENCE_S)


def _end(state: ManagerState, found: Namespace, lease: Lease) -> None:
    with state.lock:
        state.undo_locked(lease)
        found.num_copying -= 1
        state.copied.notify_all()


def _recheck_on_nvme(state: ManagerState, found: Namespace, key: BlockKey) -> None:
    """Read a held block; a copy that is bad or cannot be read is lost."""
    index, nvme = found.index, found.nvme
    with state.lock:
        row = index.find(key)
        slot = index.slot(row, TierKind.NVME) if row != NO_ROW else -1
    if slot < 0 or nvme is None:
        return
    read = SlotRead(SlotId(slot), key, aligned_buffer(found.layout.block_bytes))
    try:
        status = nvme.read([read])[0].status
    except (UcmError, OSError) as error:
        _log.warning("a block cannot be looked at again: %s", error)
        status = IoStatus.IO_ERROR
    if status is IoStatus.OK:
        return
    with state.lock:
        row = index.find(key)
        is_there = row != NO_ROW and index.slot(row, TierKind.NVME) == read.slot
        if not is_there or index.in_flight(row, PROMOTING):  # who reads it finds out, too
            return
        index.lose(row, TierKind.NVME)
        if status is not IoStatus.CORRUPT:  # a corrupt one's slot is quarantined
            found.undeleted.append(Victim(key, read.slot))
    if status is IoStatus.CORRUPT:
        state.metrics.add("ucm_corrupt_blocks_total", tier="nvme")
