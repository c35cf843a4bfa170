"""Where summaries come from: a client's store, a slot's area on NVMe, or computed from the block.

    store      a client wrote it behind its block; believed on the daemon's copy, or refused
    promotion  read with its block from NVMe
    wanted     (`await_summaries`) read from NVMe without its block; or computed
    computed   on one thread of its own, from a block in memory that came without

Whoever waits, waits for reads and computations that are under way, at most so long as it says; what
is not there by then has no summary *for now*, and its block is to be read. A block that is on NVMe
only, without a summary there, is not fetched for one: it gets it with its next promotion.

Envelope: a read of 40 KiB a block; computing gsa-k4 of a block of SmolLM2-135M takes some 10 ms, at
most `summaries.max_queued_blocks` wait for it, and a block that waits is not held in memory.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from ucm.kernels.summarize import summarize_blocks
from ucm.kernels.summary_record import content_of, encode_summary
from ucm.storage.summary_areas import StoredSummary
from ucm.storage.tier import SlotId

from .block_columns import NO_ROW, NO_SLOT
from .checksum import checksum, verify
from .errors import CapacityError, InvalidArgumentError, TierUnavailableError, UcmError
from .hashing import CheckedKeys
from .manager_state import MAX_WAIT_S, ManagerState
from .namespaces import Namespace
from .summaries import BookEntry, StoredKind, SummaryBook, SummaryShelf, SummarySource
from .transfer import Priority, TransferPool
from .types import BlockKey, NamespaceId, SessionId, SummaryKind, SummaryStatus, TierKind

_log = logging.getLogger(__name__)

BLOCKS_PER_READ = 64
"""Summaries in one job: 2.5 MiB."""

Wanted = tuple[NamespaceId, BlockKey]


@dataclass(frozen=True, slots=True, eq=False)
class SummaryGrants:
    """The summaries of some blocks, pinned in their book until `SummaryFills.release`."""

    found: Namespace
    book: SummaryBook
    statuses: tuple[SummaryStatus, ...]
    """One for every key asked for, in order."""
    slots: tuple[SlotId, ...]
    """Where in the book's arena; NO_SLOT unless READY. Distance: `book.slot_bytes`."""
    contents: tuple[int, ...]
    """Of what content the block is that each speaks for; 0 unless READY."""

    def view(self, index: int) -> memoryview | None:
        """The encoded summary of a key, read-only; None unless READY."""
        slot = self.slots[index]
        return self.book.view(slot) if slot != NO_SLOT else None

    @property
    def ready_slots(self) -> list[SlotId]:
        """What is pinned."""
        return [slot for slot in self.slots if slot != NO_SLOT]


class _Wait:
    """Somebody who waits for summaries. Changed under the manager's lock only."""

    def __init__(self, session: SessionId) -> None:
        self.session = session
        self.pending: set[Wanted] = set()
        self.done = threading.Event()

    def settle(self, wanted: Wanted) -> None:
        self.pending.discard(wanted)
        if not self.pending:
            self.done.set()


