"""Opening a namespace: decide what of its files can be believed, and repair the rest.

    clean mark matches data.mdb      -> believe the index, or the snapshot that it vouches for
    no mark, `verify` finds nothing  -> believe its structure, check the header behind every record
    otherwise                        -> set the index aside, make a new one from the slot headers

Records that cannot be right (damaged, two for one slot, in a retired or quarantined place, without
their parent) are dropped, durably, before their slots can be handed out again. A rebuild may find
blocks that were written but never committed: their bytes are right, so they are kept. Never reads
slabs: a read checks those. Whatever the files hold, opening ends in a namespace that works; only a
damaged superblock, which fixes where everything lies, needs `ucm fsck --repair`.

Envelope: 4 KiB for each slot after an unclean end, in parallel; after a clean one the digests of
the index (140 bytes a block) and of its snapshot (52), 0.5 s for a million blocks.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ucm.errors import CapacityError, CorruptionError, TierUnavailableError
from ucm.types import ROOT_KEY, BlockKey

from . import index as index_file
from .file_io import IoRequest, aligned_buffer, sync_folder
from .format import HEADER_BYTES, decode_header, is_blank
from .index import BlockIndex, IndexRecord
from .slots import SlotState, SlotTable
from .stray_files import remove
from .tier import SlotId

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from .entry_table import EntryTable
    from .file_io import FileIo
    from .format import SlotHeader, Superblock
    from .segments import Segments

log = logging.getLogger(__name__)

Word = TypeVar("Word")

HEADERS_PER_BATCH = 1024
"""4 MiB of headers in memory at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceFiles:
    """What recovery works on."""

    folder: Path
    superblock: Superblock
    segments: Segments
    io: FileIo
    index_map_bytes: int

    @property
    def index_folder(self) -> Path:
        """Where LMDB lies."""
        return self.folder / "index"


@dataclass(frozen=True, slots=True)
class Recovered:
    """A namespace that can be used."""

    index: BlockIndex
    slots: SlotTable
    last_generation: int
    """The largest generation found."""
    was_rebuilt: bool
    dropped_blocks: int
    table: EntryTable | None = None
    """All blocks, where a snapshot had them ready."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that cannot be right."""

    key: BlockKey
    slot: SlotId | None
    """None when the record does not even say; else free once the drop is durable."""
    reason: str
    parent: BlockKey | None = None
    """Set when only its parent's absence makes it unusable."""


@dataclass(slots=True)
class Reconciliation:
    """Records that may stay and those that must go."""

    kept: list[IndexRecord] = field(default_factory=list)
    """A parent before its children, otherwise oldest first."""
    dropped: list[Dropped] = field(default_factory=list)

    def drop(
        self, record: IndexRecord, reason: str, *, missing_parent: BlockKey | None = None
    ) -> None:
        """Let a record go."""
        self.dropped.append(Dropped(record.key, record.slot, reason, missing_parent))


@dataclass(frozen=True, slots=True)
class ScannedHeader:
    """What stands in front of one slot."""

    slot: SlotId
    header: SlotHeader | None
    """None unless it is whole and this slot's."""
    is_readable: bool
    is_blank: bool


def recover(files: NamespaceFiles) -> Recovered:
    """Open the index of a namespace, whatever state it is in.

    Raises:
        TierUnavailableError, CapacityError: the disk does not even allow a new index.
    """
    snapshot = index_file.read_snapshot(files.index_folder)
    index, is_clean, was_rebuilt = _open_index(files)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(index.close, clean=False)
        if is_clean and snapshot is not None and _agrees(files, index, snapshot):
            on_failure.pop_all()
            return _from_snapshot(files, index, snapshot)
        result = reconcile(files, index, check_headers=not is_clean and not was_rebuilt)
        slots = _slot_table(files, index, result)
        on_failure.pop_all()
    if result.dropped:
        log.warning("%s: dropped %d unusable records", files.folder, len(result.dropped))
    last = max((record.generation for record in result.kept), default=0)
    return Recovered(index, slots, last, was_rebuilt, len(result.dropped))


def _agrees(files: NamespaceFiles, index: BlockIndex, snapshot: EntryTable) -> bool:
    """Whether every block of a snapshot is where it can be read; else some must be dropped."""
    for segment in index.retired():
        files.segments.retire(segment)
    barred = index.quarantined()
    return files.segments.are_there(snapshot.slots) and not np.isin(snapshot.slots, barred).any()


def _from_snapshot(files: NamespaceFiles, index: BlockIndex, snapshot: EntryTable) -> Recovered:
    slots = _free_slots(files.segments)
    slots.fill(snapshot.slots, snapshot.generations)
    _bar(files, index, slots)
    last = int(snapshot.generations.max(initial=0))
    return Recovered(index, slots, last, was_rebuilt=False, dropped_blocks=0, table=snapshot)


