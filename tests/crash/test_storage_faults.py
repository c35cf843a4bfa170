"""Cut the power, or fail a call, at every point of a workload; reopen; nothing may be wrong.

A run is replayed by its seed and the number of the call. After each: reopening works, what was
flushed is there, what was deleted is not, every byte is right, and the store goes on working.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.errors import UcmError
from ucm.storage.fsck import check_store
from ucm.storage.nvme import NvmeStore, NvmeTier
from ucm.storage.tier import IoStatus, SlotId, SlotRead, SlotWrite
from ucm.testing.faulty_index import faulty_index
from ucm.testing.faulty_io import FaultyFileIo, PowerCut
from ucm.testing.nvme import NAMESPACE, nvme_config, quick_folder
from ucm.testing.tier_conformance import (
    LAYOUT,
    get,
    make_block,
    make_key,
    make_write,
    put,
    slabs,
)
from ucm.types import ROOT_KEY, BlockKey

NUM_NAMES = 24
NUM_SLOTS = 16
NUM_STEPS = 10

KEYS = {make_key(name): name for name in range(NUM_NAMES)}


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


class Workload:
    """Random stores and deletes, and what they promise about the disk."""

    def __init__(self, seed: int, io: FaultyFileIo, folder: Path) -> None:
        self.random = random.Random(seed)
        self.io = io
        self.path = folder / "data"
        self.store: NvmeStore | None = None
        self.slots: dict[int, SlotId] = {}
        """Flushed blocks."""
        self.unsure: set[int] = set()
        """Blocks of the call that was cut."""
        self.retired: set[int] = set()

    def run(self) -> None:
        """Until done or cut."""
        try:
            self.store = NvmeStore(nvme_config(self.path, NUM_SLOTS), self.io)
            tier = self.store.open_namespace(NAMESPACE, LAYOUT)
            for _ in range(NUM_STEPS):
                self.random.choice((self.write, self.write, self.delete, self.read))(tier)
            self.store.close()
        except (PowerCut, UcmError):
            if self.store is not None:
                self.store.abort()
        finally:
            self.io.close()

    def write(self, tier: NvmeTier) -> None:
        absent = [name for name in range(NUM_NAMES) if name not in self.slots]
        names = self.random.sample(absent, min(len(absent), self.random.randint(1, 5)))
        slots = tier.allocate(len(names))
        items = [make_write(slot, name) for slot, name in zip(slots, names, strict=False)]
        self.unsure = {KEYS[item.key] for item in items}
        statuses = tier.write(items)
        self.unsure = set()
        for item, status in zip(items, statuses, strict=True):
            if status is IoStatus.OK:
                self.slots[KEYS[item.key]] = item.slot
            else:
                tier.free([item.slot])

    def delete(self, tier: NvmeTier) -> None:
        names = self.random.sample(sorted(self.slots), min(len(self.slots), 2))
        items = [(self.slots.pop(name), make_key(name)) for name in names]
        self.unsure = set(names)
        tier.delete(items)
        self.unsure = set()

    def read(self, tier: NvmeTier) -> None:
        for name, slot in self.slots.items():
            get(tier, slot, name)  # asserts that what is OK is right


def reopen_and_check(work: Workload, *, may_miss: bool = False) -> NvmeTier:
    """Open the files again without faults and compare them with the promises."""
    store = NvmeStore(nvme_config(work.path, NUM_SLOTS))
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    assert tier.check_integrity() == []
    found = {KEYS[entry.key]: entry.slot for entry in tier.entries()}
    assert found.keys() <= work.slots.keys() | work.unsure
    if not may_miss:
        assert found.keys() >= work.slots.keys()
    for name, slot in found.items():
        assert get(tier, slot, name) is IoStatus.OK
    goes_on(tier)
    store.close()
    return tier


def goes_on(tier: NvmeTier) -> None:
    """The store takes new blocks in every slot that is left."""
    slots = tier.allocate(NUM_SLOTS)
    items = [make_write(slot, f"after {slot}") for slot in slots]
    assert tier.write(items) == [IoStatus.OK] * len(items)
    for slot in slots:
        assert get(tier, slot, f"after {slot}") is IoStatus.OK
    tier.delete([(item.slot, item.key) for item in items])
    assert tier.check_integrity() == []


def count_calls(seed: int, folder: Path) -> int:
    io = FaultyFileIo(seed=seed)
    Workload(seed, io, folder / "counted").run()
    shutil.rmtree(folder / "counted")
    return io.num_calls


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(4))
def test_power_cut_at_every_call(seed: int, folder: Path) -> None:
    num_calls = count_calls(seed, folder)
    assert num_calls > 20, num_calls
    for cut_at in range(1, num_calls + 1):
        work = Workload(seed, FaultyFileIo(seed=cut_at, cut_at=cut_at), folder / str(cut_at))
        work.run()
        assert work.io.has_failed
        reopen_and_check(work)
        shutil.rmtree(folder / str(cut_at))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("seed", range(100, 102))
def test_each_call_fails_once(seed: int, code: int, folder: Path) -> None:
    for call in range(1, count_calls(seed, folder) + 1):
        io = FaultyFileIo(seed=call, faults={call: code})
        work = Workload(seed, io, folder / str(call))
        work.run()
        assert io.has_failed
        reopen_and_check(work, may_miss=True)
        shutil.rmtree(folder / str(call))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(200, 203))
def test_a_lost_index_after_a_power_cut_brings_no_deleted_block_back(
    seed: int, folder: Path
) -> None:
    for cut_at in range(10, count_calls(seed, folder), 5):
        io = FaultyFileIo(seed=cut_at, cut_at=cut_at)
        work = Workload(seed, io, folder / str(cut_at))
        work.run()
        index = work.path / "ns" / NAMESPACE.hex() / "index"
        if index.exists():
            shutil.rmtree(index)
        store = NvmeStore(nvme_config(work.path, NUM_SLOTS))
        tier = store.open_namespace(NAMESPACE, LAYOUT)
        found = {KEYS[entry.key]: entry.slot for entry in tier.entries()}
        assert work.slots.keys() <= found.keys() <= work.slots.keys() | work.unsure
        for name in work.slots:
            assert get(tier, found[name], name) is IoStatus.OK
        for name in work.unsure & found.keys():  # a torn block is a miss, not a wrong one
            assert get(tier, found[name], name) in (IoStatus.OK, IoStatus.CORRUPT)
        store.close()
        shutil.rmtree(folder / str(cut_at))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_a_miss_or_a_clear_error(seed: int, folder: Path) -> None:
    """Flip bits, truncate or fill with garbage, in any file; then use it, check it, repair it."""
    chance = random.Random(seed)
    work = Workload(seed, FaultyFileIo(), folder)
    work.run()
    files = [
        path for path in sorted(work.path.rglob("*")) if path.is_file() and path.stat().st_size
    ]
    for _ in range(chance.randint(1, 4)):
        damage(chance.choice(files), chance)
    use_damaged(work.path)
    check_store(work.path, repair=False)
    assert check_store(work.path, repair=True).ok
    assert check_store(work.path, repair=False).findings == []
    store = NvmeStore(nvme_config(work.path, NUM_SLOTS))
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    for entry in tier.entries():
        assert get(tier, entry.slot, KEYS[entry.key]) is IoStatus.OK
    goes_on(tier)
    store.close()


def damage(path: Path, chance: random.Random) -> None:
    size = path.stat().st_size
    kind = chance.choice(("flip", "flip", "truncate", "garbage"))
    if size == 0:
        return
    if kind == "truncate":
        os.truncate(path, chance.randrange(size))
        return
    with path.open("r+b") as file:
        start = chance.randrange(size)
        file.seek(start)
        if kind == "flip":
            byte = file.read(1)[0] ^ (1 << chance.randrange(8))
            file.seek(start)
            file.write(bytes([byte]))
        else:
            file.write(chance.randbytes(min(8192, size - start)))


def use_damaged(path: Path) -> None:
    """Whatever can be opened and read is right."""
    try:
        store = NvmeStore(nvme_config(path, NUM_SLOTS))
    except UcmError as error:
        assert "fsck" in str(error) or "format" in str(error)  # noqa: PT017  one of two outcomes
        return
    try:
        tier = store.open_namespace(NAMESPACE, LAYOUT)
    except UcmError as error:
        assert "fsck" in str(error)  # noqa: PT017  one of two outcomes
    else:
        for entry in tier.entries():
            if entry.key in KEYS:
                get(tier, entry.slot, KEYS[entry.key])
        assert tier.check_integrity() == []
    finally:
        store.abort()


def test_a_failed_fdatasync_retires_only_its_segment(folder: Path) -> None:
    """Never retried: the segment's blocks are missing, the others are served and written."""
    io = FaultyFileIo()
    path = folder / "data"
    store = NvmeStore(nvme_config(path, NUM_SLOTS), io)
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    first = put(tier, range(4))
    put(tier, range(4, 6))
    io.fail_once("fdatasync")
    slots = tier.allocate(2)
    items = [make_write(slot, f"lost {slot}") for slot in slots]
    assert tier.write(items) == [IoStatus.IO_ERROR] * 2
    tier.free(slots)
    assert tier.usage().quarantined_slots == 4
    assert [get(tier, slot, name) for name, slot in first.items()] == [IoStatus.OK] * 4
    assert get(tier, SlotId(4), 4) is IoStatus.IO_ERROR
    later = put(tier, ["later"])
    assert later["later"] // 4 not in {1}
    assert tier.check_integrity() == []
    store.close()
    store = NvmeStore(nvme_config(path, NUM_SLOTS))
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    assert {entry.key for entry in tier.entries()} == {*map(make_key, first), make_key("later")}
    assert tier.usage().quarantined_slots == 4
    store.close()
    assert check_store(path, repair=True).ok
    store = NvmeStore(nvme_config(path, NUM_SLOTS))
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    assert tier.usage().quarantined_slots == 0
    goes_on(tier)
    store.close()


