"""`ucm bench storage`: the store beside the machine's ceilings and other stores, in one run.

    dram        a load through the daemon against a plain copy              storage_dram.py
    lookup      round trips of names                                        storage_lookup.py
    concurrent  1, 4, 16 clients, with and without stores                   storage_concurrent.py
    nvme        our tier and a whole store against fio, by slab size        storage_nvme.py
    index       opening a large index; the daemon's private memory          storage_lookup.py
    peers       files, LMDB, Redis, LMCache on the same blocks              storage_peers.py

What is compared is measured in the same rounds (`storage_measure.py`); every byte that any of them
loaded is compared with what was put (`storage_payload.py`), and `wrong_bytes` counts those that
differ. Everything is made in a folder of its own on the file system to measure, and removed.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ucm.config_loader import default_store_path
from ucm.errors import ConfigError

from .storage_ceilings import Scout, find_ceiling
from .storage_concurrent import measure_concurrent
from .storage_daemon import bench_daemon
from .storage_dram import DramBench
from .storage_lookup import measure_index, measure_lookup
from .storage_manifest import file_system, manifest
from .storage_measure import Progress, Result, StorageBenchOptions
from .storage_nvme import NvmePlan, measure_nvme
from .storage_payload import Audit
from .storage_peers import measure_peers

DAEMON_SETTINGS = {
    "memory.capacity_bytes": "512MiB",
    "nvme.capacity_bytes": "2GiB",
    "nvme.segment_bytes": "256MiB",
    "nvme.index_map_bytes": "64MiB",
    "nvme.write_queue_bytes": "256MiB",
}
LITTLE_MEMORY = {"memory.capacity_bytes": "192MiB"}
"""Less than half of what is loaded in turns; room for the leases of 16 clients."""


def run_storage_bench(options: StorageBenchOptions, progress: Progress | None = None) -> Result:
    """Measure; see the module. Blocks for a minute to a quarter of an hour.

    Args:
        options: what to measure.
        progress: called with a line of text before each longer piece of work.

    Raises:
        ConfigError: the folder cannot be used, or its files are memory.
        CorruptionError: the store lost or refused a block that it had accepted.
        UcmError: the daemon did not start or did not answer.
    """
    began_s = time.perf_counter()
    phases_s: dict[str, float] = {}

    def say(line: str) -> None:
        phases_s[line] = round(time.perf_counter() - began_s, 1)
        if progress is not None:
            progress(line)

    audit = Audit()
    with bench_folder(options) as folder:
        result: Result = {"wrong_bytes": 0, **_daemon_phases(folder, options, audit, say)}
        result["nvme"] = _nvme_phase(folder, options, audit, began_s + options.nvme_end_s, say)
        result["index"] = measure_index(folder / "index", options, say)
        result["peers"] = measure_peers(folder / "peers", options, audit, say)
        result["manifest"] = manifest(folder, options)
    result["wrong_bytes"] = audit.wrong_bytes
    result["checked_bytes"] = audit.checked_bytes
    result["took_s"] = round(time.perf_counter() - began_s, 1)
    result["began_at_s"] = phases_s
    return result


@contextmanager
def bench_folder(options: StorageBenchOptions) -> Iterator[Path]:
    """A new folder on the file system to measure, removed at the end whatever happens.

    Raises:
        ConfigError: it cannot be made, or its files are memory.
    """
    parent = options.path or default_store_path().parent
    kind = file_system(parent).kind
    if kind in ("tmpfs", "ramfs") and not options.allow_tmpfs:
        raise ConfigError(
            f"{parent} is {kind}, its files are memory: give --path a folder on a disk, "
            "or --allow-tmpfs"
        )
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="ucm-bench-", dir=parent))
    except OSError as error:
        raise ConfigError(f"cannot measure in {parent}: {error.strerror}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _daemon_phases(
    folder: Path, options: StorageBenchOptions, audit: Audit, say: Progress
) -> Result:
    """What a daemon answers; then, if asked, one whose memory holds less than is loaded."""
    found: Result = {}
    say("starting a daemon")
    store = folder / "daemon"
    with bench_daemon(store, DAEMON_SETTINGS) as daemon:
        with daemon.connect() as cache:
            say("host memory: loads against a plain copy")
            found["dram"] = DramBench(cache, options.dram_blocks, audit).run(options.dram)
            say("lookups")
            found["lookup"] = measure_lookup(cache, options.lookup_keys, options.lookup)
        found["concurrent"] = measure_concurrent(daemon, options.memory_chains, options, audit, say)
    shutil.rmtree(store, ignore_errors=True)
    if options.disk_chains:
        say("starting a daemon with little memory")
        with bench_daemon(store, DAEMON_SETTINGS | LITTLE_MEMORY) as daemon:
            found["concurrent_nvme"] = measure_concurrent(
                daemon, options.disk_chains, options, audit, say
            )
        shutil.rmtree(store, ignore_errors=True)
    return found


def _nvme_phase(
    folder: Path, options: StorageBenchOptions, audit: Audit, end_s: float, say: Progress
) -> Result:
    """Every slab size; `end_s` is on the performance counter."""
    count = options.ceiling_candidates
    scout = Scout(find_ceiling(), count, thorough=options.thorough_scouting)
    found: Result = {}
    for number, slab in enumerate(options.slabs):
        share_s = (end_s - time.perf_counter()) / (len(options.slabs) - number)
        plan = NvmePlan(
            scout=scout,
            rounds=options.nvme.within(share_s),
            whole_store_once=options.whole_store_once,
            progress=say,
        )
        say(f"nvme {slab}: looking for the ceiling")
        found[slab] = measure_nvme(folder / "nvme", slab, options.size_bytes, plan, audit)
    return found
