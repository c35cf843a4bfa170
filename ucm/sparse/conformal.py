"""Conformal selection: reads the blocks that keep the unread mass below a limit, nearly always.

A summary estimates a block's attention mass, and it errs. How far is learnt from *audits*, steps
that read everything. The mass of what is always read (sink, recent window) is no estimate: its keys
are at hand. With blocks in the order of their estimated mass, k of them read, and

    odds_h(k)   log( limit / (1 - limit) * Z_read / Z_unread ) of head h, Z_read with what is always
                read, the rest of both estimated

head h keeps to the limit by the estimate while log m_h <= odds_h(k) for a multiplier m_h of the
unread mass. k*_h is where it does so in truth. From audits of all texts, per layer:

    score_h     odds_h(k*_h - 1): any larger multiplier would have read enough
    m_h         the (1 - level) quantile of head h's scores, with the finite sample's correction
    level       one a layer: the largest at which a head is violated in at most `delta` of audits

A layer reads one set of blocks, the largest that any head asks for; that is why `level` may be far
above `delta`. It is chosen by conformal risk control, (n V + 1) / (n + 1) <= delta for the mean
violation V over n audits, which bounds the expected share of violations if audits and later steps
are exchangeable. Texts differ, so a sequence has a `Drift`, which its own audits move:

    shift       added to log m_h of all heads and layers; 0 at first, never below 0
    an audited step adds      rate * (violated share of the heads of all layers - delta)

Whatever the text does, T audited steps of a sequence have a mean violation of at most
delta + shift_T / (rate * T), and the shift is bounded: where it is large all is read, and nothing
violated. All layers move one shift, as one step of one layer says next to nothing of a share of
1 %. The first steps of a sequence are audits, as nothing else is known of its text.

Until there are enough audits (1 / delta of them) everything is read, which makes those steps
audits. The promise is about the share of unread softmax mass (total variation), on average over
layers, steps and heads; it is statistical. For a bound that always holds see `certificates`.

Sources: split conformal quantile, Vovk et al., "Algorithmic learning in a random world"; conformal
risk control (arXiv 2208.02814); tracking under drift: adaptive conformal inference, Gibbs and
Candes (arXiv 2106.00170), on the threshold rather than the level, "Conformal PID control for time
series prediction" (arXiv 2307.16895).

Envelope: a selection is a dozen numpy calls on H x n numbers, about 100 us for 128 blocks; an audit
sorts H columns of `capacity` scores some 10 times, about 2 ms.

Shapes: Q queries, H query heads, n candidate blocks, A audits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ucm.errors import InvalidArgumentError
from ucm.kernels.block_scores import shared_mass

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConformalOptions:
    """What is promised, and how it is learnt."""

    delta: float = 0.01
    """Share of (step, head)s that may exceed the limit."""
    tail_mass: float = 0.1
    """The limit: softmax mass of a head that a step does not read."""
    audit_stride: int = 16
    """One step in so many reads everything and is learnt from; fewer audits follow a text that
    is unlike those before too slowly."""
    opening_audits: int = 8
    """First steps of a sequence that are audits, so that the text shows at once whether it is like
    those before: a point more reads over 256 steps; of a text that is unlike them half the
    violations over the first 96."""
    capacity: int = 1024
    """Audits a layer remembers: the newest."""
    rate: float = 6.0
    """How far an audited step whose heads all miss raises the shift of its sequence, in nats; 0
    trusts that texts are alike, much more than this reads too much after each surprise."""

    def __post_init__(self) -> None:
        """Refuse what promises nothing."""
        if not (0.0 < self.delta < 1.0 and 0.0 < self.tail_mass < 1.0):
            raise InvalidArgumentError(
                f"delta {self.delta} and tail_mass {self.tail_mass} must lie between 0 and 1"
            )
        if self.audit_stride < 1 or self.opening_audits < 0 or not self.rate >= 0.0:
            raise InvalidArgumentError(
                f"audit_stride {self.audit_stride} must be >= 1, opening_audits "
                f"{self.opening_audits} and rate {self.rate} >= 0"
            )
        if self.capacity < self.min_audits:
            raise InvalidArgumentError(
                f"delta {self.delta} needs {self.min_audits} audits, capacity is {self.capacity}"
            )

    @property
    def min_audits(self) -> int:
        """Audits without which nothing can be promised."""
        return int(np.ceil(1.0 / self.delta)) - 1


@dataclass(slots=True)
class ConformalStats:
    """What the audits of one layer have shown."""

    audits: int = 0
    """Of selections, so those of the warm-up do not count."""
    violations: float = 0.0
    """Sum over audits of the share of heads beyond the limit."""

    @property
    def violation_rate(self) -> float:
        """Share of audited (step, head)s beyond the limit; 0.0 without audits."""
        return self.violations / self.audits if self.audits else 0.0


@dataclass(slots=True)
class Drift:
    """How much less may be left out of one sequence than audits of all texts say."""

    options: ConformalOptions
    shift: float = 0.0
    """Added to the logarithm of all multipliers; never negative."""

    def observe(self, missed_Q: F64, num_layers: int) -> None:
        """Correct for what audits of one of `num_layers` missed; see `TailCalibrator.audit`."""
        excess = float((missed_Q - self.options.delta).sum()) / num_layers
        self.shift = max(0.0, self.shift + self.options.rate * excess)


@dataclass(frozen=True, slots=True)
class _Ranking:
    """Blocks in the order in which they would be read, and what the estimates say on the way."""

    order: NDArray[np.int64]
    """[Q, n] those that must be read first."""
    first: int
    """How many must be read."""
    log_odds: F64
    """[Q, H, n + 1 - first]: with the first `first + i` blocks read; inf at the end."""


@dataclass(slots=True)
class TailCalibrator:
    """One layer's selection and what it learns. Of one thread."""

    options: ConformalOptions
    num_heads: int
    stats: ConformalStats = field(init=False)
    _tables: F32 = field(init=False)
    """[A, H, H]: [a, h, g] is odds_g(k*_h - 1), -inf where k*_h is 0."""
    _next: int = 0
    _multipliers: F64 | None = None
    """[H] logarithms; None: not known yet."""

    def __post_init__(self) -> None:
        """Start without any knowledge."""
        self.stats = ConformalStats()
        self._tables = np.zeros((0, self.num_heads, self.num_heads), np.float32)

    @property
    def is_ready(self) -> bool:
        """Whether a selection may leave anything out."""
        return self._multipliers is not None

    @property
    def num_scores(self) -> int:
        """Audits that are remembered."""
        return len(self._tables)

    def select(self, log_mass_QHN: F32, must_N: Bools, known_QH: F32, shift: float = 0.0) -> Bools:
        """The blocks to read.

        Args:
            log_mass_QHN: [Q, H, n] estimated logarithm of each candidate's mass (-inf: unknown,
                which only blocks of `must_N` may be).
            must_N: [n] candidates that are read anyway.
            known_QH: [Q, H] the true logarithm of the mass of all that is always read besides.
            shift: of the sequence; see `Drift`.

        Returns:
            [n]; all blocks while nothing is known.

        Raises:
            InvalidArgumentError: shapes that do not fit, or a number that is none.
        """
        self._check(log_mass_QHN, must_N, known_QH)
        chosen = np.array(must_N, copy=True)
        if self._multipliers is None:
            chosen[:] = True
            return chosen
        ranking = _rank(log_mass_QHN, must_N, known_QH, self.options.tail_mass)
        for order, count in zip(ranking.order, self._counts(ranking, shift), strict=True):
            chosen[order[:count]] = True
        return chosen

    def audit(
        self,
        log_mass_QHN: F32,
        must_N: Bools,
        known_QH: F32,
        true_QHN: F32,
        shift: float = 0.0,
    ) -> F64:
        """Learn from steps that read everything.

        Args:
            log_mass_QHN: as for `select`.
            must_N: as for `select`.
            known_QH: as for `select`.
            true_QHN: [Q, H, n] the true logarithm of each candidate's mass.
            shift: as for `select`.

        Returns:
            [Q] share of heads that would have been left beyond the limit; zeros where everything
            would have been read.

        Raises:
            InvalidArgumentError: shapes that do not fit, or a number that is none.
        """
        self._check(log_mass_QHN, must_N, known_QH)
        if true_QHN.shape != log_mass_QHN.shape:
            raise InvalidArgumentError(
                f"true masses {true_QHN.shape} of estimates {log_mass_QHN.shape}"
            )
        if np.isnan(true_QHN).any():
            raise InvalidArgumentError("a true mass is not a number: such a step shows nothing")
        limit = self.options.tail_mass
        ranking = _rank(log_mass_QHN, must_N, known_QH, limit)
        enough = _enough(ranking, true_QHN, known_QH, limit)
        missed = np.zeros(len(log_mass_QHN))
        if self._multipliers is not None:
            counts = np.array(self._counts(ranking, shift)) - ranking.first
            missed = (counts[:, None] < enough).mean(1)
            self.stats.audits += len(missed)
            self.stats.violations += float(missed.sum())
        self._remember(ranking, enough)
        self._recalibrate()
        return missed

    def _counts(self, ranking: _Ranking, shift: float) -> list[int]:
        """Blocks that each query's heads ask for."""
        assert self._multipliers is not None
        limits = self._multipliers + shift
        wanted = (ranking.log_odds < limits[:, None]).sum(-1).max(-1)
        return [ranking.first + int(count) for count in wanted]

    def _remember(self, ranking: _Ranking, enough_QH: NDArray[np.int64]) -> None:
        """Keep what the multipliers would have had to be; the newest replace the oldest."""
        rows = np.maximum(enough_QH - 1, 0)
        at = np.take_along_axis(ranking.log_odds[:, None], rows[:, :, None, None], -1)[..., 0]
        new = np.where(enough_QH[:, :, None] > 0, at, -np.inf).astype(np.float32)
        room = self.options.capacity - len(self._tables)
        self._tables = np.concatenate([self._tables, new[: max(0, room)]])
        for row in new[max(0, room) :]:
            self._tables[self._next] = row
            self._next = (self._next + 1) % self.options.capacity

    def _recalibrate(self) -> None:
        """The least multipliers that keep the remembered audits within `delta`."""
        num, delta = len(self._tables), self.options.delta
        if num < self.options.min_audits:
            return
        scores = np.sort(np.einsum("ahh->ah", self._tables), axis=0)
        # The violated share falls as the rank rises: find the least rank that will do.
        low, high = 0, num - 1
        while low < high:
            rank = (low + high) // 2
            missed = (self._tables > scores[rank]).all(-1).mean()
            low, high = (low, rank) if num * missed + 1.0 <= (num + 1) * delta else (rank + 1, high)
        # Strictly above the score: the limit holds from there on.
        self._multipliers = np.nextafter(scores[low], np.float32(np.inf)).astype(np.float64)

    def _check(self, log_mass: F32, must: Bools, known: F32) -> None:
        if log_mass.ndim != 3 or log_mass.shape[1] != self.num_heads:
            raise InvalidArgumentError(
                f"estimates of shape {log_mass.shape}, this layer has {self.num_heads} heads"
            )
        if must.shape != log_mass.shape[2:] or known.shape != log_mass.shape[:2]:
            raise InvalidArgumentError(
                f"marks {must.shape} and known masses {known.shape} of estimates {log_mass.shape}"
            )
        if not np.isfinite(log_mass[:, :, ~must]).all():
            raise InvalidArgumentError("an estimate is not finite, and its block is no must")
        if np.isnan(known).any() or (known == np.inf).any():
            raise InvalidArgumentError("the mass of what is always read is not a number")


