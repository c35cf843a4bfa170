"""Load plans as messages: between `PlanGrants` and `BeginLoadRequest` / `BeginLoadReply`.

As in `ucm.wire`, what does not say what it should is an `InvalidArgumentError` and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ucm.storage.extents import SlotPlace
from ucm.storage.tier import SlotId

from .errors import InvalidArgumentError
from .layout import ALIGNMENT_BYTES, MAX_BLOCK_BYTES
from .plan_grants import PlanGrants
from .progress import ProgressPlace
from .protos import cache_pb2 as pb
from .types import LeaseId, LoadMode, LoadStatus, SourceKind
from .wire import (
    LOAD_STATUS_FROM_WIRE,
    LOAD_STATUS_TO_WIRE,
    TIER_FROM_WIRE,
    TIER_TO_WIRE,
    words_from_wire,
    words_to_wire,
)

LOAD_MODE_TO_WIRE: Final[Mapping[LoadMode, pb.LoadMode]] = {
    LoadMode.MAPPED: pb.LOAD_MODE_MAPPED,
    LoadMode.DIRECT: pb.LOAD_MODE_DIRECT,
}
LOAD_MODE_FROM_WIRE: Final = {int(wire): word for word, wire in LOAD_MODE_TO_WIRE.items()}

SOURCE_TO_WIRE: Final[Mapping[SourceKind, pb.SourceKind]] = {
    SourceKind.MEMORY: pb.SOURCE_KIND_MEMORY,
    SourceKind.PROMOTING: pb.SOURCE_KIND_PROMOTING,
    SourceKind.EXTENT: pb.SOURCE_KIND_EXTENT,
}
SOURCE_FROM_WIRE: Final = {int(wire): word for word, wire in SOURCE_TO_WIRE.items()}


def mode_from_wire(number: int) -> LoadMode:
    """The mode of a request.

    Raises:
        InvalidArgumentError: none of ours.
    """
    mode = LOAD_MODE_FROM_WIRE.get(number)
    if mode is None:
        raise InvalidArgumentError(f"no load mode has the number {number}")
    return mode


def plan_to_wire(grants: PlanGrants) -> pb.BeginLoadReply:
    """A plan as the daemon's answer."""
    places = grants.places
    return pb.BeginLoadReply(
        lease_id=grants.lease_id,
        timeout_s=grants.timeout_s,
        statuses=words_to_wire(grants.statuses, LOAD_STATUS_TO_WIRE),
        sources=words_to_wire(grants.sources, SOURCE_TO_WIRE),
        tiers=words_to_wire(grants.tiers, TIER_TO_WIRE),
        offsets=grants.offsets,
        checksums=grants.checksums,
        slots=[place.slot for place in places],
        segments=[place.segment for place in places],
        file_ids=[place.file_id for place in places],
        slot_offsets=[place.offset for place in places],
        generations=[place.generation for place in places],
        summary_bytes=places[0].summary_bytes if places else 0,
        progress_offset=grants.progress.offset if grants.progress else 0,
        progress_serial=grants.progress.serial if grants.progress else 0,
    )


def plan_from_wire(reply: pb.BeginLoadReply, *, num_keys: int) -> PlanGrants:
    """The plan that `plan_to_wire` described.

    Raises:
        InvalidArgumentError: its lists do not fit each other, or the number of keys.
    """
    grants = PlanGrants(
        lease_id=LeaseId(reply.lease_id),
        statuses=words_from_wire(reply.statuses, LOAD_STATUS_FROM_WIRE),
        sources=words_from_wire(reply.sources, SOURCE_FROM_WIRE),
        tiers=words_from_wire(reply.tiers, TIER_FROM_WIRE),
        offsets=tuple(reply.offsets),
        checksums=reply.checksums,
        places=_places(reply),
        timeout_s=reply.timeout_s,
        progress=_progress(reply),
    )
    ready = grants.statuses.count(LoadStatus.READY)
    in_files = grants.sources.count(SourceKind.EXTENT)
    is_whole = (
        len(grants.statuses) == num_keys
        and LoadStatus.READY not in grants.statuses[ready:]
        and len(grants.sources) == len(grants.tiers) == ready
        and len(grants.offsets) == ready - in_files
        and len(grants.places) == in_files
        and (grants.progress is not None) == (SourceKind.PROMOTING in grants.sources)
    )
    is_whole = is_whole and _is_area(reply.summary_bytes)
    if not is_whole:
        raise InvalidArgumentError("the lists of a load plan do not match the keys asked for")
    return grants


def _progress(reply: pb.BeginLoadReply) -> ProgressPlace | None:
    if not reply.progress_serial:
        return None
    return ProgressPlace(reply.progress_offset, reply.progress_serial)


def _is_area(num_bytes: int) -> bool:
    return num_bytes % ALIGNMENT_BYTES == 0 and num_bytes <= MAX_BLOCK_BYTES


def _places(reply: pb.BeginLoadReply) -> tuple[SlotPlace, ...]:
    columns = (reply.slots, reply.segments, reply.file_ids, reply.slot_offsets, reply.generations)
    try:
        return tuple(
            SlotPlace(SlotId(slot), segment, file_id, offset, generation, reply.summary_bytes)
            for slot, segment, file_id, offset, generation in zip(*columns, strict=True)
        )
    except ValueError as error:
        raise InvalidArgumentError("the places of a load plan are cut short") from error
