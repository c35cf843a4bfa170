"""`BlocksAhead`: what the next layer will probably read, from its predicted queries.

    before layer l attends     the model predicts q of layer l + 1     `QueriesAhead`
                               -> blocks to fetch meanwhile            `BlocksAhead.expect`
    when layer l + 1 chooses   hits and misses are counted             `BlocksAhead.check`

Source: InfiniGen (arXiv 2406.19707).

Envelope: what a fresh selection costs, once more a layer; nothing where nobody asks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .protocols import BlockIndexes, Selection
from .selector import SequenceSelector

Expect = Callable[[int, BlockIndexes], None]
"""(layer, logical blocks that it will probably read)."""


@dataclass(slots=True)
class AheadStats:
    """How good the predictions were."""

    expected: int = 0
    """Blocks that were predicted."""
    chosen: int = 0
    """Blocks that were then chosen, of layers with a prediction."""
    hits: int = 0
    """Blocks that were both."""

    @property
    def recall(self) -> float:
        """Share of the chosen blocks that had been predicted; 0 before the first."""
        return self.hits / self.chosen if self.chosen else 0.0


class BlocksAhead:
    """A `QueriesAhead` of one decode step; see the module."""

    def __init__(
        self, selector: SequenceSelector, stats: AheadStats, expect: Expect | None = None
    ) -> None:
        """Predict the selections of one step.

        Args:
            selector: of the sequence; its step has begun.
            stats: counted into.
            expect: told each prediction as it is made.
        """
        self._selector = selector
        self._stats = stats
        self._expect = expect
        self._expected: dict[int, set[int]] = {}

    def __call__(self, layer: int, q_THD: Tensor, /) -> None:
        """See `QueriesAhead`."""
        blocks = self._selector.predict(layer, q_THD).blocks
        self._expected[layer] = set(blocks.tolist())
        self._stats.expected += len(blocks)
        if self._expect is not None:
            self._expect(layer, blocks)

    def check(self, layer: int, selection: Selection) -> None:
        """Count what became of the prediction for a layer, if there was one."""
        expected = self._expected.pop(layer, None)
        if expected is not None:
            self._stats.chosen += len(selection.blocks)
            self._stats.hits += len(expected.intersection(selection.blocks.tolist()))
