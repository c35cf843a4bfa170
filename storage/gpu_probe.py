"""`python -m ucm.storage.gpu_probe STEP...`: try what may hang or crash, in a process of its own.

Run by `ucm.storage.io_choice`, which kills it when its time is over. Each step that ends prints a
line of JSON at once, `{"ok": ..., "found": ...}`, so that it shows how far it came; the first that
fails is the last.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Final

from ucm.errors import UcmError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


def probe_driver() -> tuple[bool, str]:
    """Load libcuda, initialise it, find a device."""
    from ucm.kernels.cuda.driver import CudaDriver

    try:
        return True, f"the CUDA driver works, device 0 is {CudaDriver().arch}"
    except UcmError as error:
        return False, str(error)


def probe_cufile() -> tuple[bool, str]:
    """Import kvikio and open the cuFile driver."""
    try:
        import kvikio
        from kvikio import cufile_driver

        cufile_driver.driver_open()
        major, minor = cufile_driver.libcufile_version()
        cufile_driver.driver_close()
    except (ImportError, RuntimeError, OSError, ValueError) as error:
        return False, f"the cuFile driver does not open: {error}"
    return True, f"kvikio {kvikio.__version__} opened cuFile {major}.{minor}"


STEPS: Final[Mapping[str, Callable[[], tuple[bool, str]]]] = {
    "driver": probe_driver,
    "cufile": probe_cufile,
}


def run(steps: Sequence[str]) -> None:
    """Try the steps in order until one fails."""
    for step in steps:
        ok, found = STEPS[step]()
        sys.stdout.write(json.dumps({"ok": ok, "found": " ".join(found.split())}) + "\n")
        sys.stdout.flush()
        if not ok:
            return


if __name__ == "__main__":
    run(sys.argv[1:])
