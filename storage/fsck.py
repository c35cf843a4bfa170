"""Check a data folder offline, byte by byte, and repair what can be: `ucm fsck`.

    names        nothing foreign, left over or open to others  repair: put away, or chmod
    registry     sound, and right about its documents         repair: move it aside
    superblock   readable, of our version, the folder's own    repair: move the namespace aside
    index        sound LMDB (walked, not mapped)               repair: rebuild from slot headers
    segments     all there, whole, in use                     repair: complete, or delete a retired
    deletions    no record or header of a deleted block       repair: finish the deletion
    records      each has its slot, header and parent         repair: drop the record
    slabs        each matches its checksum                    repair: drop the record, free the slot
    summaries    each speaks for its block                    repair: blank the area (harmless)
    slots        nothing but what the index knows             repair: blank the header (harmless)

Repair never invents a block: it ends with fewer of them, and all that are left are right. Nothing
is changed without `repair`. Takes the folder's lock, so no daemon may run on it. Reads everything:
expect the disk's sequential rate.
"""

from __future__ import annotations

import contextlib
import logging
import stat
from typing import TYPE_CHECKING

from ucm.errors import ConfigError, CorruptionError, UcmError
from ucm.path_errors import reachable

from . import index as index_file
from .budget import SegmentBudget
from .encoded_io import slot_io_for
from .file_io import PosixFileIo, aligned_buffer
from .folder import current_uid, list_namespaces, locked_folder, read_superblock, translate_os_error
from .format import HEADER_BYTES
from .fsck_collections import DeletionProof
from .fsck_report import FindingKind, FsckFinding, FsckReport
from .index import BlockIndex, IndexRecord
from .recovery import (
    Dropped,
    NamespaceFiles,
    causes_of_loss,
    order_by_chain,
    rebuild_index,
    reconcile,
    scan_headers,
)
from .segments import Segments, segment_files, segment_path
from .stray_files import find_strays, move_aside, put_away, remove
from .summary_areas import blank_areas, filled_areas
from .tier import IoStatus, SlotId, SlotRead

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ucm.types import NamespaceId

    from .file_io import FileIo
    from .format import Superblock

__all__ = ["FindingKind", "FsckFinding", "FsckReport", "check_store"]

log = logging.getLogger(__name__)

IO_THREADS = 8
BATCH_BYTES = 64 << 20
"""Blocks in memory at once."""
MIN_MAP_BYTES = 1 << 30


def check_store(path: Path, repair: bool, io: FileIo | None = None) -> FsckReport:
    """Check the data folder `path`, and with `repair` mend it.

    Blocks for as long as reading all of it takes.

    Raises:
        ConfigError: no data folder there, a daemon runs on it, or it is another user's.
        CapacityError, TierUnavailableError: the lock cannot be taken.
    """
    _check_is_store(path)
    own_io = PosixFileIo(IO_THREADS) if io is None else io
    report = FsckReport()
    try:
        with locked_folder(path):
            _check_names(path, report, repair=repair)
            _check_namespaces(path, own_io, report, repair=repair)
    finally:
        if io is None:
            own_io.close()
    return report


def _check_namespaces(path: Path, io: FileIo, report: FsckReport, *, repair: bool) -> None:
    with DeletionProof(path, report, repair=repair) as proof:
        for namespace in list_namespaces(path / "ns"):
            report.num_namespaces += 1
            _NamespaceCheck((path, namespace), io, report, proof, repair=repair).run()


def _check_is_store(path: Path) -> None:
    with reachable(path, "check it as that user", ConfigError):
        is_there, is_store = path.exists(), (path / "ns").is_dir()
        owner = path.stat().st_uid if is_there else current_uid()
    if not is_there:
        raise ConfigError(f"there is no folder {path}: give the data folder of a daemon")
    if not path.is_dir():
        raise ConfigError(f"{path} is a file: give the data folder of a daemon")
    if owner != current_uid():
        raise ConfigError(
            f"{path} belongs to user {owner}, this process runs as user {current_uid()}: check it "
            "as its owner"
        )
    if not is_store:
        raise ConfigError(
            f"{path} is not a data folder: it has no `ns` in it, which a daemon makes when it "
            "first starts on a folder"
        )


