"""`check_store`: finds each kind of damage, changes nothing unasked, repairs what can be."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.checksum import checksum
from ucm.errors import ConfigError
from ucm.storage import fsck
from ucm.storage.folder import note_socket
from ucm.storage.format import HEADER_BYTES
from ucm.storage.fsck import FindingKind, FsckReport, check_store
from ucm.storage.index import BlockIndex, IndexRecord
from ucm.storage.nvme import NvmeStore
from ucm.storage.tier import IoStatus, SlotId
from ucm.testing.nvme import NAMESPACE, SLOT_BYTES, nvme_config, quick_folder
from ucm.testing.tier_conformance import LAYOUT, get, make_key, put
from ucm.types import ROOT_KEY


@pytest.fixture
def path() -> Iterator[Path]:
    with quick_folder() as folder:
        store = NvmeStore(nvme_config(folder / "data", 8))
        put(store.open_namespace(NAMESPACE, LAYOUT), range(6))
        store.close()
        yield folder / "data"


def segment(path: Path, number: int = 0) -> Path:
    return path / "ns" / NAMESPACE.hex() / "segments" / f"{number:04d}.seg"


def index_folder(path: Path) -> Path:
    return path / "ns" / NAMESPACE.hex() / "index"


def kinds(report: FsckReport) -> list[FindingKind]:
    return [finding.kind for finding in report.findings]


def fingerprint(path: Path) -> dict[str, str]:
    files = (entry for entry in sorted(path.rglob("*")) if entry.is_file())
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def overwrite(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(data)


def test_the_note_whose_namespace_it_is_is_ours(tmp_path: Path) -> None:
    data = tmp_path / "data"
    store = NvmeStore(nvme_config(data, 8))
    put(store.open_namespace(NAMESPACE, LAYOUT, "a tenant"), range(2))
    store.close()
    assert check_store(data, repair=True).findings == []
    assert (data / "ns" / NAMESPACE.hex() / "tenant").read_text() == "a tenant"


def names_after(path: Path) -> list[int]:
    """What a daemon serves afterwards, each verified."""
    store = NvmeStore(nvme_config(path, 8))
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    keys = [make_key(name) for name in range(8)]
    names = [keys.index(entry.key) for entry in tier.entries()]
    for entry in tier.entries():
        assert get(tier, entry.slot, keys.index(entry.key)) is IoStatus.OK
    store.close()
    return names


def check_then_repair(path: Path) -> FsckReport:
    """Check without a change, repair, check again: nothing is left. Returns the first report."""
    before = fingerprint(path)
    report = check_store(path, repair=False)
    assert fingerprint(path) == before, "a check changes nothing"
    assert not any(finding.fixed for finding in report.findings)
    repaired = check_store(path, repair=True)
    assert repaired.ok
    assert all(finding.fixed for finding in repaired.findings)
    assert check_store(path, repair=False).findings == []
    return report


def test_a_sound_store_has_no_findings(path: Path) -> None:
    report = check_then_repair(path)
    assert report.ok
    assert report.findings == []
    assert (report.num_namespaces, report.num_blocks) == (1, 6)
    assert report.num_bytes == 6 * SLOT_BYTES
    assert names_after(path) == [0, 1, 2, 3, 4, 5]


def test_a_flipped_bit_in_a_slab(path: Path) -> None:
    overwrite(segment(path, 1), SLOT_BYTES + HEADER_BYTES + 9, b"\xaa")
    report = check_then_repair(path)
    assert not report.ok
    (finding,) = report.findings
    assert (finding.kind, finding.segment, finding.slot) == (FindingKind.CHECKSUM, 1, 5)
    assert finding.key == make_key(5).hex()[:8]
    assert finding.namespace == NAMESPACE.hex()[:8]
    assert names_after(path) == [0, 1, 2, 3, 4]


def test_children_of_a_damaged_block_go_with_it(path: Path) -> None:
    overwrite(segment(path), 3 * SLOT_BYTES + HEADER_BYTES, b"\xaa\xbb")
    report = check_then_repair(path)
    (finding,) = report.findings
    assert (finding.kind, finding.slot, finding.num_behind) == (FindingKind.CHECKSUM, 3, 2)
    assert "(and 2 blocks behind it)" in finding.what
    assert names_after(path) == [0, 1, 2]


def test_a_retired_segment_in_the_middle_leaves_no_gap(path: Path) -> None:
    index = BlockIndex(index_folder(path), 16 << 20)
    index.retire(0, "fdatasync failed")
    index.close(clean=True)
    assert FindingKind.SEGMENT in kinds(check_then_repair(path))
    assert names_after(path) == []


def test_a_damaged_header(path: Path) -> None:
    overwrite(segment(path, 1), SLOT_BYTES + 50, b"zz")
    report = check_then_repair(path)
    assert kinds(report) == [FindingKind.RECORD]
    assert names_after(path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [0, 10, 5000, 20000])
def test_a_truncated_index(path: Path, size: int) -> None:
    os.truncate(index_folder(path) / "data.mdb", size)
    report = check_then_repair(path)
    assert kinds(report) == [FindingKind.INDEX]
    assert names_after(path) == [0, 1, 2, 3, 4, 5]


def test_a_missing_index(path: Path) -> None:
    shutil.rmtree(index_folder(path))
    assert kinds(check_then_repair(path)) == [FindingKind.INDEX]
    assert names_after(path) == [0, 1, 2, 3, 4, 5]


def test_an_index_that_is_another_lmdb_file(path: Path) -> None:
    import lmdb

    shutil.rmtree(index_folder(path))
    with lmdb.open(str(index_folder(path))) as environment, environment.begin(write=True) as writer:
        writer.put(b"something", b"else")
    assert kinds(check_then_repair(path)) == [FindingKind.INDEX]
    assert names_after(path) == [0, 1, 2, 3, 4, 5]


def test_a_record_without_its_block(path: Path) -> None:
    index = BlockIndex(index_folder(path), 16 << 20)
    index.put([IndexRecord(make_key(7), ROOT_KEY, SlotId(7), 12345)])
    index.close(clean=True)
    report = check_then_repair(path)
    assert kinds(report) == [FindingKind.RECORD]
    assert report.findings[0].slot == 7


def test_a_block_without_its_record_is_harmless(path: Path) -> None:
    index = BlockIndex(index_folder(path), 16 << 20)
    index.delete([(SlotId(5), make_key(5))])
    index.close(clean=True)
    report = check_then_repair(path)
    assert kinds(report) == [FindingKind.UNINDEXED]
    assert report.ok
    assert report.findings[0].key == make_key(5).hex()[:8]


def test_garbage_in_a_free_slot_is_harmless(path: Path) -> None:
    overwrite(segment(path, 1), 3 * SLOT_BYTES, b"garbage")
    report = check_then_repair(path)
    assert kinds(report) == [FindingKind.UNINDEXED]
    assert report.ok


def test_a_truncated_and_a_missing_segment(path: Path) -> None:
    os.truncate(segment(path, 1), SLOT_BYTES)
    report = check_then_repair(path)
    assert kinds(report)[0] is FindingKind.SEGMENT
    assert names_after(path) == [0, 1, 2, 3, 4]
    segment(path, 0).unlink()
    report = check_then_repair(path)
    assert kinds(report)[0] is FindingKind.SEGMENT
    assert names_after(path) == []


def test_quarantined_slots_and_retired_segments_are_used_again(path: Path) -> None:
    index = BlockIndex(index_folder(path), 16 << 20)
    index.quarantine(SlotId(3), make_key(3), "bad checksum or header")
    index.retire(1, "fdatasync failed")
    index.close(clean=True)
    report = check_then_repair(path)
    assert {FindingKind.QUARANTINED, FindingKind.SEGMENT} <= set(kinds(report))
    assert names_after(path) == [0, 1, 2]
    store = NvmeStore(nvme_config(path, 8))
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    assert tier.usage().quarantined_slots == 0
    assert len(tier.allocate(8)) == 5
    store.close()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap"])
def test_a_damaged_superblock_moves_the_namespace_aside(path: Path, damage: str) -> None:
    superblock = path / "ns" / NAMESPACE.hex() / "superblock"
    if damage == "flip":
        overwrite(superblock, 70, b"\xff")
    elif damage == "truncate":
        os.truncate(superblock, 99)
    elif damage == "swap":
        superblock.parent.rename(path / "ns" / ("ab" * 32))
    else:
        superblock.unlink()
    report = check_then_repair(path)
    assert kinds(report) == [FindingKind.SUPERBLOCK]
    assert len(list((path / "quarantine").iterdir())) == 1
    assert names_after(path) == []


def test_another_version_is_reported_and_left_alone(path: Path) -> None:
    superblock = path / "ns" / NAMESPACE.hex() / "superblock"
    data = bytearray(superblock.read_bytes())
    struct.pack_into("<I", data, 8, 9)
    struct.pack_into("<Q", data, 4088, checksum(bytes(data[:4088])))
    superblock.write_bytes(data)
    before = fingerprint(path)
    for repair in (False, True):
        report = check_store(path, repair=repair)
        assert kinds(report) == [FindingKind.VERSION]
        assert not report.ok
    assert fingerprint(path) == before


def test_it_does_not_run_beside_a_daemon_or_on_another_folder(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a data folder"):
        check_store(tmp_path, repair=True)
    with pytest.raises(ConfigError, match="there is no folder"):
        check_store(tmp_path / "nowhere", repair=True)
    with pytest.raises(ConfigError, match="is a file"):
        check_store(path / "lock", repair=True)
    assert list(tmp_path.iterdir()) == []
    store = NvmeStore(nvme_config(path, 8))
    with pytest.raises(ConfigError, match=r"in use by process [0-9]+: stop it first$"):
        check_store(path, repair=False)
    note_socket(path, tmp_path / "ucm.sock")
    with pytest.raises(ConfigError, match=r"serves at \S+ucm.sock: stop it first$"):
        check_store(path, repair=False)
    store.close()
    assert check_store(path, repair=False).ok


def test_the_folder_of_another_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsck, "current_uid", lambda: os.geteuid() + 1)
    with pytest.raises(ConfigError, match=f"belongs to user {os.geteuid()}, .* as its owner"):
        check_store(path, repair=True)

    def refuse(_path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(ConfigError, match="check it as that user"):
        check_store(path, repair=True)
