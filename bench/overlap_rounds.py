"""The runs of the overlap benchmark's cells, and which ways are measured again.

    round 1     every way of every cell, `repeats` times
    rounds 2, 3 ways that are quick, and those that say something about a ratio of the cell, while
                `OverlapBenchOptions.limit_s` lasts
    rounds 4 .. ways of which all runs together are short, up to `MOST_SHORT_ROUNDS` of them

A round goes over all cells before the next begins: a slow minute of a shared machine is then one
run of a way and not all of them. What computing everything takes depends on the context's length
only, so cells of one length share these runs where a cell has fewer than `MOST_ROUNDS` itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from .overlap_cells import MOST_ROUNDS, Cell, OverlapBenchOptions
from .overlap_rig import CHOSEN, COMPUTE_ONLY, HYBRID, Run, Variant


@dataclass(slots=True)
class CellRuns:
    """One cell, and what was measured of it."""

    cell: Cell
    tokens: Sequence[int]
    """Its prompt."""
    num_hits: int
    """Leading blocks of it that the cache has."""
    variants: Sequence[Variant]
    """The ways that are measured, in the order of a round."""
    runs: list[Run] = field(default_factory=list)

    def of(self, variant: Variant) -> list[Run]:
        """The runs of one way, the first one first."""
        return [run for run in self.runs if run.variant is variant]

    def times_s(self, variant: Variant) -> list[float]:
        """Seconds to the first token of each of them."""
        return [run.ttft_s for run in self.of(variant)]

    def due(self, options: OverlapBenchOptions) -> list[Variant]:
        """The ways to measure (again), in their order."""
        return [
            each
            for each in self.variants
            if options.wants_run(self.times_s(each), is_judged=self._is_judged(each))
        ]

    def expected_s(self, due: Sequence[Variant]) -> float:
        """What these ways took so far, once each."""
        return sum(statistics.median(self.times_s(each) or [0.0]) for each in due)

    def _is_judged(self, variant: Variant) -> bool:
        """Whether the cell's ratios depend on more runs of it.

        A load that takes longer than computing does not become the better way by another run, and
        computing is measured in other cells too.
        """
        own_s, alone_s = self.times_s(variant), self.times_s(COMPUTE_ONLY)
        if variant is COMPUTE_ONLY or not own_s or not alone_s:
            return False
        return variant in (HYBRID, CHOSEN) or statistics.median(own_s) <= statistics.median(alone_s)


def compute_times_s(found: CellRuns, cells: Sequence[CellRuns]) -> list[float]:
    """Seconds of computing all of a cell's prompt: its own runs, or those of cells as long too."""
    own = found.times_s(COMPUTE_ONLY)
    if len(own) >= MOST_ROUNDS:
        return own
    context = found.cell.context_tokens
    return [
        seconds
        for each in cells
        if each.cell.context_tokens == context
        for seconds in each.times_s(COMPUTE_ONLY)
    ]
