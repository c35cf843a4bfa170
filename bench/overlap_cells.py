"""The cells of the overlap benchmark: which were asked for, and whether they can be measured.

    bandwidth    1     3     10    30    ...      a Latin square: each bandwidth, hit ratio and
    hits .5     1 k   3 k   6 k   1 k             context meets each value of the two others once,
    hits .9     3 k   6 k   1 k   3 k             or as often as there are values; a third of the
    hits 1.0    6 k   1 k   3 k   6 k             cells, a third of the time

Everything here is known before the first measurement, which takes minutes to hours. Pairs instead
of all combinations: D. M. Cohen et al., "The AETG System: An Approach to Testing Based on
Combinatorial Design", IEEE Transactions on Software Engineering 23(7), 1997.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Final, TypeVar

from ucm.errors import ConfigError
from ucm.types import TierKind

MB: Final = 1_000_000
TEACHING_BLOCKS: Final = 2
"""What a load must read at least that teaches the cost model a bandwidth."""

MOST_ROUNDS: Final = 3
"""Of a way in a cell, where `repeats` does not ask for more: a median wants three, for one and the
same pass takes a fifth more or less from run to run on a shared machine."""

MOST_SHORT_ROUNDS: Final = 9
"""Of a way whose runs are short: 10 ms more or less of waiting are a twentieth of a load of 0.2 s,
of which from run to run 0.88 to 0.95 is hidden."""

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapBenchOptions:
    """What to measure."""

    model_path: Path | None = None
    """Model folder or GGUF file; None takes the one that `ucm model pull` fetched."""
    dtype: str = "fp32"
    bandwidths_mb_s: tuple[float | None, ...] = (1.0, 3.0, 10.0, 30.0, 100.0, None)
    """None: as fast as the disk."""
    hit_ratios: tuple[float, ...] = (0.5, 0.9, 1.0)
    context_tokens: tuple[int, ...] = (1024, 3072, 6144)
    tiers: tuple[TierKind, ...] = (TierKind.NVME,)
    repeats: int = 1
    """Runs of each way in each cell, at least."""
    steady_s: float = 10.0
    """A way whose runs in a cell took less so far gets another, up to `MOST_ROUNDS`; so does one
    that a ratio of the cell depends on, however long it takes. 0: none."""
    short_s: float = 2.5
    """A way whose runs in a cell took less altogether gets another, up to `MOST_SHORT_ROUNDS`."""
    limit_s: float = 30 * 60.0
    """Runs beyond `repeats` are begun only where the whole benchmark should end before."""
    answer_tokens: int = 8
    """Of each answer; compared with that of `compute_only`."""
    every_cell: bool = False
    """False: enough cells for every pair of a bandwidth, a hit ratio and a context; see the
    module."""
    longest_load_s: float = 30.0
    """Ways that read every hit and would read for longer than this are left out of a cell (null):
    no context takes as long to compute."""
    decode_rounds: int = 6
    """Decodes with storing on, and as many with storing off, alternating; 0: not measured."""
    decode_tokens: int = 256
    """Long enough for stores that wait for several blocks to begin and end within a decode."""
    stores_wait: bool = True
    """False: each block of a decode is stored by itself, at once, so that a short decode has its
    stores too; dearer than what a session does."""
    store: Path | None = None
    """Folder in which the daemon's data folder is made while measuring; None: that of temporary
    files."""

    def wants_run(self, took_s: Sequence[float], *, is_judged: bool = False) -> bool:
        """Whether a way is measured (again), after runs that took so long.

        Args:
            took_s: of its runs in the cell.
            is_judged: whether a ratio of the cell depends on it.
        """
        if len(took_s) < self.repeats:
            return True
        is_unsteady = self.steady_s > 0 and (is_judged or sum(took_s) < self.steady_s)
        most = MOST_SHORT_ROUNDS if sum(took_s) < self.short_s else MOST_ROUNDS
        return len(took_s) < most and is_unsteady

    def quick(self) -> OverlapBenchOptions:
        """The same on two cells of a short context: below 50 s."""
        return replace(
            self,
            bandwidths_mb_s=(10.0, None),
            hit_ratios=(0.9,),
            context_tokens=(512,),
            answer_tokens=4,
            steady_s=1.5,
            short_s=0.0,
            limit_s=30.0,
            decode_rounds=4,
            decode_tokens=34,
            stores_wait=False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One place in the table."""

    bandwidth_mb_s: float | None
    hit_ratio: float
    context_tokens: int
    tier: TierKind

    def __str__(self) -> str:
        speed = "unlimited" if self.bandwidth_mb_s is None else f"{self.bandwidth_mb_s:g} MB/s"
        return (
            f"{self.tier.value} {speed}, hit ratio {self.hit_ratio:g}, {self.context_tokens} tokens"
        )


