"""The manager's snapshot as it travels to operators' tools, both ways."""

from __future__ import annotations

from .errors import TierUnavailableError
from .grants import ManagerStatus, NamespaceStatus, ShareStatus, TierStatus
from .protos import cache_pb2 as pb
from .types import NamespaceId, TierKind
from .wire import TIER_FROM_WIRE, TIER_TO_WIRE


def status_to_wire(status: ManagerStatus) -> pb.StatusReply:
    """A snapshot as a message."""
    return pb.StatusReply(
        state=status.state,
        num_sessions=status.num_sessions,
        num_leases=status.num_leases,
        leased_bytes=status.leased_bytes,
        write_queue_blocks=status.write_queue_blocks,
        write_queue_bytes=status.write_queue_bytes,
        tiers=[_tier_to_wire(tier) for tier in status.tiers],
        namespaces=[_namespace_to_wire(namespace) for namespace in status.namespaces],
        problems=status.problems,
        rejected_admissions=status.rejected_admissions,
    )


def _tier_to_wire(tier: TierStatus) -> pb.TierStatus:
    return pb.TierStatus(
        tier=TIER_TO_WIRE[tier.kind],
        used_bytes=tier.used_bytes,
        capacity_bytes=tier.capacity_bytes,
        num_blocks=tier.num_blocks,
        quarantined_slots=tier.quarantined_slots,
        writable=tier.writable,
        reason=tier.reason,
        io=tier.io,
        io_reason=tier.io_reason,
    )


def _namespace_to_wire(namespace: NamespaceStatus) -> pb.NamespaceStatus:
    return pb.NamespaceStatus(
        namespace=namespace.id,
        num_blocks=namespace.num_blocks,
        memory_blocks=namespace.memory_blocks,
        nvme_blocks=namespace.nvme_blocks,
        block_bytes=namespace.block_bytes,
        num_sessions=namespace.num_sessions,
        problem=namespace.problem,
        tenant=namespace.tenant,
        shares=[_share_to_wire(share) for share in namespace.shares],
        pinned_bytes=namespace.pinned_bytes,
        model_id=namespace.model_id,
        dtype=namespace.dtype,
        codec=namespace.codec,
    )


def _share_to_wire(share: ShareStatus) -> pb.TierShare:
    return pb.TierShare(
        tier=TIER_TO_WIRE[share.kind],
        held_bytes=share.held_bytes,
        quota_bytes=share.quota_bytes,
        reserved_bytes=share.reserved_bytes,
    )


def status_from_wire(reply: pb.StatusReply) -> ManagerStatus:
    """The snapshot in a message.

    Raises:
        TierUnavailableError: a tier that this release does not know.
    """
    return ManagerStatus(
        state=reply.state,
        num_sessions=reply.num_sessions,
        num_leases=reply.num_leases,
        leased_bytes=reply.leased_bytes,
        write_queue_blocks=reply.write_queue_blocks,
        write_queue_bytes=reply.write_queue_bytes,
        tiers=tuple(_tier_from_wire(tier) for tier in reply.tiers),
        namespaces=tuple(_namespace_from_wire(item) for item in reply.namespaces),
        problems=tuple(reply.problems),
        rejected_admissions=reply.rejected_admissions,
    )


def _kind_from_wire(tier: pb.Tier) -> TierKind:
    kind = TIER_FROM_WIRE.get(tier)
    if kind is None:
        raise TierUnavailableError("the daemon has a tier that this release does not know")
    return kind


def _tier_from_wire(tier: pb.TierStatus) -> TierStatus:
    return TierStatus(
        kind=_kind_from_wire(tier.tier),
        used_bytes=tier.used_bytes,
        capacity_bytes=tier.capacity_bytes,
        num_blocks=tier.num_blocks,
        quarantined_slots=tier.quarantined_slots,
        writable=tier.writable,
        reason=tier.reason,
        io=tier.io,
        io_reason=tier.io_reason,
    )


def _namespace_from_wire(namespace: pb.NamespaceStatus) -> NamespaceStatus:
    return NamespaceStatus(
        id=NamespaceId(namespace.namespace),
        num_blocks=namespace.num_blocks,
        memory_blocks=namespace.memory_blocks,
        nvme_blocks=namespace.nvme_blocks,
        block_bytes=namespace.block_bytes,
        num_sessions=namespace.num_sessions,
        problem=namespace.problem,
        tenant=namespace.tenant,
        shares=tuple(_share_from_wire(share) for share in namespace.shares),
        pinned_bytes=namespace.pinned_bytes,
        model_id=namespace.model_id,
        dtype=namespace.dtype,
        codec=namespace.codec,
    )


def _share_from_wire(share: pb.TierShare) -> ShareStatus:
    return ShareStatus(
        kind=_kind_from_wire(share.tier),
        held_bytes=share.held_bytes,
        quota_bytes=share.quota_bytes,
        reserved_bytes=share.reserved_bytes,
    )
