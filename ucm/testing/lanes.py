"""How much the reliability tests do: the one place with their figures, and the one switch.

    make test         the fast lane: minutes, at every change
    make test-deep    the deep lane: hours, before a release

The switch is the environment variable `UCM_HYPOTHESIS_PROFILE` (`deep`, or anything else for fast),
which also chooses Hypothesis' own profile. `docs/reliability.md` names the test behind each row.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """Counts of runs, cuts, kills and seconds."""

    state_machine_runs: int
    """Runs of the whole-store state machine on each of its two stores."""
    state_machine_steps: int
    disk_seeds: int
    """Runs on the simulated disk, one seed each."""
    short_sequence_lengths: int
    """All sequences of up to so many store operations are cut at every call."""
    kills: int
    """`kill -9` of a daemon under load."""
    power_cuts: int
    """Cuts of a real file system, in each of the two modes."""
    calls_failed_each: int
    """System calls of each kind that are failed, one a run, spread over all there are."""
    bit_flips: int
    failed_syncs: int
    deaths_each: int
    """How often a client dies in each of its states."""
    damaged_stores: int
    """Stores of the corpus that `fsck` must explain and mend."""
    random_faults_s: float
    """How long lives of a store are run under random faults."""
    soak_s: float
    """Length of the leak soak."""


FAST: Final = Lane(
    state_machine_runs=150,
    state_machine_steps=50,
    disk_seeds=2_000,
    short_sequence_lengths=3,
    kills=100,
    power_cuts=40,
    calls_failed_each=200,
    bit_flips=500,
    failed_syncs=20,
    deaths_each=5,
    damaged_stores=1_000,
    random_faults_s=120.0,
    soak_s=180.0,
)

DEEP: Final = Lane(
    state_machine_runs=10_000,
    state_machine_steps=100,
    disk_seeds=200_000,
    short_sequence_lengths=3,
    kills=5_000,
    power_cuts=1_000,
    calls_failed_each=1_000_000,
    bit_flips=100_000,
    failed_syncs=1_000,
    deaths_each=200,
    damaged_stores=20_000,
    random_faults_s=7200.0,
    soak_s=float(os.environ.get("UCM_SOAK_S", "600")),
)

IS_DEEP: Final = os.environ.get("UCM_HYPOTHESIS_PROFILE") == "deep"
LANE: Final = DEEP if IS_DEEP else FAST


def seeds_to_run(variable: str, count: int) -> range:
    """Seeds 0 to `count`, or the single one that the environment names to replay it."""
    named = os.environ.get(variable)
    return range(count) if named is None else range(int(named), int(named) + 1)
