"""The Nth system call of a store's life fails, N = 1, 2, 3 ... until there is no Nth.

`strace` injects the failures into a real process, so LMDB's own calls fail as well as ours. It
counts calls by thread. What it calls a short transfer is a lie of the kernel's: the call returns a
length and transfers nothing, which only a checksum can notice; honest short transfers are in
`unit/test_storage_file_io`. The fast lane takes every N up to 20 and then ever wider steps.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from ucm.testing.lanes import LANE
from ucm.testing.life_server import MAX_STEP_S, LifeServer, check_store_of_life
from ucm.testing.nvme import quick_folder

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
            check_store_of_life(path, set(accepted))
        shutil.rmtree(path, ignore_errors=True)
        num_failed += was_failed
        num_accepted += len(accepted)
        if not was_failed:
            break
    print(f"{num_failed} calls failed, {num_accepted} blocks were accepted all the same")
    assert num_failed > 0, "no such call: the test would prove nothing"
