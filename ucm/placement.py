"""What to load, promote, store, flush and evict: plans, never deeds.

Each function looks at one namespace's index and answers with rows; `evict` alone also takes the
copies out of the index, because a block is unusable from the moment it is chosen. The manager
applies plans under its lock and does the I/O outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ucm.storage.tier import SlotId

from .block_columns import NO_ROW, PROMOTING, WRITING
from .block_index import BlockIndex
from .errors import InvalidArgumentError
from .types import ROOT_KEY, BlockKey, StoreStatus, TierKind


@dataclass(frozen=True, slots=True)
class PromotionPlan:
    """A usable prefix, by what each block needs."""

    rows: tuple[int, ...]
    """The longest usable prefix, in order."""
    tiers: tuple[TierKind, ...]
    """Fastest tier of each."""
    promote: tuple[int, ...]
    """Rows that only NVMe has and nobody is reading yet: each needs a slot and a read."""

    @property
    def in_memory(self) -> bool:
        """Whether nothing has to be read."""
        return self.tiers.count(TierKind.MEMORY) == len(self.tiers)


def plan_load(index: BlockIndex, keys: Sequence[BlockKey]) -> PromotionPlan:
    """Decide how to bring the cached prefix of `keys` to memory; prefetch uses it too."""
    found, tiers = index.prefix(keys)
    rows = tuple(found)
    slower = [row for row, tier in zip(rows, tiers, strict=True) if tier is not TierKind.MEMORY]
    promote = tuple(row for row in slower if not index.in_flight(row, PROMOTING))
    return PromotionPlan(rows, tiers, promote)


@dataclass(frozen=True, slots=True)
class StorePlan:
    """What to answer for each offered block."""

    statuses: tuple[StoreStatus, ...]
    """PRESENT, ORPHAN or WANTED for each key, in order."""
    hold: tuple[int, ...]
    """Rows that must not be evicted until the store completes: the parent and what is present."""


def plan_store(index: BlockIndex, parent: BlockKey, keys: Sequence[BlockKey]) -> StorePlan:
    """Decide which blocks of the chain `parent -> keys[0] -> ...` are wanted.

    Raises:
        InvalidArgumentError: a key twice, ROOT_KEY as a key, or a known key under another parent:
            a key names its parent, so the caller's chain is wrong.
    """
    if len(set(keys)) != len(keys) or ROOT_KEY in keys or parent in keys:
        raise InvalidArgumentError("the keys of a store must form a chain: each once, no root")
    parent_row = index.find(parent)
    orphaned = parent != ROOT_KEY and (parent_row == NO_ROW or not index.usable(parent_row))
    hold = [] if parent == ROOT_KEY or orphaned else [parent_row]
    statuses: list[StoreStatus] = []
    previous = parent
    for key in keys:
        row = index.find(key)
        if row != NO_ROW and index.parent_key(row) != previous:
            raise InvalidArgumentError(
                f"block {key.hex()[:8]} follows {index.parent_key(row).hex()[:8]}, "
                f"not {previous.hex()[:8]}: the keys are not one chain"
            )
        previous = key
        if orphaned:
            statuses.append(StoreStatus.ORPHAN)
        elif row != NO_ROW and index.resident(row):
            statuses.append(StoreStatus.PRESENT)
            hold.append(row)
        else:
            statuses.append(StoreStatus.WANTED)
    return StorePlan(tuple(statuses), tuple(hold))


def plan_flush(index: BlockIndex, row: int) -> tuple[int, ...] | None:
    """Rows to queue for NVMe so that `row` gets there with all its ancestors, parents first.

    Returns:
        The rows that are neither durable nor queued, or None when an ancestor has no copy in
        memory: then `row` could only become an orphan on disk.
    """
    chain: list[int] = []
    while row != NO_ROW and not index.has(row, TierKind.NVME) and not index.in_flight(row, WRITING):
        if not index.has(row, TierKind.MEMORY):
            return None
        chain.append(row)
        row = index.parent(row)
    return tuple(reversed(chain))


def plan_commit(index: BlockIndex, rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """Split a batch into rows that may be written now, and rows whose parent would be missing.

    Args:
        index: the namespace's index.
        rows: in the order in which they were queued, parents first.
    """
    admitted: list[int] = []
    refused: list[int] = []
    in_batch: set[int] = set()
    for row in rows:
        parent = index.parent(row)
        if parent == NO_ROW or parent in in_batch or index.has(parent, TierKind.NVME):
            admitted.append(row)
            in_batch.add(row)
        else:
            refused.append(row)
    return admitted, refused


@dataclass(frozen=True, slots=True)
class Victim:
    """A copy that has left the index and waits to be deleted from its tier."""

    key: BlockKey
    slot: SlotId


def evict(index: BlockIndex, tier: TierKind, count: int) -> list[Victim]:
    """Take up to `count` copies out of `tier`, leaves first; fewer when the rest is held."""
    victims: list[Victim] = []
    while len(victims) < count:
        row = index.next_victim(tier)
        if row == NO_ROW:
            break
        key = index.key(row)
        victims.append(Victim(key, index.evict(row, tier)))
    return victims
