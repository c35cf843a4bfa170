"""Credit: how much of a thing may be in service at once; what would pass it is refused at once.

A refused call has cost nothing, changed nothing, and says when to come again. Nobody queues here:
a queue in front of a full service only makes every answer late. After H. T. Kung and R. Morris,
"Credit-Based Flow Control for ATM Networks", IEEE Network 9(2), 1995.

Who gets what, of the `service.rpc_threads` that answer calls (`ThreadShares`):

    half      loads that wait for the disk, and flushes
    quarter   stores that copy into the arena
    quarter   selections
    the rest  answers at once: lookups, loads from memory, what gives something back

Loads have priority over stores: `Pacer` leaves stores a share of the time while loads go on.

Thread-safe; never blocks.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from .errors import CapacityError


@dataclass(frozen=True, slots=True)
class ThreadShares:
    """How many of the threads that answer calls each kind of slow call may hold."""

    waiting: int
    copying: int
    selecting: int

    @classmethod
    def of(cls, num_threads: int) -> ThreadShares:
        """The shares of `num_threads`; at least one thread each."""
        quarter = max(1, num_threads // 4)
        return cls(waiting=max(1, num_threads // 2), copying=quarter, selecting=quarter)


class Credit:
    """A limit for each owner."""

    def __init__(self, limit: int, refusal: str, *, retry_after_s: float) -> None:
        """Nothing is taken yet.

        Args:
            limit: calls, bytes or whatever is counted, for each owner.
            refusal: what a refused caller is told; `{limit}` is replaced.
            retry_after_s: when it may come again.
        """
        self._limit = limit
        self._refusal = refusal.format(limit=limit)
        self._retry_after_s = retry_after_s
        self._lock = threading.Lock()
        self._used: Counter[Hashable] = Counter()

    def used(self, owner: Hashable = None) -> int:
        """What the owner has taken and not given back."""
        with self._lock:
            return self._used[owner]

    def left(self, owner: Hashable = None) -> int:
        """What the owner may still take."""
        with self._lock:
            return max(0, self._limit - self._used[owner])

    def take(self, owner: Hashable = None, amount: int = 1) -> None:
        """Take some.

        Raises:
            CapacityError: it would pass the limit.
        """
        with self._lock:
            if self._used[owner] + amount > self._limit:
                raise CapacityError(self._refusal, retry_after_s=self._retry_after_s)
            self._used[owner] += amount

    def charge(self, owner: Hashable, amount: int) -> None:
        """Take some without a look at the limit: the caller has looked at `left`."""
        with self._lock:
            self._used[owner] += amount

    def give_back(self, owner: Hashable = None, amount: int = 1) -> None:
        """Undo `take` or `charge`."""
        with self._lock:
            assert self._used[owner] >= amount, owner
            self._used[owner] -= amount
            if not self._used[owner]:
                del self._used[owner]

    @contextlib.contextmanager
    def taken(self, owner: Hashable = None) -> Iterator[None]:
        """`take` one for the length of a `with` block."""
        self.take(owner)
        try:
            yield
        finally:
            self.give_back(owner)


class Pacer:
    """Lets work through for a share of the time while something more urgent goes on.

    Decides by the times it is given, in seconds of one clock. Thread-safe.
    """

    def __init__(self, share: float, quiet_s: float, longest_rest_s: float) -> None:
        """Nothing urgent goes on yet.

        Args:
            share: of the time, above 0, that the work may take while it is not quiet.
            quiet_s: nothing urgent for so long means that the work may take all of it.
            longest_rest_s: work of any size begins again by then: who brings it has a deadline.
        """
        self._rest = 1.0 / share - 1.0
        self._quiet_s = quiet_s
        self._longest_rest_s = longest_rest_s
        self._lock = threading.Lock()
        self._urgent_at_s = float("-inf")
        self._next_at_s = float("-inf")

    def note_urgent(self, now_s: float) -> None:
        """Something urgent begins or ends."""
        with self._lock:
            self._urgent_at_s = now_s

    def check(self, now_s: float) -> None:
        """Pass when the work may begin now.

        Raises:
            CapacityError: it rests, with the time until it may.
        """
        with self._lock:
            left_s = self._next_at_s - now_s
            if left_s > 0 and now_s - self._urgent_at_s < self._quiet_s:
                raise CapacityError(
                    "loads go first; the lease stays, complete it again", retry_after_s=left_s
                )

    def note_done(self, started_s: float, now_s: float) -> None:
        """A piece of the work has ended: it rests in proportion."""
        with self._lock:
            rested_s = max(self._next_at_s, now_s) + (now_s - started_s) * self._rest
            self._next_at_s = min(rested_s, now_s + self._longest_rest_s)
