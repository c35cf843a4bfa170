"""The plug of a real file system is pulled under the real store, again and again.

A loop-mounted ext4 is shut down by its own ioctl, as its tests do, while a process stores blocks
and says on another disk what was flushed. Two modes: what was not synced is dropped, and: half of
the pages of every file are written back first, in no order, as memory pressure would. After each
cut the file system recovers by its journal, the store is opened and everything is read.
`UCM_POWER_SEED=N` begins with that seed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from ucm.storage.nvme import NvmeStore
from ucm.storage.tier import IoStatus
from ucm.testing.lanes import IS_DEEP, LANE
from ucm.testing.nvme import NAMESPACE, nvme_config, quick_folder
from ucm.testing.power_cut_writer import NUM_SLOTS, SLOTS_PER_SEGMENT
from ucm.testing.tier_conformance import LAYOUT, get, make_key

EXT4_IOC_SHUTDOWN: Final = 0x8004587D
LOG_FLUSH, NO_LOG_FLUSH = 1, 2
SYNC_FILE_RANGE_WRITE_AND_WAIT: Final = 7
IMAGE_BYTES: Final = 48 << 20


class Plug:
    """An ext4 in a file, mounted, whose power can be cut."""

    def __init__(self, folder: Path) -> None:
        self.image, self.mount_point = folder / "image", folder / "mnt"
        self.mount_point.mkdir()
        self.image.touch()
        os.truncate(self.image, IMAGE_BYTES)

    def mount(self) -> bool:
        command = ["mount", "-o", "loop", str(self.image), str(self.mount_point)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def unmount(self) -> None:
        """Until the last dying process has let go of it."""
        for _ in range(200):
            done = subprocess.run(["umount", self.mount_point], capture_output=True, check=False)
            if done.returncode == 0:
                return
            threading.Event().wait(0.02)
        raise AssertionError(done.stderr)

    def cut(self, flags: int) -> None:
        fd = os.open(self.mount_point, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", flags))
        finally:
            os.close(fd)

    def write_back_some(self, chance: random.Random) -> None:
        """Persist a random half of the pages of each file, in a random order."""
        libc = ctypes.CDLL(None, use_errno=True)
        files = [path for path in self.mount_point.rglob("*") if path.is_file()]
        pages = [(path, offset) for path in files for offset in range(0, path.stat().st_size, 4096)]
        opened = {path: os.open(path, os.O_RDWR) for path in files}
        for path, offset in chance.sample(pages, len(pages) // 2):
            arguments = (ctypes.c_long(offset), ctypes.c_long(4096))
            libc.sync_file_range(opened[path], *arguments, SYNC_FILE_RANGE_WRITE_AND_WAIT)
        for fd in opened.values():
            os.close(fd)


@pytest.fixture
def plug() -> Iterator[Plug]:
    """Skips where the machine does not allow it; leaves neither mount nor loop device behind."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed")
    with quick_folder() as folder:
        found = Plug(folder)
        subprocess.run(["mkfs.ext4", "-q", str(found.image)], check=True, capture_output=True)
        if not found.mount():
            pytest.skip("loop devices cannot be mounted here")
        try:
            yield found
        finally:
            if os.path.ismount(found.mount_point):
                found.unmount()


@pytest.fixture
def writers() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "ucm.testing.power_cut_writer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    yield process
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.wait(20)
    process.stdout.close()


@dataclass
class Promises:
    """What the writers said before their power went."""

    journal: Path
    flushed: set[int] = field(default_factory=set)
    unsure: set[int] = field(default_factory=set)
    num_flushed: int = 0
    next_name: int = 0

    def read(self) -> None:
        """Take in the journal of one life."""
        lines = self.journal.read_text().split("\n")[:-1] if self.journal.exists() else []
        for line in lines:
            verb, name = line.split()
            if verb == "flushed":
                self.flushed.add(int(name))
                self.num_flushed += 1
            else:
                self.flushed.discard(int(name))
                self.unsure.add(int(name))
        self.journal.unlink(missing_ok=True)
        known = self.flushed | self.unsure
        first = max({*known, self.next_name - 1}) + 1  # a life may end before its first promise
        self.unsure.update(range(first, first + 6))  # the write that the cut came into
        self.next_name = first + 6


def live_and_die(
    plug: Plug, writers: subprocess.Popen[str], promises: Promises, chance: random.Random, mode: str
) -> None:
    assert writers.stdin is not None
    assert writers.stdout is not None
    writers.stdin.write(f"{plug.mount_point / 'data'} {promises.journal} {promises.next_name}\n")
    pid = int(writers.stdout.readline())
    threading.Event().wait(chance.uniform(0.02, 0.25))
    if mode == "some":
        plug.write_back_some(chance)
    plug.cut(LOG_FLUSH if mode == "some" else NO_LOG_FLUSH)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    writers.stdin.write("\n")
    assert writers.stdout.readline() == "gone\n"


def check(path: Path, promises: Promises) -> None:
    """Everything flushed is there; whatever is there is right; nothing is there uncalled for."""
    if not path.exists():
        assert not promises.flushed
        return
    store = NvmeStore(nvme_config(path, NUM_SLOTS, slots_per_segment=SLOTS_PER_SEGMENT))
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    assert tier.check_integrity() == []
    by_key = {make_key(name): name for name in range(promises.next_name)}
    found = {by_key[entry.key]: entry.slot for entry in tier.entries()}
    lost = promises.flushed - found.keys()
    assert not lost, f"flushed blocks are gone: {sorted(lost)}"
    assert found.keys() <= promises.flushed | promises.unsure
    for name, slot in found.items():
        assert get(tier, slot, name) is IoStatus.OK
    promises.flushed = set(found)
    promises.unsure.clear()
    store.abort()


@pytest.mark.timeout(7200 if IS_DEEP else 300)
@pytest.mark.parametrize("mode", ["dropped", "some"])
def test_power_cuts(mode: str, plug: Plug, writers: subprocess.Popen[str]) -> None:
    seed = int(os.environ.get("UCM_POWER_SEED", "0"))
    chance = random.Random(f"{mode} {seed}")
    promises = Promises(plug.image.with_name("journal"))
    for _ in range(LANE.power_cuts):
        live_and_die(plug, writers, promises, chance, mode)
        plug.unmount()
        promises.read()
        assert plug.mount()
        check(plug.mount_point / "data", promises)
    print(f"{promises.num_flushed} blocks flushed in {LANE.power_cuts} lives")
    assert promises.num_flushed > 10 * LANE.power_cuts  # else the runs would prove nothing
