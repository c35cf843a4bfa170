"""A lease's blocks in columns: the same as a list of them, and what does not fit together."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ucm.api import LoadLease, NamespaceHandle
from ucm.block_rows import BlockRows
from ucm.checksum import block_checksums
from ucm.copying import BlockCopier
from ucm.errors import LayoutMismatchError, TierUnavailableError
from ucm.kernels.block_copy import BLOCK_COPY
from ucm.leased_blocks import LeasedBlocks
from ucm.protos import cache_pb2 as pb
from ucm.remote_leases import OpenNamespace, load_lease, store_lease
from ucm.testing.tier_conformance import LAYOUT, make_block
from ucm.types import BlockKey, LoadStatus, NamespaceId, StoreStatus, TierKind
from ucm.wire import LOAD_STATUS_TO_WIRE, STORE_STATUS_TO_WIRE, TIER_TO_WIRE

SIZE = LAYOUT.block_bytes
KEYS = [BlockKey(bytes([number]) * 32) for number in range(3)]
OFFSETS = (2 * SIZE, 0)
"""Of the two that are there."""
MEMORY = memoryview(b"".join(bytes(make_block(number, LAYOUT)) for number in range(3)))


def columns() -> dict[str, Any]:
    views = [MEMORY[start : start + SIZE] for start in OFFSETS]
    sums = [block_checksums(LAYOUT, view) for view in views]
    return {
        "keys": KEYS,
        "statuses": (LoadStatus.READY, LoadStatus.READY, LoadStatus.MISS),
        "tiers": (TierKind.MEMORY, TierKind.NVME),
        "ready": BlockRows(MEMORY, OFFSETS, SIZE),
        "checksums": np.array(sums, np.uint64),
    }


@pytest.fixture
def leased() -> LeasedBlocks:
    return LeasedBlocks(**columns())


def test_an_entry_is_made_when_it_is_asked_for(leased: LeasedBlocks) -> None:
    assert len(leased) == 3
    assert [block.key for block in leased] == KEYS
    assert [block.status for block in leased[1:]] == [LoadStatus.READY, LoadStatus.MISS]
    assert [block.tier for block in leased] == [TierKind.MEMORY, TierKind.NVME, None]
    assert leased[0].data == make_block(2, LAYOUT)
    assert leased[1].checksums == block_checksums(LAYOUT, make_block(0, LAYOUT))
    assert leased[-1] == leased[2]
    assert (leased[2].data, leased[2].checksums) == (None, ())
    with pytest.raises(IndexError):
        leased[3]


def replaced(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    def damage(columns: dict[str, Any]) -> None:
        columns[name] = value

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        replaced("keys", KEYS[:2]),
        replaced("statuses", (LoadStatus.READY, LoadStatus.MISS, LoadStatus.READY)),
        replaced("statuses", (LoadStatus.READY, LoadStatus.MISS, LoadStatus.MISS)),
        replaced("tiers", (TierKind.MEMORY,)),
        replaced("ready", BlockRows(MEMORY, [0], SIZE)),
        replaced("checksums", np.zeros((3, LAYOUT.num_layers), np.uint64)),
    ],
)
def test_columns_that_do_not_fit_together_are_refused(
    damage: Callable[[dict[str, Any]], None],
) -> None:
    bad = columns()
    damage(bad)
    with pytest.raises(ValueError, match=r"READY|match"):
        LeasedBlocks(**bad)


@pytest.mark.parametrize("outside", [2 * SIZE + 1, 2**64 - 1, 2**64, -1])
def test_a_block_outside_the_memory_is_refused(outside: int) -> None:
    with pytest.raises(ValueError, match="of its memory"):
        BlockRows(MEMORY, [0, outside], SIZE)


def test_who_has_the_rows_has_the_memory() -> None:
    floats = np.arange(64, dtype=np.float32)
    view = floats.data
    rows = BlockRows(view, [0, 64], 64)
    assert [bytes(row) for row in rows] == [floats[:16].tobytes(), floats[16:32].tobytes()]
    assert rows.addresses().tolist() == [floats.ctypes.data, floats.ctypes.data + 64]
    kept = weakref.ref(floats)
    del floats, view
    gc.collect()
    assert kept() is not None


@pytest.mark.parametrize("implementation", BLOCK_COPY.names)
def test_they_are_copied_by_column(
    implementation: str, leased: LeasedBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCM_KERNEL_BLOCK_COPY", implementation)
    targets = [memoryview(bytearray(SIZE)) for _ in KEYS]
    with BlockCopier(LAYOUT) as copier:
        assert copier.copy_verified(leased, targets) == [True, True, False]
        assert targets[:2] == [make_block(2, LAYOUT), make_block(0, LAYOUT)]
        leased.checksums[1, -1] ^= np.uint64(1)
        assert copier.copy_verified(leased, targets) == [True, False, False]
        assert copier.verify_in_place(leased) == [True, False, False]
        few = LeasedBlocks(**{**columns(), "checksums": leased.checksums[:, 1:]})
        assert copier.copy_verified(few, targets) == [False] * 3
        other = LeasedBlocks(**{**columns(), "ready": BlockRows(MEMORY, OFFSETS, SIZE - 1)})
        with pytest.raises(LayoutMismatchError):
            copier.copy_verified(other, targets)


def answer(offset: int, num_slabs: int) -> LoadLease:
    """What a client makes of a daemon's answer to a load of one block."""
    reply = pb.PrepareLoadReply(
        lease_id=bytes(16),
        statuses=bytes([LOAD_STATUS_TO_WIRE[LoadStatus.READY]]),
        tiers=bytes([TIER_TO_WIRE[TierKind.MEMORY]]),
        offsets=[offset],
        checksums=bytes(8 * num_slabs),
    )
    handle = NamespaceHandle(NamespaceId(bytes(32)), LAYOUT)
    return load_lease(KEYS[:1], reply, OpenNamespace(handle, MEMORY))


def test_an_answer_that_does_not_fit_the_layout_is_not_believed() -> None:
    assert answer(2 * SIZE, LAYOUT.num_layers).blocks[0].data == MEMORY[2 * SIZE :]
    for offset, num_slabs in (
        (0, LAYOUT.num_layers + 1),
        (0, 1),
        (2 * SIZE + 1, LAYOUT.num_layers),
    ):
        with pytest.raises(TierUnavailableError, match="do not match"):
            answer(offset, num_slabs)


def test_a_place_outside_the_staging_memory_is_not_believed() -> None:
    reply = pb.PrepareStoreReply(
        lease_id=bytes(16),
        statuses=bytes([STORE_STATUS_TO_WIRE[StoreStatus.WANTED]]),
        offsets=[2 * SIZE + 1],
    )
    with pytest.raises(TierUnavailableError, match="do not match"):
        store_lease(KEYS[:1], reply, LAYOUT, MEMORY)
