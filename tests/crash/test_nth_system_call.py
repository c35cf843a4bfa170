"""The Nth system call of a store's life fails, N = 1, 2, 3 ... until there is no Nth.

`strace` injects the failures into a real process, so LMDB's own calls fail as well as ours. It
counts calls by thread. What it calls a short transfer is a lie of the kernel's: the call returns a
length and transfers nothing, which only a checksum can notice; honest short transfers are in
`unit/test_storage_file_io`. The fast lane takes every N up to 20 and then ever wider steps.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from ucm.config import NvmeConfig
from ucm.storage.fsck import check_store
from ucm.storage.nvme import NvmeStore
from ucm.storage.tier import IoStatus, SlotRead
from ucm.testing.blocks import TINY_LAYOUT, content, meaning
from ucm.testing.io_workload import SEGMENT_BYTES
from ucm.testing.lanes import LANE
from ucm.testing.nvme import quick_folder

MAX_STEP_S: Final = 5.0
MAX_LIFE_S: Final = 60.0

FAULTS: Final = (
    ("pwritev,pwritev2", "error=EIO"),
    ("pwritev,pwritev2", "error=ENOSPC"),
    ("pwritev,pwritev2", "error=EINTR"),
    ("pwritev,pwritev2", "retval=512"),
    ("preadv,preadv2", "error=EIO"),
    ("preadv,preadv2", "error=EINTR"),
    ("preadv,preadv2", "retval=4096"),
    ("pwrite64", "error=EIO"),
    ("pwrite64", "error=ENOSPC"),
    ("pwrite64", "retval=512"),
    ("fdatasync", "error=EIO"),
    ("fsync", "error=EIO"),
    ("openat", "error=EIO"),
    ("openat", "error=EMFILE"),
    ("fallocate", "error=ENOSPC"),
    ("fallocate", "error=EINTR"),
    ("ftruncate", "error=EIO"),
    ("rename", "error=EIO"),
    ("unlink", "error=EIO"),
    ("mkdir", "error=ENOSPC"),
)


class LifeServer:
    """The process that forks lives."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ucm.testing.io_workload"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def say(self, line: str) -> str:
        """Send a line and wait for the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], MAX_LIFE_S)
        assert ready, "the store hangs"
        return self.process.stdout.readline()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@pytest.fixture(scope="module")
def server() -> Iterator[LifeServer]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    probe = subprocess.run(["strace", "-qq", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"strace cannot trace here: {probe.stderr.decode(errors='replace')[:200]}")
    found = LifeServer()
    yield found
    found.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


def live(server: LifeServer, path: Path, inject: str) -> tuple[dict[str, object], bool]:
    """One life under injection; its outcome, and whether a call was failed."""
    pid = server.say(str(path)).strip()
    log = path.with_name("strace.log")
    calls = inject.partition(":")[0]
    command = ["strace", "-f", "-p", pid, "-o", str(log), "-e", f"trace={calls}"]
    with subprocess.Popen(
        [*command, "-e", f"inject={inject}"], stderr=subprocess.PIPE, text=True
    ) as tracer:
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        outcome = json.loads(server.say("go"))
        tracer.stderr.read()
    return outcome, "(INJECTED)" in log.read_text()


def check(path: Path, accepted: set[str]) -> None:
    """Without faults it opens, and whatever is in it is right and was accepted."""
    config = NvmeConfig(
        path=path,
        capacity_bytes=3 * SEGMENT_BYTES,
        segment_bytes=SEGMENT_BYTES,
        io_threads=1,
        index_map_bytes=4 << 20,
    )
    store = NvmeStore(config)
    for namespace in store.namespaces():
        tier = store.open_namespace(namespace, TINY_LAYOUT)
        assert tier.check_integrity() == []
        for entry in list(tier.entries()):
            into = memoryview(bytearray(TINY_LAYOUT.block_bytes))
            (outcome,) = tier.read([SlotRead(entry.slot, entry.key, into)])
            assert outcome.status in (IoStatus.OK, IoStatus.CORRUPT)
            if outcome.status is IoStatus.OK:
                assert entry.key.hex() in accepted, "a put that failed is visible"
                assert meaning(into) == content(entry.key)
    store.close()
    assert check_store(path, repair=True).ok


def numbers(limit: int) -> Iterator[int]:
    """1, 2, 3 and then, if there may be only `limit`, with growing steps."""
    number = 0
    for count in range(limit):
        step = 1 if limit > 1000 or count < 20 else 1 + (count - 20) // 4
        number += step
        yield number


@pytest.mark.timeout(3600 if LANE.calls_failed_each > 1000 else 300)
@pytest.mark.parametrize(
    ("calls", "fault"), FAULTS, ids=[re.sub(r"\W", "-", "-".join(f)) for f in FAULTS]
)
def test_each_call_fails(server: LifeServer, folder: Path, calls: str, fault: str) -> None:
    num_failed = num_accepted = 0
    for number in numbers(LANE.calls_failed_each):
        path = folder / str(number)
        outcome, was_failed = live(server, path, f"{calls}:{fault}:when={number}")
        replay = f"{calls}:{fault}:when={number}"
        assert outcome["status"] == 0, f"{replay}: the process died: {outcome}"
        assert outcome["wrong"] == 0, replay
        assert float(str(outcome["slowest_s"])) < 2 * MAX_STEP_S, f"{replay}: {outcome}"
        accepted = outcome["accepted"]
        assert isinstance(accepted, list)
        if path.exists():
            check(path, set(accepted))
        shutil.rmtree(path, ignore_errors=True)
        num_failed += was_failed
        num_accepted += len(accepted)
        if not was_failed:
            break
    print(f"{num_failed} calls failed, {num_accepted} blocks were accepted all the same")
    assert num_failed > 0, "no such call: the test would prove nothing"