def _bar(files: NamespaceFiles, index: BlockIndex, slots: SlotTable) -> None:
    """Take out of use what is quarantined or retired, or has left the disk."""
    slots.quarantine(index.quarantined())
    for segment in files.segments.retired:
        slots.quarantine([SlotId(slot) for slot in files.segments.slots_of(segment)])
    for segment in files.segments.left:
        left = [SlotId(slot) for slot in files.segments.slots_of(segment)]
        slots.change(left, SlotState.FREE, SlotState.ABSENT)


def reconcile(files: NamespaceFiles, index: BlockIndex, *, check_headers: bool) -> Reconciliation:
    """Sort the index's records into those that can be right and those that cannot; no writes.

    Raises:
        TierUnavailableError: LMDB cannot read.
    """
    for segment in index.retired():
        files.segments.retire(segment)
    barred = set(index.quarantined())
    result = Reconciliation()
    newest: dict[SlotId, IndexRecord] = {}
    for item in index.records():
        if not isinstance(item, IndexRecord):
            result.dropped.append(Dropped(item, None, "its record is damaged"))
        elif files.segments.locate(item.slot) is None or item.slot in barred:
            result.drop(item, "its slot does not exist or is out of use")
        else:
            rival = newest.get(item.slot)
            if rival is not None:
                older = min(rival, item, key=_by_generation)
                result.drop(older, "a newer block has its slot")
            newest[item.slot] = item if rival is None else max(rival, item, key=_by_generation)
    candidates = list(newest.values())
    if check_headers:
        candidates = _with_matching_headers(files, candidates, result)
    result.kept, orphans = order_by_chain(candidates)
    for orphan in orphans:
        result.drop(orphan, "its parent is not stored", missing_parent=orphan.parent)
    return result


def order_by_chain(
    records: Iterable[IndexRecord],
) -> tuple[list[IndexRecord], list[IndexRecord]]:
    """Order records: a parent before its children, otherwise oldest first.

    Returns:
        The ordered ones, and those whose chain does not reach the root.
    """
    ordered: list[IndexRecord] = []
    seen = {ROOT_KEY}
    waiting: dict[BlockKey, list[IndexRecord]] = {}
    for record in sorted(records, key=_by_generation):
        if record.parent not in seen:
            waiting.setdefault(record.parent, []).append(record)
            continue
        admitted = [record]
        while admitted:
            current = admitted.pop()
            ordered.append(current)
            seen.add(current.key)
            admitted.extend(reversed(waiting.pop(current.key, [])))
    return ordered, [record for group in waiting.values() for record in group]


def causes_of_loss(
    found: Sequence[tuple[Word, Dropped]],
) -> Iterator[tuple[Word, Dropped, int]]:
    """Every cause of a loss once, with the number of blocks that only hang on it.

    Args:
        found: what is dropped, each with a word that says how it was found.
    """
    parents = {dropped.key: dropped.parent for _, dropped in found}
    tops: dict[bytes, bytes] = {}
    for key in parents:
        top, climbed = key, dict[bytes, None]()
        while top not in tops:
            climbed[top] = None
            parent = parents[top]
            if parent not in parents or parent in climbed:  # a cause, or records in a circle
                break
            top = parent
        tops.update(dict.fromkeys(climbed, tops.get(top, top)))
    num_in_all = Counter(tops.values())
    for word, dropped in found:
        if tops[dropped.key] == dropped.key:
            yield word, dropped, num_in_all[dropped.key] - 1


def scan_headers(files: NamespaceFiles, slots: Sequence[SlotId]) -> Iterator[ScannedHeader]:
    """Read the headers of `slots`, in order."""
    buffer = aligned_buffer(HEADERS_PER_BATCH * HEADER_BYTES)
    for start in range(0, len(slots), HEADERS_PER_BATCH):
        part = slots[start : start + HEADERS_PER_BATCH]
        views = [buffer[i * HEADER_BYTES : (i + 1) * HEADER_BYTES] for i in range(len(part))]
        places = [files.segments.locate(slot) for slot in part]
        requests = [
            IoRequest(place[0], place[1], (view,))
            for place, view in zip(places, views, strict=True)
            if place is not None
        ]
        codes = iter(files.io.read_batch(requests))
        for slot, place, view in zip(part, places, views, strict=True):
            is_read = place is not None and next(codes) == 0
            header = decode_header(files.superblock, slot, view) if is_read else None
            yield ScannedHeader(slot, header, is_read, is_read and is_blank(view))


