"""Namespaces with a codec: two classes of slots, what comes back, what the folder keeps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ucm.checksum import block_checksums
from ucm.errors import ConfigError
from ucm.layout import KvDtype, KvLayout
from ucm.storage import encoded_io
from ucm.storage.codec import CodecId
from ucm.storage.encoding import block_words
from ucm.storage.folder import drop_segment
from ucm.storage.format import Superblock
from ucm.storage.fsck import FindingKind, check_store
from ucm.storage.nvme import NvmeStore, NvmeTier
from ucm.storage.segments import segment_files
from ucm.storage.tier import IoStatus, SlotId, SlotRead, SlotWrite
from ucm.testing.nvme import NAMESPACE, nvme_config
from ucm.testing.tier_conformance import LAYOUT, get, make_key, make_write, put, slabs
from ucm.testing.wild_blocks import make_wild_block, make_wild_write
from ucm.types import ROOT_KEY

FOLDER = NAMESPACE.hex()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def opened(path: Path) -> Iterator[list[NvmeStore]]:
    stores: list[NvmeStore] = []
    yield stores
    for store in stores:
        store.close()


def open_tier(
    path: Path, opened: list[NvmeStore], codec: str = "int8", num_slots: int = 16
) -> NvmeTier:
    for store in opened:
        store.close()
    store = NvmeStore(nvme_config(path, num_slots, codec=codec))
    opened.append(store)
    return store.open_namespace(NAMESPACE, LAYOUT, accepts_lossy=True)


def get_wild(tier: NvmeTier, slot: SlotId, name: int | str) -> IoStatus:
    into = memoryview(bytearray(LAYOUT.block_bytes))
    (outcome,) = tier.read([SlotRead(slot, make_key(name), into)])
    assert outcome.status is not IoStatus.OK or slabs(into) == slabs(make_wild_block(name))
    return outcome.status


def test_what_does_not_fit_is_answered_and_goes_to_a_full_slot(
    path: Path, opened: list[NvmeStore]
) -> None:
    tier = open_tier(path, opened)
    slots = tier.allocate(3)
    items = [make_write(slots[0], 0), make_wild_write(slots[1], 1), make_write(slots[2], 2)]
    assert tier.write(items) == [IoStatus.OK, IoStatus.OVERSIZE, IoStatus.OK]
    assert get_wild(tier, slots[1], 1) is IoStatus.CORRUPT, "nothing is there"
    tier.free([slots[1]])
    (full,) = tier.allocate(1, full=True)
    assert tier.write([make_wild_write(full, 1)]) == [IoStatus.OK]
    assert get_wild(tier, full, 1) is IoStatus.OK
    assert [get(tier, slots[i], i) for i in (0, 2)] == [IoStatus.OK] * 2
    names = sorted(p.name for p in segment_files(path / "ns" / FOLDER / "segments").values())
    assert names == ["0000.compact.seg", "0001.seg"]
    assert tier.check_integrity() == []


@pytest.mark.parametrize("clean", [True, False])
def test_both_classes_survive_a_restart(path: Path, opened: list[NvmeStore], clean: bool) -> None:
    tier = open_tier(path, opened)
    compact = put(tier, [0, 1, 2])
    (full,) = tier.allocate(1, full=True)
    assert tier.write([make_wild_write(full, "wild")]) == [IoStatus.OK]
    if not clean:
        opened[0].abort()
    tier = open_tier(path, opened)
    assert {entry.key: entry.slot for entry in tier.entries()} == {
        **{make_key(name): slot for name, slot in compact.items()},
        make_key("wild"): full,
    }
    assert get_wild(tier, full, "wild") is IoStatus.OK
    assert [get(tier, slot, name) for name, slot in compact.items()] == [IoStatus.OK] * 3
    assert tier.check_integrity() == []
    assert tier.allocate(1, full=True) == [full + 1], "the second slot of the full segment"
    assert tier.allocate(1)[0] < full


def test_the_index_is_rebuilt_from_both_classes(path: Path, opened: list[NvmeStore]) -> None:
    tier = open_tier(path, opened)
    slots = put(tier, [0, 1])
    (full,) = tier.allocate(1, full=True)
    assert tier.write([make_wild_write(full, "wild")]) == [IoStatus.OK]
    opened[0].close()
    (path / "ns" / FOLDER / "index" / "data.mdb").write_bytes(b"no database")
    tier = open_tier(path, opened)
    assert tier.was_rebuilt
    assert {entry.slot for entry in tier.entries()} == {*slots.values(), full}
    assert get_wild(tier, full, "wild") is IoStatus.OK


def test_a_full_segment_has_no_slots_behind_its_last(path: Path, opened: list[NvmeStore]) -> None:
    """Four numbers a segment, two full slots in it: the others are never handed out."""
    tier = open_tier(path, opened)
    full = tier.allocate(100, full=True)
    assert full == [4 * segment + i for segment in range(4) for i in (0, 1)]
    assert tier.usage().total_slots == 8
    assert tier.usage().quarantined_slots == 0
    items = [make_wild_write(slot, slot) for slot in full]
    assert tier.write(items) == [IoStatus.OK] * 8
    assert [get_wild(tier, slot, slot) for slot in full] == [IoStatus.OK] * 8
    assert get_wild(tier, SlotId(2), 2) is IoStatus.IO_ERROR
    assert tier.check_integrity() == []


def test_without_compact_slots_full_ones_take_any_block(
    path: Path, opened: list[NvmeStore]
) -> None:
    tier = open_tier(path, opened, num_slots=8)
    (first,) = tier.allocate(1, full=True)
    tier.free([first])
    slots = tier.allocate(100)
    assert slots == [4, 5, 6, 7, 0, 1]
    assert tier.write([make_write(slot, slot) for slot in slots]) == [IoStatus.OK] * 6
    assert [get(tier, slot, slot) for slot in slots] == [IoStatus.OK] * 6


def test_a_namespace_keeps_its_codec(
    path: Path, opened: list[NvmeStore], caplog: pytest.LogCaptureFixture
) -> None:
    slots = put(open_tier(path, opened, "int8"), [0, 1])
    with caplog.at_level(logging.WARNING):
        tier = open_tier(path, opened, "raw")
    assert "keeps its codec int8" in caplog.text
    assert [get(tier, slot, name) for name, slot in slots.items()] == [IoStatus.OK] * 2


def test_who_accepts_no_loss_gets_none(path: Path, opened: list[NvmeStore]) -> None:
    store = NvmeStore(nvme_config(path, 16, codec="int8"))
    opened.append(store)
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    slots = tier.allocate(2)
    assert tier.write([make_wild_write(slot, slot) for slot in slots]) == [IoStatus.OK] * 2
    assert [get_wild(tier, slot, slot) for slot in slots] == [IoStatus.OK] * 2


def test_an_unknown_codec_is_refused(path: Path) -> None:
    config = nvme_config(path, 4)
    object.__setattr__(config, "codec", "zip")
    with pytest.raises(ConfigError, match="bp-zstd"):
        NvmeStore(config)


def test_the_checksums_are_those_of_what_comes_back(path: Path, opened: list[NvmeStore]) -> None:
    """A lossy block differs from what was put, and is still verified end to end."""
    tier = open_tier(path, opened)
    data = memoryview(bytearray(LAYOUT.block_bytes))
    words = block_words(LAYOUT, data)
    words[...] = np.random.default_rng(3).standard_normal(words.shape).astype("<f4").view("<u4")
    sums = block_checksums(LAYOUT, data)
    (slot,) = tier.allocate(1)
    assert tier.write([SlotWrite(slot, make_key(0), ROOT_KEY, data, sums)]) == [IoStatus.OK]
    into = memoryview(bytearray(LAYOUT.block_bytes))
    (outcome,) = tier.read([SlotRead(slot, make_key(0), into)])
    assert outcome.status is IoStatus.OK
    assert outcome.checksums == block_checksums(LAYOUT, into) != sums


def test_a_block_that_does_not_match_its_checksums_is_not_encoded(
    path: Path, opened: list[NvmeStore]
) -> None:
    tier = open_tier(path, opened)
    (slot,) = tier.allocate(1)
    honest = make_write(slot, 1)
    liar = SlotWrite(slot, honest.key, ROOT_KEY, make_wild_block(1), honest.checksums)
    assert tier.write([liar]) == [IoStatus.CORRUPT]


def test_every_flipped_byte_of_a_compact_slot_is_noticed(
    path: Path, opened: list[NvmeStore]
) -> None:
    slots = put(open_tier(path, opened), [0, 1])
    opened[0].close()
    file = path / "ns" / FOLDER / "segments" / "0000.compact.seg"
    tier = open_tier(path, opened)
    size = int(np.frombuffer(file.read_bytes()[152:160], "<u8")[0])
    good = file.read_bytes()
    for position in [*range(0, 4096, 97), *range(4096, 4096 + size, 23)]:
        spoilt = bytearray(good)
        spoilt[position] ^= 0x10
        file.write_bytes(bytes(spoilt))
        read = SlotRead(slots[0], make_key(0), memoryview(bytearray(LAYOUT.block_bytes)))
        # not through the tier, which would quarantine the slot after the first
        (outcome,) = tier._slot_io.read([read], tier._slots.generations([slots[0]]))
        assert outcome.status is IoStatus.CORRUPT, position
    file.write_bytes(good)
    assert get(tier, slots[0], 0) is IoStatus.OK


def test_fsck_reads_both_classes_and_repairs(path: Path, opened: list[NvmeStore]) -> None:
    tier = open_tier(path, opened)
    compact = put(tier, [0, 1, 2])
    full = tier.allocate(2, full=True)
    assert tier.write([make_wild_write(slot, f"wild {slot}") for slot in full]) == [IoStatus.OK] * 2
    opened[0].close()
    report = check_store(path, repair=False)
    assert report.ok
    assert report.num_blocks == 5
    segments = segment_files(path / "ns" / FOLDER / "segments")
    for number, offset in ((0, 2 * 8192 + 4200), (1, 16384 + 5000)):
        with segments[number].open("r+b") as file:
            file.seek(offset)
            file.write(b"spoilt")
    report = check_store(path, repair=True)
    assert [finding.kind for finding in report.findings] == [FindingKind.CHECKSUM] * 2
    assert {finding.slot for finding in report.findings} == {compact[2], full[1]}
    assert report.ok
    tier = open_tier(path, opened)
    assert [get(tier, compact[name], name) for name in (0, 1)] == [IoStatus.OK] * 2
    assert get_wild(tier, full[0], f"wild {full[0]}") is IoStatus.OK
    assert tier.check_integrity() == []


def test_segments_of_idle_namespaces_make_way_in_either_class(
    path: Path, opened: list[NvmeStore]
) -> None:
    tier = open_tier(path, opened)
    tier.allocate(1)
    tier.allocate(1, full=True)
    opened[0].close()
    root = path / "ns"
    assert drop_segment(root, set(), {""}) == ("", 32768)
    assert list(segment_files(root / FOLDER / "segments")) == [0]


def test_waves_bound_the_scratch_memory(
    path: Path, opened: list[NvmeStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded_io, "WAVE_BYTES", 3 * 8192)
    tier = open_tier(path, opened)
    slots = put(tier, list(range(8)))
    assert [get(tier, slot, name) for name, slot in slots.items()] == [IoStatus.OK] * 8
    mover = tier._slot_io
    assert isinstance(mover, encoded_io.EncodedSlotIo)
    assert [len(spare) for spare in mover._spares] == [3 * 8192]


def test_many_threads_write_and_read_together(path: Path, opened: list[NvmeStore]) -> None:
    tier = open_tier(path, opened, "bp-zstd", num_slots=64)
    failures: list[str] = []

    def work(number: int) -> None:
        for turn in range(6):
            name = f"{number}/{turn}"
            (slot,) = tier.allocate(1)
            statuses = tier.write([make_write(slot, name)])
            if statuses != [IoStatus.OK] or get(tier, slot, name) is not IoStatus.OK:
                failures.append(name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_full_block_must_fit_a_segment() -> None:
    layout = KvLayout(
        num_layers=30, num_kv_heads=3, head_dim=64, block_tokens=32, dtype=KvDtype.BFLOAT16
    )
    with pytest.raises(ConfigError, match=r"raise nvme\.segment_bytes"):
        Superblock(
            namespace=NAMESPACE,
            layout=layout,
            segment_bytes=layout.block_bytes,
            codec=CodecId.INT8,
            compact_bytes=layout.block_bytes // 2,
        )
