"""Words shared by all layers: ids, tiers, statuses."""

from __future__ import annotations

import enum
from typing import NewType

KEY_BYTES = 32
"""Length of a block key and of a namespace id: one SHA-256 digest."""

BlockKey = NewType("BlockKey", bytes)
"""32 bytes that name one block's content; see `ucm.hashing`."""

NamespaceId = NewType("NamespaceId", bytes)
"""32 bytes: the fingerprint of everything but the tokens that changes a block's bytes."""

LeaseId = NewType("LeaseId", bytes)
"""16 random bytes; valid only inside the session that got it."""

SessionId = NewType("SessionId", int)
"""A client's connection, as the daemon counts them."""

ROOT_KEY = BlockKey(bytes(KEY_BYTES))
"""The parent of a chain's first block."""


class TierKind(enum.StrEnum):
    """Where bytes are, fastest first."""

    MEMORY = "memory"
    NVME = "nvme"


class LoadMode(enum.StrEnum):
    """How a load that goes layer by layer gets what only NVMe has."""

    MAPPED = "mapped"
    """The cache promotes it to host memory, where the client reads it."""
    DIRECT = "direct"
    """The client reads the files itself; the cache's memory is not touched."""


class SourceKind(enum.StrEnum):
    """Where a client finds the bytes of one block of a load plan."""

    MEMORY = "memory"
    """In host memory, all of it, now."""
    PROMOTING = "promoting"
    """In host memory, layer by layer, as the plan's progress says."""
    EXTENT = "extent"
    """In a file that the client reads itself."""


class LoadOrder(enum.StrEnum):
    """Which slabs of a load arrive first."""

    LAYERS = "layers"
    """All blocks of layer 0, then of layer 1: computation follows layer by layer."""
    BLOCKS_FROM_BACK = "blocks_from_back"
    """The last block whole, then the one before: computation comes towards it from the front."""


class LoadStatus(enum.StrEnum):
    """What became of one key of a load."""

    READY = "ready"
    MISS = "miss"
    CORRUPT = "corrupt"
    """The stored bytes failed their checksum; the block is quarantined and counts as a miss."""
    TIMED_OUT = "timed_out"
    NO_SPACE = "no_space"
    """The host tier has no slot free of leases to promote into."""


class StoreStatus(enum.StrEnum):
    """What became of one key of a store."""

    WANTED = "wanted"
    """A staging slot was granted: fill it and complete the store."""
    ACCEPTED = "accepted"
    """Checked and readable by every session of the namespace."""
    PRESENT = "present"
    """The block was there already; nothing to do."""
    NO_SPACE = "no_space"
    """No staging slot, or no slot in the host tier that could be evicted; try later or drop."""
    ORPHAN = "orphan"
    """Its parent is in no tier, so nobody could ever reach it."""
    CORRUPT = "corrupt"
    """The staged bytes do not match the checksum that came with them."""
    REFUSED = "refused"
    """The daemon drains, its disk is full, or the block is of a deleted document; loads go on."""


class BlockState(enum.StrEnum):
    """How durable a block is."""

    ABSENT = "absent"
    ACCEPTED = "accepted"
    FLUSHED = "flushed"


class SummaryKind(enum.StrEnum):
    """What a block's summary holds; `ucm.kernels.summarize` says where each comes from."""

    GSA_K4 = "gsa-k4"
    """Four clusters of the block's keys: the default."""
    GSA_2 = "gsa-2"
    """Mean, the two keys farthest from it, and two directions of spread."""
    SHADOW2 = "shadow2"
    """Every key, in 2 bits a channel."""
    SHADOW4 = "shadow4"
    """Every key, in 4 bits a channel: near exact, and certificates can be built on it."""
    MEAN = "mean"
    BOX = "box"
    CUBOID = "cuboid"
    HASH128 = "hash128"
    MAXNORM = "maxnorm"

    @property
    def number(self) -> int:
        """What formats and protocols write; never reused."""
        return _SUMMARY_NUMBERS[self]

    @classmethod
    def from_number(cls, number: int) -> SummaryKind | None:
        """The kind that `number` stands for; None if this version knows none."""
        return _SUMMARY_KINDS.get(number)


class SummaryStatus(enum.StrEnum):
    """What can be known of one block without reading it."""

    READY = "ready"
    """Its summary is in memory and speaks for the block's present bytes."""
    NO_SUMMARY = "no_summary"
    """The block is cached, its summary cannot be had now: the block has to be read."""
    MISS = "miss"


_SUMMARY_NUMBERS = {
    SummaryKind.GSA_K4: 1,
    SummaryKind.GSA_2: 2,
    SummaryKind.SHADOW2: 3,
    SummaryKind.SHADOW4: 4,
    SummaryKind.MEAN: 5,
    SummaryKind.BOX: 6,
    SummaryKind.CUBOID: 7,
    SummaryKind.HASH128: 8,
    SummaryKind.MAXNORM: 9,
}
_SUMMARY_KINDS = {number: kind for kind, number in _SUMMARY_NUMBERS.items()}
