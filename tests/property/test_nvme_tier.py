"""NvmeTier against a dictionary: any order of calls, restarts, crashes and lost indexes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from ucm.storage.nvme import NvmeStore
from ucm.storage.tier import IoStatus, SlotId, SlotWrite
from ucm.testing.nvme import NAMESPACE, nvme_config
from ucm.testing.tier_conformance import LAYOUT, get, make_key, make_write
from ucm.types import ROOT_KEY

NUM_SLOTS = 12
NAMES = st.integers(0, 15)


class NvmeMachine(RuleBasedStateMachine):
    """The model: name -> slot for blocks, a set for slots handed out."""

    slots = Bundle("slots")

    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="ucm", dir=memory if memory.is_dir() else None))
        self.blocks: dict[int, SlotId] = {}
        self.allocated: set[SlotId] = set()
        self.open()

    def open(self) -> None:
        self.store = NvmeStore(nvme_config(self.folder / "data", NUM_SLOTS))
        self.tier = self.store.open_namespace(NAMESPACE, LAYOUT)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(target=slots, count=st.integers(0, 5))
    def allocate(self, count: int) -> object:
        given = self.tier.allocate(count)
        room = NUM_SLOTS - len(self.blocks) - len(self.allocated)
        assert len(given) == min(count, room)
        assert not set(given) & (self.allocated | set(self.blocks.values()))
        self.allocated.update(given)
        return multiple(*given)

    @rule(slot=consumes(slots))
    def free(self, slot: SlotId) -> None:
        self.tier.free([slot])
        self.allocated.discard(slot)

    @rule(slot=consumes(slots), name=NAMES, good=st.sampled_from([True, True, True, False]))
    def write(self, slot: SlotId, name: int, good: bool) -> None:
        if slot not in self.allocated:
            return  # the tier was opened again meanwhile
        item = make_write(slot, name)
        if not good:
            item = SlotWrite(slot, make_key(name), ROOT_KEY, item.data, (1, 2, 3))
        (status,) = self.tier.write([item])
        self.allocated.discard(slot)
        if good:
            assert status is IoStatus.OK
            self.blocks[name] = slot
        else:
            assert status is IoStatus.CORRUPT
            self.tier.free([slot])

    @rule(name=NAMES, other=NAMES)
    def read(self, name: int, other: int) -> None:
        slot = self.blocks.get(name)
        if slot is None:
            return
        assert get(self.tier, slot, name) is IoStatus.OK
        if other != name:
            assert get(self.tier, slot, other) is IoStatus.CORRUPT

    @rule(names=st.lists(NAMES, max_size=4, unique=True))
    def delete(self, names: list[int]) -> None:
        slots = [self.blocks.pop(name, SlotId(NUM_SLOTS)) for name in names]
        self.tier.delete([(slot, make_key(name)) for slot, name in zip(slots, names, strict=True)])

    @rule(how=st.sampled_from(["close", "abort", "lose the index"]))
    def reopen(self, how: str) -> None:
        if how == "close":
            self.store.close()
        else:
            self.store.abort()
        if how == "lose the index":
            shutil.rmtree(self.folder / "data" / "ns" / NAMESPACE.hex() / "index")
        self.allocated.clear()
        self.open()

    @invariant()
    def agrees(self) -> None:
        found = {entry.key: entry.slot for entry in self.tier.entries()}
        assert found == {make_key(name): slot for name, slot in self.blocks.items()}
        usage = self.tier.usage()
        assert usage.used_slots == len(self.blocks) + len(self.allocated)
        assert usage.free_slots == NUM_SLOTS - usage.used_slots
        assert usage.quarantined_slots == 0
        assert self.tier.check_integrity() == []


TestNvmeTier = pytest.mark.timeout(120)(NvmeMachine.TestCase)
TestNvmeTier.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
