"""One seed, one disk's life: random operations, cuts at any call, media that lie; then read it all.

    seed % 4     0  power cuts              a cut tears what was not synced, index included
                 1  and a lying medium      misdirected, unreadable and rotten sectors
                 2  and failing calls       EIO and ENOSPC, of syncs and index commits too
                 3  and all of it, and sectors of the index file damaged between two lives

Every second four seeds have room for summaries, and some blocks have one.

After every life: opening works, the index is sound, no entry leads to anything but its own bytes
or a counted miss, nothing deleted is back, and every flushed block is there unless a fault was
planted in its slot or in one that it hangs on; and so is its summary, and no other.
`UCM_DISK_SEED=N` replays one seed.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.errors import UcmError
from ucm.storage.nvme import NvmeStore, NvmeTier
from ucm.storage.tier import IoStatus, SlotId
from ucm.testing.faulty_index import faulty_index
from ucm.testing.faulty_io import FaultyFileIo, PowerCut
from ucm.testing.faulty_media import FaultyMedia, MediaRates
from ucm.testing.lanes import IS_DEEP, LANE, seeds_to_run
from ucm.testing.nvme import NAMESPACE, nvme_config, quick_folder
from ucm.testing.tier_conformance import LAYOUT, get, get_summary, make_key, make_write
from ucm.types import SummaryKind

NUM_SLOTS = 12
SLOTS_PER_SEGMENT = 4
STEPS_A_LIFE = 7
SEEDS_A_TEST = 1000 if IS_DEEP else 100

CALM = MediaRates()
LYING = MediaRates(misdirected_write=0.03, misdirected_read=0.01, latent_error=0.06, rot=0.06)


class DiskRun:
    """One seed's life: what was promised, and what may be excused."""

    def __init__(self, seed: int, folder: Path, outcomes: Counter[str]) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.outcomes = outcomes
        self.path = folder / "data"
        self.lies, self.fails = seed % 4 in (1, 3), seed % 4 in (2, 3)
        self.kind = SummaryKind.GSA_K4 if seed // 4 % 2 else None
        self.config = nvme_config(self.path, NUM_SLOTS, summary=self.kind)
        self.slot_bytes = self.config.segment_bytes // SLOTS_PER_SEGMENT
        self.summarised: set[tuple[int, SlotId]] = set()
        """Names that were written with their summary, and where."""
        self.media = FaultyMedia(seed, CALM)
        self.next_name = 0
        self.parent: dict[int, int | None] = {}
        self.places: dict[int, set[SlotId]] = {}
        """Every slot that a name may be in."""
        self.flushed: dict[int, SlotId] = {}
        self.unsure: set[int] = set()
        """Names in a call that failed or was cut: there or not."""
        self.torn: set[int] = set()
        """Names whose last write was not acknowledged. Its header may be on the disk and its slabs
        not: nobody sees that until the index is rebuilt from headers, lives later."""
        self.index_was_damaged = False

    def run(self) -> None:
        for life in range(self.random.randint(1, 3)):
            self.live(life)
            if self.seed % 4 == 3 and self.random.random() < 0.4:
                self.damage_index()
            self.check()

    def live(self, life: int) -> None:
        """Open, work, and die or close; anything may fail."""
        seed = self.seed * 10 + life
        faults = {}
        if self.fails:
            for _ in range(self.random.randint(1, 4)):
                code = self.random.choice((errno.EIO, errno.ENOSPC))
                faults[self.random.randint(1, 60)] = code
        self.media.rates = LYING if self.lies else CALM
        cut_at = self.random.randint(1, 60)
        io = FaultyFileIo(seed=seed, cut_at=cut_at, faults=faults, media=self.media)
        with faulty_index(io, seed):
            store = NvmeStore(self.config, io)
            try:
                tier = store.open_namespace(NAMESPACE, LAYOUT, summary=self.kind)
                for _ in range(STEPS_A_LIFE):
                    self.random.choice((self.put, self.put, self.put, self.delete, self.read))(tier)
                if self.random.random() < 0.7:
                    store.close()
            except (PowerCut, UcmError) as error:
                self.outcomes[type(error).__name__] += 1
            finally:
                store.abort()
                io.close()

    def put(self, tier: NvmeTier) -> None:
        """A short chain behind a block that is there, or one of them once more."""
        parent = self.random.choice([None, *self.flushed])
        slots = tier.allocate(self.random.randint(1, 3))
        items = []
        for slot in slots:
            name = self._name(parent)
            kind = self.kind if self.kind and self.random.random() < 0.7 else None
            self.summarised.discard((name, slot))
            if kind is not None:
                self.summarised.add((name, slot))
            items.append((name, make_write(slot, name, self.parent[name], summary=kind)))
            self.places.setdefault(name, set()).add(slot)
            parent = name
        names = [name for name, _ in items]
        self.unsure.update(names)
        self.torn.update(names)
        statuses = tier.write([item for _, item in items])
        for (name, item), status in zip(items, statuses, strict=True):
            if status is IoStatus.OK:
                self.flushed[name] = item.slot
                self.unsure.discard(name)
                self.torn.discard(name)
            else:
                tier.free([item.slot])

    def _name(self, parent: int | None) -> int:
        """Mostly a new one; now and then one that is stored is written again."""
        if self.flushed and self.random.random() < 0.1:
            return self.random.choice(list(self.flushed))
        self.next_name += 1
        self.parent[self.next_name] = parent
        return self.next_name

    def delete(self, tier: NvmeTier) -> None:
        """A block and all that hangs on it, in one call, as the store does."""
        if not self.flushed:
            return
        gone = self._with_descendants({self.random.choice(list(self.flushed))})
        items = [(slot, name) for name, slot in self.flushed.items() if name in gone]
        self.unsure.update(name for _, name in items)
        for _, name in items:
            del self.flushed[name]
        tier.delete([(slot, make_key(name)) for slot, name in items])
        lost = {name for name in gone if self._is_doubtful(name)}
        if not self.fails and not lost:  # a failed index still holds what it was told to forget
            self.unsure -= gone

    def read(self, tier: NvmeTier) -> None:
        for name, slot in self.flushed.items():
            self.outcomes[get(tier, slot, name).value] += 1  # asserts that what is OK is right

    def damage_index(self) -> None:
        """Some sectors of the file that LMDB wrote are not what it wrote."""
        path = self.path / "ns" / NAMESPACE.hex() / "index" / "data.mdb"
        size = path.stat().st_size if path.exists() else 0
        if not size:
            return
        self.index_was_damaged = True
        with path.open("r+b") as file:
            for _ in range(self.random.randint(1, 3)):
                file.seek(self.random.randrange(size))
                file.write(self.random.randbytes(self.random.choice((1, 16, 512))))

    def check(self) -> None:
        """Open on a disk that behaves from now on and compare with what was promised."""
        self.media.rates = CALM
        io = FaultyFileIo(seed=self.seed, media=self.media)
        store = NvmeStore(self.config, io)
        tier = store.open_namespace(NAMESPACE, LAYOUT, summary=self.kind)
        self.outcomes["rebuilt"] += tier.was_rebuilt
        assert tier.check_integrity() == []
        by_key = {make_key(name): name for name in self.parent}
        found = {by_key[entry.key]: entry.slot for entry in tier.entries()}
        self.check_names(found, was_rebuilt=tier.was_rebuilt)
        for name, slot in found.items():
            self.check_block(tier, slot, name)
        left = {by_key[entry.key]: entry.slot for entry in tier.entries()}
        assert left.keys() <= found.keys()
        assert tier.check_integrity() == []
        self.flushed = left
        self.unsure.clear()
        self.index_was_damaged = False
        if self.random.random() < 0.1:
            self.fill(tier)
        store.close()

    def check_names(self, found: dict[int, SlotId], *, was_rebuilt: bool) -> None:
        if was_rebuilt:  # only its new file can be torn, or one that we damaged
            assert self.index_was_damaged or not self.flushed, "the index did not survive a cut"
        else:
            unknown = found.keys() - self.flushed.keys() - self.unsure
            assert not unknown, f"deleted blocks are back: {unknown}"
        missing = self.flushed.keys() - found.keys()
        excused = {name for name in missing if self._is_doubtful(name)}
        excused |= self.parent.keys() - self.flushed.keys()  # a child may outlive a failed parent
        if self.index_was_damaged:
            excused = missing
        lost = missing - self._with_descendants(excused)
        assert not lost, f"flushed blocks are gone: {lost}"
        self.outcomes["present"] += len(found)
        self.outcomes["excused"] += len(missing)

    def check_block(self, tier: NvmeTier, slot: SlotId, name: int) -> None:
        """It is right, or it is a miss that somebody planted, and then it is not offered again."""
        status = get(tier, slot, name)
        self.outcomes[status.value] += 1
        if status is IoStatus.OK:
            self.check_summary(tier, slot, name)
            return
        is_torn = tier.was_rebuilt and name in self.unsure | self.torn
        assert is_torn or self._is_doubtful(name), f"the entry of {name} leads to garbage: {status}"
        if status is IoStatus.CORRUPT:
            assert slot not in {entry.slot for entry in tier.entries()}
            assert tier.usage().quarantined_slots > 0

    def check_summary(self, tier: NvmeTier, slot: SlotId, name: int) -> None:
        """It is the right one, and there if the block was written with it and nothing lied."""
        found = get_summary(tier, slot, name)
        is_due = (name, slot) in self.summarised
        self.outcomes["summary"] += bool(found)
        assert is_due or not found, f"{name} was written without a summary"
        torn = tier.was_rebuilt and name in self.unsure | self.torn
        assert found or not is_due or torn or self._is_doubtful(name), f"that of {name} is lost"

    def fill(self, tier: NvmeTier) -> None:
        """The store takes new blocks in every slot that is left."""
        slots = tier.allocate(NUM_SLOTS)
        items = [make_write(slot, f"after {slot}") for slot in slots]
        assert tier.write(items) == [IoStatus.OK] * len(items)
        assert [get(tier, slot, f"after {slot}") for slot in slots] == [IoStatus.OK] * len(slots)
        tier.delete([(item.slot, item.key) for item in items])

    def _is_doubtful(self, name: int) -> bool:
        segments = self.path / "ns" / NAMESPACE.hex() / "segments"
        return any(
            self.media.is_doubtful(
                segments / f"{slot // SLOTS_PER_SEGMENT:04d}.seg",
                slot % SLOTS_PER_SEGMENT * self.slot_bytes,
                self.slot_bytes,
            )
            for slot in self.places[name]
        )

    def _with_descendants(self, names: set[int]) -> set[int]:
        result = set(names)
        for name, parent in self.parent.items():  # a parent has its name before its children
            if parent in result:
                result.add(name)
        return result


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


SEEDS = seeds_to_run("UCM_DISK_SEED", LANE.disk_seeds)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", SEEDS[::SEEDS_A_TEST])
def test_random_lives_of_a_disk(first: int, folder: Path) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(first, min(first + SEEDS_A_TEST, SEEDS.stop)):
        print(f"UCM_DISK_SEED={seed}")
        DiskRun(seed, folder / str(seed), outcomes).run()
        shutil.rmtree(folder / str(seed))
    print(dict(outcomes))
    if "UCM_DISK_SEED" not in os.environ:  # else the runs would prove nothing
        expected = ("PowerCut", "present", "corrupt", "rebuilt", "summary")
        assert min(outcomes[name] for name in expected) > 0
