"""Encoded summaries in memory: what selections are made from instead of the blocks.

    SummaryShelf   of a namespace: a book for each kind that somebody opened it with
    SummaryBook    one kind: slots of one sealed arena, by key, the least recently used goes first
    SummaryBudget  what all books may touch together

A summary speaks for one content, named by `content_of` its block's slab checksums, and is in a book
only after `decode_summary` believed it on the daemon's own copy. Who uses one compares the content
with the block's, as far as it is known; a pinned slot stays as it is, even when its entry is
replaced. Everything is guarded by the manager's lock; nothing here blocks, reads a disk or computes
a summary (`ucm.summary_fills` does). Clients map an arena read-only, as they do with blocks.

Envelope: 36 KiB a block (SmolLM2-135M, gsa-k4): a copy of 4 us each, done under the lock.
"""

from __future__ import annotations

import enum
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ucm.kernels.summary_record import area_bytes, content_of, summary_bytes
from ucm.storage.arena import Arena, ArenaKind
from ucm.storage.tier import ReadOutcome, SlotId

from .api import SlabChecksums
from .errors import CapacityError
from .layout import ALIGNMENT_BYTES, KvDtype, KvLayout
from .metrics import Metrics
from .types import BlockKey, SummaryKind

MAX_BARREN = 65536
"""Blocks without a summary on NVMe that are remembered; then it begins anew."""


class SummarySource(enum.StrEnum):
    """Where a summary came from."""

    CLIENT = "client"
    NVME = "nvme"
    COMPUTED = "computed"


class SummaryBudget:
    """Host memory of all books. An arena gives no pages back, so what was touched counts.

    Thread-safe by itself: a namespace is closed without the manager's lock.
    """

    def __init__(self, capacity_bytes: int, metrics: Metrics) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.metrics = metrics
        self._lock = threading.Lock()

    def take(self, size_bytes: int, *, held_bytes: int) -> bool:
        """Let a book that holds `held_bytes` touch more: up to half of what the others leave."""
        with self._lock:
            if held_bytes + size_bytes > self.capacity_bytes - self.used_bytes:
                return False
            self._change_locked(size_bytes)
            return True

    def give_back(self, size_bytes: int) -> None:
        """A book was closed."""
        with self._lock:
            self._change_locked(-size_bytes)

    def _change_locked(self, size_bytes: int) -> None:
        self.used_bytes += size_bytes
        self.metrics.set("ucm_summaries_bytes", self.used_bytes)


@dataclass(slots=True, eq=False)
class BookEntry:
    """One summary in a book."""

    slot: SlotId
    content: int
    """`content_of` the checksums of the block that it speaks for."""
    is_stored: bool
    """Whether that is the content of the block's copy on NVMe, even if a codec lost precision."""