def cells_of(options: OverlapBenchOptions) -> list[Cell]:
    """The cells to measure, each once; limited bandwidth is the disk's, so memory has none."""
    of_tier = product if options.every_cell else pairwise
    return [
        Cell(bandwidth_mb_s=speed, hit_ratio=ratio, context_tokens=context, tier=tier)
        for tier in dict.fromkeys(options.tiers)
        for speed, context, ratio in of_tier(
            [
                speed
                for speed in dict.fromkeys(options.bandwidths_mb_s)
                if not _has_none(tier, speed)
            ],
            list(dict.fromkeys(options.context_tokens)),
            list(dict.fromkeys(options.hit_ratios)),
        )
    ]


def pairwise(
    first: Sequence[A], second: Sequence[B], third: Sequence[C]
) -> Iterator[tuple[A, B, C]]:
    """As few combinations as hold every pair of values of two of the sequences.

    Of the shortest sequence the sum of the two others' indexes takes a value, around and around.
    """
    sizes = (len(first), len(second), len(third))
    shortest = sizes.index(min(sizes))
    for index in product(*map(range, sizes)):
        others = sum(index) - index[shortest]
        if index[shortest] == others % sizes[shortest]:
            yield first[index[0]], second[index[1]], third[index[2]]


def left_out(options: OverlapBenchOptions) -> list[str]:
    """Lines that say which cells are not measured; none where all are."""
    lines = []
    speeds = set(options.bandwidths_mb_s) - {None}
    if TierKind.MEMORY in options.tiers and speeds:
        lines.append(f"bandwidths that memory does not have: {len(speeds)}; they limit the disk")
    count, of_all = len(cells_of(options)), len(cells_of(replace(options, every_cell=True)))
    if count < of_all:
        lines.append(
            f"{count} of {of_all} cells: each pair of a bandwidth, a hit ratio and a context is in "
            "one of them; --every-cell measures all"
        )
    return lines


def check_cells(options: OverlapBenchOptions) -> None:
    """See that there is something to measure and somewhere to store it.

    Raises:
        ConfigError: no cell is left, or `store` is no folder to write to.
    """
    if not cells_of(options):
        raise ConfigError(
            "nothing to measure: a bandwidth limits the disk only, and only memory was asked for; "
            "add --bandwidth unlimited or --tier nvme"
        )
    store = options.store
    if store is None:
        return
    if not store.is_dir():
        raise ConfigError(f"--store {store} is no folder: create it, or name another")
    if not os.access(store, os.W_OK | os.X_OK):
        raise ConfigError(f"--store {store} cannot be written to: name another folder")


def check_speeds(options: OverlapBenchOptions, block_bytes: int) -> None:
    """See that no bandwidth is so low that even the load that teaches the model takes too long.

    Args:
        options: what to measure.
        block_bytes: of one block that a load moves.

    Raises:
        ConfigError: `TEACHING_BLOCKS` would be read for longer than `longest_load_s`.
    """
    lowest = TEACHING_BLOCKS * block_bytes / options.longest_load_s / MB
    # Rounded up to the digits that are shown: what the message names is taken.
    unit = 10.0 ** (math.floor(math.log10(lowest)) - 2)
    for cell in cells_of(options):
        if cell.bandwidth_mb_s is not None and cell.bandwidth_mb_s < lowest:
            raise ConfigError(
                f"--bandwidth {cell.bandwidth_mb_s:g}: {TEACHING_BLOCKS} blocks of this model "
                f"would be read for longer than {options.longest_load_s:g} s; name at least "
                f"{math.ceil(lowest / unit) * unit:.3g} MB/s"
            )


def check_contexts(options: OverlapBenchOptions, max_context_tokens: int) -> None:
    """See that the model takes the longest context and its answer.

    Raises:
        ConfigError: it does not.
    """
    longest, answer = max(options.context_tokens), options.answer_tokens
    if longest + answer > max_context_tokens:
        raise ConfigError(
            f"--context {longest} and {answer} tokens of answer are more than the "
            f"{max_context_tokens} that the model takes: name at most {max_context_tokens - answer}"
        )


def _has_none(tier: TierKind, speed: float | None) -> bool:
    return tier is TierKind.MEMORY and speed is not None
