"""GPUDirect and the CUDA kernels in CI, in processes of their own: tests/doubles/README.md.

What passes here runs on a double of the CUDA driver: it proves our code, not NVIDIA's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ucm.testing.doubles import LABEL, SOURCES, build_doubles

pytestmark = pytest.mark.timeout(240)

SUITES = {
    "gds": (("gds_suite.py",), 120),
    "kernel": (("kernel_suite.py",), 70),
    "device": (("pinned_suite.py", "device_load_suite.py", "device_plan_suite.py"), 150),
}
"""Files of one process, and how many tests must pass at least: an empty suite proves nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doubles")
    build_doubles(folder)
    return folder


@pytest.mark.parametrize("suite", SUITES)
def test_suite_passes_on_the_doubles(suite: str, folder: Path, tmp_path: Path) -> None:
    files, least = SUITES[suite]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += [str(SOURCES / file) for file in files]
    result = subprocess.run(
        [*command, f"--basetemp={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, "UCM_DOUBLES": str(folder)},
    )
    assert result.returncode == 0, f"{LABEL}\n{result.stdout[-8000:]}{result.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed, result.stdout
    assert int(passed[1]) >= least
    assert "skipped" not in result.stdout


def test_the_parent_has_no_gpu() -> None:
    """The doubles stay in their processes: nothing else may believe in them."""
    maps = Path("/proc/self/maps").read_text()
    assert "kernels_on_host" not in maps
    assert "kvikio" not in sys.modules
