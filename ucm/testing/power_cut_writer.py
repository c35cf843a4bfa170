"""A process that stores blocks until the power goes, and says outside what was flushed.

    python -m ucm.testing.power_cut_writer

reads "DATA_FOLDER JOURNAL FIRST_NAME" a line and answers each with the id of a forked child, which
opens the store in the data folder (its own, real file layer) and writes and deletes until it is
killed. Block n is `make_block(n)`; the journal, on another disk, gets

    flushed N     after a write of block N returned
    going N       before block N is deleted
"""

from __future__ import annotations

import os
import random
import sys
import traceback
from pathlib import Path
from typing import Final

from ucm.storage.nvme import NvmeStore, NvmeTier
from ucm.storage.tier import IoStatus, SlotId

from .nvme import NAMESPACE, nvme_config
from .tier_conformance import LAYOUT, make_key, make_write

NUM_SLOTS: Final = 64
SLOTS_PER_SEGMENT: Final = 16


def write_until_killed(path: Path, journal: Path, first_name: int) -> None:
    """Never returns but by an error, which the end of the disk is."""
    chance = random.Random(first_name)
    out = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    store = NvmeStore(nvme_config(path, NUM_SLOTS, slots_per_segment=SLOTS_PER_SEGMENT))
    tier = store.open_namespace(NAMESPACE, LAYOUT)
    slots = {entry.key: entry.slot for entry in tier.entries()}
    held = {name: slots[make_key(name)] for name in range(first_name) if make_key(name) in slots}
    name = first_name
    while True:
        count = chance.randint(1, 6)
        while tier.usage().free_slots < count:
            victims = chance.sample(sorted(held), min(len(held), 4))
            os.write(out, "".join(f"going {victim}\n" for victim in victims).encode())
            tier.delete([(held.pop(victim), make_key(victim)) for victim in victims])
        _write(tier, range(name, name + count), held)
        os.write(out, "".join(f"flushed {n}\n" for n in range(name, name + count)).encode())
        name += count


def _write(tier: NvmeTier, names: range, held: dict[int, SlotId]) -> None:
    slots = tier.allocate(len(names))
    items = [make_write(slot, name) for slot, name in zip(slots, names, strict=True)]
    statuses = tier.write(items)
    if statuses != [IoStatus.OK] * len(items):
        raise OSError(f"the disk is gone: {statuses}")
    held.update(zip(names, slots, strict=True))


def main() -> None:
    """Fork a writer for each line; their deaths are the caller's business."""
    while line := sys.stdin.readline().split():
        pid = os.fork()
        if pid == 0:
            try:
                write_until_killed(Path(line[0]), Path(line[1]), int(line[2]))
            except BaseException:  # noqa: BLE001  the outermost frame, on a disk that is gone
                Path(line[1]).with_suffix(".err").write_text(traceback.format_exc())
            finally:
                os._exit(1)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        sys.stdin.readline()
        os.waitpid(pid, 0)
        sys.stdout.write("gone\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