class SummaryBook:
    """Summaries of one kind of one namespace's blocks. Needs the manager's lock throughout."""

    def __init__(self, layout: KvLayout, kind: SummaryKind, budget: SummaryBudget) -> None:
        """Create the arena; it costs nothing until it is written.

        Raises:
            LayoutMismatchError: this kind cannot describe such blocks.
            CapacityError: the kernel refuses so large a mapping, or not one summary would fit.
        """
        self.kind = kind
        self.layout = layout
        self.summary_bytes = summary_bytes(layout, kind)
        """Length of an encoded summary."""
        self.slot_bytes = area_bytes(layout, kind)
        """Distance of two slots, and length of an area on the disk and in a staging run."""
        num_slots = budget.capacity_bytes // self.slot_bytes
        if num_slots < 1:
            raise CapacityError(
                f"a {kind} summary takes {self.slot_bytes} bytes, summaries.capacity_bytes is "
                f"{budget.capacity_bytes}: raise it"
            )
        self.arena = Arena(_page_layout(self.slot_bytes), num_slots, ArenaKind.READ_ONLY)
        self._budget = budget
        self._entries: OrderedDict[BlockKey, BookEntry] = OrderedDict()
        self._pins: Counter[SlotId] = Counter()
        self._ownerless: set[SlotId] = set()
        self._to_erase: set[SlotId] = set()
        """Of deleted blocks: zeroed when nobody pins them any more."""
        self._free: list[SlotId] = []
        self._num_touched = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"SummaryBook({self.kind.value}, {len(self)} of {self.arena.num_slots})"

    @property
    def touched_bytes(self) -> int:
        """Host memory that it costs."""
        return self._num_touched * self.slot_bytes

    def get(self, key: BlockKey) -> BookEntry | None:
        """The entry of that key, which becomes the most recently used."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(
        self,
        key: BlockKey,
        data: bytes,
        content: int,
        source: SummarySource,
        *,
        is_stored: bool = False,
    ) -> bool:
        """Keep a summary that was believed; it replaces what the key had.

        Args:
            key: of the block.
            data: encoded, `summary_bytes` long; decoded and checked by the caller.
            content: of the block that it speaks for.
            source: where it came from, for the metrics.
            is_stored: see `BookEntry.is_stored`.

        Returns:
            False when there is no room: all is pinned.
        """
        assert len(data) == self.summary_bytes, (len(data), self.summary_bytes)
        entry = self._entries.get(key)
        if entry is not None and entry.content == content:
            entry.is_stored = entry.is_stored or is_stored
            self._entries.move_to_end(key)
            return True
        self.drop(key)
        slot = self._take_slot()
        if slot is None:
            return False
        self.arena.view(slot)[: self.summary_bytes] = data
        self._entries[key] = BookEntry(slot, content, is_stored)
        self._budget.metrics.add("ucm_summaries_kept_total", source=source.value)
        return True

    def drop(self, key: BlockKey, *, erase: bool = False) -> None:
        """Forget the summary of a block, if there is one; `erase`: leave no byte of it."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        if erase:
            self._to_erase.add(entry.slot)
        if entry.slot in self._pins:
            self._ownerless.add(entry.slot)
        else:
            self._give_back(entry.slot)

    def _give_back(self, slot: SlotId) -> None:
        if slot in self._to_erase:
            self._to_erase.remove(slot)
            self.arena.view(slot)[:] = bytes(self.slot_bytes)
        self._free.append(slot)

    def view(self, slot: SlotId) -> memoryview:
        """The summary in a slot, read-only; stays as it is while the slot is pinned."""
        return self.arena.view(slot)[: self.summary_bytes].toreadonly()

    def pin(self, slots: Iterable[SlotId]) -> None:
        """Keep slots as they are until `unpin`."""
        self._pins.update(slots)

    def unpin(self, slots: Iterable[SlotId]) -> None:
        """Undo one `pin` of each."""
        for slot in slots:
            self._pins[slot] -= 1
            if self._pins[slot] > 0:
                continue
            del self._pins[slot]
            if slot in self._ownerless:
                self._ownerless.remove(slot)
                self._give_back(slot)

    def close(self) -> None:
        """Give the memory back. Views that are still held keep their pages alive."""
        self._entries.clear()
        self._budget.give_back(self.touched_bytes)
        self._num_touched = 0
        self.arena.close()

    def check_integrity(self) -> list[str]:
        """Every violated invariant, in words."""
        held = [entry.slot for entry in self._entries.values()]
        slots = [*held, *self._ownerless, *self._free]
        problems = []
        if sorted(slots) != list(range(self._num_touched)):
            problems.append(f"{self.kind} book: slots are lost or used twice")
        if not self._ownerless <= self._pins.keys() <= {*held, *self._ownerless}:
            problems.append(f"{self.kind} book: a pinned slot holds nothing")
        return problems

    def _take_slot(self) -> SlotId | None:
        if self._free:
            return self._free.pop()
        is_left = self._num_touched < self.arena.num_slots
        if is_left and self._budget.take(self.slot_bytes, held_bytes=self.touched_bytes):
            self._num_touched += 1
            return SlotId(self._num_touched - 1)
        for key, entry in self._entries.items():
            if entry.slot not in self._pins:
                del self._entries[key]
                self._budget.metrics.add("ucm_summaries_evicted_total")
                return entry.slot
        return None