def test_slots_of_a_commit_in_doubt_are_not_written_again(folder: Path) -> None:
    """The sync after a commit failed: its records may be durable, so their blocks must stay."""
    io = FaultyFileIo()
    with faulty_index(io, seed=0):
        store = NvmeStore(nvme_config(folder / "data", NUM_SLOTS), io)
        tier = store.open_namespace(NAMESPACE, LAYOUT)
        put(tier, ["parent", "child"])
        (again,) = tier.allocate(1)
        io.fail_once("sync")
        assert tier.write([make_write(again, "parent")]) == [IoStatus.IO_ERROR]
        tier.free([again])
        others = tier.allocate(NUM_SLOTS)
        assert again not in others
        items = [make_write(slot, f"other {slot}") for slot in others]
        calls = io.num_calls
        assert tier.write(items) == [IoStatus.IO_ERROR] * len(items)
        assert io.num_calls == calls, "nothing is written that cannot be committed"
        store.abort()
    store = NvmeStore(nvme_config(folder / "data", NUM_SLOTS))
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    found = {entry.key: entry.slot for entry in tier.entries()}
    assert found.keys() == {make_key("parent"), make_key("child")}
    assert get(tier, found[make_key("parent")], "parent") is IoStatus.OK
    store.close()


def test_a_full_disk_stops_stores_and_not_loads(folder: Path) -> None:
    """ENOSPC is FULL, nothing of it is visible, and reads go on."""
    io = FaultyFileIo()
    store = NvmeStore(nvme_config(folder / "data", NUM_SLOTS), io)
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    slots = put(tier, range(3))
    more = tier.allocate(1)
    io.fail_next(errno.ENOSPC)
    assert tier.write([make_write(more[0], "no room")]) == [IoStatus.FULL]
    tier.free(more)
    assert [get(tier, slot, name) for name, slot in slots.items()] == [IoStatus.OK] * 3
    io.fail_next(errno.ENOSPC)
    assert len(tier.allocate(NUM_SLOTS)) == 1, "no segment could be made"
    assert tier.usage().free_slots == 0
    assert len(tier.allocate(4)) == 4, "there is room again"
    store.close()


