"""A failed fdatasync, at random moments: one segment is quarantined, everything else goes on.

`FaultyFileIo` asserts that a file whose sync failed is never synced again ("Can Applications
Recover from fsync Failures?", USENIX ATC 2020).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.storage.nvme import NvmeStore
from ucm.storage.tier import IoStatus, SlotId
from ucm.testing.faulty_io import FaultyFileIo
from ucm.testing.lanes import IS_DEEP, LANE
from ucm.testing.nvme import NAMESPACE, nvme_config, quick_folder
from ucm.testing.tier_conformance import LAYOUT, get, make_key, make_write, put

NUM_SLOTS = 32
SLOTS_PER_SEGMENT = 4


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


@pytest.mark.timeout(600 if IS_DEEP else 60)
def test_only_the_segment_goes(folder: Path) -> None:
    for seed in range(LANE.failed_syncs):
        run(folder / str(seed), random.Random(seed))


def run(path: Path, chance: random.Random) -> None:
    io = FaultyFileIo(seed=chance.randrange(1000))
    store = NvmeStore(nvme_config(path, NUM_SLOTS), io)
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    slots: dict[int | str, SlotId] = {}
    for name in range(chance.randint(1, 12)):
        slots.update(put(tier, [name]))
    (slot,) = tier.allocate(1)
    first, lost = min(slots.values()), slot // SLOTS_PER_SEGMENT
    io.fail_once("fdatasync")
    if slot % SLOTS_PER_SEGMENT:  # else a new segment could not even be made
        assert tier.write([make_write(slot, "lost")]) == [IoStatus.IO_ERROR]
    else:
        victim = chance.choice(list(slots))
        lost = slots[victim] // SLOTS_PER_SEGMENT
        tier.free([slot])
        tier.delete([(slots.pop(victim), make_key(victim))])
    assert first == 0
    assert tier.usage().quarantined_slots == SLOTS_PER_SEGMENT
    for stored, place in slots.items():
        wanted = IoStatus.IO_ERROR if place // SLOTS_PER_SEGMENT == lost else IoStatus.OK
        assert get(tier, place, stored) is wanted
    later = put(tier, [f"later {number}" for number in range(6)])
    assert all(place // SLOTS_PER_SEGMENT != lost for place in later.values())
    assert tier.check_integrity() == []
    store.close()
    reopened = NvmeStore(nvme_config(path, NUM_SLOTS))
    tier = reopened.open_namespace(NAMESPACE, LAYOUT)
    assert tier.usage().quarantined_slots == SLOTS_PER_SEGMENT, "the retirement is durable"
    found = {entry.key for entry in tier.entries()}
    assert found >= {make_key(name) for name in later}
    reopened.close()
