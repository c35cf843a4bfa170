"""Cut the power at every call of a workload on encoded and full slots; nothing may be wrong.

A run is replayed by its codec, its seed and the number of the call.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.errors import UcmError
from ucm.storage.fsck import check_store
from ucm.storage.nvme import NvmeStore, NvmeTier
from ucm.storage.tier import IoStatus, SlotId, SlotRead, SlotWrite
from ucm.testing.faulty_io import FaultyFileIo, PowerCut
from ucm.testing.nvme import NAMESPACE, nvme_config, quick_folder
from ucm.testing.tier_conformance import LAYOUT, make_key, make_write, slabs
from ucm.testing.wild_blocks import make_wild_write

NUM_NAMES = 20
NUM_SLOTS = 16
NUM_STEPS = 6
KEYS = {make_key(name): name for name in range(NUM_NAMES)}


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


def write_of(slot: SlotId, name: int) -> SlotWrite:
    """Every third block is one that int8 cannot represent."""
    return make_wild_write(slot, name) if name % 3 == 0 else make_write(slot, name)


def read_is_right(tier: NvmeTier, slot: SlotId, name: int) -> bool:
    into = memoryview(bytearray(LAYOUT.block_bytes))
    (outcome,) = tier.read([SlotRead(slot, make_key(name), into)])
    if outcome.status is IoStatus.OK:
        assert slabs(into) == slabs(write_of(slot, name).data)
    return outcome.status is IoStatus.OK


def store_all(tier: NvmeTier, names: list[int]) -> dict[int, SlotId]:
    """Write blocks as the layer above does: what is too long goes to a full slot."""
    done: dict[int, SlotId] = {}
    for full in (False, True):
        slots = tier.allocate(len(names), full=full)
        items = [write_of(slot, name) for slot, name in zip(slots, names, strict=False)]
        statuses = tier.write(items)
        for item, status in zip(items, statuses, strict=True):
            if status is IoStatus.OK:
                done[KEYS[item.key]] = item.slot
            else:
                tier.free([item.slot])
        names = [
            KEYS[item.key]
            for item, status in zip(items, statuses, strict=True)
            if status is IoStatus.OVERSIZE
        ]
    return done


class Workload:
    """Random stores and deletes, and what they promise about the disk."""

    def __init__(self, codec: str, seed: int, io: FaultyFileIo, folder: Path) -> None:
        self.config = nvme_config(folder / "data", NUM_SLOTS, codec=codec)
        self.random = random.Random(seed)
        self.io = io
        self.slots: dict[int, SlotId] = {}
        self.unsure: set[int] = set()

    def run(self) -> None:
        store = None
        try:
            store = NvmeStore(self.config, self.io)
            tier = store.open_namespace(NAMESPACE, LAYOUT, accepts_lossy=True)
            for _ in range(NUM_STEPS):
                self.random.choice((self.write, self.write, self.delete))(tier)
            store.close()
        except (PowerCut, UcmError):
            if store is not None:
                store.abort()
        finally:
            self.io.close()

    def write(self, tier: NvmeTier) -> None:
        absent = [name for name in range(NUM_NAMES) if name not in self.slots]
        names = self.random.sample(absent, min(len(absent), self.random.randint(1, 5)))
        self.unsure = set(names)
        self.slots |= store_all(tier, names)
        self.unsure = set()

    def delete(self, tier: NvmeTier) -> None:
        names = self.random.sample(sorted(self.slots), min(len(self.slots), 2))
        items = [(self.slots.pop(name), make_key(name)) for name in names]
        self.unsure = set(names)
        tier.delete(items)
        self.unsure = set()


def reopen_and_check(work: Workload) -> None:
    store = NvmeStore(work.config)
    tier = store.open_namespace(NAMESPACE, LAYOUT, accepts_lossy=True)
    assert tier.check_integrity() == []
    found = {KEYS[entry.key]: entry.slot for entry in tier.entries()}
    assert work.slots.keys() <= found.keys() <= work.slots.keys() | work.unsure
    for name, slot in found.items():
        assert read_is_right(tier, slot, name) or name not in work.slots
    more = store_all(tier, [name for name in range(NUM_NAMES) if name not in found])
    assert all(read_is_right(tier, slot, name) for name, slot in more.items())
    tier.delete([(slot, make_key(name)) for name, slot in more.items()])
    assert tier.check_integrity() == []
    store.close()


def count_calls(codec: str, folder: Path) -> int:
    io = FaultyFileIo(seed=1)
    Workload(codec, 1, io, folder / "counted").run()
    return io.num_calls


@pytest.mark.timeout(120)
@pytest.mark.parametrize("codec", ["bp-zstd", "int8"])
@pytest.mark.parametrize("loses_index", [False, True])
def test_power_cut_at_every_call(codec: str, loses_index: bool, folder: Path) -> None:
    num_calls = count_calls(codec, folder)
    assert num_calls > 20, num_calls
    for cut_at in range(1, num_calls + 1, 5 if loses_index else 1):
        io = FaultyFileIo(seed=cut_at, cut_at=cut_at)
        work = Workload(codec, 1, io, folder / str(cut_at))
        work.run()
        assert io.has_failed
        index = folder / str(cut_at) / "data" / "ns" / NAMESPACE.hex() / "index"
        if loses_index and index.exists():
            shutil.rmtree(index)
        reopen_and_check(work)
        assert work.config.path is not None
        # a torn block that only its header named was found by a read, and quarantined
        assert check_store(work.config.path, repair=loses_index).ok
        shutil.rmtree(folder / str(cut_at))
