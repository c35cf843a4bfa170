"""Every call on files fails now and then, LMDB's included: libfiu before the C library."""

from __future__ import annotations

import ctypes.util
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.testing.io_workload import CHAIN_BLOCKS, NUM_CHAINS
from ucm.testing.lanes import LANE
from ucm.testing.life_server import MAX_STEP_S, LifeServer, check_store_of_life
from ucm.testing.nvme import quick_folder

WRAPPER = Path("/usr/lib/fiu/fiu_posix_preload.so")
PROBABILITY = 0.01
ALL_BLOCKS = 2 * NUM_CHAINS * CHAIN_BLOCKS


@pytest.fixture
def server() -> Iterator[LifeServer]:
    if not WRAPPER.exists() or ctypes.util.find_library("fiu") is None:
        pytest.skip("libfiu is not installed (Debian: fiu-utils)")
    found = LifeServer({"LD_PRELOAD": str(WRAPPER), "UCM_FIU_PROBABILITY": str(PROBABILITY)})
    yield found
    found.close()


def num_accepted_in_a_life(server: LifeServer, path: Path) -> int:
    server.say(str(path))
    outcome = json.loads(server.say("go"))
    assert outcome["status"] == 0, f"the process died: {outcome}"
    assert outcome["wrong"] == 0, outcome
    assert outcome["slowest_s"] < 2 * MAX_STEP_S, outcome
    if path.exists():
        check_store_of_life(path, set(outcome["accepted"]))
    shutil.rmtree(path, ignore_errors=True)
    return len(outcome["accepted"])


@pytest.mark.fixed_time
@pytest.mark.timeout(LANE.random_faults_s * 2 + 120)
def test_lives_under_random_faults(server: LifeServer) -> None:
    accepted: list[int] = []
    end_s = time.monotonic() + LANE.random_faults_s
    with quick_folder() as folder:
        while time.monotonic() < end_s:
            accepted.append(num_accepted_in_a_life(server, folder / str(len(accepted))))
    num_spoilt = sum(count < ALL_BLOCKS for count in accepted)
    print(f"{len(accepted)} lives, {num_spoilt} with blocks lost, {sum(accepted)} blocks accepted")
    assert sum(accepted) > 0
    assert num_spoilt > 0, "no fault struck: the test would prove nothing"
