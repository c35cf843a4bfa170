"""Every sequence of up to three operations, cut at every call, with three ways to survive it.

Most crash bugs of file systems need no more than three operations on a fresh system and a crash
right behind one that makes something durable ("Finding Crash-Consistency Bugs with Bounded
Black-Box Crash Testing", OSDI 2018). A cut within a sequence's first operations is the cut of a
shorter sequence, so each is cut only in its last one. A store's `flush` ends in the tier's `write`,
which is durable when it returns. Half of the cuts are of a namespace with summaries.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ucm.storage.nvme import NvmeStore, NvmeTier
from ucm.storage.tier import IoStatus, SlotId
from ucm.testing.faulty_index import faulty_index
from ucm.testing.faulty_io import SURVIVAL, FaultyFileIo, PowerCut
from ucm.testing.lanes import LANE
from ucm.testing.nvme import NAMESPACE, nvme_config, quick_folder
from ucm.testing.tier_conformance import LAYOUT, get, get_summary, make_key, make_write
from ucm.types import SummaryKind

NUM_SLOTS = 4
NAMES = ("A", "B", "C")
PARENT = {"A": None, "B": "A", "C": None}


class Sequence:
    """A store, what it was told, and what it must therefore hold."""

    def __init__(self, folder: Path, io: FaultyFileIo, summary: SummaryKind | None = None) -> None:
        self.path = folder / "data"
        self.io = io
        self.summary = summary
        self.slots: dict[str, SlotId] = {}
        self.unsure: set[str] = set()
        self.store = self._open()

    @property
    def tier(self) -> NvmeTier:
        return self.store.open_namespace(NAMESPACE, LAYOUT, summary=self.summary)

    def run(self, names: tuple[str, ...]) -> list[int]:
        """Do the operations; returns how many calls had been made after each."""
        calls = [0]
        try:
            for name in names:
                OPERATIONS[name](self)
                calls.append(self.io.num_calls)
        except PowerCut:
            pass
        finally:
            self.store.abort()
            self.io.close()
        return calls

    def put_a(self) -> None:
        self._put("A")

    def put_child(self) -> None:
        self._put("B")

    def put_both(self) -> None:
        self._put("A", "B")

    def reuse(self) -> None:
        """A goes with its child, and another block comes into its slot."""
        self.delete()
        self._put("C")

    def delete(self) -> None:
        names = [name for name in ("A", "B") if name in self.slots]
        items = [(self.slots.pop(name), make_key(name)) for name in names]
        self.unsure.update(names)
        self.tier.delete(items)
        self.unsure.difference_update(names)

    def get(self) -> None:
        for name, slot in self.slots.items():
            assert get(self.tier, slot, name) is IoStatus.OK

    def reopen(self) -> None:
        self.store.close()
        self._open_again()

    def crash(self) -> None:
        """The process dies, the machine does not."""
        self.store.abort()
        self._open_again()

    def _open(self) -> NvmeStore:
        return NvmeStore(nvme_config(self.path, NUM_SLOTS, summary=self.summary), self.io)

    def _open_again(self) -> None:
        """Blocks whose parent was never stored are dropped by that."""
        self.store = self._open()
        if "A" not in self.slots and "B" in self.slots:
            self.unsure.add("B")
            del self.slots["B"]
        assert self.tier is not None
        self.unsure.clear()

    def _put(self, *names: str) -> None:
        """Store what is not there yet, or A once more, in another slot."""
        wanted = [name for name in names if name == "A" or name not in self.slots]
        slots = self.tier.allocate(len(wanted))
        items = [
            make_write(slot, name, PARENT[name], summary=self.summary)
            for slot, name in zip(slots, wanted, strict=False)
        ]
        self.unsure.update(wanted[: len(items)])
        for name, slot, status in zip(wanted, slots, self.tier.write(items), strict=False):
            assert status is IoStatus.OK
            self.slots[name] = slot
        self.unsure.clear()


NOTHING_AT_FIRST = ("get", "delete", "crash")
"""Done to an empty store they leave it as it is: such a sequence is a shorter one."""

OPERATIONS: dict[str, Callable[[Sequence], None]] = {
    "put A": Sequence.put_a,
    "put child": Sequence.put_child,
    "put both": Sequence.put_both,
    "delete": Sequence.delete,
    "reuse": Sequence.reuse,
    "get": Sequence.get,
    "reopen": Sequence.reopen,
    "crash": Sequence.crash,
}


def check(done: Sequence) -> None:
    """Open on a good disk: what was flushed is there and right, what was deleted is not."""
    config = nvme_config(done.path, NUM_SLOTS, summary=done.summary)
    store = NvmeStore(config, FaultyFileIo())
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    assert tier.check_integrity() == []
    by_key = {make_key(name): name for name in NAMES}
    found = {by_key[entry.key]: entry.slot for entry in tier.entries()}
    assert found.keys() <= done.slots.keys() | done.unsure
    expected = {name for name in done.slots if PARENT[name] in (None, *done.slots)}
    if not done.unsure & {"A"}:  # its child goes with it
        assert found.keys() >= expected
    for name, slot in found.items():
        assert get(tier, slot, name) is IoStatus.OK
        assert (done.summary is None) == (get_summary(tier, slot, name) == b"")
    store.close()


def sequences() -> Iterator[tuple[str, ...]]:
    for length in range(1, LANE.short_sequence_lengths + 1):
        yield from itertools.product(OPERATIONS, repeat=length)


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


@pytest.mark.timeout(300)
@pytest.mark.parametrize("survival", SURVIVAL)
@pytest.mark.parametrize("first", [name for name in OPERATIONS if name not in NOTHING_AT_FIRST])
def test_all_short_sequences_cut_at_every_call(first: str, survival: str, folder: Path) -> None:
    num_cuts = 0
    for names in sequences():
        if names[0] != first:
            continue
        io = FaultyFileIo()
        with faulty_index(io, seed=0):
            whole = Sequence(folder / "whole", io)
            calls = whole.run(names)
        if survival == "some":
            check(whole)
        shutil.rmtree(folder / "whole")
        for cut_at in range(calls[-2] + 1, calls[-1] + 1):
            io = FaultyFileIo(seed=cut_at, cut_at=cut_at, survival=survival)
            with faulty_index(io, seed=cut_at):
                summary = SummaryKind.GSA_K4 if cut_at % 2 else None
                cut = Sequence(folder / "cut", io, summary)
                cut.run(names)
            assert io.is_dead
            check(cut)
            shutil.rmtree(folder / "cut")
            num_cuts += 1
    print(f"{num_cuts} cuts")
