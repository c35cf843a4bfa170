"""1,000 damaged stores: `fsck` explains every planted defect, mends it, and harms nothing else.

`UCM_FSCK_SEED=N` replays one store.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.storage.fsck import FindingKind, FsckReport, check_store
from ucm.storage.nvme import NvmeStore
from ucm.storage.tier import IoStatus
from ucm.testing.damaged_store import (
    COARSE,
    FINE,
    PARENTS,
    DamagedStore,
    Planted,
    make_damaged_store,
    make_sound_store,
    with_descendants,
)
from ucm.testing.lanes import IS_DEEP, LANE, seeds_to_run
from ucm.testing.nvme import NAMESPACE, quick_folder
from ucm.testing.tier_conformance import LAYOUT, get, get_summary, make_key

SEEDS = seeds_to_run("UCM_FSCK_SEED", LANE.damaged_stores)
SEEDS_A_TEST = 1000 if IS_DEEP else 100


@pytest.fixture(scope="module")
def sound() -> Iterator[tuple[Path, Path]]:
    """A sound store without summaries, and one with."""
    with quick_folder() as folder:
        make_sound_store(folder / "without")
        make_sound_store(folder / "with", has_summaries=True)
        yield folder / "without", folder / "with"


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


def fingerprint(path: Path) -> dict[str, str]:
    files = (each for each in sorted(path.rglob("*")) if each.is_file() and each.name != "lock")
    return {
        f"{each} {each.lstat().st_mode:o}": hashlib.sha256(each.read_bytes()).hexdigest()
        for each in files
    }


def is_explained(planted: Planted, report: FsckReport) -> bool:
    """Whether a finding of a fitting kind is about it, in words."""
    return any(
        finding.kind in planted.kinds
        and finding.what
        and (planted.slot is None or finding.slot == planted.slot or finding.num_behind)
        for finding in report.findings
    )


def check_repaired(store: DamagedStore) -> None:
    """Everything that no defect hit is still there byte for byte, and nothing else is."""
    lost = with_descendants({name for planted in store.planted for name in planted.lost})
    opened = NvmeStore(store.config)
    tier = opened.open_namespace(NAMESPACE, LAYOUT)
    by_key = {make_key(name): name for name in PARENTS}
    found = {by_key[entry.key]: entry.slot for entry in tier.entries()}
    for name, slot in found.items():
        assert get(tier, slot, name) is IoStatus.OK
        get_summary(tier, slot, name)  # the right one or none
    if not any(planted.may_lose_all for planted in store.planted):
        assert found.keys() >= PARENTS.keys() - lost
    assert tier.usage().quarantined_slots == 0
    opened.close()


def run(store: DamagedStore) -> None:
    before = fingerprint(store.path)
    report = check_store(store.path, repair=False)
    assert fingerprint(store.path) == before, "a check changes nothing"
    for planted in store.planted:
        assert is_explained(planted, report), (planted, report.findings)
    lost = with_descendants({name for planted in store.planted for name in planted.lost})
    silent = {finding.slot for finding in report.findings if finding.kind is FindingKind.SUMMARY}
    for planted in store.planted:
        if FindingKind.SUMMARY in planted.kinds:
            assert planted.slot in silent | lost, report.findings
    assert report.ok or any(p.is_damage or p.may_lose_all or p.lost for p in store.planted)
    assert not report.ok or not any(p.is_damage for p in store.planted)
    is_final = any(planted.is_final for planted in store.planted)
    repaired = check_store(store.path, repair=True)
    assert repaired.ok != is_final, repaired.findings
    again = check_store(store.path, repair=False)
    assert (again.findings == []) != is_final, again.findings
    if not is_final:
        check_repaired(store)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", SEEDS[::SEEDS_A_TEST])
def test_every_planted_defect_is_found_and_mended(
    first: int, sound: tuple[Path, Path], folder: Path
) -> None:
    kinds: Counter[str] = Counter()
    for seed in range(first, min(first + SEEDS_A_TEST, SEEDS.stop)):
        print(f"UCM_FSCK_SEED={seed}")
        odd = seed % 2
        store = make_damaged_store(sound[odd], folder / str(seed), seed, has_summaries=bool(odd))
        kinds.update(planted.name for planted in store.planted)
        print([planted.name for planted in store.planted])
        run(store)
        shutil.rmtree(folder / str(seed))
    print(dict(kinds))
    assert len(SEEDS) == 1 or len(kinds) > len(FINE) + len(COARSE) // 2
