"""Leases of a session with a daemon: its answers, joined with the memory that the door handed out.

What does not fit together in an answer is the daemon's fault: `TierUnavailableError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .api import LoadLease, NamespaceHandle, StoreLease
from .block_rows import BlockRows
from .errors import InvalidArgumentError, TierUnavailableError
from .grants import store_slot
from .layout import KvLayout
from .leased_blocks import LeasedBlocks
from .protos import cache_pb2 as pb
from .types import BlockKey, LeaseId, StoreStatus
from .wire import (
    LOAD_STATUS_FROM_WIRE,
    STORE_STATUS_FROM_WIRE,
    TIER_FROM_WIRE,
    Word,
    checksum_rows_from_wire,
    words_from_wire,
)


class OpenNamespace:
    """A namespace of a session and its arena."""

    __slots__ = ("arena", "handle")

    def __init__(self, handle: NamespaceHandle, arena: memoryview) -> None:
        self.handle = handle
        self.arena = arena


def known_words(packed: bytes, words: Mapping[int, Word]) -> tuple[Word, ...]:
    """Enum numbers as words; a number that this release does not know is the daemon's fault."""
    try:
        return words_from_wire(packed, words)
    except InvalidArgumentError as error:
        raise TierUnavailableError(f"the daemon says what is unknown here: {error}") from error


def load_lease(
    keys: Sequence[BlockKey], reply: pb.PrepareLoadReply, namespace: OpenNamespace
) -> LoadLease:
    """The lease that the daemon granted for `keys`.

    Raises:
        TierUnavailableError: its answer is garbled.
    """
    layout = namespace.handle.layout
    try:
        ready = BlockRows(namespace.arena, reply.offsets, layout.block_bytes)
        sums = checksum_rows_from_wire(reply.checksums, num_blocks=len(ready))
        blocks = LeasedBlocks(
            keys,
            known_words(reply.statuses, LOAD_STATUS_FROM_WIRE),
            known_words(reply.tiers, TIER_FROM_WIRE),
            ready,
            sums,
        )
    except (InvalidArgumentError, ValueError) as error:
        raise TierUnavailableError(f"the daemon's lists do not match: {error}") from error
    if len(ready) and sums.shape[1] != layout.num_layers:
        raise TierUnavailableError(
            f"the daemon's lists do not match: {sums.shape[1]} checksums of a block of "
            f"{layout.num_layers} layers"
        )
    return LoadLease(LeaseId(reply.lease_id), blocks, reply.timeout_s)


def store_lease(
    keys: Sequence[BlockKey], reply: pb.PrepareStoreReply, layout: KvLayout, staging: memoryview
) -> StoreLease:
    """The lease that the daemon granted for `keys`; the slots are in `staging`.

    Raises:
        TierUnavailableError: its answer is garbled.
    """
    statuses = known_words(reply.statuses, STORE_STATUS_FROM_WIRE)
    try:
        views = BlockRows(staging, reply.offsets, layout.block_bytes + reply.summary_bytes)
    except ValueError as error:
        raise TierUnavailableError(f"the daemon's lists do not match: {error}") from error
    if len(statuses) != len(keys) or statuses.count(StoreStatus.WANTED) != len(views):
        raise TierUnavailableError("the daemon's lists do not match the keys offered")
    wanted, size = iter(views), layout.block_bytes
    slots = tuple(
        store_slot(key, status, next(wanted) if status is StoreStatus.WANTED else None, size)
        for key, status in zip(keys, statuses, strict=True)
    )
    return StoreLease(LeaseId(reply.lease_id), slots, reply.timeout_s)