def _rank(log_mass_QHN: F32, must_N: Bools, known_QH: F32, limit: float) -> _Ranking:
    # A head that looks at what is always read has little to say of the order.
    rows = np.concatenate([log_mass_QHN, known_QH[..., None]], axis=-1)
    shared = np.stack([shared_mass(row[None])[:-1] for row in rows])
    order = np.argsort(np.where(must_N, -np.inf, -shared), axis=1, kind="stable")
    first = int(must_N.sum())
    read, unread = _split_sums(log_mass_QHN, order, first, known_QH)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_odds = np.log(limit / (1.0 - limit)) + np.log(read) - np.log(unread)
    # Nothing unread keeps to any limit, and so does nothing at all.
    log_odds = np.where(np.isnan(log_odds) | (unread == 0.0), np.inf, log_odds)
    # What is read only grows: without this, rounding could make the odds fall.
    return _Ranking(order, first, np.maximum.accumulate(log_odds, axis=-1))


def _enough(ranking: _Ranking, true: F32, known: F32, limit: float) -> NDArray[np.int64]:
    """[Q, H]: how many blocks beyond those of must keep the head to the limit in truth."""
    read, unread = _split_sums(true, ranking.order, ranking.first, known)
    counts: NDArray[np.int64] = (unread > limit * (read + unread)).sum(-1)
    return counts


def _split_sums(log_mass: F32, order: NDArray[np.int64], first: int, known: F32) -> tuple[F64, F64]:
    """Read and unread mass with the first `first + i` blocks read, relative to the largest.

    Returns:
        Two of [Q, H, n + 1 - first].
    """
    logs = np.take_along_axis(log_mass.astype(np.float64), order[:, None], -1)
    base = np.maximum(logs.max(-1, initial=-np.inf, keepdims=True), known[..., None])
    base = np.where(np.isfinite(base), base, 0.0)
    masses = np.exp(logs - base)
    none = np.zeros((*masses.shape[:2], 1))
    after = np.concatenate(
        [none, masses[..., : first - 1 : -1] if first else masses[..., ::-1]], -1
    )
    unread = after.cumsum(-1)[..., ::-1]
    always = masses[..., :first].sum(-1, keepdims=True) + np.exp(known[..., None] - base)
    read = always + np.concatenate([none, masses[..., first:].cumsum(-1)], -1)
    return read, unread