def test_a_torn_read_is_not_believed(folder: Path) -> None:
    """A device that fails half way leaves an error, not half a block."""
    io = FaultyFileIo()
    store = NvmeStore(nvme_config(folder / "data", NUM_SLOTS), io)
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    (slot,) = put(tier, ["whole"]).values()
    io.fail_next(errno.EIO)
    assert get(tier, slot, "whole") is IoStatus.IO_ERROR
    assert get(tier, slot, "whole") is IoStatus.OK
    store.close()


def test_a_replaced_slot_is_not_the_old_block(folder: Path) -> None:
    """A reader with an outdated slot gets a miss; a misdirected write is noticed."""
    store = NvmeStore(nvme_config(folder / "data", NUM_SLOTS), FaultyFileIo())
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    slots = put(tier, ["old"]) | put(tier, ["neighbour"])
    tier.delete([(slots["old"], make_key("old"))])
    assert put(tier, ["new"])["new"] == slots["old"]
    into = memoryview(bytearray(LAYOUT.block_bytes))
    (outcome,) = tier.read([SlotRead(slots["old"], make_key("old"), into)])
    assert outcome.status is IoStatus.CORRUPT
    assert get(tier, slots["old"], "new") is IoStatus.OK
    store.close()
    segment = folder / "data" / "ns" / NAMESPACE.hex() / "segments" / "0000.seg"
    data = segment.read_bytes()
    size = len(data) // 4
    with segment.open("r+b") as file:  # slot 1's bytes land in slot 0 as well
        file.write(data[size : 2 * size])
    store = NvmeStore(nvme_config(folder / "data", NUM_SLOTS))
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    assert get(tier, SlotId(0), "new") is IoStatus.CORRUPT
    assert get(tier, SlotId(0), "neighbour") is IoStatus.CORRUPT
    assert get(tier, SlotId(1), "neighbour") is IoStatus.OK
    store.close()


def test_the_block_maker_makes_what_it_says() -> None:
    """The oracle itself: names, keys and bytes belong together."""
    assert len(KEYS) == NUM_NAMES
    assert slabs(make_block(1)) != slabs(make_block(2))
    write = make_write(SlotId(0), 3)
    assert isinstance(write, SlotWrite)
    assert (write.key, write.parent) == (BlockKey(make_key(3)), ROOT_KEY)
