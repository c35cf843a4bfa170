"""The part of `ucm fsck` about collections: proof that what was deleted is gone.

    registry   sound, its counts right                     repair: move it aside, begin anew
    deleted    no record of the index and no header of any slot names a deleted block, or one that
               follows it in its chain; nothing is still to be erased
                                                           repair: finish the deletion
    named      each block that a document names is stored, or counted as evicted

A namespace that cannot be checked proves nothing: what is to be erased in it stays to be erased.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from ucm.errors import TierUnavailableError, UcmError

from .closed_namespaces import remove_aside
from .erase import erase_slots
from .folder import COLLECTIONS_FOLDER
from .fsck_report import FindingKind, FsckFinding, FsckReport
from .index import IndexRecord
from .recovery import scan_headers
from .registry import Registry, wall_us
from .stray_files import move_aside
from .tier import SlotId

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path
    from types import TracebackType

    from ucm.types import BlockKey, NamespaceId

    from .index import BlockIndex
    from .recovery import NamespaceFiles

MIN_MAP_BYTES = 1 << 30


class DeletionProof:
    """One check of a data folder's deletions; use it as a context manager."""

    def __init__(self, path: Path, report: FsckReport, *, repair: bool) -> None:
        """Read the registry; what is wrong with it goes to `report`."""
        self._path = path
        self._report = report
        self._repair = repair
        self._registry: Registry | None = None
        self._named: dict[NamespaceId, set[BlockKey]] = {}
        self._deleted: dict[NamespaceId, set[BlockKey]] = {}
        self._pending: dict[NamespaceId, set[BlockKey]] = {}
        self._kept: dict[NamespaceId, set[BlockKey]] = {}
        """What a namespace is proven not to hold any more."""
        self._check_registry()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            if self._registry is not None:
                self._registry.close()

    # ------------------------------------------------------------ registry

    def _check_registry(self) -> None:
        folder = self._path / COLLECTIONS_FOLDER
        if not folder.exists():
            return
        problems = self._read(folder)
        if not problems:
            return
        finding = self._report.find(
            FindingKind.REGISTRY,
            "",
            f"{problems[0]}; without it documents have to be put again, and a deletion that was "
            "not finished is unknown",
        )
        if self._registry is not None:
            self._registry.abort()
            self._registry = None
        for found in (self._named, self._deleted, self._pending):
            found.clear()
        if self._repair:
            finding.fixed = self._move_aside(folder, finding)

    def _move_aside(self, folder: Path, finding: FsckFinding) -> bool:
        try:
            move_aside(folder, self._path / "quarantine")
        except OSError as error:
            finding.what += f"; it stays: {error}"
            return False
        return True

    def _read(self, folder: Path) -> list[str]:
        """Take in what the registry says; what is wrong with it, in words."""
        data = folder / "data.mdb"
        size = data.stat().st_size if data.exists() else 0
        try:
            registry = Registry(folder, max(MIN_MAP_BYTES, 2 * size), read_only=not self._repair)
            self._registry = registry
            problems = registry.check_integrity()
            if problems:
                return problems
            for record in registry.documents():
                self._report.num_documents += 1
                self._named.setdefault(record.key.namespace, set()).update(record.keys)
            for each in registry.deleted():
                self._deleted.setdefault(each.namespace, set()).add(each.key)
                if not each.erased_us:
                    self._pending.setdefault(each.namespace, set()).add(each.key)
        except (UcmError, OSError) as error:
            return [str(error)]
        return []

    # ---------------------------------------------------------- namespaces

    def check(
        self,
        namespace: NamespaceId,
        files: NamespaceFiles,
        index: BlockIndex,
        renewed: frozenset[int],
    ) -> None:
        """Look for deleted blocks in the index and in every header; repair erases them.

        `renewed` segments have a fresh file instead of one that could not be written.
        """
        deleted = self._deleted.get(namespace)
        if not deleted:
            return
        places, is_whole = _places(files, index)
        gone = _with_descendants(deleted, places)
        hits = [place for place in places if place[1] in gone]
        findings = []
        for slot, key, _, in_index in hits:
            where = "the index" if in_index else "a header"
            finding = self._report.find(
                FindingKind.DELETED, namespace.hex()[:8], f"{where} names a deleted block"
            )
            finding.slot, finding.key = slot, key.hex()[:8]
            finding.segment = files.segments.segment_of(slot)
            findings.append(finding)
        is_whole = is_whole and files.segments.retired <= renewed
        if is_whole and not hits and namespace not in self._pending:
            self._kept[namespace] = deleted
        if self._repair and is_whole and (hits or namespace in self._pending):
            self._erase(namespace, (files, index), hits, findings)

    def _erase(
        self,
        namespace: NamespaceId,
        place: tuple[NamespaceFiles, BlockIndex],
        hits: Iterable[Named],
        findings: Iterable[FsckFinding],
    ) -> None:
        """Take blocks out of the index, then leave no byte in any slot that it does not use."""
        files, index = place
        try:
            index.drop([key for _, key, _, in_index in hits if in_index])
            used = {item.slot for item in index.records() if isinstance(item, IndexRecord)}
            others = [SlotId(n) for n in range(files.segments.num_slots) if n not in used]
            if erase_slots(files, others):
                raise TierUnavailableError("a segment cannot be synced")
        except UcmError as error:
            for finding in findings:
                finding.what += f"; it stays: {error}"
            return
        for finding in findings:
            finding.fixed = True
        self._kept[namespace] = self._deleted[namespace]

    def count(self, namespace: NamespaceId, stored: Collection[BlockKey]) -> None:
        """Count what documents name in a namespace that holds `stored`."""
        named = self._named.pop(namespace, set())
        self._report.num_named_blocks += len(named)
        self._report.num_evicted_blocks += sum(key not in stored for key in named)

    # -------------------------------------------------------------- the end

    def _finish(self) -> None:
        for namespace in list(self._named):  # it has no folder, or none that can be read
            self.count(namespace, ())
        for namespace, keys in self._deleted.items():
            if not (self._path / "ns" / namespace.hex()).exists():
                self._kept[namespace] = keys
        for namespace, keys in self._pending.items():
            self._settle(namespace, keys)
        self._report.num_deleted_blocks = sum(
            len(keys) for name, keys in self._kept.items() if not self._pending.get(name)
        )

    def _settle(self, namespace: NamespaceId, keys: Collection[BlockKey]) -> None:
        """Report what was still to be erased; after a repair, note that it is."""
        finding = self._report.find(
            FindingKind.DELETED,
            namespace.hex()[:8],
            f"{len(keys)} deleted blocks are still to be erased, or to be noted as erased; a "
            "daemon does it when it starts",
        )
        if not self._repair or namespace not in self._kept or self._registry is None:
            return
        try:
            remove_aside(self._path, namespace)
            self._registry.mark_erased(namespace, keys, wall_us())
        except UcmError as error:
            finding.what += f"; it cannot be done: {error}"
            return
        finding.fixed = True
        self._pending[namespace] = set()


