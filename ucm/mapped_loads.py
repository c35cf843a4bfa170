"""Promotions that go layer by layer: the same layers of all blocks, then the next ones.

    begin    lock: slots, reads queued, a region of the session's progress area
    a step   one request a block, no lock | lock: say how far it is, or settle | queue the next step
    end      of the lease: nothing more is told to it; blocks that nobody waits for are let go of
             at the next step, before they are read

Loads of one block share its promotion, layer by layer or not: each has a tally of its own. Blocks
that are encoded on the disk come whole. What is complete is adopted by the memory tier as ever.
A step goes to the end of the queue, so that loads at the same time take turns.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ucm.storage.extents import ExtentTable
from ucm.storage.layer_io import LayerRead, layers_per_request
from ucm.storage.tier import IoStatus, ReadOutcome

from .api import SlabChecksums
from .errors import CapacityError, UcmError
from .leases import Lease
from .loads import LoadPath, publish
from .manager_state import ManagerState
from .namespaces import Namespace, Promotion
from .progress import ProgressArea, PromotionTally
from .transfer import Priority
from .types import LoadStatus, TierKind

_log = logging.getLogger(__name__)

BLOCKS_PER_JOB = 1024
"""Blocks whose layers are read together; more are several jobs."""


class MappedLoad:
    """One load's interest in promotions. Changed under the manager's lock only."""

    def __init__(self, found: Namespace, rows: Sequence[int], area: ProgressArea) -> None:
        """Join the promotions of `rows`, in the order of the keys; there must be room for them.

        Raises:
            AssertionError: the area has no room; the caller has asked.
        """
        region = area.reserve(len(rows), found.layout.num_layers)
        assert region is not None, "the caller has asked for room"
        self.place = region.place
        self._found = found
        self._area = area
        self._tally = PromotionTally(rows, region)
        self._pending = set(rows)
        for row in rows:
            promotion = found.promotions[row]
            promotion.waits.append(self)
            self.advance(row, promotion.num_layers, promotion.checksums)
        self.publish()

    def advance(self, row: int, num_layers: int, checksums: SlabChecksums) -> None:
        """See `PromotionWait.advance`."""
        self._tally.advance(row, num_layers, checksums)

    def settle(self, row: int, failure: LoadStatus | None) -> None:
        """See `PromotionWait.settle`. What is behind a failure is not waited for any more."""
        self._pending.discard(row)
        if failure is not None:
            self._tally.fail(row)
            self._leave(self._pending.intersection(self._tally.useless_rows()))

    def publish(self) -> None:
        """See `PromotionWait.publish`."""
        self._tally.publish()

    def end(self) -> None:
        """The lease is over."""
        self._leave(set(self._pending))
        self._area.free(self._tally.region)

    def _leave(self, rows: set[int]) -> None:
        for row in rows:
            self._found.promotions[row].waits.remove(self)
        self._pending -= rows


@dataclass(slots=True, eq=False)
class _Item:
    promotion: Promotion
    read: LayerRead


class LayerJob:
    """Reads a batch of blocks layer by layer, one step at a time, on the transfer threads."""

    def __init__(
        self,
        state: ManagerState,
        loads: LoadPath,
        found: Namespace,
        extents: ExtentTable,
        batch: Sequence[Promotion],
    ) -> None:
        self._state = state
        self._loads = loads
        self._found = found
        self._extents = extents
        self._next_layer = 0
        self._items = [
            _Item(each, LayerRead(each.source, each.key, found.memory.view(each.target)))
            for each in batch
        ]

    def run(self) -> None:
        """One step, and queue the next; when it cannot be queued, go on here."""
        while self._step():
            if self._loads.submit(self.run, 0, Priority.LOAD):
                return

    def _step(self) -> bool:
        """Read the next layers; False when there is nothing left to do."""
        layout = self._found.layout
        first = self._next_layer
        stop = min(first + layers_per_request(layout), layout.num_layers)
        with self._state.lock:
            self._drop_unwanted_locked()
        if not self._items:
            return False
        statuses = self._read(first, stop)
        with self._state.lock:
            for item, status in zip(self._items, statuses, strict=True):
                self._note_locked(item, status, stop)
            publish([item.promotion for item in self._items])
        self._items = [
            item
            for item, status in zip(self._items, statuses, strict=True)
            if status is IoStatus.OK and stop < layout.num_layers
        ]
        self._next_layer = stop
        return bool(self._items)

    def _drop_unwanted_locked(self) -> None:
        for item in self._items:
            if not item.promotion.waits:
                self._loads.abandon_locked(self._found, item.promotion)
        self._items = [item for item in self._items if item.promotion.waits]

    def _read(self, first: int, stop: int) -> list[IoStatus]:
        reads = [item.read for item in self._items]
        start = time.perf_counter()
        try:
            statuses = self._extents.read_layers(reads, first, stop)
        except (UcmError, OSError) as error:
            _log.warning("reading layers of %d blocks: %s", len(reads), error)
            statuses = [IoStatus.IO_ERROR] * len(reads)
        metrics, num_layers = self._state.metrics, stop - first
        seconds = time.perf_counter() - start
        metrics.observe("ucm_io_duration_seconds", seconds, tier="nvme", op="read")
        num_bytes = len(reads) * num_layers * self._found.layout.slab_stride_bytes
        metrics.add("ucm_io_bytes_total", num_bytes, tier="nvme", op="read")
        return statuses

    def _note_locked(self, item: _Item, status: IoStatus, stop: int) -> None:
        promotion, sums = item.promotion, item.read.checksums
        if status is not IoStatus.OK or stop == self._found.layout.num_layers:
            outcome = ReadOutcome(status, sums, summary=item.read.summary)
            self._loads.settle_locked(self._found, promotion, outcome)
            return
        promotion.num_layers, promotion.checksums = stop, sums
        for wait in promotion.waits:
            wait.advance(promotion.row, stop, sums)


class MappedLoads:
    """Begins promotions for layer by layer loads. Called under the manager's lock."""

    def __init__(self, state: ManagerState, loads: LoadPath) -> None:
        self._state = state
        self._loads = loads

    def begin_locked(
        self, found: Namespace, lease: Lease, rows: Sequence[int], needed: Sequence[int]
    ) -> set[int]:
        """Have rows promoted that nobody promotes yet, as far as there is room for all of it.

        Args:
            found: the namespace.
            lease: pins `rows`.
            rows: which memory lacks and the client does not read itself, in the order of the keys.
            needed: the leading ones of `rows` that nobody promotes yet.

        Returns:
            Those of `rows` that are on their way.
        """
        try:
            area = self._state.progress_locked(lease.session)
        except CapacityError as error:
            _log.warning("no progress area for session %d: %s", lease.session, error)
            return set()
        if not area.has_room(len(rows), found.layout.num_layers):
            return set()
        needed = self._loads.affordable(lease.session, found, needed)
        extents = found.nvme.extents if found.nvme is not None else None
        slots = found.index.slots(needed, TierKind.NVME)
        places = extents.places(slots) if extents is not None else [None] * len(needed)
        start = 0
        while start < len(needed):
            is_plain = places[start] is not None
            stop = start + 1
            while stop < len(needed) and (places[stop] is not None) == is_plain:
                stop += 1
            how = self._layered(found, extents) if is_plain and extents else self._whole(found)
            if self._loads.promote_locked(found, lease.session, needed[start:stop], how) < (
                stop - start
            ):
                break
            start = stop
        return {row for row in rows if row in found.promotions}

    def watch_locked(self, found: Namespace, lease: Lease, rows: Sequence[int]) -> MappedLoad:
        """Follow the promotions of `rows` for the lease; there must be room, see `begin_locked`."""
        load = MappedLoad(found, rows, self._state.progress_locked(lease.session))
        lease.at_end = load.end
        return load

    def _layered(
        self, found: Namespace, extents: ExtentTable
    ) -> tuple[Callable[[list[Promotion]], bool], int]:
        def submit(batch: list[Promotion]) -> bool:
            job = LayerJob(self._state, self._loads, found, extents, batch)
            return self._loads.submit(job.run, len(batch), Priority.LOAD)

        return submit, BLOCKS_PER_JOB

    def _whole(self, found: Namespace) -> tuple[Callable[[list[Promotion]], bool], int]:
        return self._loads.whole_blocks(found, Priority.LOAD)
