"""What the manager says about itself: snapshots of tiers and namespaces, and their invariants.

Called with the manager's lock held.
"""

from __future__ import annotations

from .grants import NamespaceStatus, ShareStatus, TierStatus
from .namespaces import Namespace, NamespaceTable
from .types import TierKind


def namespace_statuses(table: NamespaceTable) -> tuple[NamespaceStatus, ...]:
    """Every open namespace: what it holds and may hold."""
    return tuple(_namespace_status(table, found) for found in table)


def _namespace_status(table: NamespaceTable, found: Namespace) -> NamespaceStatus:
    return NamespaceStatus(
        id=found.id,
        num_blocks=len(found.index),
        memory_blocks=found.index.num_copies(TierKind.MEMORY),
        nvme_blocks=found.index.num_copies(TierKind.NVME),
        block_bytes=found.layout.block_bytes,
        num_sessions=found.num_sessions,
        problem=found.problem,
        tenant=found.tenant,
        shares=_shares(table, found),
        pinned_bytes=len(found.pinned) * found.layout.block_bytes,
        model_id=found.model_id,
        dtype=found.layout.dtype.value,
        codec=found.nvme.usage().codec if found.nvme is not None else "",
    )


def _shares(table: NamespaceTable, found: Namespace) -> tuple[ShareStatus, ...]:
    memory, nvme = table.shares.of(found.tenant), table.nvme_shares.of(found.tenant)
    in_memory = ShareStatus(
        TierKind.MEMORY, found.touched_bytes, memory.quota_bytes, memory.reserved_bytes
    )
    if found.nvme is None:
        return (in_memory,)
    held_bytes = found.nvme.usage().held_bytes
    return (
        in_memory,
        ShareStatus(TierKind.NVME, held_bytes, nvme.quota_bytes, nvme.reserved_bytes),
    )


def tier_status(
    namespaces: list[Namespace], kind: TierKind, capacity_bytes: int, reason: str
) -> TierStatus:
    """One tier over all open namespaces."""
    usages = [
        tier.usage()
        for found in namespaces
        if (tier := found.memory if kind is TierKind.MEMORY else found.nvme) is not None
    ]
    return TierStatus(
        kind=kind,
        used_bytes=sum(usage.used_slots * usage.slot_bytes for usage in usages),
        capacity_bytes=capacity_bytes,
        num_blocks=sum(found.index.num_copies(kind) for found in namespaces),
        quarantined_slots=sum(usage.quarantined_slots for usage in usages),
        writable=not reason,
        reason=reason,
    )


def check_namespace(found: Namespace) -> list[str]:
    """Every violated invariant of one namespace, in words. O(blocks)."""
    problems = found.index.check_integrity() + found.memory.check_integrity()
    if found.nvme is not None:
        problems += found.nvme.check_integrity()
    if found.summaries is not None:
        problems += found.summaries.check_integrity()
    pins = sum(count for count in found.pinned.values())
    if any(found.index.pins(row) < count for row, count in found.pinned.items()):
        problems.append(f"{pins} pins, but not all of their rows are held")
    held = found.promotions or found.num_copying or found.detached
    used, copies = found.memory.usage().used_slots, found.index.num_copies(TierKind.MEMORY)
    if not held and used != copies:
        problems.append(f"memory: {used} slots in use for {copies} blocks")
    return [f"namespace {found.id.hex()[:8]}: {problem}" for problem in problems]
