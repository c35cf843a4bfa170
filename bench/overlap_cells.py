"""The cells of the overlap benchmark: which were asked for, and whether they can be measured.

Everything here is known before the first measurement, which takes minutes to hours.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from ucm.errors import ConfigError
from ucm.types import TierKind


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
    answer_tokens: int = 8
    """Of each answer; compared with that of `compute_only`."""
    longest_load_s: float = 900.0
    """Ways that would read for longer than this are left out of a cell (null)."""
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

    def quick(self) -> OverlapBenchOptions:
        """The same on two cells of a short context: below 50 s."""
        return replace(
            self,
            bandwidths_mb_s=(10.0, None),
            hit_ratios=(0.9,),
            context_tokens=(512,),
            answer_tokens=4,
            decode_rounds=2,
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
    """Every cell that was asked for, once; limited bandwidth is the disk's, so memory has none."""
    found = [cell for cell in _all_cells(options) if not _limits_memory(cell)]
    return list(dict.fromkeys(found))


def left_out(options: OverlapBenchOptions) -> str:
    """A line that says which cells are not measured; empty where all are."""
    count = len({cell for cell in _all_cells(options) if _limits_memory(cell)})
    if not count:
        return ""
    return f"cells of memory left out: {count}; a bandwidth limits the disk only, memory has none"


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


def _all_cells(options: OverlapBenchOptions) -> list[Cell]:
    return [
        Cell(bandwidth_mb_s=speed, hit_ratio=ratio, context_tokens=context, tier=tier)
        for tier in options.tiers
        for speed in options.bandwidths_mb_s
        for context in options.context_tokens
        for ratio in options.hit_ratios
    ]


def _limits_memory(cell: Cell) -> bool:
    return cell.tier is TierKind.MEMORY and cell.bandwidth_mb_s is not None