def _check_names(path: Path, report: FsckReport, *, repair: bool) -> None:
    """Report what lies around; repair puts it away."""
    try:
        strays = list(find_strays(path / "ns"))
    except OSError as error:
        raise translate_os_error(error, f"cannot list {path / 'ns'}") from error
    for stray in strays:
        finding = FsckFinding(FindingKind(stray.kind.value), stray.namespace[:8], stray.what)
        report.findings.append(finding)
        if not repair:
            continue
        try:
            put_away(stray, path / "quarantine")
            finding.fixed = True
        except OSError as error:
            finding.what += f"; it stays: {error}"


class _NamespaceCheck:
    """One namespace's check; findings go to `report`."""

    def __init__(
        self,
        place: tuple[Path, NamespaceId],
        io: FileIo,
        report: FsckReport,
        proof: DeletionProof,
        *,
        repair: bool,
    ) -> None:
        path, namespace = place
        self._path = path
        self._proof = proof
        self._folder = path / "ns" / namespace.hex()
        self._namespace = namespace
        self._io = io
        self._report = report
        self._repair = repair

    def run(self) -> None:
        """Check everything; whatever stops it is a finding."""
        superblock = self._check_superblock()
        if superblock is None:
            return
        try:
            self._check_segment_files(superblock)
            with self._opened(superblock) as files:
                index = self._open_index(files)
                if index is not None:
                    self._check_contents(files, index)
        except (UcmError, OSError) as error:
            self._find(FindingKind.INDEX, f"the check cannot go on: {error}")

    def _find(self, kind: FindingKind, what: str) -> FsckFinding:
        return self._report.find(kind, self._namespace.hex()[:8], what)

    def _check_superblock(self) -> Superblock | None:
        try:
            superblock = read_superblock(self._folder)
            if superblock.namespace == self._namespace:
                return superblock
            finding = self._find(FindingKind.SUPERBLOCK, "it is another namespace's")
        except ConfigError as error:
            self._find(FindingKind.VERSION, str(error))
            return None
        except CorruptionError as error:
            finding = self._find(FindingKind.SUPERBLOCK, str(error))
        except UcmError as error:
            self._find(FindingKind.SUPERBLOCK, str(error))
            return None
        if self._repair and self._move_aside():
            finding.fixed = True
            finding.what += "; all of it was moved to quarantine/, and it starts empty"
        else:
            finding.what += "; nobody can say what its blocks are: a repair moves them aside"
        return None

    def _move_aside(self) -> bool:
        """Keep the namespace once in `quarantine/`; it starts empty when it is next opened."""
        target = self._path / "quarantine" / self._folder.name
        try:
            target.parent.mkdir(mode=0o700, exist_ok=True)
            remove(target)
            self._folder.rename(target)
        except OSError as error:
            log.warning("cannot move %s aside: %s", self._folder, error)
            return False
        return True

    def _check_segment_files(self, superblock: Superblock) -> None:
        """Short files; opening for repair completes them. One that is missing has left."""
        for number, path in sorted(segment_files(self._folder / "segments").items()):
            is_file = stat.S_ISREG(path.lstat().st_mode)
            if not is_file and self._repair:
                move_aside(path, self._path / "quarantine")
            size = path.lstat().st_size if is_file else 0
            if size < superblock.segment_bytes:
                what = f"it has {size} bytes of {superblock.segment_bytes}"
                if not is_file:
                    what = "it is a link or a folder, not a file"
                finding = self._find(FindingKind.SEGMENT, what)
                finding.segment, finding.fixed = number, self._repair

    @contextlib.contextmanager
    def _opened(self, superblock: Superblock) -> Iterator[NamespaceFiles]:
        budget = SegmentBudget(0).of("")  # a check creates no segment
        folder, read_only = self._folder / "segments", not self._repair
        segments = Segments(folder, superblock, self._io, budget, read_only=read_only)
        data = self._folder / "index" / "data.mdb"
        size = data.stat().st_size if data.exists() else 0
        try:
            yield NamespaceFiles(
                folder=self._folder,
                superblock=superblock,
                segments=segments,
                io=self._io,
                index_map_bytes=max(MIN_MAP_BYTES, 2 * size),
            )
        finally:
            segments.close()

    def _open_index(self, files: NamespaceFiles) -> BlockIndex | None:
        """The index, rebuilt if need be and allowed; None if there is none to go on with."""
        if files.segments.num_segments == 0 and not files.index_folder.exists():
            return None
        folder = files.index_folder
        mark_lies = (folder / "clean").exists() and not index_file.is_vouched(folder)
        problems = index_file.verify(folder)
        if mark_lies and not problems:
            mark = self._find(FindingKind.MARK, "the mark of a clean end does not fit the index")
            mark.fixed = self._repair  # a mark of our own takes its place
        if not problems:
            try:
                return self._new_index(files)
            except UcmError as error:
                problems = [str(error)]
        finding = self._find(FindingKind.INDEX, "; ".join(problems[:3]))
        if not self._repair:
            return None
        rebuild_index(files)
        finding.fixed = True
        return self._new_index(files)

    def _new_index(self, files: NamespaceFiles) -> BlockIndex:
        return BlockIndex(files.index_folder, files.index_map_bytes, read_only=not self._repair)

    def _check_contents(self, files: NamespaceFiles, index: BlockIndex) -> None:
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(index.close, clean=False)
            renewed = self._check_barred(files, index)
            self._proof.check(self._namespace, files, index, renewed)
            result = reconcile(files, index, check_headers=True)
            self._check_missing(files, result.dropped)
            bad = self._check_slabs(files, result.kept)
            gone = {dropped.key for dropped in bad}
            left, orphans = order_by_chain(r for r in result.kept if r.key not in gone)
            bad += [Dropped(r.key, r.slot, "its parent is damaged", r.parent) for r in orphans]
            self._report.num_blocks += len(left)
            self._proof.count(self._namespace, {record.key for record in left})
            found = [(FindingKind.RECORD, dropped) for dropped in result.dropped]
            found += [(FindingKind.CHECKSUM, dropped) for dropped in bad]
            in_use = {record.slot for record in left}
            self._settle_dropped(files, index, found, in_use)
            reported = {item.slot for _, item in found} | set(index.quarantined())
            self._check_other_slots(files, reported | in_use)
            on_failure.pop_all()
        index.close(clean=True)

    def _check_barred(self, files: NamespaceFiles, index: BlockIndex) -> frozenset[int]:
        """Report quarantined slots and retired segments; repair lets them be used again.

        Returns:
            Segments that have a fresh file now.
        """
        slots, segments = index.quarantined(), index.retired()
        findings = []
        for slot in slots:
            finding = self._find(FindingKind.QUARANTINED, "a read found it bad")
            finding.slot, finding.segment = slot, files.segments.segment_of(slot)
            findings.append(finding)
        for segment in segments:
            finding = self._find(FindingKind.SEGMENT, "it was retired: its fdatasync failed")
            finding.segment = segment
            findings.append(finding)
        if not self._repair or not findings:
            return frozenset()
        for segment in segments:
            files.segments.retire(segment)
        self._blank(files, slots)
        for segment in segments:
            self._renew(segment, files.superblock)
        index.drop(
            record.key
            for record in list(index.records())
            if isinstance(record, IndexRecord)
            and (record.slot in set(slots) or files.segments.segment_of(record.slot) in segments)
        )
        index.lift(slots, segments)
        for finding in findings:
            finding.fixed = True
        return frozenset(segments)

    def _check_missing(self, files: NamespaceFiles, dropped: Sequence[Dropped]) -> None:
        """Segments that left without their blocks: their files were deleted by somebody else."""
        slots = [item.slot for item in dropped if item.slot is not None]
        for segment in sorted({files.segments.segment_of(slot) for slot in slots}):
            if segment in files.segments.left:
                finding = self._find(FindingKind.SEGMENT, "its file is missing, with blocks in it")
                finding.segment, finding.fixed = segment, self._repair

    def _renew(self, segment: int, superblock: Superblock) -> None:
        """A fresh file in place of one whose sync failed; without it the numbers had a gap."""
        folder = self._folder / "segments"
        path = segment_files(folder).get(segment) or segment_path(
            folder, segment, is_compact=superblock.has_compact_slots
        )
        path.unlink(missing_ok=True)
        file = self._io.open(path, create=True, writable=True)
        try:
            self._io.preallocate(file, superblock.segment_bytes)
            self._io.fdatasync(file)
        finally:
            self._io.close_file(file)

    def _check_slabs(self, files: NamespaceFiles, records: Sequence[IndexRecord]) -> list[Dropped]:
        """Read every block and compare it with its checksums."""
        block_bytes = files.superblock.layout.block_bytes
        per_batch = max(1, BATCH_BYTES // block_bytes)
        buffer = aligned_buffer(min(per_batch, max(1, len(records))) * block_bytes)
        slot_io = slot_io_for(files.superblock, files.segments, files.io)
        bad: list[Dropped] = []
        silent: list[IndexRecord] = []
        in_place = sorted(records, key=lambda record: record.slot)
        for start in range(0, len(in_place), per_batch):
            part = in_place[start : start + per_batch]
            items = [
                SlotRead(r.slot, r.key, buffer[i * block_bytes : (i + 1) * block_bytes])
                for i, r in enumerate(part)
            ]
            outcomes = slot_io.read(items, [record.generation for record in part])
            self._report.num_bytes += len(part) * files.superblock.slot_bytes
            for record, outcome in zip(part, outcomes, strict=True):
                if outcome.status is not IoStatus.OK:
                    reason = _SLAB_REASONS[outcome.status]
                    bad.append(Dropped(record.key, record.slot, reason))
                elif not outcome.summary:
                    silent.append(record)
        self._check_summaries(files, silent)
        return bad

    def _check_summaries(self, files: NamespaceFiles, silent: Sequence[IndexRecord]) -> None:
        """Areas of good blocks that hold something, but no summary of theirs."""
        key_of = {record.slot: record.key for record in silent}
        filled = filled_areas(files, list(key_of))
        for slot in filled:
            finding = self._find(FindingKind.SUMMARY, "it does not speak for its block")
            finding.slot, finding.key = slot, key_of[slot].hex()[:8]
            finding.segment, finding.fixed = files.segments.segment_of(slot), self._repair
        if self._repair:
            blank_areas(files, filled)

    def _settle_dropped(
        self,
        files: NamespaceFiles,
        index: BlockIndex,
        found: Sequence[tuple[FindingKind, Dropped]],
        in_use: set[SlotId],
    ) -> None:
        """Report what must go; for repair, forget it and free its slots."""
        findings = []
        for kind, dropped, num_behind in causes_of_loss(found):
            blocks = "block" if num_behind == 1 else "blocks"
            behind = f" (and {num_behind} {blocks} behind it)" if num_behind else ""
            finding = self._find(kind, dropped.reason + behind)
            finding.key, finding.slot = dropped.key.hex()[:8], dropped.slot
            finding.num_behind = num_behind
            if dropped.slot is not None:
                finding.segment = files.segments.segment_of(dropped.slot)
            findings.append(finding)
        if not self._repair or not findings:
            return
        index.drop(dropped.key for _, dropped in found)
        slots = {dropped.slot for _, dropped in found if dropped.slot is not None} - in_use
        self._punch(files, sorted(slots))
        self._blank(files, sorted(slots))
        for finding in findings:
            finding.fixed = True

    def _check_other_slots(self, files: NamespaceFiles, known: set[SlotId | None]) -> None:
        """Headers in slots that the index does not use."""
        others = [SlotId(n) for n in range(files.segments.num_slots) if n not in known]
        leftovers = []
        for scanned in scan_headers(files, others):
            if scanned.is_blank or not scanned.is_readable:
                continue
            finding = self._find(FindingKind.UNINDEXED, "a header that no record knows")
            finding.slot = scanned.slot
            finding.segment = files.segments.segment_of(scanned.slot)
            finding.key = scanned.header.key.hex()[:8] if scanned.header else ""
            finding.fixed = self._repair
            leftovers.append(scanned.slot)
        if self._repair:
            self._blank(files, leftovers)

    def _blank(self, files: NamespaceFiles, slots: Sequence[SlotId]) -> None:
        valid = [slot for slot in slots if slot < files.segments.num_slots]
        slot_io_for(files.superblock, files.segments, files.io).blank(valid)
        files.segments.sync({files.segments.segment_of(slot) for slot in valid})

    def _punch(self, files: NamespaceFiles, slots: Sequence[SlotId]) -> None:
        """Let the file system give the slots other sectors when they are next written."""
        for slot in slots:
            place = files.segments.locate(slot)
            if place is not None:
                with contextlib.suppress(OSError):  # not every file system can; blanking suffices
                    length = files.superblock.slot_bytes
                    files.io.punch_hole(place[0], place[1] + HEADER_BYTES, length - HEADER_BYTES)


_SLAB_REASONS = {
    IoStatus.CORRUPT: "its bytes do not match their checksums",
    IoStatus.IO_ERROR: "the device cannot read it",
    IoStatus.FULL: "the device cannot read it",
}