class SummaryFills:
    """Fills the books of one manager. Thread-safe where not named `_locked`."""

    def __init__(
        self,
        state: ManagerState,
        pool: TransferPool,
        waiting_place: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Begin idle; the computing thread starts with its first job.

        Args:
            state: of the manager.
            pool: where summaries are read.
            waiting_place: of calls that wait; refuses with CapacityError.
        """
        self._state = state
        self._pool = pool
        self._waiting_place = waiting_place
        self._computing: TransferPool | None = None
        self._closed = False
        self._interrupted = False
        self._reading: set[Wanted] = set()
        self._queued: set[Wanted] = set()
        self._waits: dict[Wanted, list[_Wait]] = {}

    # ------------------------------------------------------------ opening

    def open_locked(self, found: Namespace, kind: SummaryKind) -> SummaryBook:
        """Keep summaries of that kind of the namespace's blocks, from now on.

        Raises:
            LayoutMismatchError, CapacityError: see `SummaryBook`.
        """
        if found.summaries is None:
            areas = found.nvme.summaries if found.nvme is not None else None
            stored = StoredKind(areas.kind, areas.is_lossy) if areas is not None else StoredKind()
            compute = functools.partial(self._want_computed_locked, found)
            found.summaries = SummaryShelf(found.layout, stored, compute)
        return found.summaries.open(kind, self._state.namespaces.summary_budget)

    def book_locked(self, session: SessionId, found: Namespace) -> SummaryBook:
        """The book of the kind that the session opened the namespace with.

        Raises:
            InvalidArgumentError: it opened it without.
        """
        kind = self._state.session_locked(session).summaries.get(found.id)
        book = found.summaries.books.get(kind) if kind and found.summaries is not None else None
        if book is None:
            raise InvalidArgumentError(
                f"this session opened namespace {found.id.hex()[:8]} without summaries; "
                "open it with a kind of them"
            )
        return book

    # ------------------------------------------------------------- asking

    def await_summaries(
        self,
        session: SessionId,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        timeout_s: float,
    ) -> SummaryGrants:
        """The summaries of `keys` of the session's kind, those that can be had in time.

        Blocks up to `timeout_s` of real time, never for a block's keys and values. What it answers
        stays in place until `release`.

        Raises:
            InvalidArgumentError: the session opened the namespace without summaries.
            BlockNotFoundError, TierUnavailableError: see `ManagerState.begin_locked`.
        """
        state = self._state
        checked = state.checked_keys(keys)
        with state.lock:
            found, _ = state.begin_locked(session, namespace)
            book = self.book_locked(session, found)
            found.num_copying += 1  # it is not closed meanwhile
            grants = self._grants_locked(found, book, checked)
            if SummaryStatus.NO_SUMMARY not in grants.statuses:  # the usual case
                return grants
            book.unpin(grants.ready_slots)
            wait = self._ask_locked(session, found, book, checked)
        try:
            self._wait(wait, timeout_s)
        finally:
            with state.lock:
                self._forget_locked(wait)
                grants = self._grants_locked(found, book, checked)
        return grants

    def release(self, grants: SummaryGrants) -> None:
        """Let the summaries go; call it once."""
        with self._state.lock:
            self.release_locked(grants)

    def release_locked(self, grants: SummaryGrants) -> None:
        """As `release`."""
        grants.book.unpin(grants.ready_slots)
        self._end_use_locked(grants.found)

    def _end_use_locked(self, found: Namespace) -> None:
        found.num_copying -= 1
        self._state.copied.notify_all()

    def _wait(self, wait: _Wait, timeout_s: float) -> None:
        timeout_s = min(timeout_s, MAX_WAIT_S)
        if timeout_s <= 0 or not wait.pending or self._closed or self._interrupted:
            return
        with contextlib.suppress(CapacityError), self._waiting_place():
            wait.done.wait(timeout_s)

    def _grants_locked(
        self, found: Namespace, book: SummaryBook, keys: CheckedKeys
    ) -> SummaryGrants:
        statuses: list[SummaryStatus] = []
        entries: list[BookEntry | None] = []
        for key in keys:
            row = found.index.find(key)
            if row == NO_ROW or not found.index.resident(row):
                statuses.append(SummaryStatus.MISS)
                entries.append(None)
                continue
            entry = _entry(found, book, key, row)
            statuses.append(SummaryStatus.READY if entry else SummaryStatus.NO_SUMMARY)
            entries.append(entry)
        grants = SummaryGrants(
            found,
            book,
            tuple(statuses),
            tuple([entry.slot if entry else NO_SLOT for entry in entries]),
            tuple([entry.content if entry else 0 for entry in entries]),
        )
        book.pin(grants.ready_slots)
        return grants

    def _ask_locked(
        self, session: SessionId, found: Namespace, book: SummaryBook, keys: CheckedKeys
    ) -> _Wait:
        """Have what is missing read or computed."""
        wait, to_read = _Wait(session), list[BlockKey]()
        for key in keys:
            row = found.index.find(key)
            if row == NO_ROW or _entry(found, book, key, row) is not None:
                continue
            wanted = (found.id, key)
            if self._can_read(found, book, key, row):
                if wanted not in self._reading:
                    to_read.append(key)
            elif found.index.has(row, TierKind.MEMORY):
                self._want_computed_locked(found, key)
            else:
                continue
            wait.pending.add(wanted)
            self._waits.setdefault(wanted, []).append(wait)
        for start in range(0, len(to_read), BLOCKS_PER_READ):
            self._read_later_locked(found, book.kind, to_read[start : start + BLOCKS_PER_READ])
        under_way = self._reading | self._queued if wait.pending else set()
        for wanted in wait.pending - under_way:  # found no place
            self._settle_locked(wanted)
        return wait

    def _can_read(self, found: Namespace, book: SummaryBook, key: BlockKey, row: int) -> bool:
        shelf = found.summaries
        assert shelf is not None, "it has a book"
        is_there = shelf.stored.kind is book.kind and found.index.has(row, TierKind.NVME)
        if not is_there or key in shelf.barren:
            return False
        in_memory = found.index.has(row, TierKind.MEMORY)
        return not (in_memory and shelf.stored.is_lossy)  # it speaks for another content

    def _settle_locked(self, wanted: Wanted) -> None:
        for wait in self._waits.pop(wanted, []):
            wait.settle(wanted)

    def end_waits_locked(self, session: SessionId | None = None) -> None:
        """Let calls that wait answer now: an ended session's, or all, for good, when None."""
        self._interrupted = self._interrupted or session is None
        for waits in self._waits.values():
            for wait in waits:
                if session in (None, wait.session):
                    wait.done.set()

    def _forget_locked(self, wait: _Wait) -> None:
        for wanted in wait.pending:
            waits = self._waits.get(wanted, [])
            if wait in waits:
                waits.remove(wait)
            if not waits:
                self._waits.pop(wanted, None)

    # ------------------------------------------------------------ reading

    def _read_later_locked(
        self, found: Namespace, kind: SummaryKind, keys: Sequence[BlockKey]
    ) -> None:
        index = found.index
        places = [(index.slot(index.find(key), TierKind.NVME), key) for key in keys]

        def job() -> None:
            self._read(found, kind, places)

        with contextlib.suppress(CapacityError, TierUnavailableError):
            self._pool.submit(Priority.LOAD, job)
            self._reading.update((found.id, key) for key in keys)
            found.num_copying += 1

    def _read(
        self, found: Namespace, kind: SummaryKind, places: Sequence[tuple[SlotId, BlockKey]]
    ) -> None:
        """One job of the pool. Nothing is lost by what cannot be read but a summary."""
        areas = found.nvme.summaries if found.nvme is not None else None
        assert areas is not None, "it has a stored kind"
        summaries: Sequence[StoredSummary | None] = [None] * len(places)
        try:
            summaries = areas.read(places)
        except (UcmError, OSError) as error:
            _log.warning("reading %d summaries: %s", len(places), error)
        finally:  # whatever went wrong: the namespace is held, and somebody may wait
            self._keep_read(found, kind, places, summaries)

    def _keep_read(
        self,
        found: Namespace,
        kind: SummaryKind,
        places: Sequence[tuple[SlotId, BlockKey]],
        summaries: Sequence[StoredSummary | None],
    ) -> None:
        with self._state.lock:
            shelf = found.summaries
            assert shelf is not None, "a namespace in use is not closed"
            for (slot, key), summary in zip(places, summaries, strict=True):
                self._reading.discard((found.id, key))
                row = found.index.find(key)
                is_current = row != NO_ROW and found.index.slot(row, TierKind.NVME) == slot
                if is_current and summary is not None:
                    content = content_of(summary.checksums)
                    shelf.books[kind].put(
                        key, summary.data, content, SummarySource.NVME, is_stored=True
                    )
                elif is_current:
                    shelf.note_barren(key)
                self._after_read_locked(found, kind, key, row)
            self._end_use_locked(found)

    def _after_read_locked(
        self, found: Namespace, kind: SummaryKind, key: BlockKey, row: int
    ) -> None:
        """Answer who waits; unless the block is in memory and can still get its summary there."""
        assert found.summaries is not None
        book, wanted = found.summaries.books[kind], (found.id, key)
        if row != NO_ROW and found.index.has(row, TierKind.MEMORY):
            if _entry(found, book, key, row) is None and wanted in self._waits:
                self._want_computed_locked(found, key)
            if wanted in self._queued:
                return
        self._settle_locked(wanted)

    # ---------------------------------------------------------- computing

    def _want_computed_locked(self, found: Namespace, key: BlockKey) -> None:
        """Queue the computation of what the books lack of a block; not if too many wait."""
        wanted = (found.id, key)
        if wanted in self._queued or self._closed:
            return
        if self._computing is None:
            limit = self._state.config.summaries.max_queued_blocks
            self._computing = TransferPool(1, limit, name="ucm-summaries")
        try:
            self._computing.submit(Priority.WRITE, lambda: self._compute(found, key))
        except (CapacityError, TierUnavailableError):
            self._state.metrics.add("ucm_summaries_dropped_total")
            return
        self._queued.add(wanted)

    def _compute(self, found: Namespace, key: BlockKey) -> None:
        """One job of the computing thread."""
        state = self._state
        with state.lock:
            task = self._begin_locked(found, key)
        if task is None:
            return
        made: list[tuple[SummaryKind, bytes]] = []
        try:
            made = _made(found, task)
        except UcmError as error:
            _log.warning("computing the summary of a block: %s", error)
        finally:
            if not made:
                state.recheck(found, key)
            with state.lock:
                self._keep_locked(found, task, made)

    def _begin_locked(self, found: Namespace, key: BlockKey) -> _Task | None:
        """Hold the block, if it is in memory and lacks a summary; else answer who waits."""
        self._queued.discard((found.id, key))
        row = found.index.find(key)
        is_open = self._state.namespaces.get_locked(found.id) is found
        slot = found.index.slot(row, TierKind.MEMORY) if is_open and row != NO_ROW else NO_SLOT
        shelf = found.summaries
        if slot == NO_SLOT or shelf is None or self._closed:
            self._settle_locked((found.id, key))
            return None
        books = shelf.books.values()
        kinds = tuple(book.kind for book in books if _entry(found, book, key, row) is None)
        if not kinds:
            self._settle_locked((found.id, key))
            return None
        found.index.pin(row)
        found.num_copying += 1
        self._queued.add((found.id, key))  # until it is made
        return _Task(key, row, slot, found.memory.checksums(slot), kinds)

    def _keep_locked(
        self, found: Namespace, task: _Task, made: list[tuple[SummaryKind, bytes]]
    ) -> None:
        assert found.summaries is not None
        content = content_of(task.checksums)
        is_stored = found.memory.was_lossy(task.slot)
        if found.index.slot(task.row, TierKind.MEMORY) == task.slot:
            for kind, data in made:
                book = found.summaries.books[kind]
                book.put(task.key, data, content, SummarySource.COMPUTED, is_stored=is_stored)
        found.index.unpin(task.row)
        self._queued.discard((found.id, task.key))
        self._settle_locked((found.id, task.key))
        self._end_use_locked(found)

    def close(self, *, timeout_s: float) -> bool:
        """Compute no more and let everybody who waits answer; False on time-out."""
        with self._state.lock:
            self._closed = True
            self.end_waits_locked()
        return self._computing is None or self._computing.close(timeout_s=timeout_s)


@dataclass(frozen=True, slots=True)
class _Task:
    """A block whose summaries are being computed; it is pinned."""

    key: BlockKey
    row: int
    slot: SlotId
    checksums: tuple[int, ...]
    kinds: tuple[SummaryKind, ...]


def _made(found: Namespace, task: _Task) -> list[tuple[SummaryKind, bytes]]:
    """The summaries of a block in memory; none if its bytes are not what they were.

    From a copy that was verified, so that a summary speaks for what its checksums name.
    """
    layout = found.layout
    data = memoryview(bytes(found.memory.view(task.slot)))
    if not verify(layout, data, task.checksums):
        return []
    made = []
    for kind in task.kinds:
        records = summarize_blocks(layout, kind, [data])[0]
        made.append((kind, encode_summary(layout, kind, records, task.checksums)))
    return made


def _entry(found: Namespace, book: SummaryBook, key: BlockKey, row: int) -> BookEntry | None:
    """The entry of a block, if it speaks for the bytes that a load of it would give."""
    entry = book.get(key)
    if entry is None:
        return None
    slot = found.index.slot(row, TierKind.MEMORY)
    if slot != NO_SLOT:
        content = checksum(found.memory.packed_checksums([slot]))
        return entry if entry.content == content else None
    shelf = found.summaries
    is_sure = shelf is not None and (entry.is_stored or not shelf.stored.is_lossy)
    return entry if is_sure else None
