"""The NVMe store and tier: the folder, restarts, concurrency, order of a rewrite."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ucm.checksum import checksum
from ucm.errors import ConfigError, CorruptionError, LayoutMismatchError, TierUnavailableError
from ucm.layout import KvDtype, KvLayout
from ucm.storage import folder as folder_checks
from ucm.storage.nvme import NvmeStore
from ucm.storage.tier import IoStatus, SlotId
from ucm.testing.nvme import NAMESPACE, SLOT_BYTES, nvme_config, open_tier, quick_folder
from ucm.testing.tier_conformance import LAYOUT, get, make_key, make_write, put
from ucm.types import NamespaceId, TierKind

OTHER = NamespaceId(b"o" * 32)


@pytest.fixture
def path() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder / "data"


def test_a_restart_serves_what_was_written(path: Path) -> None:
    store, tier = open_tier(path)
    slots = put(tier, range(6))
    tier.delete([(slots[5], make_key(5))])
    store.close()
    store.close()
    store, tier = open_tier(path)
    assert store.namespaces() == [NAMESPACE]
    assert tier.kind is TierKind.NVME
    assert [entry.key for entry in tier.entries()] == [make_key(name) for name in range(5)]
    assert [get(tier, slots[name], name) for name in range(5)] == [IoStatus.OK] * 5
    assert tier.usage().used_slots == 5
    assert not tier.was_rebuilt
    store.close()


def test_so_does_one_after_a_kill(path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from ucm.storage.nvme import NvmeStore\n"
        "from ucm.testing.nvme import NAMESPACE, nvme_config\n"
        "from ucm.testing.tier_conformance import LAYOUT, put\n"
        "store = NvmeStore(nvme_config(Path(sys.argv[1]), 8))\n"
        "put(store.open_namespace(NAMESPACE, LAYOUT), range(5))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -9
    store, tier = open_tier(path)
    assert [get(tier, SlotId(name), name) for name in range(5)] == [IoStatus.OK] * 5
    assert not tier.was_rebuilt
    store.close()


def test_children_follow_parents_whatever_the_slots(path: Path) -> None:
    store, tier = open_tier(path)
    slots = tier.allocate(4)
    parents = {0: None, 1: 0, 2: 1, 3: None}
    for name in (0, 3, 2, 1):  # 2 is older than its parent
        assert tier.write([make_write(slots[name], name, parents[name])]) == [IoStatus.OK]
    store.close()
    store, tier = open_tier(path)
    names = [slots.index(entry.slot) for entry in tier.entries()]
    assert sorted(names) == [0, 1, 2, 3]
    assert names.index(0) < names.index(1) < names.index(2)
    store.close()


def test_orphans_are_gone_after_a_restart(path: Path) -> None:
    store, tier = open_tier(path)
    slots = put(tier, range(4))
    tier.delete([(slots[1], make_key(1))])
    store.close()
    store, tier = open_tier(path)
    assert [entry.key for entry in tier.entries()] == [make_key(0)]
    assert tier.usage().free_slots == 7
    assert tier.check_integrity() == []
    store.close()


def test_generations_grow_over_restarts(path: Path) -> None:
    seen = []
    for turn in range(3):
        store, tier = open_tier(path)
        assert put(tier, [turn])[turn] == 0
        seen.append(tier._slots.generation(SlotId(0)))
        tier.delete([(SlotId(0), make_key(turn))])
        store.abort()
    assert seen == sorted(set(seen))


def test_a_moved_key_leaves_its_old_slot_free(path: Path) -> None:
    store, tier = open_tier(path)
    put(tier, ["moving"])
    new = put(tier, ["moving"])["moving"]
    assert new == 1
    assert tier.usage().used_slots == 1
    tier.delete([(SlotId(0), make_key("moving"))])
    assert get(tier, new, "moving") is IoStatus.OK
    store.close()


def test_damage_in_a_segment_is_a_miss_and_stays_barred(path: Path) -> None:
    store, tier = open_tier(path)
    slots = put(tier, range(3))
    segment = path / "ns" / NAMESPACE.hex() / "segments" / "0000.seg"
    with segment.open("r+b") as file:
        file.seek(2 * SLOT_BYTES + 4096 + 17)
        file.write(b"\xff\x00\xff")
    assert get(tier, slots[2], 2) is IoStatus.CORRUPT
    assert tier.usage().quarantined_slots == 1
    assert get(tier, slots[1], 1) is IoStatus.OK
    tier.delete([(slots[2], make_key(2))])
    tier.free([slots[2]])
    assert tier.usage().quarantined_slots == 1
    store.close()
    store, tier = open_tier(path)
    assert [entry.key for entry in tier.entries()] == [make_key(0), make_key(1)]
    assert tier.usage().quarantined_slots == 1
    assert slots[2] not in tier.allocate(8)
    store.close()


def test_a_truncated_segment_is_a_miss(path: Path) -> None:
    store, tier = open_tier(path)
    slots = put(tier, range(3))
    os.truncate(path / "ns" / NAMESPACE.hex() / "segments" / "0000.seg", 2 * SLOT_BYTES + 5000)
    assert get(tier, slots[1], 1) is IoStatus.OK
    assert get(tier, slots[2], 2) is IoStatus.CORRUPT
    store.close()


def test_writers_and_readers_at_once(path: Path) -> None:
    store, tier = open_tier(path, num_slots=64)
    failures: list[str] = []

    def work(worker: int) -> None:
        for turn in range(6):
            names = [f"{worker} {turn} {i}" for i in range(3)]
            slots = put(tier, names)
            for name, slot in slots.items():
                if get(tier, slot, name) is not IoStatus.OK:
                    failures.append(str(name))
            tier.delete([(slots[name], make_key(name)) for name in names[1:]])

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert tier.usage().used_slots == 24
    assert tier.check_integrity() == []
    store.close()


def test_a_namespace_closed_alone_can_be_opened_again(path: Path) -> None:
    store, tier = open_tier(path)
    put(tier, [1])
    assert store.open_namespace(NAMESPACE, LAYOUT) is tier
    tier.close()
    again = store.open_namespace(NAMESPACE, LAYOUT)
    assert again is not tier
    assert get(again, SlotId(0), 1) is IoStatus.OK
    with pytest.raises(TierUnavailableError):
        list(tier.entries())
    assert tier.write([]) == []
    store.close()


def test_namespaces_do_not_see_each_other(path: Path) -> None:
    store, tier = open_tier(path)
    put(tier, ["mine"])
    other = store.open_namespace(OTHER, LAYOUT)
    assert list(other.entries()) == []
    assert get(other, SlotId(0), "mine") is not IoStatus.OK
    assert sorted(store.namespaces()) == sorted([NAMESPACE, OTHER])
    assert len(other.allocate(99)) == 4, "the first one has the other segment"
    store.close()


def test_another_layout_is_refused(path: Path) -> None:
    other = KvLayout(
        num_layers=2, num_kv_heads=1, head_dim=8, block_tokens=32, dtype=KvDtype.FLOAT32
    )
    store, _ = open_tier(path)
    with pytest.raises(LayoutMismatchError, match="not of"):
        store.open_namespace(NAMESPACE, other)
    store.close()
    store = NvmeStore(nvme_config(path, 8))
    with pytest.raises(LayoutMismatchError, match="not of"):
        store.open_namespace(NAMESPACE, other)
    store.close()


def test_a_second_daemon_is_told_who_has_the_folder(path: Path) -> None:
    store, _ = open_tier(path)
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        NvmeStore(nvme_config(path, 8))
    store.close()
    open_tier(path)[0].close()


def test_a_folder_of_another_format_version_is_refused(path: Path) -> None:
    open_tier(path)[0].close()
    superblock = path / "ns" / NAMESPACE.hex() / "superblock"
    data = bytearray(superblock.read_bytes())
    struct.pack_into("<I", data, 8, 7)
    struct.pack_into("<Q", data, 4088, checksum(bytes(data[:4088])))
    superblock.write_bytes(data)
    for _ in range(2):  # and the lock is free again
        with pytest.raises(ConfigError, match="disk format 7"):
            NvmeStore(nvme_config(path, 8))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_superblock_names_the_remedy(path: Path, damage: str) -> None:
    open_tier(path)[0].close()
    superblock = path / "ns" / NAMESPACE.hex() / "superblock"
    if damage == "flip":
        superblock.write_bytes(superblock.read_bytes()[:100] + b"x" * 3996)
    elif damage == "truncate":
        os.truncate(superblock, 10)
    else:
        superblock.unlink()
    store = NvmeStore(nvme_config(path, 8))
    with pytest.raises(CorruptionError, match="ucm fsck --repair"):
        store.open_namespace(NAMESPACE, LAYOUT)
    assert put(store.open_namespace(OTHER, LAYOUT), [1])
    store.close()


def test_another_owners_folder_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_tier(path)[0].close()
    monkeypatch.setattr(folder_checks, "current_uid", lambda: os.geteuid() + 1)
    with pytest.raises(ConfigError, match="belongs to user"):
        NvmeStore(nvme_config(path, 8))


def test_so_it_is_when_it_really_changed_hands(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving a folder away needs root")
    open_tier(path)[0].close()
    os.chown(path, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        NvmeStore(nvme_config(path, 8))


def test_a_world_writable_folder_is_refused(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)
    with pytest.raises(ConfigError, match="chmod"):
        NvmeStore(nvme_config(path, 8))


def test_a_folder_of_something_else_is_named_in_a_warning_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.mkdir(mode=0o700)
    (path / "lost+found").mkdir()
    NvmeStore(nvme_config(path, 8)).close()
    assert not caplog.records
    shutil.rmtree(path / "ns")
    (path / "thesis.tex").write_text("dear reader")
    store, _ = open_tier(path)
    store.close()
    assert "thesis.tex" in caplog.text
    caplog.clear()
    NvmeStore(nvme_config(path, 8)).close()
    assert not caplog.records
    assert (path / "thesis.tex").read_text() == "dear reader"


def test_a_link_or_a_file_is_no_data_folder(path: Path) -> None:
    (path.parent / "real").mkdir()
    path.symlink_to(path.parent / "real")
    with pytest.raises(ConfigError, match="link"):
        NvmeStore(nvme_config(path, 8))
    (path.parent / "file").touch()
    with pytest.raises(ConfigError, match="is a link or a file"):
        NvmeStore(nvme_config(path.parent / "file", 8))
    with pytest.raises(ConfigError, match="cannot be used: Not a directory; name another"):
        NvmeStore(nvme_config(path.parent / "file" / "below", 8))


def test_what_it_makes_is_private(path: Path) -> None:
    store, tier = open_tier(path)
    put(tier, [1])
    for entry in [path, *path.rglob("*")]:
        mode = stat.S_IMODE(entry.lstat().st_mode)
        assert mode & 0o077 == 0, (entry, oct(mode))
    store.close()


def test_sizes_that_cannot_work_are_refused(path: Path) -> None:
    config = nvme_config(path, 8)
    with pytest.raises(ConfigError, match=r"nvme\.path is not set"):
        NvmeStore(replace(config, path=None))
    with pytest.raises(ConfigError, match=r"capacity_bytes .* is below"):
        NvmeStore(replace(config, capacity_bytes=config.segment_bytes - 1))
    store = NvmeStore(replace(config, segment_bytes=SLOT_BYTES - 1))
    with pytest.raises(ConfigError, match=r"raise nvme\.segment_bytes"):
        store.open_namespace(NAMESPACE, LAYOUT)
    store.close()


def test_other_sizes_in_the_configuration_keep_the_old_files(path: Path) -> None:
    store, tier = open_tier(path)
    put(tier, range(5))
    store.close()
    config = replace(nvme_config(path, 8), segment_bytes=8 * SLOT_BYTES, capacity_bytes=1 << 20)
    store = NvmeStore(config)
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    assert [get(tier, SlotId(name), name) for name in range(5)] == [IoStatus.OK] * 5
    store.close()


def test_a_full_disk_stops_stores_and_loads_go_on(tmp_path: Path) -> None:
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(command, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        store, tier = open_tier(mounted / "data", num_slots=400)
        slots = tier.allocate(400)
        assert 4 <= len(slots) < 40
        assert tier.allocate(1) == []
        assert tier.usage().free_slots == 0
        items = [make_write(slot, slot) for slot in slots]
        assert tier.write(items) == [IoStatus.OK] * len(items)
        assert all(get(tier, slot, slot) is IoStatus.OK for slot in slots)
        tier.delete([(slots[0], make_key(slots[0]))])
        assert tier.allocate(1) == [slots[0]]
        store.close()
        store, tier = open_tier(mounted / "data", num_slots=400)
        assert len(list(tier.entries())) == len(slots) - 1
        store.close()
    finally:
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)


def test_a_closed_store_opens_nothing(path: Path) -> None:
    """Another process may hold the folder by then."""
    store = NvmeStore(nvme_config(path, 8))
    store.close()
    with pytest.raises(TierUnavailableError, match="closed"):
        store.open_namespace(NAMESPACE, LAYOUT)
    assert store.namespaces() == []


def test_a_file_in_place_of_the_namespaces_is_a_clear_error(path: Path) -> None:
    path.mkdir()
    (path / "ns").write_bytes(b"")
    with pytest.raises(TierUnavailableError, match="cannot read the data folder"):
        NvmeStore(nvme_config(path, 8))
    (path / "ns").unlink()
    NvmeStore(nvme_config(path, 8)).close()


def test_a_namespace_that_nobody_has_open_makes_way(path: Path) -> None:
    """After a change of model the old one's blocks do not keep the new one's out for ever."""
    store, old = open_tier(path)
    put(old, range(8))
    store.close()
    store = NvmeStore(nvme_config(path, 8))
    new = store.open_namespace(OTHER, LAYOUT)
    assert new.usage().free_slots == 8
    slots = put(new, range(3))
    assert [get(new, slots[name], name) for name in slots] == [IoStatus.OK] * 3
    old = store.open_namespace(NAMESPACE, LAYOUT)
    assert [entry.slot for entry in old.entries()] == [0, 1, 2, 3], "its last segment is gone"
    assert [get(old, SlotId(name), name) for name in range(4)] == [IoStatus.OK] * 4
    assert old.check_integrity() == []
    assert new.usage().free_slots == 1, "what is open stays"
    assert len(new.allocate(5)) == 1
    old.close()
    assert len(new.allocate(5)) == 4
    assert store.namespaces() == [OTHER], "its only segment went, so it went as a whole"
    assert list(store.open_namespace(NAMESPACE, LAYOUT).entries()) == []
    store.close()


def test_of_several_the_one_that_was_closed_first_makes_way(path: Path) -> None:
    names = [NamespaceId(bytes([65 + n]) * 32) for n in range(3)]
    store = NvmeStore(nvme_config(path, 8))
    for age, name in ((300, names[1]), (200, names[0])):
        tier = store.open_namespace(name, LAYOUT)
        put(tier, range(2))
        tier.close()
        index = path / "ns" / name.hex() / "index"
        past = index.stat().st_mtime - age
        os.utime(index, (past, past))
    put(store.open_namespace(names[2], LAYOUT), range(2))
    assert store.namespaces() == [names[0], names[2]]
    store.close()


def test_a_full_disk_has_no_room_for_the_pid_and_opens_all_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_tier(path)[0].close()

    def no_room(*_: object) -> int:
        raise OSError(errno.ENOSPC, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", no_room)
        fd = folder_checks.lock_folder(path)
    with pytest.raises(ConfigError, match="in use"):
        folder_checks.lock_folder(path)
    os.close(fd)
