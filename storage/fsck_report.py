"""What `ucm fsck` found: kinds of damage, findings, the whole report."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class FindingKind(enum.StrEnum):
    """What is wrong."""

    VERSION = "version"
    """The namespace was written by a program with another disk format."""
    SUPERBLOCK = "superblock"
    INDEX = "index"
    """LMDB's file is damaged, or the index is missing."""
    RECORD = "record"
    """An index record that cannot be right, or whose slot holds something else."""
    CHECKSUM = "checksum"
    """A block's bytes are not what was written, or cannot be read."""
    SEGMENT = "segment"
    """A segment file is missing, too short or retired."""
    QUARANTINED = "quarantined"
    """A slot that a read found bad before."""
    UNINDEXED = "unindexed"
    """A slot with a header that no record knows: a write that a crash cut short. Harmless."""
    SUMMARY = "summary"
    """What lies in front of a good block is no summary of it. Harmless: nobody believes it."""
    MARK = "mark"
    """The mark of a clean end is not about this index file, so opening verifies it. Harmless."""
    REGISTRY = "registry"
    """The registry of collections is damaged: nobody knows what was deleted."""
    DELETED = "deleted"
    """A block of a deleted document is still there, or is not proven to be gone."""
    FOREIGN = "foreign"
    """A name that is not ours. Harmless."""
    LEFTOVER = "leftover"
    """A file that a crash kept from getting its name. Harmless."""
    PERMISSIONS = "permissions"
    """Others may write to it."""


_HARMLESS_WORDS = ("unindexed", "summary", "mark", "foreign", "leftover")
HARMLESS = frozenset(FindingKind(word) for word in _HARMLESS_WORDS)


@dataclass(slots=True)
class FsckFinding:
    """One thing that is not as it should be."""

    kind: FindingKind
    namespace: str
    """The namespace id's first 8 hex digits."""
    what: str
    """In words."""
    segment: int | None = None
    slot: int | None = None
    key: str = ""
    """The block key's first 8 hex digits; empty where it is about no block."""
    num_behind: int = 0
    """Blocks that hang on this one and are lost with it."""
    fixed: bool = False

    @property
    def is_damage(self) -> bool:
        """Whether blocks are lost or in danger, and it is not just a leftover."""
        return self.kind not in HARMLESS


@dataclass(slots=True)
class FsckReport:
    """The outcome of one check."""

    num_namespaces: int = 0
    num_blocks: int = 0
    """Blocks found whole."""
    num_bytes: int = 0
    """Slot bytes that were read and verified."""
    num_documents: int = 0
    """Registered ones."""
    num_named_blocks: int = 0
    """Blocks that they name, each once."""
    num_evicted_blocks: int = 0
    """Those of them that are not stored: evicted, or never flushed."""
    num_deleted_blocks: int = 0
    """Blocks of deleted documents of which no record and no header is left."""
    findings: list[FsckFinding] = field(default_factory=list)

    def find(self, kind: FindingKind, namespace: str, what: str) -> FsckFinding:
        """Add a finding."""
        finding = FsckFinding(kind, namespace, what)
        self.findings.append(finding)
        return finding

    @property
    def ok(self) -> bool:
        """Whether no damage is left."""
        return all(finding.fixed or not finding.is_damage for finding in self.findings)
