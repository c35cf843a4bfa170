"""`CacheSlabSource`: a cache as the tier below an engine's pool, for sequences longer than it.

    engine's thread   put -> wait_kept       read -> wait        bounded by `deadline_s`
    source's thread   prepare, fill, complete_store | begin_load, slab by slab, complete_load

Invariants
    * A slab counts as there when its checksum over the *destination* is the one that was made when
      it was stored; what is wrong is reported to the cache, asked for once more, and then lost.
    * A block counts as kept when the cache said that it has it; its lease is renewed at half time.
    * Nothing writes to a destination after its read was cancelled: files are read into memory of
      the source's own first, so a disk that hangs holds nobody up.
    * A cache that dies loses slabs, nothing else: what is asked for next connects anew.

Envelope: a slab costs some 50 us of this interpreter, its read and its checksum; a run of
`run_blocks` blocks one call to the cache for each half of a lease.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from ucm.api import SlabChecksums, StoreLease
from ucm.checksum import checksum
from ucm.errors import LayoutMismatchError, UcmError
from ucm.reader_io import open_reader_io
from ucm.slab_mover import Scratch, SlabMover
from ucm.sparse.slab_queue import ReadQueue, SlabLostError
from ucm.types import BlockKey, LoadMode, StoreStatus

from .link import CacheFactory, Connection
from .slab_shelf import CacheRead, CacheShelf, CacheSlabs, Put, Run

if TYPE_CHECKING:
    from ucm.hashing import NamespaceSpec

log = logging.getLogger(__name__)

CACHE_ERRORS = (UcmError, OSError, ValueError, RuntimeError)
"""What a cache that died, or memory of it that is gone, may fail with."""

TRIES_BEFORE_NEW_CHAIN = 4
"""Stores without room, running, until another chain is begun: writing behind takes some time."""

KEPT = (StoreStatus.ACCEPTED, StoreStatus.PRESENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlabSourceOptions:
    """Limits of a source."""

    deadline_s: float = 10.0
    """Longest wait for one slab, or for the store of what one pass filled; then it is lost."""
    lease_s: float = 60.0
    """How long a run of blocks is pinned; renewed at half time while it is read."""
    run_blocks: int = 32
    """Blocks of one lease, and of one store call."""
    retry_s: float = 0.05
    """Wait between two tries to store in a cache that has no room: it may be writing behind."""


class CacheSlabSource:
    """See `SlabSource` and the module."""

    capacity_bytes = None
    """Not known here: the cache evicts."""

    def __init__(
        self, factory: CacheFactory, spec: NamespaceSpec, options: SlabSourceOptions | None = None
    ) -> None:
        """Start the thread; it connects when there is something to do.

        Args:
            factory: makes a connection, for example `lambda: connect(path, timeout_s=2.0)`.
            spec: identity of the KV; its layout is the pool's.
            options: limits; the defaults when None.
        """
        self.options = options or SlabSourceOptions()
        self.deadline_s = self.options.deadline_s
        self._factory = factory
        self._spec = spec
        self._connection: Connection | None = None
        self._generation = 0
        self._io = open_reader_io()
        self._scratch = Scratch()
        self._changed = threading.Condition()
        self._reads: ReadQueue[CacheSlabs] = ReadQueue()
        self._errands: deque[Callable[[], None]] = deque()
        self._shelves: set[CacheShelf] = set()
        self._thread = threading.Thread(target=self._run, name="ucm-cache-slabs", daemon=True)
        self._thread.start()

    def open(self, name: str) -> CacheShelf:
        """See `SlabSource.open`."""
        namespace, layout = self._spec.fingerprint(), self._spec.layout
        return CacheShelf(name, namespace, layout.block_tokens, self, self._changed)

    def close(self) -> None:
        """See `SlabSource.close`."""
        with self._changed:
            self._reads.close()
            self._changed.notify_all()
        self._thread.join(2 * self.deadline_s)

    # `Errands`

    def submit_read(self, read: CacheRead, *, is_ahead: bool) -> None:
        """See `Errands.submit_read`."""
        self._reads.submit(read, is_ahead=is_ahead)

    def submit_put(self, put: Put) -> None:
        """See `Errands.submit_put`."""
        with self._changed:
            self._errands.append(lambda: self._store(put))
            self._changed.notify_all()

    def submit_close(self, shelf: CacheShelf) -> None:
        """See `Errands.submit_close`."""
        with self._changed:
            self._errands.append(lambda: self._end_runs(shelf))
            self._changed.notify_all()

    # The source's thread

    def _run(self) -> None:
        while (work := self._next()) is not None:
            work()
        for shelf in list(self._shelves):
            self._end_runs(shelf)
        self._drop_connection()
        self._io.close()

    def _next(self) -> Callable[[], None] | None:
        """What to do now: stores, then reads that somebody waits for, then the others."""
        with self._changed:
            while True:
                if self._errands:
                    return self._errands.popleft()
                if self._reads.is_closed:
                    return None
                if (read := self._reads.next_read()) is not None:
                    return partial(self._advance, read)
                self._changed.wait()

    def _advance(self, read: CacheRead) -> None:
        """Bring the next slab of a read, or say that it is lost."""
        number = read.done
        block = read.blocks[number]
        try:
            why = self._fetch(read, block) and self._fetch(read, block)
        except CACHE_ERRORS as error:
            log.info("a slab could not be read: %s", error)
            self._drop_connection()
            why = str(error)
        with self._changed:
            if not why:
                read.done += not read.is_cancelled
            else:
                read.error = SlabLostError(block, why)
            self._changed.notify_all()

    def _fetch(self, read: CacheRead, block: int) -> str:
        """Try once; the lease of a run that failed is not used again."""
        shelf, size = read.job.shelf, self.options.run_blocks
        number, index = divmod(block, size)
        run = self._run_of(shelf, number, index)
        if run is None:
            return "it left the shelf"
        wanted = (read, read.job.views[read.done])
        why = run.fetch(index, read.job.layer, wanted, self._scratch)
        if why:
            self._end_run(shelf, number)
        return why

    def _run_of(self, shelf: CacheShelf, number: int, index: int) -> Run | None:
        """The lease of a run, renewed at half time, when it lacks the block, or its cache died.

        None when the block left the shelf: who asked has cancelled, and did not wait for us.
        """
        run = shelf.runs.get(number)
        first = number * self.options.run_blocks
        with self._changed:
            wanted = shelf.keys[first : min(first + self.options.run_blocks, shelf.num_kept)]
        if index >= len(wanted):
            return None
        if run is not None:
            keys = [block.key for block in run.plan.blocks]
            is_fresh = time.monotonic() < run.renew_s and run.generation == self._generation
            if is_fresh and index < len(keys) and keys[index] == wanted[index]:
                return run
            self._end_run(shelf, number)
        connection = self._connect()
        plan = connection.cache.begin_load(
            connection.namespace.id,
            wanted,
            mode=LoadMode.DIRECT,
            timeout_s=self.options.lease_s,
        )
        layout = self._spec.layout
        run = shelf.runs[number] = Run(
            plan, layout, self._generation, lambda run: SlabMover(plan, layout, run, self._io, run)
        )
        self._shelves.add(shelf)
        return run

    def _end_run(self, shelf: CacheShelf, number: int) -> None:
        run = shelf.runs.pop(number)
        if run.plan.progress is not None:
            run.plan.progress.close()
        connection = self._connection
        if connection is None or run.generation != self._generation:
            return
        try:
            connection.cache.complete_load(run.plan.id, run.corrupt)
        except CACHE_ERRORS as error:
            log.info("a lease could not be given back: %s", error)
            self._drop_connection()

    def _end_runs(self, shelf: CacheShelf) -> None:
        for number in list(shelf.runs):
            self._end_run(shelf, number)
        self._shelves.discard(shelf)

    def _store(self, put: Put) -> None:
        """Store what was put, batch by batch; a cache without room is asked again for a while."""
        stop_s = time.monotonic() + self.deadline_s
        size, num_tries, why = self.options.run_blocks, 0, ""
        while put.num_done < len(put.keys) and not why:
            batch = range(put.num_done, min(put.num_done + size, len(put.keys)))
            try:
                num_new, why = self._store_batch(put, batch)
            except CACHE_ERRORS as error:
                num_new, why = 0, str(error)
                self._drop_connection()
            self._count_kept(put, num_new, "")
            num_tries = 0 if num_new else num_tries + 1
            if why == _NO_ROOM and time.monotonic() < stop_s and not self._reads.is_closed:
                why = ""
                self._make_room(put, num_tries)
        self._count_kept(put, 0, why)

    def _count_kept(self, put: Put, num_new: int, why: str) -> None:
        put.num_done += num_new
        with self._changed:
            if put.epoch == put.shelf.epoch:
                put.shelf.num_kept += num_new
                put.shelf.error = why
                self._changed.notify_all()

    def _make_room(self, put: Put, num_tries: int) -> None:
        """What this source pins cannot leave the cache's memory, nor can a chain it extends."""
        for shelf in list(self._shelves):
            self._end_runs(shelf)
        if num_tries >= TRIES_BEFORE_NEW_CHAIN:
            put.begin_chain()
        time.sleep(self.options.retry_s)

    def _store_batch(self, put: Put, batch: range) -> tuple[int, str]:
        """Returns how many leading blocks of the batch the cache has now, and why not more."""
        connection = self._connect()
        keys = put.keys[batch.start : batch.stop]
        parent = put.parent_of(batch.start)
        lease = connection.cache.prepare_store(connection.namespace.id, parent, keys)
        sums = self._fill(put.slabs, batch, lease)
        if sums:
            statuses = connection.cache.complete_store(lease.id, sums)
        else:
            connection.cache.release(lease.id)
            statuses = tuple(slot.status for slot in lease.slots)
        num_kept = next((i for i, status in enumerate(statuses) if status not in KEPT), len(keys))
        if num_kept == len(keys):
            return num_kept, ""
        status = statuses[num_kept]
        has_room = status not in (StoreStatus.NO_SPACE, StoreStatus.WANTED)
        return num_kept, f"the cache says {status}" if has_room else _NO_ROOM

    def _fill(
        self, slabs: torch.Tensor, batch: range, lease: StoreLease
    ) -> dict[BlockKey, SlabChecksums]:
        """Copy the wanted blocks into their staging slots; returns their checksums."""
        layout = self._spec.layout
        sums: dict[BlockKey, SlabChecksums] = {}
        for number, slot in zip(batch, lease.slots, strict=True):
            if slot.status is not StoreStatus.WANTED or slot.data is None:
                continue
            of_block = slabs[:, number].contiguous().view(layout.num_layers, -1).view(torch.uint8)
            staged = np.frombuffer(slot.data, np.uint8).reshape(layout.num_layers, -1)
            staged[:, : layout.slab_bytes] = of_block.numpy()
            sums[slot.key] = tuple(checksum(slab.data) for slab in of_block.numpy())
        return sums

    def _connect(self) -> Connection:
        """The connection, made anew if the last one broke."""
        if self._connection is None:
            cache = self._factory()
            namespace = cache.open_namespace(self._spec)
            if namespace.layout != self._spec.layout:
                cache.close()
                raise LayoutMismatchError(
                    f"the cache opened the namespace with {namespace.layout}, asked for "
                    f"{self._spec.layout}"
                )
            self._connection = Connection(cache, namespace)
        return self._connection

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        self._generation += 1
        if connection is None:
            return
        try:
            connection.cache.close()
        except CACHE_ERRORS as error:
            log.debug("closing a broken connection: %s", error)


_NO_ROOM = "the cache has no room"
