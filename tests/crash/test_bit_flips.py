"""One flipped bit anywhere in a store's files: everything that is read back is right, or a miss.

In half of the runs the store did not end cleanly, so that no digest vouches for the index; half
have summaries, of which each is right too, or not there.
`UCM_FLIP_SEED=N` replays one flip.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.errors import UcmError
from ucm.storage.format import HEADER_BYTES
from ucm.storage.nvme import NvmeStore
from ucm.storage.tier import IoStatus
from ucm.testing.damaged_store import KIND, NUM_SLOTS, PARENTS, DamagedStore, make_sound_store
from ucm.testing.lanes import IS_DEEP, LANE, seeds_to_run
from ucm.testing.nvme import NAMESPACE, nvme_config, quick_folder
from ucm.testing.tier_conformance import LAYOUT, get, get_summary, make_key, make_summary
from ucm.types import SummaryKind

SEEDS = seeds_to_run("UCM_FLIP_SEED", LANE.bit_flips)


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        make_sound_store(path / "sound")
        make_sound_store(path / "summarised", has_summaries=True)
        yield path


def flip(path: Path, chance: random.Random) -> None:
    offset = chance.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ (1 << chance.randrange(8))]))


def read_back(path: Path, kind: SummaryKind | None) -> str:
    """Open and read everything: what the flip came to. Asserts that no byte is wrong."""
    store = NvmeStore(nvme_config(path, NUM_SLOTS, summary=kind))
    try:
        tier = store.open_namespace(NAMESPACE, LAYOUT)
    except UcmError as error:
        assert "fsck" in str(error) or "format" in str(error)  # noqa: PT017  one of two outcomes
        return "refused"
    else:
        by_key = {make_key(name): name for name in PARENTS}
        found = {by_key[entry.key]: entry.slot for entry in tier.entries()}
        statuses = Counter(get(tier, slot, name) for name, slot in found.items())
        assert set(statuses) <= {IoStatus.OK, IoStatus.CORRUPT}
        silent = [name for name, slot in found.items() if not get_summary(tier, slot, name)]
        if kind is not None and len(silent) > statuses[IoStatus.CORRUPT] + 1:  # one never had any
            assert statuses[IoStatus.CORRUPT] == 0
            return "silent"
        assert tier.check_integrity() == []
        if tier.was_rebuilt:
            assert statuses[IoStatus.OK] == len(PARENTS)
            return "rebuilt"
        if statuses[IoStatus.CORRUPT]:
            assert tier.usage().quarantined_slots == statuses[IoStatus.CORRUPT]
            return "corrupt"
        return "unused space" if len(found) == len(PARENTS) else "dropped"
    finally:
        store.abort()


@pytest.mark.timeout(3600 if IS_DEEP else 120)
def test_flipped_bits_are_noticed_or_matter_to_nobody(folder: Path) -> None:
    outcomes: Counter[str] = Counter()
    for seed in SEEDS:
        chance = random.Random(seed)
        path = folder / str(seed)
        summary = KIND if seed % 2 else None
        shutil.copytree(folder / ("summarised" if summary else "sound"), path)
        kind = chance.choice(("*.seg", "*.seg", "data.mdb", "data.mdb", "superblock", "clean"))
        if kind != "clean" and chance.random() < 0.5:
            next(path.rglob("clean")).unlink()
        if seed % 10 == 1:
            kind, name = "summary", chance.choice([name for name in PARENTS if name != 8])
            summarised = DamagedStore(path, chance, has_summaries=True)
            summarised.flip(name, HEADER_BYTES, len(make_summary(name, KIND)))
        else:
            flip(chance.choice(sorted(path.rglob(kind))), chance)
        print(f"UCM_FLIP_SEED={seed}: {kind}")
        outcome = read_back(path, summary)
        outcomes[f"{kind}: {outcome}"] += 1
        assert kind != "superblock" or outcome == "refused"
        assert kind != "summary" or outcome == "silent"
        shutil.rmtree(path)
    print(dict(outcomes))
    assert len(SEEDS) == 1 or outcomes["*.seg: corrupt"] > len(SEEDS) // 10