def rebuild_index(files: NamespaceFiles) -> None:
    """Make a new index from the slot headers; the old one is kept once as `index.damaged`.

    A crash in between leaves no index, and so another rebuild.

    Raises:
        TierUnavailableError, CapacityError: the disk does not allow it.
    """
    fresh = files.folder / "index.new"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        newest = _newest_by_key(files)
        index = BlockIndex(fresh, files.index_map_bytes)
        try:
            index.put(newest)
        finally:
            index.close(clean=False)
        set_index_aside(files)
        fresh.rename(files.index_folder)
        sync_folder(files.folder)
    except OSError as error:
        raise TierUnavailableError(
            f"cannot rebuild the index of {files.folder}: {error}"
        ) from error
    log.warning("%s: rebuilt the index: %d blocks found", files.folder, len(newest))


def set_index_aside(files: NamespaceFiles) -> None:
    """Move the index to `index.damaged`, in place of an older one.

    Raises:
        OSError: the folder cannot be changed.
    """
    damaged = files.folder / "index.damaged"
    remove(damaged)
    if files.index_folder.exists():
        files.index_folder.rename(damaged)


def _open_index(files: NamespaceFiles) -> tuple[BlockIndex, bool, bool]:
    """The index, whether it was closed cleanly, and whether it had to be rebuilt."""
    folder = files.index_folder
    is_new = not (folder / "data.mdb").exists() and files.segments.num_segments == 0
    is_clean = is_new or index_file.is_vouched(folder)
    problems = [] if is_clean else index_file.verify(folder)
    if not problems:
        try:
            index = BlockIndex(folder, files.index_map_bytes)
        except (CorruptionError, TierUnavailableError) as error:
            problems = [str(error)]
        else:
            return index, is_clean, False
    log.warning("%s: the index is unusable: %s", files.folder, problems[0])
    rebuild_index(files)
    return BlockIndex(folder, files.index_map_bytes), False, True


def _slot_table(files: NamespaceFiles, index: BlockIndex, result: Reconciliation) -> SlotTable:
    """The state of every slot, once what must go is durably gone."""
    slots = _free_slots(files.segments)
    if result.dropped:
        try:
            index.drop(dropped.key for dropped in result.dropped)
        except (CapacityError, TierUnavailableError) as error:
            # their records are still there, so their slots must not be written again
            log.warning("%s: cannot drop records yet: %s", files.folder, error)
            slots.quarantine([item.slot for item in result.dropped if item.slot is not None])
    _bar(files, index, slots)
    used = [record.slot for record in result.kept]
    slots.change(used, SlotState.FREE, SlotState.USED)
    slots.set_generations(used, [record.generation for record in result.kept])
    return slots


def _free_slots(segments: Segments) -> SlotTable:
    """A table of all slots, as if none were used."""
    slots = SlotTable(0)
    for segment in range(segments.num_segments):
        append_segment(slots, segments, segment)
    return slots


def append_segment(slots: SlotTable, segments: Segments, segment: int) -> None:
    """Append the slot numbers of the next segment to the table."""
    numbers = segments.slots_of(segment)
    num_real = segments.num_real_slots(segment)
    full = segments.is_full_slot(SlotId(numbers.start))
    slots.grow(num_real, full=full)
    slots.grow(len(numbers) - num_real, SlotState.NO_PLACE, full=full)


def _with_matching_headers(
    files: NamespaceFiles, records: list[IndexRecord], result: Reconciliation
) -> list[IndexRecord]:
    records = sorted(records, key=lambda record: record.slot)
    scan = scan_headers(files, [record.slot for record in records])
    matching = []
    for record, scanned in zip(records, scan, strict=True):
        if scanned.header is not None and describes(scanned.header, record):
            matching.append(record)
        else:
            result.drop(record, "the header in its slot is another or damaged")
    return matching


def describes(header: SlotHeader, record: IndexRecord) -> bool:
    """Whether a slot's header and its index record are about the same write."""
    return (header.key, header.parent, header.generation) == (
        record.key,
        record.parent,
        record.generation,
    )


def _newest_by_key(files: NamespaceFiles) -> list[IndexRecord]:
    newest: dict[BlockKey, IndexRecord] = {}
    slots = [SlotId(slot) for slot in range(files.segments.num_slots)]
    for scanned in scan_headers(files, slots):
        header = scanned.header
        if header is None:
            continue
        record = IndexRecord(header.key, header.parent, scanned.slot, header.generation)
        rival = newest.get(record.key)
        if rival is None or rival.generation < record.generation:
            newest[record.key] = record
    return list(newest.values())


def _by_generation(record: IndexRecord) -> int:
    return record.generation
