"""Load plans as messages: what goes in comes out, and garbage is refused by name."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from ucm.errors import InvalidArgumentError
from ucm.plan_grants import PlanGrants, PlanMemory, planned_blocks
from ucm.plan_wire import (
    LOAD_MODE_TO_WIRE,
    SOURCE_TO_WIRE,
    mode_from_wire,
    plan_from_wire,
    plan_to_wire,
)
from ucm.progress import ProgressPlace
from ucm.protos import cache_pb2 as pb
from ucm.storage.extents import SlotPlace
from ucm.storage.tier import SlotId
from ucm.types import BlockKey, LeaseId, LoadMode, LoadStatus, SourceKind, TierKind

READY, MISS = LoadStatus.READY, LoadStatus.MISS
MEMORY, PROMOTING, EXTENT = SourceKind.MEMORY, SourceKind.PROMOTING, SourceKind.EXTENT
GRANTS = PlanGrants(
    lease_id=LeaseId(bytes(16)),
    statuses=(READY, READY, READY, MISS),
    sources=(MEMORY, EXTENT, PROMOTING),
    tiers=(TierKind.MEMORY, TierKind.NVME, TierKind.NVME),
    offsets=(0, 8192),
    checksums=bytes(range(16)),
    places=(SlotPlace(SlotId(7), 1, 3, 4096, 1 << 63),),
    timeout_s=31.0,
    progress=ProgressPlace(64, 9),
)
KEYS = [BlockKey(bytes([number]) * 32) for number in range(1, 5)]


def test_a_plan_survives_the_journey() -> None:
    packed = plan_to_wire(GRANTS).SerializeToString()
    assert plan_from_wire(pb.BeginLoadReply.FromString(packed), num_keys=4) == GRANTS


def test_every_word_has_a_number() -> None:
    assert set(LOAD_MODE_TO_WIRE) == set(LoadMode)
    assert set(SOURCE_TO_WIRE) == set(SourceKind)
    assert [mode_from_wire(number) for number in LOAD_MODE_TO_WIRE.values()] == list(LoadMode)
    with pytest.raises(InvalidArgumentError):
        mode_from_wire(0)


@pytest.mark.parametrize(
    "field",
    [
        *("statuses", "sources", "tiers", "offsets", "slots", "segments", "file_ids"),
        *("generations", "progress_serial"),
    ],
)
def test_lists_that_do_not_fit_are_refused(field: str) -> None:
    reply = plan_to_wire(GRANTS)
    reply.ClearField(field)
    with pytest.raises(InvalidArgumentError):
        plan_from_wire(reply, num_keys=4)
    with pytest.raises(InvalidArgumentError):
        plan_from_wire(plan_to_wire(GRANTS), num_keys=5)


@given(st.data())
def test_garbage_is_a_plan_or_refused(data: st.DataObject) -> None:
    """Flipped, cut and spliced messages: nothing but the one error."""
    packed = bytearray(plan_to_wire(GRANTS).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(packed) - 1))
        packed[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        packed = packed or bytearray(b"\0")
    try:
        reply = pb.BeginLoadReply.FromString(bytes(packed))
        grants = plan_from_wire(reply, num_keys=4)
    except (DecodeError, InvalidArgumentError):
        return
    assert len(grants.statuses) == 4
    assert len(grants.offsets) + len(grants.places) == len(grants.sources)


def test_a_block_whose_file_cannot_be_had_ends_the_plan() -> None:
    data = memoryview(bytes(8192))
    memory = PlanMemory(lambda offset: data[offset : offset + 1], [(1, 2)], lambda place: None)
    blocks = planned_blocks(KEYS, GRANTS, memory)
    assert [block.status for block in blocks] == [READY, MISS, MISS, MISS]
    assert [block.key for block in blocks] == KEYS
    assert blocks[0].checksums == (1, 2)


def test_a_plan_without_a_place_for_every_block_is_refused() -> None:
    memory = PlanMemory(lambda offset: memoryview(b""), [], lambda place: None)
    with pytest.raises(ValueError, match="lacks"):
        planned_blocks(KEYS, GRANTS, memory)