Named = tuple[SlotId, "BlockKey", "BlockKey", bool]
"""Where a block is named: slot, key, parent, and whether by the index or by a header."""


def _places(files: NamespaceFiles, index: BlockIndex) -> tuple[list[Named], bool]:
    """Every place where a record or a header names a block; and whether all could be read."""
    is_whole = True
    found = [
        (item.slot, item.key, item.parent, True)
        for item in index.records()
        if isinstance(item, IndexRecord)
    ]
    known = {(slot, key) for slot, key, _, _ in found}
    slots = [SlotId(number) for number in range(files.segments.num_slots)]
    for scanned in scan_headers(files, slots):
        header = scanned.header
        if not scanned.is_readable and files.segments.locate(scanned.slot) is not None:
            is_whole = False
        if header is not None and (scanned.slot, header.key) not in known:
            found.append((scanned.slot, header.key, header.parent, False))
    return found, is_whole


def _with_descendants(keys: Collection[BlockKey], places: Iterable[Named]) -> set[BlockKey]:
    """`keys` and all that follow them in their chains."""
    children: dict[BlockKey, list[BlockKey]] = {}
    for _, key, parent, _ in places:
        children.setdefault(parent, []).append(key)
    found, waiting = set(keys), list(keys)
    while waiting:
        for child in children.get(waiting.pop(), ()):
            if child not in found:
                found.add(child)
                waiting.append(child)
    return found
