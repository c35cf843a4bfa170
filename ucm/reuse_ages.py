"""How soon blocks come back, learned by counting: what a place in the tier earns, by uses and age.

    group   blocks of 0 (found on disk: worth nothing until used), 1, 2, 3 to 4, and more uses
    bin     age at reuse: below 0.25 s, then two to an octave; two days and more are one bin

Of a block that was last used `age` ago, the *index* is the most that keeping it can earn a second:

    index(group, age) = max over T > age of
        P(used again before T | not before age) / E[seconds until then or T | not before age]

That is Gittins' index (Gittins, "Bandit processes and dynamic allocation indices", J. R. Stat. Soc.
B 41, 1979) of a block as a bandit that pays one when it is used. Hit density (Beckmann, Chen and
Cidon, "LHD: improving cache hit rate by maximizing hit density", NSDI 2018) is that ratio with T as
the cache happens to evict. The maximum matters in a small tier: a chat waits a minute for its next
turn, and a policy that looks at the chance of the next second never keeps one that long.

Counts fade, so that the index follows the work; before there are any it comes from a prior that
falls hyperbolically with age and weighs as much as 50 uses.

Envelope: 3 KiB; noting is O(1), and a refresh, every 4,000 uses, O(groups * bins^2).
Pure: never locks, logs, sleeps or reads a clock.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_USES: Final = 7
"""Uses are counted this far: a conversation of fifty turns is hardly likelier to have another than
one of ten, and the count fits three bits."""

_GROUPS: Final = np.array([0, 1, 2, 3, 3, 4, 4, 4], np.uint8)
"""Group by uses, 0 to `MAX_USES`."""
_NUM_GROUPS = 5
_UNUSED = 0
_NUM_BINS = 40
_FIRST_BIN_US = 250_000
_LIMITS_US: Final = _FIRST_BIN_US * 2.0 ** (np.arange(_NUM_BINS) / 2)
"""Upper limits of the bins; ages beyond the last count as its."""
_INNER_LIMITS_US: Final = _LIMITS_US[:-1].tolist()

_REFRESH_USES = 4000
_FADING = 0.98
"""Of the counts, at each refresh: the last 200,000 uses or so are what is known."""

_PRIOR_USES = 50.0
_PRIOR_CHANCES = np.array([[0.0], [0.35], [0.55], [0.65], [0.8]])
"""That a block of each group is ever used again. In public chat traces, and in ones made by chance,
it is 0.3 to 0.6 after one use and 0.9 after many."""
_PRIOR_MEDIAN_US = 120e6
"""Half of the reuse comes sooner: two minutes of thinking and typing."""


class ReuseAges:
    """Counts of uses and of the ages at which the next one came."""

    def __init__(self) -> None:
        self._uses = array("d", bytes(8 * _NUM_GROUPS))
        self._reuses = array("d", bytes(8 * _NUM_GROUPS * _NUM_BINS))
        self._num_new = 0
        self._index: Any = _index_of(*_prior())
        self._index_rows: list[list[float]] = self._index.tolist()

    def note_use(self, uses: int, count: int = 1) -> None:
        """`count` blocks have been used for the time `uses`, and wait to be used again."""
        self._uses[_GROUPS_BY_USES[uses]] += count
        self._num_new += count
        if self._num_new >= _REFRESH_USES:
            self.refresh()

    def note_reuse(self, uses: int, age_us: int, count: int = 1) -> None:
        """`count` blocks that had been used `uses` times were used again after `age_us`."""
        place = _GROUPS_BY_USES[uses] * _NUM_BINS + bisect_right(_INNER_LIMITS_US, age_us)
        self._reuses[place] += count

    def note_reuses(self, uses: NDArray[np.uint8], ages_us: NDArray[np.int64]) -> None:
        """`note_reuse` of many blocks, and `note_use` of each one's next use.

        Args:
            uses: [n] before the new use, each from 0 to `MAX_USES`.
            ages_us: [n].
        """
        places = _GROUPS[uses] * np.intp(_NUM_BINS) + _bins(ages_us)
        counts = np.bincount(places, minlength=len(self._reuses))
        np.frombuffer(self._reuses)[:] += counts
        following = _GROUPS[np.minimum(uses + 1, MAX_USES)]
        np.frombuffer(self._uses)[:] += np.bincount(following, minlength=_NUM_GROUPS)
        self._num_new += len(uses)
        if self._num_new >= _REFRESH_USES:
            self.refresh()

    def index(self, uses: NDArray[np.uint8], ages_us: NDArray[np.int64]) -> NDArray[np.float64]:
        """Most reuses a second that keeping each block can earn, as of the last refresh.

        Args:
            uses: [n], each from 0 to `MAX_USES`.
            ages_us: [n], microseconds since the last use.
        """
        result: NDArray[np.float64] = self._index[_GROUPS[uses], _bins(ages_us)]
        return result

    def index_of(self, uses: int, age_us: int) -> float:
        """`index` of one block."""
        return self._index_rows[_GROUPS_BY_USES[uses]][bisect_right(_INNER_LIMITS_US, age_us)]

    def refresh(self) -> None:
        """Learn from what was noted, and let it fade."""
        prior_uses, prior_reuses = _prior()
        uses, reuses = np.frombuffer(self._uses), np.frombuffer(self._reuses)
        self._index = _index_of(
            uses + prior_uses, reuses.reshape(_NUM_GROUPS, _NUM_BINS) + prior_reuses
        )
        self._index_rows = self._index.tolist()
        uses *= _FADING
        reuses *= _FADING
        self._num_new = 0


_GROUPS_BY_USES: Final[list[int]] = _GROUPS.tolist()


def _bins(ages_us: NDArray[np.int64]) -> NDArray[np.intp]:
    """Bin of each age."""
    return np.searchsorted(_LIMITS_US[:-1], ages_us, side="right")


def _prior() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Uses [groups] and reuses [groups, bins] to begin with: P(age < a) = chance * a / (a + m)."""
    below = np.concatenate(([0.0], _LIMITS_US / (_LIMITS_US + _PRIOR_MEDIAN_US)))
    uses = np.full(_NUM_GROUPS, _PRIOR_USES)
    return uses, _PRIOR_USES * _PRIOR_CHANCES * np.diff(below)


def _index_of(uses: NDArray[np.float64], reuses: NDArray[np.float64]) -> NDArray[np.float64]:
    """The index by group and bin; see the module.

    Args:
        uses: [groups], above 0.
        reuses: [groups, bins]; a group's sum is at most its uses, up to fading.
    """
    widths_s = np.diff(_LIMITS_US, prepend=0.0) / 1e6
    chance = reuses / uses[:, None]
    used = np.cumsum(chance, axis=1)
    waiting = np.maximum(1.0 - used, 0.0) + chance / 2  # at the middle of each bin
    kept_s = np.cumsum(np.maximum(waiting, 1e-9) * widths_s, axis=1)
    # [groups, first bin kept, last bin kept]
    gained = used[:, None, :] - (used - chance)[:, :, None]
    spent_s = kept_s[:, None, :] - (kept_s - np.maximum(waiting, 1e-9) * widths_s)[:, :, None]
    possible = np.triu(np.ones((_NUM_BINS, _NUM_BINS), bool))
    rates = np.where(possible, gained / np.where(possible, spent_s, 1.0), 0.0)
    best: NDArray[np.float64] = rates.max(axis=2)
    best[_UNUSED] = 0.0
    return best
