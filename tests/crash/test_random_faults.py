"""Every call on files fails now and then, LMDB's included: libfiu before the C library."""

from __future__ import annotations

import ctypes.util
import json
import shutil
import time
from pathlib import Path

import pytest

from ucm.testing.io_workload import CHAIN_BLOCKS, NUM_CHAINS
from ucm.testing.lanes import LANE
from ucm.testing.life_server import MAX_STEP_S, LifeServer, check_store_of_life
from ucm.testing.nvme import quick_folder

WRAPPER = Path("/usr/lib/fiu/fiu_posix_preload.so")
PROBABILITY = 0.01
ALL_BLOCKS = 2 * NUM_CHAINS * CHAIN_BLOCKS


@pytest.mark.timeout(LANE.random_faults_s * 2 + 120)
def test_lives_under_random_faults() -> None:
    if not WRAPPER.exists() or ctypes.util.find_library("fiu") is None:
        pytest.skip("libfiu is not installed (Debian: fiu-utils)")
    environ = {"LD_PRELOAD": str(WRAPPER), "UCM_FIU_PROBABILITY": str(PROBABILITY)}
    server = LifeServer(environ)
    num_lives = num_accepted = num_spoilt = 0
    try:
        with quick_folder() as folder:
            end_s = time.monotonic() + LANE.random_faults_s
            while time.monotonic() < end_s:
                path = folder / str(num_lives)
                server.say(str(path))
                outcome = json.loads(server.say("go"))
                assert outcome["status"] == 0, f"the process died: {outcome}"
                assert outcome["wrong"] == 0, outcome
                assert outcome["slowest_s"] < 2 * MAX_STEP_S, outcome
                if path.exists():
                    check_store_of_life(path, set(outcome["accepted"]))
                shutil.rmtree(path, ignore_errors=True)
                num_lives += 1
                num_accepted += len(outcome["accepted"])
                num_spoilt += len(outcome["accepted"]) < ALL_BLOCKS
    finally:
        server.close()
    print(f"{num_lives} lives, {num_spoilt} with blocks lost, {num_accepted} blocks accepted")
    assert num_accepted > 0
    assert num_spoilt > 0, "no fault struck: the test would prove nothing"