@dataclass(frozen=True, slots=True)
class StoredKind:
    """What a namespace keeps in front of its blocks on NVMe."""

    kind: SummaryKind | None = None
    """None: nothing."""
    is_lossy: bool = False
    """Whether a block's content may change when it is written there."""


class SummaryShelf:
    """The books of one namespace, and what is known of its blocks. Needs the manager's lock."""

    def __init__(
        self, layout: KvLayout, stored: StoredKind, compute: Callable[[BlockKey], None]
    ) -> None:
        """Begin without a book.

        Args:
            layout: of the blocks.
            stored: what NVMe keeps.
            compute: wants the summaries of a block in memory made, some time; never blocks.
        """
        self.layout = layout
        self.stored = stored
        self.barren: set[BlockKey] = set()
        """Blocks whose area on NVMe held nothing; they are not read for it again."""
        self._compute = compute
        self._books: dict[SummaryKind, SummaryBook] = {}

    @property
    def books(self) -> Mapping[SummaryKind, SummaryBook]:
        """By kind."""
        return self._books

    def open(self, kind: SummaryKind, budget: SummaryBudget) -> SummaryBook:
        """The book of a kind, made if need be.

        Raises:
            LayoutMismatchError, CapacityError: see `SummaryBook`.
        """
        book = self._books.get(kind)
        if book is None:
            book = self._books[kind] = SummaryBook(self.layout, kind, budget)
        return book

    def arrived(
        self,
        key: BlockKey,
        checksums: SlabChecksums,
        given: tuple[SummaryKind, bytes] | None,
        source: SummarySource,
    ) -> None:
        """A block is in memory now: keep the summary that came with it, have others computed.

        What a book has of another content of that key is forgotten.

        Args:
            key: of the block.
            checksums: of its slabs.
            given: a summary that was believed for these checksums; None when there was none.
            source: where block and summary came from.
        """
        self.barren.discard(key)
        content, is_short = content_of(checksums), False
        for kind, book in self._books.items():
            if given is not None and given[0] is kind:
                is_stored = source is SummarySource.NVME
                book.put(key, given[1], content, source, is_stored=is_stored)
                continue
            entry = book.get(key)
            if entry is None or entry.content != content:
                book.drop(key)
                is_short = True
        if is_short:
            self._compute(key)

    def promoted(self, key: BlockKey, outcome: ReadOutcome) -> None:
        """A block was read from NVMe into memory, with its summary if it had one; see `arrived`."""
        kind, data = self.stored.kind, outcome.summary
        given = (kind, data) if kind and data else None
        self.arrived(key, outcome.checksums, given, SummarySource.NVME)

    def forget(self, key: BlockKey) -> None:
        """A block was deleted: leave nothing of what is known of it."""
        self.barren.discard(key)
        for book in self._books.values():
            book.drop(key, erase=True)

    def note_barren(self, key: BlockKey) -> None:
        """NVMe has no summary of this block."""
        if len(self.barren) >= MAX_BARREN:
            self.barren.clear()
        self.barren.add(key)

    def to_store(self, key: BlockKey, checksums: SlabChecksums) -> bytes:
        """The summary to write in front of a block on NVMe; b"" when there is none of it."""
        book = self._books.get(self.stored.kind) if self.stored.kind else None
        entry = book.get(key) if book is not None else None
        if book is None or entry is None or entry.content != content_of(checksums):
            return b""
        return bytes(book.view(entry.slot))

    def close(self) -> None:
        """Give all memory back."""
        for book in self._books.values():
            book.close()
        self._books.clear()

    def check_integrity(self) -> list[str]:
        """Every violated invariant, in words."""
        return [problem for book in self._books.values() for problem in book.check_integrity()]


def _page_layout(slot_bytes: int) -> KvLayout:
    """A "block" of `slot_bytes`, whole pages: 2 x pages x 512 x 4 bytes."""
    return KvLayout(
        num_layers=1,
        num_kv_heads=slot_bytes // ALIGNMENT_BYTES,
        head_dim=512,
        block_tokens=1,
        dtype=KvDtype.FLOAT32,
    )
