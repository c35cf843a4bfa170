"""Data folders with planted, recorded defects: the corpus that `fsck` must explain and mend.

A seed chooses a sound store's copy and either one defect that hides what lies behind it
(superblock, index file) or one to three that do not, in different places. Each says which findings
explain it and which blocks it costs.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ucm.storage.format import FORMAT_VERSION, HEADER_BYTES, SUPERBLOCK_BYTES
from ucm.storage.fsck import FindingKind as Kind
from ucm.storage.index import BlockIndex, IndexRecord
from ucm.storage.nvme import NvmeStore
from ucm.storage.tier import IoStatus, SlotId
from ucm.types import ROOT_KEY, SummaryKind

from .nvme import NAMESPACE, head_bytes, nvme_config
from .tier_conformance import LAYOUT, make_key, make_summary, make_write

if TYPE_CHECKING:
    from collections.abc import Callable

    from ucm.config import NvmeConfig

SLOTS_PER_SEGMENT: Final = 4
NUM_SLOTS: Final = 12
KIND: Final = SummaryKind.GSA_K4
"""Of the summaries in those stores that have any; block number 8 lies there without."""
PARENTS: Final[dict[int, int | None]] = {
    0: None, 1: 0, 2: 1, 3: 2, 4: None, 5: 4, 6: None, 7: 6, 8: None, 9: 8,
}  # fmt: skip
"""Block number n lies in slot n."""


@dataclass(frozen=True, slots=True)
class Planted:
    """One defect: at least one finding of one of these kinds must explain it."""

    name: str
    kinds: tuple[Kind, ...]
    lost: frozenset[int] = frozenset()
    """Blocks that it costs, without their descendants."""
    slot: int | None = None
    """The finding names this slot."""
    is_damage: bool = True
    is_final: bool = False
    """No repair is possible: it is reported each time."""
    may_lose_all: bool = False


@dataclass(slots=True)
class DamagedStore:
    """One store of the corpus."""

    path: Path
    random: random.Random
    has_summaries: bool = False
    planted: list[Planted] = field(default_factory=list)
    free_names: list[int] = field(default_factory=lambda: list(PARENTS))
    """Blocks that no defect has hit yet."""
    free_slots: list[int] = field(default_factory=lambda: [10, 11])

    @property
    def head_bytes(self) -> int:
        """What lies in front of a block."""
        return head_bytes(KIND if self.has_summaries else None)

    @property
    def slot_bytes(self) -> int:
        """From one slot to the next."""
        return self.head_bytes + LAYOUT.block_bytes

    @property
    def config(self) -> NvmeConfig:
        """How it is opened."""
        return nvme_config(self.path, NUM_SLOTS, summary=KIND if self.has_summaries else None)

    @property
    def folder(self) -> Path:
        """The namespace's folder."""
        return self.path / "ns" / NAMESPACE.hex()

    def take(self) -> int:
        """A block that no other defect hits."""
        name = self.random.choice(self.free_names)
        self.free_names.remove(name)
        return name

    def take_summarised(self) -> int:
        """As `take`, a block that has a summary."""
        self.free_names = [name for name in self.free_names if name != 8] or self.free_names
        return self.take()

    def take_free_slot(self) -> int:
        """A slot without a block that no other defect uses; far out when there is none left."""
        return self.free_slots.pop() if self.free_slots else 1 << 20

    def segment(self, number: int) -> Path:
        """A segment's file."""
        return self.folder / "segments" / f"{number:04d}.seg"

    def overwrite(self, slot: int, offset: int, data: bytes) -> None:
        """Write into a slot behind the store's back."""
        with self.segment(slot // SLOTS_PER_SEGMENT).open("r+b") as file:
            file.seek(slot % SLOTS_PER_SEGMENT * self.slot_bytes + offset)
            file.write(data)

    def read_slot(self, slot: int) -> bytes:
        """A slot's bytes."""
        start = slot % SLOTS_PER_SEGMENT * self.slot_bytes
        data = self.segment(slot // SLOTS_PER_SEGMENT).read_bytes()
        return data[start : start + self.slot_bytes]

    def flip(self, slot: int, start: int, length: int) -> None:
        """Flip one bit in a range of a slot."""
        offset = start + self.random.randrange(length)
        byte = self.read_slot(slot)[offset] ^ (1 << self.random.randrange(8))
        self.overwrite(slot, offset, bytes([byte]))

    def index(self) -> BlockIndex:
        """The index, to be closed cleanly: only the planted defect is one."""
        return BlockIndex(self.folder / "index", 16 << 20)

    def put_record(self, record: IndexRecord) -> None:
        """Let the index say something."""
        index = self.index()
        index.put([record])
        index.close(clean=True)


def make_sound_store(path: Path, *, has_summaries: bool = False) -> None:
    """The store that the corpus is made of."""
    kind = KIND if has_summaries else None
    store = NvmeStore(nvme_config(path, NUM_SLOTS, summary=kind))
    tier = store.open_namespace(NAMESPACE, LAYOUT, summary=kind)
    slots = tier.allocate(len(PARENTS))
    assert slots == list(PARENTS)
    items = [
        make_write(SlotId(name), name, parent, summary=None if name == 8 else kind)
        for name, parent in PARENTS.items()
    ]
    assert tier.write(items) == [IoStatus.OK] * len(items)
    store.close()


def make_damaged_store(
    sound: Path, path: Path, seed: int, *, has_summaries: bool = False
) -> DamagedStore:
    """A copy of `sound`, which has summaries or not, with the defects of one seed."""
    shutil.copytree(sound, path)
    store = DamagedStore(path, random.Random(seed), has_summaries)
    if store.random.random() < 0.3:
        plants = [store.random.choice(COARSE)]
    else:
        fine = FINE + OF_SUMMARIES if has_summaries else FINE
        plants = store.random.sample(fine, store.random.randint(1, 3))
    plants.sort(key=ORDER.index)
    store.planted = [plant(store) for plant in plants]
    return store


def with_descendants(names: set[int]) -> set[int]:
    """What is lost with `names`."""
    result = set(names)
    for name, parent in PARENTS.items():
        if parent in result:
            result.add(name)
    return result


def _slab_flip(store: DamagedStore) -> Planted:
    name, layer = store.take(), store.random.randrange(LAYOUT.num_layers)
    start = store.head_bytes + layer * LAYOUT.slab_stride_bytes
    store.flip(name, start, LAYOUT.slab_bytes)
    return Planted("slab flip", (Kind.CHECKSUM, Kind.RECORD), frozenset({name}), name)


def _header_flip(store: DamagedStore) -> Planted:
    name = store.take()
    store.flip(name, 0, HEADER_BYTES)
    return Planted("header flip", (Kind.RECORD,), frozenset({name}), name)


def _header_blank(store: DamagedStore) -> Planted:
    name = store.take()
    store.overwrite(name, 0, bytes(HEADER_BYTES))
    return Planted("blank header", (Kind.RECORD,), frozenset({name}), name)


def _misdirected(store: DamagedStore) -> Planted:
    name, source = store.take(), store.random.choice(list(PARENTS))
    if source == name:
        source = (name + 1) % len(PARENTS)
    store.overwrite(name, 0, store.read_slot(source))
    return Planted("another slot's bytes", (Kind.RECORD,), frozenset({name}), name)


def _record_garbage(store: DamagedStore) -> Planted:
    name = store.take()
    index = store.index()
    with index._env.begin(write=True) as transaction:  # noqa: SLF001  damage has no public door
        garbage = store.random.randbytes(store.random.choice((0, 7, 56)))
        transaction.put(make_key(name), garbage, db=index._blocks)  # noqa: SLF001
    index.close(clean=True)
    return Planted("record of garbage", (Kind.RECORD,), frozenset({name}))


def _wrong_place(store: DamagedStore) -> Planted:
    name = store.take()
    slot = store.random.choice((store.take_free_slot(), 1 << 20, (1 << 64) - 1))
    parent = PARENTS[name]
    parent_key = ROOT_KEY if parent is None else make_key(parent)
    store.put_record(IndexRecord(make_key(name), parent_key, SlotId(slot), 7))
    return Planted("record of another slot", (Kind.RECORD,), frozenset({name}), slot)


def _wrong_generation(store: DamagedStore) -> Planted:
    name, parent = store.take(), None
    parent = PARENTS[name]
    parent_key = ROOT_KEY if parent is None else make_key(parent)
    generation = store.random.choice((0, 3, 1 << 50))
    store.put_record(IndexRecord(make_key(name), parent_key, SlotId(name), generation))
    return Planted("record of another write", (Kind.RECORD,), frozenset({name}), name)


def _two_for_one(store: DamagedStore) -> Planted:
    name = store.take()
    generation = store.random.choice((0, 1 << 60))
    record = IndexRecord(make_key("rival"), ROOT_KEY, SlotId(name), generation)
    store.put_record(record)
    lost = frozenset({name}) if generation else frozenset()
    return Planted("two records for one slot", (Kind.RECORD,), lost, name)


def _orphan(store: DamagedStore) -> Planted:
    slot = store.take_free_slot()
    store.put_record(IndexRecord(make_key("orphan"), make_key("nobody"), SlotId(slot), 9))
    return Planted("record without parent", (Kind.RECORD,), slot=slot)


def _lost_record(store: DamagedStore) -> Planted:
    name = store.take()
    index = store.index()
    index.drop([make_key(name)])
    index.close(clean=True)
    kinds = (Kind.UNINDEXED,)
    return Planted("block without record", kinds, frozenset({name}), name, is_damage=False)


def _garbage_in_free_slot(store: DamagedStore) -> Planted:
    slot = store.free_slots.pop(0) if store.free_slots else store.take()
    store.overwrite(slot, 0, store.random.randbytes(512))
    return Planted("garbage in a free slot", (Kind.UNINDEXED,), slot=slot, is_damage=False)


def _names_of(segment: int) -> frozenset[int]:
    first = segment * SLOTS_PER_SEGMENT
    return frozenset(range(first, first + SLOTS_PER_SEGMENT)) & frozenset(PARENTS)


def _segment_truncated(store: DamagedStore) -> Planted:
    number = store.random.randrange(3)
    size = store.random.randrange(SLOTS_PER_SEGMENT * store.slot_bytes)
    os.truncate(store.segment(number), size)
    return Planted("truncated segment", (Kind.SEGMENT,), _names_of(number))


def _segment_missing(store: DamagedStore) -> Planted:
    number = store.random.randrange(2)  # a missing last one leaves no trace but its records
    store.segment(number).unlink()
    return Planted("missing segment", (Kind.SEGMENT,), _names_of(number))


def _last_segment_missing(store: DamagedStore) -> Planted:
    store.segment(2).unlink()
    return Planted("missing last segment", (Kind.RECORD,), _names_of(2))


def _segment_is_a_link(store: DamagedStore) -> Planted:
    number = store.random.randrange(3)
    target = store.path.with_name(store.path.name + ".elsewhere")
    store.segment(number).rename(target)
    store.segment(number).symlink_to(target)
    return Planted("segment is a link", (Kind.SEGMENT,), _names_of(number))


def _segment_is_a_folder(store: DamagedStore) -> Planted:
    number = store.random.randrange(3)
    store.segment(number).unlink()
    store.segment(number).mkdir()
    return Planted("segment is a folder", (Kind.SEGMENT,), _names_of(number))


def _extra_segment(store: DamagedStore) -> Planted:
    shutil.copy(store.segment(store.random.randrange(3)), store.segment(3))
    return Planted("copied segment", (Kind.UNINDEXED,), is_damage=False)


def _segment_far_away(store: DamagedStore) -> Planted:
    store.segment(6).write_bytes(b"")
    return Planted("gap in the segments", (Kind.SEGMENT,))


def _quarantined(store: DamagedStore) -> Planted:
    name = store.take()
    index = store.index()
    index.quarantine(SlotId(name), make_key(name), "bad checksum or header")
    index.close(clean=True)
    return Planted("quarantined slot", (Kind.QUARANTINED,), frozenset({name}), name)


def _retired(store: DamagedStore) -> Planted:
    number = store.random.randrange(3)
    index = store.index()
    index.retire(number, "fdatasync failed")
    index.close(clean=True)
    return Planted("retired segment", (Kind.SEGMENT,), _names_of(number))


def _foreign_file(store: DamagedStore) -> Planted:
    places = (store.path / "ns", store.folder, store.folder / "segments", store.folder / "index")
    name = store.random.choice(("notes.txt", "core.1234", "x" * 200, "é\n"))
    (store.random.choice(places) / name).write_bytes(b"not ours")
    return Planted("foreign file", (Kind.FOREIGN,), is_damage=False)


def _leftover(store: DamagedStore) -> Planted:
    where = store.random.choice(("superblock.tmp", "index/clean.tmp", "index.new", "ns"))
    if where == "ns":
        (store.path / "ns" / ("cd" * 32 + ".tmp") / "segments").mkdir(parents=True)
    elif where == "index.new":
        (store.folder / where).mkdir()
        (store.folder / where / "data.mdb").write_bytes(bytes(8192))
    else:
        (store.folder / where).write_bytes(b"half")
    return Planted("leftover of a crash", (Kind.LEFTOVER,), is_damage=False)


def _permissions(store: DamagedStore) -> Planted:
    files = (store.folder / "superblock", store.segment(2), store.folder / "index" / "data.mdb")
    folders = (store.path / "ns", store.folder, store.folder / "segments", store.folder / "index")
    target = store.random.choice((*files, *folders))
    if target.exists() and not target.is_symlink():
        target.chmod(store.random.choice((0o666, 0o620)) | (0o111 if target.is_dir() else 0))
    else:
        (store.path / "ns").chmod(0o777)
    return Planted("others may write", (Kind.PERMISSIONS,))


def _mark_lies(store: DamagedStore) -> Planted:
    mark = store.folder / "index" / "clean"
    data = bytearray(mark.read_bytes())
    data[store.random.randrange(len(data))] ^= 1 << store.random.randrange(8)
    mark.write_bytes(data)
    return Planted("clean mark lies", (Kind.MARK,), is_damage=False)


def _superblock(store: DamagedStore) -> Planted:
    path = store.folder / "superblock"
    how = store.random.choice(("flip", "cut", "gone", "other", "folder", "empty", "long"))
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[store.random.randrange(SUPERBLOCK_BYTES)] ^= 1 << store.random.randrange(8)
        path.write_bytes(data)
    elif how in ("cut", "empty"):
        os.truncate(path, store.random.randrange(SUPERBLOCK_BYTES) if how == "cut" else 0)
    elif how == "long":
        path.write_bytes(data + b"x")
    elif how == "other":
        store.folder.rename(store.path / "ns" / ("ab" * 32))
    else:
        path.unlink()
    if how == "folder":
        path.mkdir()
    return Planted(f"superblock: {how}", (Kind.SUPERBLOCK,), frozenset(PARENTS))


def _other_version(store: DamagedStore) -> Planted:
    from ucm.checksum import checksum

    path = store.folder / "superblock"
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 8, FORMAT_VERSION + store.random.randint(1, 9))
    struct.pack_into("<Q", data, SUPERBLOCK_BYTES - 8, checksum(bytes(data[:-8])))
    path.write_bytes(data)
    return Planted("another version", (Kind.VERSION,), frozenset(PARENTS), is_final=True)


def _namespace_is_a_file(store: DamagedStore) -> Planted:
    (store.path / "ns" / ("ef" * 32)).write_bytes(b"no folder")
    return Planted("namespace is a file", (Kind.SUPERBLOCK,))


def _index_file(store: DamagedStore) -> Planted:
    data = store.folder / "index" / "data.mdb"
    how = store.random.choice(("cut", "garbled", "gone", "empty", "folder gone", "a file"))
    if how == "cut":
        os.truncate(data, store.random.randrange(1, 3 * 4096))
    elif how == "garbled":
        data.write_bytes(store.random.randbytes(data.stat().st_size))
    elif how == "empty":
        os.truncate(data, 0)
    elif how == "gone":
        data.unlink()
    else:
        shutil.rmtree(store.folder / "index")
        if how == "a file":
            (store.folder / "index").write_bytes(b"no folder")
    return Planted(f"index: {how}", (Kind.INDEX,))


def _index_page(store: DamagedStore) -> Planted:
    """Some sectors of LMDB's file; where nothing uses them, at least the clean mark is wrong."""
    path = store.folder / "index" / "data.mdb"
    data = bytearray(path.read_bytes())
    for _ in range(store.random.randint(1, 4)):
        start = store.random.randrange(len(data) // 512) * 512
        data[start : start + 512] = store.random.randbytes(512)
    path.write_bytes(data)
    kinds = (Kind.INDEX, Kind.RECORD, Kind.MARK, Kind.UNINDEXED)
    return Planted("index: sectors", kinds, may_lose_all=True, is_damage=False)


OF_SUMMARY: Final = (Kind.SUMMARY, Kind.RECORD, Kind.CHECKSUM)
"""What explains a bad summary: itself, or that its block is lost with another defect's."""


def _summary_flip(store: DamagedStore) -> Planted:
    name = store.take_summarised()
    store.flip(name, HEADER_BYTES, len(make_summary(name, KIND)))
    return Planted("summary flip", OF_SUMMARY, slot=name, is_damage=False)


def _another_blocks_summary(store: DamagedStore) -> Planted:
    name = store.take_summarised()
    store.overwrite(name, HEADER_BYTES, make_summary((name + 1) % len(PARENTS), KIND))
    return Planted("another block's summary", OF_SUMMARY, slot=name, is_damage=False)


def _summary_garbage(store: DamagedStore) -> Planted:
    name = store.take()
    size = store.head_bytes - HEADER_BYTES
    store.overwrite(name, HEADER_BYTES, store.random.randbytes(size))
    return Planted("garbage for a summary", OF_SUMMARY, slot=name, is_damage=False)


FINE: Final[list[Callable[[DamagedStore], Planted]]] = [
    _record_garbage, _wrong_place, _wrong_generation, _two_for_one, _orphan, _lost_record,
    _quarantined, _slab_flip, _header_flip, _header_blank, _misdirected,
    _garbage_in_free_slot, _foreign_file, _leftover, _permissions, _mark_lies,
]  # fmt: skip
"""Defects beside which others are still found."""

COARSE: Final[list[Callable[[DamagedStore], Planted]]] = [
    _superblock, _other_version, _namespace_is_a_file, _index_file, _index_page,
    _segment_truncated, _segment_missing, _last_segment_missing, _segment_is_a_link,
    _segment_is_a_folder, _extra_segment, _segment_far_away, _retired,
]  # fmt: skip
"""Defects that hide others or make them moot: one a store."""

OF_SUMMARIES: Final[list[Callable[[DamagedStore], Planted]]] = [
    _summary_flip, _another_blocks_summary, _summary_garbage,
]  # fmt: skip
"""Fine defects of a store with summaries: no block is lost by them."""

ORDER: Final = [*FINE, *OF_SUMMARIES, *COARSE]
"""Those that open the index come first: opening it would mend what others plant."""
