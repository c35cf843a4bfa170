"""What every part of the storage benchmark shares: options, rounds, medians.

Everything that is compared is measured in the same rounds, one after the other, and the order turns
round from one round to the next: a machine that slows down slows down both. The first round is
warm-up and discarded. Ratios are ratios of medians.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ucm.config import MIB
from ucm.layout import KvDtype, KvLayout

GB = 1e9
Progress = Callable[[str], None]
Result = dict[str, Any]
Samples = dict[str, list[float]]
Task = Callable[[], Mapping[str, float]]
"""Does one piece of work and says what it measured, by name."""


def slab_layout(slab_bytes: int, num_layers: int) -> KvLayout:
    """A layout whose slabs have `slab_bytes`, a multiple of 16 KiB: bfloat16, heads of 128."""
    tokens = min(256, max(32, slab_bytes >> 13))
    heads = slab_bytes // (2 * tokens * 128 * 2)
    layout = KvLayout(
        num_layers=num_layers,
        num_kv_heads=heads,
        head_dim=128,
        block_tokens=tokens,
        dtype=KvDtype.BFLOAT16,
    )
    assert layout.slab_bytes == slab_bytes, (layout, slab_bytes)
    return layout


SLAB_LAYOUTS: Mapping[str, KvLayout] = {
    "64KiB": slab_layout(64 << 10, 16),
    "256KiB": slab_layout(256 << 10, 8),
    "1MiB": slab_layout(1 << 20, 4),
    "4MiB": slab_layout(4 << 20, 2),
}
"""Blocks of 1, 2, 4 and 8 MiB."""

MIB_LAYOUT = SLAB_LAYOUTS["64KiB"]
"""Blocks of 1 MiB, for host memory, clients and peers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How often a phase measures."""

    repeats: int
    """Rounds that count; one more comes first and does not."""
    budget_s: float
    """A phase that took longer stops repeating; one round always counts."""

    def within(self, budget_s: float) -> Plan:
        """The same with a budget of at most `budget_s`."""
        return replace(self, budget_s=min(self.budget_s, budget_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageBenchOptions:
    """What to measure and for how long."""

    path: Path | None = None
    """Folder on the file system to measure; None takes the default store's."""
    size_bytes: int = 512 * MIB
    """Blocks moved in one round of the NVMe phase, on each side."""
    allow_tmpfs: bool = False
    """Measure even where files are memory."""
    lmcache_python: Path | None = None
    """Interpreter of an environment that has LMCache."""
    slabs: tuple[str, ...] = tuple(SLAB_LAYOUTS)
    dram_blocks: int = 64
    peer_bytes: int = 256 * MIB
    lookup_keys: tuple[int, ...] = (1_000, 10_000)
    index_blocks: int = 1_000_000
    index_openings: int = 3
    index_budget_s: float = 60.0
    """An index that would take longer to open stays smaller; its `blocks` says so."""
    clients: tuple[int, ...] = (1, 4, 16)
    client_processes: int = 4
    memory_chains: int = 8
    """Chains of 8 MiB that clients load from host memory."""
    disk_chains: int = 64
    """Chains that clients of a daemon with little memory load from the disk; 0 leaves that out."""
    cell_s: float = 4.0
    """How long a number of clients runs, with and without stores, each."""
    ceiling_candidates: int = 3
    """Of fio's settings, the best so many take part in every round."""
    thorough_scouting: bool = True
    """Whether every depth and request size is tried, for each slab size anew."""
    dram: Plan = field(default_factory=lambda: Plan(repeats=31, budget_s=20))
    whole_store_once: bool = False
    """Whether the whole store is measured once for each slab size, not in every round."""
    nvme_end_s: float = 3600.0
    """The NVMe phases aim at ending so long after the start, by fewer rounds."""
    nvme: Plan = field(default_factory=lambda: Plan(repeats=7, budget_s=75))
    """For each slab size."""
    lookup: Plan = field(default_factory=lambda: Plan(repeats=300, budget_s=20))
    peers: Plan = field(default_factory=lambda: Plan(repeats=5, budget_s=60))

    def quick(self) -> StorageBenchOptions:
        """The same keys from less: below 50 s on two busy cores."""
        return replace(
            self,
            size_bytes=min(self.size_bytes, 64 * MIB),
            peer_bytes=32 * MIB,
            index_blocks=200_000,
            index_openings=1,
            index_budget_s=5.0,
            client_processes=2,
            disk_chains=0,
            cell_s=0.4,
            ceiling_candidates=1,
            thorough_scouting=False,
            dram=Plan(repeats=15, budget_s=1.5),
            whole_store_once=True,
            nvme_end_s=26.0,
            nvme=Plan(repeats=3, budget_s=2),
            lookup=Plan(repeats=100, budget_s=1.5),
            peers=Plan(repeats=2, budget_s=2),
        )


def rounds(plan: Plan) -> Iterator[int]:
    """0 for the warm-up, then 1, 2, ... `plan.repeats`, ending early behind its budget."""
    deadline = time.perf_counter() + plan.budget_s
    for number in range(plan.repeats + 1):
        if number > 1 and time.perf_counter() > deadline:
            return
        yield number


def interleave(tasks: Sequence[Task], plan: Plan) -> Samples:
    """Run all tasks in every round, in turning order; what they measured, the warm-up left out."""
    samples: Samples = {}
    for number in rounds(plan):
        for task in tasks if number % 2 == 0 else tasks[::-1]:
            found = task()
            if number:
                _append(samples, found)
    return samples


def _append(samples: Samples, found: Mapping[str, float]) -> None:
    for name, value in found.items():
        samples.setdefault(name, []).append(value)


def medians(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of everything that was measured."""
    return {name: statistics.median(values) for name, values in samples.items()}


def best(values: Mapping[str, float]) -> tuple[str, float]:
    """The name and value of the largest.

    Raises:
        ValueError: there is none.
    """
    name = max(values, key=values.__getitem__)
    return name, values[name]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that is not below `percent` % of them (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def jain_fairness(shares: Sequence[float]) -> float:
    """1 when all shares are equal, 1/n when one has all (R. Jain et al., DEC-TR-301, 1984)."""
    squares = len(shares) * sum(share * share for share in shares)
    return sum(shares) ** 2 / squares if squares else 1.0


def gb_s(num_bytes: int, begin_s: float) -> float:
    """Rate of `num_bytes` since `begin_s` on the performance counter."""
    return num_bytes / (time.perf_counter() - begin_s) / GB


def rounded(values: Mapping[str, float], digits: int = 3) -> dict[str, float]:
    """For people and JSON: nothing here is known to more digits."""
    return {name: round(value, digits) for name, value in values.items()}
